"""Solving with other ranks: the same codes as alone, and failures that all of them have."""

from __future__ import annotations

import pytest
import torch
from rank_threads import ThreadRanks, together
from torch import Tensor

from bigq.errors import NumericsError
from bigq.machine.ranks import OneProcess
from bigq.methods.gptq import Gptq, HessianFactor
from bigq.quantized_weight import QuantizedWeight
from bigq.sched.solve.shared import are_dealt, dealt, failing_together, gathered, sharing_of, solve_shared
from bigq.scheme import QuantScheme
from bigq.vocabulary import OrderName

SCHEMES = {
    "sweeps and a search": QuantScheme(bits=4, group_size=32, scales="search"),
    "asymmetric, act-order": QuantScheme(bits=3, group_size=32, symmetric=False, order="activation"),
    "2 bits": QuantScheme(bits=2, group_size=32),
    "scales that are rounded together": QuantScheme(bits=4, group_size=64, points="nf4", scale_form="nested", sweeps=0, scales="minmax"),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_rows_that_ranks_share_have_the_codes_of_all_rows(scheme: QuantScheme) -> None:
    torch.manual_seed(0)
    weights, x = [torch.randn(50, 64), torch.randn(7, 64)], torch.randn(256, 64)

    def solve(ranks: ThreadRanks | OneProcess) -> list[QuantizedWeight]:
        collector = Gptq().collector(64, torch.device("cpu"), finite_only=False)
        collector.add(x)
        factor = collector.finish("the Linear").factor(scheme, "the Linear", last=True)
        return solve_shared(factor, [weight.clone() for weight in weights], scheme, "the Linear", ranks)

    alone = solve(OneProcess())
    for found in together(3, solve):
        assert not isinstance(found, Exception), found
        for one, whole in zip(found, alone, strict=True):
            assert torch.equal(one.codes, whole.codes) and torch.equal(one.scales, whole.scales) and torch.equal(one.zeros, whole.zeros)
            assert one.loss == pytest.approx(whole.loss, rel=1e-5)
            assert one.dequantize().shape == whole.dequantize().shape


# Experts are not stored with nested scales.
WITH_BLOCKS = QuantScheme(bits=8, group_size=128, points="e4m3", scale_form="block", order="natural", sweeps=0)


@pytest.mark.parametrize("scheme", [*list(SCHEMES.values())[:3], WITH_BLOCKS], ids=[*list(SCHEMES)[:3], "scales of blocks"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_experts_that_ranks_are_dealt(count: int, scheme: QuantScheme) -> None:
    """The same results in each rank as alone. The inputs of one are not finite: it fails everywhere, the others do not."""
    torch.manual_seed(0)
    weights, xs = torch.randn(count, 2, 24, 128), torch.randn(count, 256, 128)
    if count == 5:
        xs[3] = torch.nan

    def solve(ranks: ThreadRanks | OneProcess) -> list[list[QuantizedWeight] | NumericsError]:
        collectors, labels = Gptq().collectors(count, 128, torch.device("cpu"), finite_only=False), [f"expert {i}" for i in range(count)]
        for i, collector in enumerate(collectors.each):
            # Each rank sees some of the tokens.
            for token in ranks.rows(len(xs[i])):
                collector.add(xs[i][token])
        mine = dealt(count, scheme, ranks)
        collectors.reduce(ranks, dealt=are_dealt(scheme, ranks))
        found: list[list[QuantizedWeight] | NumericsError] = []
        if mine:
            factors = collectors.only(mine).factor(scheme, [labels[i] for i in mine])
            found = factors.solve([list(weights[i].clone()) for i in mine], scheme, [labels[i] for i in mine])
        return gathered(found, count, scheme, torch.device("cpu"), ranks)

    alone = solve(OneProcess())
    assert len(alone) == count
    first: list[list[QuantizedWeight] | NumericsError] | None = None
    for found in together(3, solve):
        assert not isinstance(found, Exception), found
        first = first or found
        for e, (one, same, whole) in enumerate(zip(found, first, alone, strict=True)):
            if isinstance(whole, NumericsError):
                assert e == 3 and isinstance(one, NumericsError) and str(one) == str(whole)
                continue
            assert e != 3 and not isinstance(one, NumericsError) and not isinstance(same, NumericsError)
            for a, b, c in zip(one, same, whole, strict=True):
                assert torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and torch.equal(a.zeros, b.zeros)
                assert (a.codes == c.codes).float().mean() > 0.98 and a.loss == pytest.approx(c.loss, rel=0.02)
                assert a.scheme == c.scheme and a.damping == c.damping and a.dead_inputs == c.dead_inputs


@pytest.mark.parametrize("tokens", [400, 150])
@pytest.mark.parametrize("order", ["activation", "group"])
def test_a_factor_that_ranks_share(monkeypatch: pytest.MonkeyPatch, order: OrderName, tokens: int) -> None:
    """All have the same bits, and solve with them what one process does. With few tokens the damping is too small, and all raise it."""
    monkeypatch.setattr("bigq.solver.hessian.SHARED_FROM", 200)
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 200), torch.randn(40, 200)
    scheme = QuantScheme(bits=4, group_size=40, order=order, damping=1e-9)

    def solve(ranks: ThreadRanks | OneProcess) -> tuple[HessianFactor, QuantizedWeight]:
        collector = Gptq().collector(200, torch.device("cpu"), finite_only=False)
        for row in ranks.rows(len(x)):
            collector.add(x[row])
        collector.reduce(ranks)
        factor = collector.finish("the Linear").factor(scheme, "the Linear", last=True, sharing=sharing_of(ranks))
        return factor, solve_shared(factor, [weight.clone()], scheme, "the Linear", ranks)[0]

    of_one, alone = solve(OneProcess())
    assert (of_one.factor.damping > scheme.damping) == (tokens < 200)
    results = [found for found in together(3, solve) if not isinstance(found, Exception)]
    assert len(results) == 3
    for factor, found in results:
        assert torch.equal(factor.factor.r, results[0][0].factor.r) and torch.equal(found.codes, results[0][1].codes)
        assert factor.factor.damping == of_one.factor.damping
        if tokens > 200:  # else rounding decides how errors are spread over directions that have no input
            assert (found.codes == alone.codes).float().mean() > 0.98 and found.loss == pytest.approx(alone.loss, rel=0.02)


def test_what_fails_in_one_rank_fails_in_all() -> None:
    def run(ranks: ThreadRanks) -> Tensor:
        with failing_together(ranks):
            if ranks.index == 1:
                raise NumericsError("the Linear: no")
        raise AssertionError("goes on")

    assert [(type(error), str(error)) for error in together(3, run)] == [(NumericsError, "the Linear: no")] * 3
