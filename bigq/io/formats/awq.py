"""The ``awq`` checkpoint format, version "gemm" of AutoAWQ, as vLLM, transformers with GPTQModel, and AutoAWQ read it.

For a Linear X with K inputs, N outputs and G groups, at 4 bits:

    X.qweight   int32 [K, N/8]    codes of 8 outputs in a word; from the lowest bits on, those of outputs 0 2 4 6 1 3 5 7
    X.qzeros    int32 [G, N/8]    zero points, packed alike and stored unchanged
    X.scales    fp16  [G, N]

The config has one group size for all Linears, and the names of modules that are not packed. A zero point is stored for every group, of
symmetric schemes too, and ``zero_point`` is always true: without it vLLM does not read the zero points, and has no kernel. So whether all
of them are the middle is noted in ``meta``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError, UsageError
from bigq.io.formats.base import Format, Misfit, PackedLinear, PackedWeight, Quantization, bank_of, require_tensor
from bigq.io.formats.fused import fused_linears
from bigq.io.formats.gptq import check_scales, excluded, require_half
from bigq.io.index import TensorInfo
from bigq.io.json_file import show_value
from bigq.kernels.pack import pack, unpack
from bigq.scheme import QuantScheme

BITS = 4
#: Codes in a word, and the output of 8 that each 4 bits of a word belong to, from the lowest bits on.
IN_WORD, ORDER = 8, (0, 2, 4, 6, 1, 3, 5, 7)
#: The place in a word of each output.
_PLACES = tuple(ORDER.index(output) for output in range(IN_WORD))
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
#: Maximum number of names of modules that are not packed, in a config.
MAX_NAMES = 1_000_000


def awq_words(codes: Tensor) -> Tensor:
    """uint8 codes [N, k] below 16 → int32 words [k, N/8]."""
    return pack(_arranged(codes, ORDER), BITS).T.contiguous()


def awq_codes(words: Tensor) -> Tensor:
    """int32 words [k, N/8] → uint8 codes [N, k]; the inverse of ``awq_words``."""
    return _arranged(unpack(words.T.contiguous(), BITS), _PLACES)


def _arranged(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    return codes.reshape(-1, IN_WORD, codes.shape[1])[:, list(order)].reshape(codes.shape)


class Awq(Format):
    """Readers look a module up among the names that are not packed: vLLM finds a name anywhere in the module's, transformers at its end,
    or at its start up to a dot. So no name may be part of a packed Linear's."""

    name = tag = "awq"
    mark = "qweight"
    zeros = "qzeros"
    symmetric_key = "meta.symmetric"
    takes_transposed = False
    bits = (BITS,)
    # vLLM's kernels and GPTQModel's take these; the first is a whole row.
    group_sizes = (-1, 32, 64, 128)
    one_size = True

    def suffixes(self, symmetric: bool) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales")

    def store(self, prefix: str, stored: PackedWeight, scheme: QuantScheme, dtype: torch.dtype) -> dict[str, Tensor]:
        words, scales, zeros = stored
        return {
            f"{prefix}.qweight": awq_words(unpack(words, BITS).T.contiguous()),
            f"{prefix}.qzeros": awq_words(zeros),
            f"{prefix}.scales": require_half(prefix, scales, self.name).T.contiguous(),
        }

    def layout(
        self, prefix: str, linear: PackedLinear, symmetric: bool, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        m, n, groups = linear.outputs, linear.inputs, linear.groups
        return {
            f"{prefix}.qweight": (torch.int32, (n, m // IN_WORD)),
            f"{prefix}.qzeros": (torch.int32, (groups, m // IN_WORD)),
            f"{prefix}.scales": (torch.float16, (groups, m)),
        }

    def read(self, prefix: str, get: Callable[[str], Tensor], scheme: QuantScheme) -> PackedWeight:
        qweight, qzeros, scales = (get(f"{prefix}.{name}") for name in self.suffixes(scheme.symmetric))
        if any(t.ndim != 2 for t in (qweight, qzeros, scales)) or _groups(qweight.shape, qzeros.shape, scales.shape) is None:
            raise CheckpointError(f"{prefix}: the shapes of qweight, qzeros and scales do not match")
        return PackedWeight(pack(awq_codes(qweight).T.contiguous(), BITS), scales.T, awq_codes(qzeros))

    def geometry(self, prefix: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
        qweight, qzeros, scales = (require_tensor(tensors, f"{prefix}.{suffix}") for suffix in self.suffixes(True))
        groups = _groups(qweight.shape, qzeros.shape, scales.shape)
        if groups is None or {qweight.dtype, qzeros.dtype} != {torch.int32} or scales.dtype not in _FLOATS:
            raise CheckpointError(
                f"tensor {qweight.name}: its shape or dtype does not match those of qzeros and scales; the checkpoint is damaged, or its "
                "version of AWQ is not gemm: fetch it again, or one of version gemm"
            )
        n, eighth = qweight.shape
        return PackedLinear(bits=BITS, outputs=eighth * IN_WORD, inputs=n, groups=groups)

    def values_per_check(self, suffix: str, info: TensorInfo) -> int:
        return 1

    def check_values(self, suffix: str, linear: PackedLinear, piece: Tensor, start: int) -> tuple[str | None, tuple[int, int] | None]:
        if suffix == "scales":
            return check_scales(piece), None
        if suffix == "qzeros":
            low, high = (int(extreme) for extreme in torch.aminmax(unpack(piece, BITS)))
            return None, (low, high)
        return None, None

    def config(self, job: Quantization) -> dict[str, Any]:
        sizes = {scheme.group_size for scheme in job.packed.values()} or {job.scheme.group_size}
        if len(sizes) > 1:
            raise ValueError(f"format awq has one group size for all Linears, not {sorted(sizes)}")
        skips: dict[str, dict[str, Any]] = {f"-:{rule.pattern}": {} for rule in job.rules if rule.overrides is None}
        return {
            "quant_method": self.name,
            "version": "gemm",
            "bits": BITS,
            "group_size": sizes.pop(),
            "zero_point": True,
            "lm_head": job.head is not None,
            "modules_to_not_convert": not_converted(job.packed, (*job.others, *job.apart)),
            # GPTQModel does not look at the names above.
            "dynamic": {**excluded(job), **skips},
            "meta": {**job.meta, "symmetric": all(scheme.symmetric for scheme in job.packed.values())},
        }

    def misfit(
        self, m: int, n: int, scheme: QuantScheme, *, transposed: bool = False, joined: bool = False, expert: bool = False
    ) -> Misfit | None:
        found = super().misfit(m, n, scheme, transposed=transposed, joined=joined, expert=expert)
        if found is None and expert and scheme.group_size == -1:
            return Misfit("group_size", "is of experts quantized in whole rows, which readers of awq do not take")
        return found

    def clash(self, packed: Iterable[str], others: Iterable[str]) -> tuple[str, str] | None:
        caught = _Caught(packed)
        return next(((name, by) for name in others if (by := caught.by(_entry(name))) is not None), None)


class _Caught:
    """What readers would take for unpacked. packed: names of the packed Linears; readers look experts up by their bank."""

    def __init__(self, packed: Iterable[str]) -> None:
        names = [*packed]
        looked_up = {bank_of(name) or name for name in names} | {fused.name for fused in fused_linears(names)}
        self._text = "\n".join(("", *sorted(looked_up), ""))

    def by(self, entry: str) -> str | None:
        """A packed name that holds the entry."""
        at = self._text.find(entry)
        return None if at < 0 else self._text[self._text.rindex("\n", 0, at) + 1 : self._text.index("\n", at)]


def _entry(name: str) -> str:
    """The name by which readers look up a module that is not packed."""
    return bank_of(name) or name


def not_converted(packed: Iterable[str], others: Iterable[str]) -> list[str]:
    """The names for ``modules_to_not_convert``: those of modules that are not packed, and paths that hold nothing else.

    One that is part of a packed Linear's name gets a dot at its end, which is right for a path. Where that is part of one too, the name is
    left out (see ``Format.clash``): readers will miss a plain weight, but take no packed Linear for one.
    """
    caught = _Caught(packed)
    entries = dict.fromkeys(map(_entry, others))
    spelled = (next((each for each in (entry, f"{entry}.") if caught.by(each) is None), None) for entry in entries)
    return sorted(each for each in spelled if each is not None)


def _groups(qweight: Iterable[int], qzeros: Iterable[int], scales: Iterable[int]) -> int | None:
    """The number of groups, from the shapes of a Linear's tensors; None if they do not match."""
    shapes = [tuple(shape) for shape in (qweight, qzeros, scales)]
    if any(len(shape) != 2 or not min(shape) for shape in shapes):
        return None
    (n, eighth), groups = shapes[0], shapes[2][0]
    fits = not n % groups and not n % IN_WORD and shapes[1:] == [(groups, eighth), (groups, eighth * IN_WORD)]
    return groups if fits else None


@dataclass(frozen=True, slots=True)
class AwqSchemes:
    """A parsed quantization config; the JSON may come from other programs. base: the scheme of all packed Linears."""

    base: QuantScheme
    format: Format

    @classmethod
    def read(cls, path: Path, config: Mapping[str, Any], format: Format) -> AwqSchemes:
        """Parse the ``quantization_config`` of the config.json at ``path``.

        Raises CheckpointError, and UnsupportedModelError for other versions, bits or ways of packing than those of ``Awq``.
        """
        version, bits = config.get("version", config.get("format", "gemm")), config.get("bits", config.get("w_bit", BITS))
        if str(version).lower() != "gemm" or bits != BITS:
            raise UnsupportedModelError(
                f"{path.parent}: is already quantized (awq, version {show_value(version)}, {show_value(bits)} bits); of awq, bigq reads "
                "version gemm at 4 bits: give such a one, or the original model"
            )
        size, names = config.get("group_size", config.get("q_group_size")), config.get("modules_to_not_convert")
        if type(size) is not int:
            raise _bad(path, f"group_size is {show_value(size)}, not an integer")
        if names is not None and (not isinstance(names, list) or len(names) > MAX_NAMES or not all(isinstance(n, str) for n in names)):
            raise _bad(path, f"modules_to_not_convert is {show_value(names)}, not a list of names")
        zero_point, meta = config.get("zero_point", True), config.get("meta")
        if type(zero_point) is not bool:
            raise _bad(path, f"zero_point is {show_value(zero_point)}, not a boolean")
        noted = meta.get("symmetric") if isinstance(meta, dict) else None
        try:
            base = QuantScheme(bits=BITS, group_size=size, symmetric=noted if isinstance(noted, bool) else not zero_point)
        except UsageError as error:
            raise _bad(path, str(error)) from None
        return cls(base, format)

    def scheme(self, name: str) -> QuantScheme:
        """The scheme of the packed Linear ``name``. Its tensors are the only evidence that it is packed: readers differ in how they find
        names in ``modules_to_not_convert``."""
        return self.base


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: quantization_config: {what}; fetch it again")
