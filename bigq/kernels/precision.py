"""fp32 matrix products: their precision on a GPU, TF32 or full, which is a setting of the process; and products of a batch."""

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


def product(a: Tensor, b: Tensor, out: Tensor, *, add: Tensor | None = None, beta: float = 1.0) -> Tensor:
    """``out = a·b``, or ``beta·add + a·b``; a: [..., m, k], b: [..., k, n], add and out: [..., m, n]. With beta 0, add is not read.

    All may have one more leading dimension, a batch. On a GPU that is one launch. On a CPU it is a product for each matrix, which has the
    bits that it has alone, as far as they do not depend on where in memory the matrix begins.
    """
    if a.ndim == 2:
        return torch.mm(a, b, out=out) if add is None else torch.addmm(add, a, b, beta=beta, out=out)
    if a.is_cuda:
        return torch.bmm(a, b, out=out) if add is None else torch.baddbmm(add, a, b, beta=beta, out=out)
    for i in range(len(a)):
        product(a[i], b[i], out[i], add=None if add is None else add[i], beta=beta)
    return out
