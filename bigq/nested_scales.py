"""Scales that are quantized themselves, as bitsandbytes stores them with "double quantization" (Dettmers et al. 2023, arXiv 2305.14314).

    scale = table[code] · block + offset

The offset is the mean of all scales of a matrix. Blocks of 256 consecutive scales, row by row, share the largest distance from it. The
table has 256 numbers of a dynamic exponent and fraction (Dettmers 2015, arXiv 1511.04561). A scale may come out as 0 or negative.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

#: Scales that share one of their own.
BLOCK = 256

#: Decades of the table: numbers of 1e-7 to 1.
DECADES = 7

#: The least number that is divided by.
TINY = 1e-38


@functools.cache
def dynamic_table() -> Tensor:
    """The 256 numbers that codes stand for, fp32 in ascending order. The decade below 10^−i has 2^(6−i) numbers of each sign, in the middle
    of as many equal parts; 0 and 1 are added."""
    numbers = [0.0, 1.0]
    for i in range(DECADES):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (10 ** (i - DECADES + 1) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        numbers += [*middles, *(-number for number in middles)]
    return torch.tensor(sorted(numbers), dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class NestedScales:
    """The scales of a matrix with m rows of G groups. codes: uint8 [m, G]. blocks: fp32 [⌈m·G / 256⌉]. offset: an fp32 number."""

    codes: Tensor
    blocks: Tensor
    offset: float

    @classmethod
    def of(cls, scales: Tensor) -> NestedScales:
        """Round fp32 scales [m, G], each to the nearest number of the table. On a number between two, bitsandbytes' own code for CPUs may
        take the other one: it looks up 65536 parts of the range."""
        flat = scales.float().contiguous().flatten()
        offset = flat.mean()
        parts = torch.nn.functional.pad(flat - offset, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        blocks = parts.abs().amax(1)
        table = dynamic_table().to(flat.device)
        bounds = (table[:-1] + table[1:]) / 2
        codes = torch.bucketize(parts * (1.0 / blocks.clamp(min=TINY))[:, None], bounds).to(torch.uint8)
        return cls(codes.flatten()[: len(flat)].view(scales.shape), blocks, float(offset))

    def values(self) -> Tensor:
        """The scales, fp32 [m, G]."""
        table = dynamic_table().to(self.codes.device)
        of_each = self.blocks.repeat_interleave(BLOCK)[: self.codes.numel()].view(self.codes.shape)
        return table[self.codes.int()] * of_each + self.offset
