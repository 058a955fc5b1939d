"""Checks for NaN and Inf."""

from __future__ import annotations

import pytest
import torch

from bigq.kernels.finiteness import is_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_single_bad_element_is_found(bad: float, dtype: torch.dtype) -> None:
    x = torch.full((9, 11), torch.finfo(dtype).max, dtype=dtype)
    x[0] = -x[0]
    assert is_finite(x)
    x[4, 7] = bad
    assert not is_finite(x)


def test_an_empty_tensor_is_finite() -> None:
    assert is_finite(torch.empty(0, 5))
