"""The arithmetic that quantizing a block needs, from its shapes. Benchmarks compute their rates from it.

It counts what the method needs, not what a program executes: replaying a block twice, or computing both halves of a symmetric
matrix, does not increase a rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linears that share an input. inputs: n. outputs: m of each Linear."""

    inputs: int
    outputs: tuple[int, ...]


def groups_of(weights: Mapping[str, tuple[int, ...]], groups: Sequence[Sequence[str]]) -> list[Group]:
    """The groups of a block from the shapes of its parameters. ``groups`` names Linears by the last part of their names."""
    shapes = {name.split(".")[-2]: shape for name, shape in weights.items() if name.endswith(".weight") and len(shape) == 2}
    if set(shapes) != {name for group in groups for name in group}:
        raise ValueError(f"the groups {groups} do not match the Linears {sorted(shapes)}")
    return [Group(inputs=shapes[names[0]][1], outputs=tuple(shapes[name][0] for name in names)) for names in groups]


def block_flops(groups: Sequence[Group], hidden: int, rows: int, seqlen: int) -> dict[str, float]:
    """Floating-point operations of one block, by the phase that does them, for rows × seqlen calibration tokens.

    replay: one forward: 2·m·n per token and Linear, and causal attention's two products, 2·seqlen·hidden per token.
    hessian: n² per token and group, XᵀX being symmetric. factor: n³/3 per group. solve: m·n² per Linear.
    """
    tokens = float(rows * seqlen)
    return {
        "replay": tokens * (sum(2.0 * m * g.inputs for g in groups for m in g.outputs) + 2.0 * seqlen * hidden),
        "hessian": sum(tokens * g.inputs**2 for g in groups),
        "factor": sum(g.inputs**3 / 3 for g in groups),
        "solve": sum(float(m) * g.inputs**2 for g in groups for m in g.outputs),
    }
