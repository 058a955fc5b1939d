"""The precision of fp32 matrix products on a GPU: TF32 or full. It is a setting of the process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def fp32_products(x: Tensor, *, tf32: bool) -> Iterator[None]:
    """Within this context, fp32 matrix products on x's device use TF32, or full fp32. Has no effect on a CPU."""
    if not x.is_cuda:
        yield
        return
    matmul = torch.backends.cuda.matmul
    # torch 2.9 replaced the flag allow_tf32 by fp32_precision, and raises if the flag is read after fp32_precision was set.
    name, value = ("fp32_precision", "tf32" if tf32 else "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", tf32)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)
