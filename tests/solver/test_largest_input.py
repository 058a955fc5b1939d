"""The largest magnitude of inputs, against a plain computation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bigq.solver.hessian import Reduction
from bigq.solver.largest_input import LargestInput

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_that_of_all_batches(dtype: torch.dtype) -> None:
    for seed, sign in ((0, 1), (1, -1)):
        batches = [torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(9 * seed + i)).to(dtype) for i in range(4)]
        batches[2][1, 3, 5] = sign * 17.3
        found = LargestInput(CPU)
        assert found.value == 0
        for batch in [*batches, batches[0][:0]]:
            found.add(batch)
        assert found.value == max(abs(float(x)) for batch in batches for x in batch.flatten())


def test_tokens_that_are_not_finite_are_left_out_if_asked() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    x[0, 1, 2], x[2, 3, 1], x[2, 3, 4], x[1, 1, 1] = math.nan, math.inf, 90.0, -7.5
    found, unchecked = LargestInput(CPU, finite_only=True), LargestInput(CPU)
    found.add(x)
    unchecked.add(x)
    assert found.value == 7.5 and not math.isfinite(unchecked.value)
    nothing = LargestInput(CPU, finite_only=True)
    nothing.add(torch.full((2, 3), math.nan))
    assert nothing.value == 0


class Other(Reduction):
    """A second process, whose largest input is 3."""

    def largest_(self, share: Tensor) -> None:
        share.clamp_(min=3.0)


@pytest.mark.parametrize(("own", "whole"), [(2.0, 3.0), (-5.0, 5.0)])
def test_processes_have_the_largest_of_all(own: float, whole: float) -> None:
    found = LargestInput(CPU)
    found.add(torch.tensor([[own, 0.5]]))
    found.reduce(Other())
    assert found.value == whole
