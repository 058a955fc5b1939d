"""Linears that readers load as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bigq.io.formats.base import bank_of

#: Linears that vLLM 0.32 loads as one, by the name of the one (``packed_modules_mapping`` of its model classes). Parts of one that
#: differ in bits, group size or symmetry end in an AssertionError, or load with the first part's scheme for all of them.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLinear:
    """Linears of one module, or matrices of all experts of a bank, that a reader loads as one.

    name: of the fused Linear or the bank; parts: full names of the Linears or matrices. experts: whether it is a bank.
    """

    name: str
    parts: tuple[str, ...]
    experts: bool = False

    @property
    def last_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.rpartition(".")[2] for part in self.parts))

    @property
    def said(self) -> str:
        """The parts in a message."""
        *others, last = self.last_names
        named = f"{', '.join(others)} and {last}" if others else last
        return f"{named} of all experts of a layer" if self.experts else named


def fused_linears(names: Iterable[str]) -> tuple[FusedLinear, ...]:
    """The fused Linears among ``names``: at least two parts in one module, which share their input. Then banks of experts."""
    whole_of = {part: whole for whole, parts in FUSED.items() for part in parts}
    found: dict[tuple[str, str], list[str]] = {}
    banks: dict[str, list[str]] = {}
    for name in names:
        module, _, last = name.rpartition(".")
        if (bank := bank_of(name)) is not None:
            banks.setdefault(bank, []).append(name)
        elif last in whole_of:
            found.setdefault((module, whole_of[last]), []).append(name)
    linears = (
        FusedLinear(name=f"{module}.{whole}" if module else whole, parts=tuple(parts))
        for (module, whole), parts in found.items()
        if len(parts) > 1
    )
    return (*linears, *(FusedLinear(name=bank, parts=tuple(parts), experts=True) for bank, parts in banks.items()))
