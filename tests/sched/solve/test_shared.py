"""Solving with other ranks: the same codes as alone, and failures that all of them have."""

from __future__ import annotations

import pytest
import torch
from rank_threads import ThreadRanks, together
from torch import Tensor

from bigq.errors import NumericsError
from bigq.machine.ranks import OneProcess
from bigq.methods.gptq import Gptq
from bigq.quantized_weight import QuantizedWeight
from bigq.sched.solve.shared import failing_together, solve_shared
from bigq.scheme import QuantScheme

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


def test_what_fails_in_one_rank_fails_in_all() -> None:
    def run(ranks: ThreadRanks) -> Tensor:
        with failing_together(ranks):
            if ranks.index == 1:
                raise NumericsError("the Linear: no")
        raise AssertionError("goes on")

    assert [(type(error), str(error)) for error in together(3, run)] == [(NumericsError, "the Linear: no")] * 3
