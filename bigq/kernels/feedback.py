"""GPTQ's error feedback: the product that corrects a block of columns for the errors of all columns before it.

It is most of a solve's arithmetic.
"""

from __future__ import annotations

from torch import Tensor

from bigq.kernels.precision import fp32_products, product


def feedback(r: Tensor, errors: Tensor, out: Tensor) -> None:
    """``out = rᵀ·errors``. r: [..., a, s], part of a factor. errors: [..., a, m]. out: [..., s, m]. fp32 (TF32 products on a GPU) or fp64.

    All may have one more leading dimension: a batch of matrices of one shape.
    """
    with fp32_products(errors, tf32=True):
        product(r.mT, errors, out)
