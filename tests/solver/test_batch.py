"""Several weights of one shape, each with its own Hessian: the bits of single ones, and failures that stay where they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels import cholesky
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.batch import Factors, HessianSums
from bigq.solver.gptq import PANEL, column_order, solve, solve_many
from bigq.solver.hessian import ACTIVATION, Factor, HessianSum, factorize
from bigq.vocabulary import ORDERS, OrderName

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")

CPU = torch.device("cpu")
NAMES = ("first", "second", "third", "fourth")


def inputs(n: int, seed: int, tokens: int | None = None) -> Tensor:
    """Correlated inputs of one size or another."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=gen) / n**0.5
    return (1 + seed) * torch.randn(2 * n if tokens is None else tokens, n, generator=gen) @ mix


def weights(m: int, n: int, seed: int) -> list[Tensor]:
    """Two weights that share an input, as gate and up do."""
    gen = torch.Generator().manual_seed(100 + seed)
    return [0.02 * torch.randn(rows, n, generator=gen) for rows in (m, m + 3)]


def alone(x: Tensor, scheme: QuantScheme, name: str = "alone") -> Factor:
    total = HessianSum(x.shape[1], CPU)
    total.add(x)
    return factorize(total.finish(name), order=column_order(scheme, x.shape[1]), damping=scheme.damping, name=name)


def together(xs: list[Tensor], scheme: QuantScheme) -> tuple[Factors | None, list[NumericsError | None]]:
    sums = HessianSums.zeros(len(xs), xs[0].shape[1], CPU)
    for one, x in zip(sums.each, xs, strict=True):
        if len(x):
            one.add(x)
    return sums.factorize(order=column_order(scheme, xs[0].shape[1]), damping=scheme.damping, names=NAMES[: len(xs)])


def same_result(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    tensors = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("codes", "scales", "zeros"))
    return tensors and all(getattr(one, name) == getattr(other, name) for name in ("loss", "energy", "damping", "dead_inputs", "scheme"))


