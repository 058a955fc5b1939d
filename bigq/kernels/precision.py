"""How exactly a GPU multiplies fp32 matrices: a setting of the process, held for a stretch of code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def fp32_products(x: Tensor, *, tf32: bool) -> Iterator[None]:
    """Let products of fp32 matrices on x's device take their factors as TF32, or in full. Does nothing on a CPU."""
    if not x.is_cuda:
        yield
        return
    matmul = torch.backends.cuda.matmul
    # torch 2.9 replaced the flag by a word, and refuses to read the flag once somebody has set the word.
    name, value = ("fp32_precision", "tf32" if tf32 else "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", tf32)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)
