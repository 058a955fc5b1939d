"""The product that corrects a block of columns for all columns before it: most of a solve's arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def feedback(r: Tensor, errors: Tensor, out: Tensor) -> None:
    """``out = rᵀ·errors``. r: [a, s] part of a factor; errors: [a, m]; out: [s, m]; fp32 or fp64."""
    with _tensor_cores(errors):
        torch.mm(r.T, errors, out=out)


@contextlib.contextmanager
def _tensor_cores(x: Tensor) -> Iterator[None]:
    """On a GPU, let fp32 products take their factors as TF32."""
    if not x.is_cuda:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
