"""The knapsack against trying every combination."""

from __future__ import annotations

import itertools
import random

import pytest

from bigq.mixed import knapsack
from bigq.mixed.knapsack import Item, choose, least_size


def total(groups: list[list[Item]], chosen: list[int]) -> tuple[float, int]:
    items = [group[i] for group, i in zip(groups, chosen, strict=True)]
    return sum(item.loss for item in items), sum(item.size for item in items)


def brute_force(groups: list[list[Item]], capacity: int) -> float:
    """The least loss of all combinations that fit."""
    every = (total(groups, list(chosen)) for chosen in itertools.product(*(range(len(group)) for group in groups)))
    return min(loss for loss, size in every if size <= capacity)


def random_groups(rng: random.Random, largest: int) -> list[list[Item]]:
    """Losses need not fall as sizes grow, nor lie on a convex curve."""
    return [
        [Item(rng.randint(1, largest), rng.choice([rng.random(), 1.0, 0.0])) for _ in range(rng.randint(1, 4))]
        for _ in range(rng.randint(1, 6))
    ]


@pytest.mark.parametrize("seed", range(60))
def test_it_is_exact_where_the_table_holds_every_size(seed: int) -> None:
    rng = random.Random(seed)
    groups = random_groups(rng, 40)
    least, most = least_size(groups), sum(max(item.size for item in group) for group in groups)
    for capacity in {least, rng.randint(least, most), most, most + 7}:
        loss, size = total(groups, choose(groups, capacity))
        assert size <= capacity
        assert loss == pytest.approx(brute_force(groups, capacity), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_sizes_that_the_table_does_not_hold_stay_within_the_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "COLUMNS", 64)
    rng = random.Random(seed)
    groups = [sorted((Item(rng.randint(1, 10**9), rng.random()) for _ in range(3)), key=lambda i: i.size) for _ in range(6)]
    least, most = least_size(groups), sum(max(item.size for item in group) for group in groups)
    capacity = (least + most) // 2
    loss, size = total(groups, choose(groups, capacity))
    best = brute_force(groups, capacity)
    assert size <= capacity
    assert loss <= best + 0.3


def test_the_best_combination_may_lie_inside_the_hull() -> None:
    """A greedy walk along the hull takes the large step of the first group, after which nothing fits."""
    groups = [[Item(0, 10.0), Item(6, 0.0)], [Item(0, 9.0), Item(5, 0.5)], [Item(0, 9.0), Item(5, 0.5)]]
    assert choose(groups, 10) == [0, 1, 1]


def test_without_a_choice_that_fits_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="capacity 2 is below the least size 3"):
        choose([[Item(3, 1.0), Item(4, 0.0)]], 2)


def test_equal_losses_take_the_smaller_size() -> None:
    assert choose([[Item(5, 1.0), Item(3, 1.0)], [Item(2, 0.0), Item(1, 0.0)]], 100) == [1, 1]


def test_the_result_is_the_same_each_time() -> None:
    groups = random_groups(random.Random(3), 1000)
    assert len({tuple(choose(groups, 2 * least_size(groups))) for _ in range(5)}) == 1


def test_as_many_groups_as_the_largest_models_have() -> None:
    rng = random.Random(0)
    groups = [[Item(bits * 1000 * rng.choice([1, 3, 8]), 4.0**-bits * rng.random()) for bits in (2, 3, 4, 8)] for _ in range(1000)]
    least = least_size(groups)
    assert total(groups, choose(groups, 2 * least))[1] <= 2 * least
