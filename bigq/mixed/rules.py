"""The rules of a job that give chosen bits to groups of Linears. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from bigq.io.formats.fused import FUSED
from bigq.mixed.groups import Group
from bigq.scheme import MAX_PATTERN, Rule

#: Characters of a pattern's part that lists blocks.
_LISTED = MAX_PATTERN // 2


def rules_of(groups: Sequence[Group], chosen: Mapping[str, int], blocks_path: str) -> tuple[Rule, ...]:
    """Rules for all groups whose bits were chosen, by rising bits. chosen: bits by the group's name.

    A pattern also matches the name of the fused Linear, by which some readers look it up, and ends where the name does.
    """
    found: dict[tuple[int, str], list[str]] = {}
    for group in groups:
        if group.name in chosen:
            block, inside = _split(group, blocks_path)
            found.setdefault((chosen[group.name], inside), []).append(block)
    return tuple(
        Rule(f"{re.escape(blocks_path)}\\.{numbers}\\.{inside}", {"bits": bits})
        for (bits, inside), blocks in sorted(found.items(), key=lambda item: item[0][0])
        for numbers in _alternatives(blocks)
    )


def _split(group: Group, blocks_path: str) -> tuple[str, str]:
    """The number of a group's block, and the pattern for what follows it in the names."""
    block, _, inside = group.name.removeprefix(f"{blocks_path}.").partition(".")
    if group.experts:
        return block, f"{re.escape(inside)}(\\.|$)"
    module, dot, last = inside.rpartition(".")
    names = [*FUSED.get(last, ()), last] if len(group.parts) > 1 else [last]
    return block, f"{re.escape(module + dot)}{_either(names)}$"


def _either(names: Sequence[str]) -> str:
    escaped = [re.escape(name) for name in names]
    if len(escaped) == 1:
        return escaped[0]
    if all(name.endswith("_proj") for name in escaped):
        return f"({'|'.join(name.removesuffix('_proj') for name in escaped)})_proj"
    return f"({'|'.join(escaped)})"


def _alternatives(blocks: Sequence[str]) -> Iterator[str]:
    """Patterns that match the numbers of some blocks each, none too long."""
    taken: list[str] = []
    for block in blocks:
        if taken and len("|".join([*taken, block])) > _LISTED:
            yield _one_of(taken)
            taken = []
        taken.append(block)
    yield _one_of(taken)


def _one_of(blocks: Sequence[str]) -> str:
    return blocks[0] if len(blocks) == 1 else f"({'|'.join(blocks)})"