SCHEMES: dict[str, dict[str, Any]] = {
    "groups": {"group_size": 32},
    "act-order": {"group_size": 32, "order": "activation"},
    "whole rows": {"group_size": -1},
    "groups wider than a block": {"group_size": 256},
    "groups of 40": {"group_size": 40},
    "grid search": {"group_size": 64, "scales": "search"},
    "wide grid search": {"group_size": 256, "scales": "search"},
    "2 bits, asymmetric": {"group_size": 32, "bits": 2, "symmetric": False},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_results_have_the_bits_of_single_weights(scheme: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In panels, blocks and sub-blocks; codes, scales, losses and energies."""
    if not compiled:
        monkeypatch.setattr("bigq.kernels.pick.compiler_installed", lambda: False)
    chosen = QuantScheme(**{"order": "natural", **SCHEMES[scheme]})
    n = 1280 if chosen.group_size in (40, 256) else PANEL + 192
    xs, groups = [inputs(n, seed) for seed in range(3)], [weights(20, n, seed) for seed in range(3)]
    expected = [solve(group, alone(x, chosen), chosen) for x, group in zip(xs, groups, strict=True)]
    factors, failures = together(xs, chosen)
    assert factors is not None and failures == [None] * 3
    found = solve_many(groups, factors, chosen, NAMES[:3])
    for ours, single in zip(found, expected, strict=True):
        assert not isinstance(ours, NumericsError)
        assert all(same_result(*pair) for pair in zip(ours, single, strict=True))
    assert not torch.equal(expected[0][0].codes, expected[1][0].codes)


@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("scheme", ["groups", "act-order", "wide grid search", "groups of 40"])
def test_results_of_the_triton_kernels_too(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel gets the whole batch: the factorization takes the path of a GPU. Searches and sweeps take minutes in the interpreter."""
    chosen = QuantScheme(**{"order": "natural", "scales": "minmax", "sweeps": int(scheme == "act-order"), **SCHEMES[scheme]})
    n = 320 if chosen.group_size == 40 else 256
    monkeypatch.setattr(cholesky, "panel_width", lambda on_gpu: 96)
    xs, groups = [inputs(n, seed) for seed in range(2)], [weights(5, n, seed) for seed in range(2)]
    expected = [solve(group, alone(x, chosen), chosen) for x, group in zip(xs, groups, strict=True)]
    whole, batches = cholesky._upper_cholesky_, []

    def at_once(h: Tensor) -> list[bool]:
        batches.append(len(h))
        return [not failed for failed in whole(h).tolist()]

    monkeypatch.setattr("bigq.solver.batch.upper_cholesky_many_", at_once)
    factors, _ = together(xs, chosen)
    assert factors is not None and batches == [2]
    for ours, single in zip(solve_many(groups, factors, chosen, NAMES[:2]), expected, strict=True):
        assert not isinstance(ours, NumericsError)
        assert all(same_result(*pair) for pair in zip(ours, single, strict=True))


BAD = {
    "NaN": lambda x: x.clone().index_fill_(0, torch.tensor([1]), float("nan")),
    "its squares overflow": lambda x: x * 1e30,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("where", [(0,), (1,), (3,), (0, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("what", BAD)
def test_a_hessian_that_fails_drops_out(what: str, where: tuple[int, ...], order: OrderName) -> None:
    """Its message is that of a single one. The factors of the others have the same bits as without it, and are one tensor."""
    scheme = QuantScheme(group_size=8, order=order)
    xs = [inputs(104, seed) for seed in range(4)]
    spoilt = [BAD[what](x) if i in where else x for i, x in enumerate(xs)]
    factors, failures = together(spoilt, scheme)
    assert [i for i, failure in enumerate(failures) if failure is not None] == list(where)
    for i in where:
        with pytest.raises(NumericsError) as caught:
            alone(spoilt[i], scheme, NAMES[i])
        assert str(failures[i]) == str(caught.value)
    left = [i for i in range(4) if i not in where]
    assert (factors is None) == (not left)
    if factors is None:
        return
    assert factors.r.shape == (len(left), 104, 104)
    for i, factor, r in zip(left, factors.each, factors.r, strict=True):
        single = alone(xs[i], scheme)
        assert torch.equal(r.triu(), single.r.triu()) and torch.equal(factor.r, r)
        assert factor.damping == single.damping and factor.dead_inputs == single.dead_inputs
        assert (factor.perm is None) == (order == "natural") and (factor.perm is None or torch.equal(factor.perm, single.perm))


@pytest.mark.parametrize("order", ORDERS)
def test_one_without_tokens_has_dead_inputs_only(order: OrderName) -> None:
    scheme = QuantScheme(group_size=8, order=order)
    xs = [inputs(104, 0), inputs(104, 1)[:0], inputs(104, 2)]
    factors, failures = together(xs, scheme)
    assert factors is not None and failures == [None] * 3
    for x, factor in zip(xs, factors.each, strict=True):
        single = alone(x, scheme)
        assert torch.equal(factor.r.triu(), single.r.triu()) and factor.dead_inputs == single.dead_inputs
    assert factors.each[1].dead_inputs == 104


@pytest.mark.parametrize("fails", ["once", "for good"])
@pytest.mark.parametrize("order", ORDERS)
def test_more_damping_for_one_is_for_that_one(fails: str, order: OrderName, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hessian that is not positive definite is tried again alone, with the result of a single one."""
    scheme = QuantScheme(group_size=40, order=order, damping=1e-9)
    xs = [inputs(200, seed) for seed in range(3)]
    sums = HessianSums.zeros(3, 200, CPU)
    for one, x in zip(sums.each, xs, strict=True):
        one.add(x)
    # Two inputs that are correlated more than fully: the damping that helps is between 0.1 and 1, or above 1.
    excess = 1.3 if fails == "once" else 5.0
    broken = HessianSum(200, CPU)
    broken.add(xs[1])
    for h in (sums._sums[1], broken._sum):
        mean = float(h.diagonal().mean())
        h[3, :] = h[:, 3] = h[7, :] = h[:, 7] = 0
        h[3, 3] = h[7, 7] = mean
        h[3, 7] = excess * mean
    factors, failures = sums.factorize(order=column_order(scheme, 200), damping=1e-9, names=NAMES[:3])
    assert factors is not None
    if fails == "for good":
        with pytest.raises(NumericsError, match="even with damping 1;") as caught:
            factorize(broken.finish("second"), order=column_order(scheme, 200), damping=1e-9, name="second")
        assert str(failures[1]) == str(caught.value) and len(factors.each) == 2
    else:
        single = factorize(broken.finish("second"), order=column_order(scheme, 200), damping=1e-9)
        assert failures == [None] * 3
        assert factors.each[1].damping == single.damping > 0.1
        assert torch.equal(factors.r[1].triu(), single.r.triu())
    for x, factor in ((xs[0], factors.each[0]), (xs[2], factors.each[-1])):
        expected = alone(x, scheme)
        assert torch.equal(factor.r.triu(), expected.r.triu()) and factor.damping == expected.damping == 1e-9


def test_a_weight_that_cannot_be_solved_fails_alone() -> None:
    scheme = QuantScheme(group_size=32, order="natural")
    xs, groups = [inputs(128, seed) for seed in range(3)], [weights(6, 128, seed) for seed in range(3)]
    expected = [solve(group, alone(x, scheme), scheme) for x, group in zip(xs, groups, strict=True)]
    groups[1][1][2, 5] = float("nan")
    factors, _ = together(xs, scheme)
    assert factors is not None
    first, second, third = solve_many(groups, factors, scheme, NAMES[:3])
    with pytest.raises(NumericsError) as caught:
        solve(groups[1], alone(xs[1], scheme), scheme, "second")
    assert str(second) == str(caught.value)
    for ours, single in ((first, expected[0]), (third, expected[2])):
        assert not isinstance(ours, NumericsError) and all(same_result(*pair) for pair in zip(ours, single, strict=True))


def test_fp64_stays_fp64() -> None:
    scheme = QuantScheme(group_size=32, order="activation")
    xs = [inputs(96, seed).double() for seed in range(2)]
    groups = [[w.double() for w in weights(6, 96, seed)] for seed in range(2)]
    singles = [factorize(2 / len(x) * x.T @ x, order=ACTIVATION, damping=0.01) for x in xs]
    factors = Factors(torch.stack([factor.r for factor in singles]), tuple(singles))
    each = tuple(dataclasses.replace(factor, r=r) for factor, r in zip(singles, factors.r, strict=True))
    found = solve_many(groups, Factors(factors.r, each), scheme, NAMES[:2])
    for ours, factor, group in zip(found, singles, groups, strict=True):
        assert not isinstance(ours, NumericsError)
        assert all(same_result(*pair) for pair in zip(ours, solve(group, factor, scheme), strict=True))


def test_sums_are_those_of_single_ones() -> None:
    """Tokens that are not finite are left out of the sum that gets them."""
    xs = [inputs(64, seed, 70) for seed in range(2)]
    xs[1][5, 3] = float("inf")
    sums = HessianSums.zeros(2, 64, CPU, finite_only=True)
    for one, x in zip(sums.each, xs, strict=True):
        single = HessianSum(64, CPU, finite_only=True)
        for part in x.split(30):
            one.add(part)
            single.add(part)
        assert (one.tokens, one.left_out) == (single.tokens, single.left_out)
        assert torch.equal(one._sum, single._sum)
    assert [one.left_out for one in sums.each] == [0, 1]
