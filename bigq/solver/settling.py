"""Scales that are rounded together with others of their matrix, once all are found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigq.kernels.grid_spec import BLOCK_ROWS, ScaleForm
from bigq.nested_scales import NestedScales


def settled_(scale: Tensor, rows: Sequence[int], form: ScaleForm) -> Sequence[NestedScales | None]:
    """Round the scales [..., G, m] of several matrices, which have these rows, in place.

    Returns how each matrix stores them, where its scales do not say it themselves. Nested ones have two dimensions.
    """
    parts = scale.split(list(rows), -1)
    if form == "block":
        for part in parts:
            part.copy_(of_blocks(part))
        return [None] * len(parts)
    nested = [NestedScales.of(part.T) for part in parts]
    scale.copy_(torch.cat([each.values() for each in nested]).T)
    return nested


def of_blocks(scale: Tensor) -> Tensor:
    """The scales of a matrix, [..., G, m], where ``BLOCK_ROWS`` rows share the largest one, rounded to bf16. That of zeros is 1.

    E4M3 has the same relative precision with any scale, so a row does not suffer from a scale that is a larger row's. bf16 is exact for
    readers whose scales have the dtype of the model, and has the range of fp32.
    """
    m = scale.shape[-1]
    padded = torch.nn.functional.pad(scale, (0, -m % BLOCK_ROWS))
    largest = padded.unflatten(-1, (-1, BLOCK_ROWS)).amax(-1).to(torch.bfloat16).to(scale.dtype)
    largest = torch.where(largest == 0, torch.ones_like(largest), largest)
    return largest.repeat_interleave(BLOCK_ROWS, -1)[..., :m]
