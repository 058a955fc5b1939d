"""Scales that are quantized themselves."""

from __future__ import annotations

import torch

from bigq.nested_scales import BLOCK, NestedScales, dynamic_table
from bigq.solver.settling import settled_


def scales(m: int, groups: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(m, groups, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.01


def test_the_table_has_a_decade_for_each_exponent() -> None:
    table = dynamic_table()
    assert len(table) == 256 and bool((table.diff() > 0).all()) and table[-1] == 1 and (table == 0).sum() == 1
    positive = table[(table > 0) & (table < 1)]
    assert torch.equal(-positive.flip(0), table[table < 0])
    assert [int(((positive > 10.0 ** (i - 7)) & (positive < 10.0 ** (i - 6))).sum()) for i in range(7)] == [2**i for i in range(7)]


def test_every_scale_is_the_nearest_that_its_block_can_hold() -> None:
    given = scales(37, 20)
    nested = NestedScales.of(given)
    assert nested.codes.shape == given.shape and len(nested.blocks) == -(-37 * 20 // BLOCK)
    assert nested.offset == float(given.flatten().mean())
    flat, values = (given - nested.offset).flatten(), nested.values()
    for start in range(0, len(flat), BLOCK):
        part = flat[start : start + BLOCK]
        largest = part.abs().max()
        assert nested.blocks[start // BLOCK] == largest
        best = (part[:, None] - dynamic_table() * largest).abs().amin(1)
        assert torch.allclose((part - (values.flatten()[start : start + BLOCK] - nested.offset)).abs(), best, atol=1e-8)
    assert float((values - given).abs().max()) < 0.008 * float(nested.blocks.max())


def test_scales_that_are_all_0_stay_0() -> None:
    nested = NestedScales.of(torch.zeros(3, 4))
    assert nested.offset == 0 and not nested.values().any()


def test_matrices_that_are_solved_together_have_scales_of_their_own() -> None:
    first, second = scales(20, 8), scales(12, 8, seed=1) * 30
    stacked = torch.cat([first, second]).T.contiguous()
    nested = settled_(stacked, [20, 12], "nested")
    for given, each, found in zip((first, second), nested, stacked.split([20, 12], 1), strict=True):
        alone = NestedScales.of(given)
        assert torch.equal(each.codes, alone.codes) and torch.equal(found, alone.values().T)
