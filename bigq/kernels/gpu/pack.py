"""``pack`` and ``unpack`` on a GPU, for codes in any memory order."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows and words (pack) or codes (unpack) of a tile.
ROWS = 64
WORDS = 16
CODES = 64


def pack_triton(codes: Tensor, bits: int) -> Tensor:
    """``pack`` for codes [k, m]."""
    k, m = codes.shape
    words_per_cycle = bits // math.gcd(bits, 32)
    cycles = k * bits // 32 // words_per_cycle
    per_tile = max(1, WORDS // triton.next_power_of_2(words_per_cycle))
    words = torch.empty(cycles * words_per_cycle, m, dtype=torch.int32, device=codes.device)
    _pack_kernel[(triton.cdiv(m, ROWS), triton.cdiv(cycles, per_tile))](
        codes, words, cycles, m, *codes.stride(),
        BITS=bits, CODES=words_per_cycle * 32 // bits, WORDS=words_per_cycle, CYCLES=per_tile, BM=ROWS, num_warps=4,
    )  # fmt: skip
    return words


def unpack_triton(words: Tensor, bits: int) -> Tensor:
    """``unpack`` for words [k·bits/32, m]."""
    k, m = words.shape[0] * 32 // bits, words.shape[1]
    codes = torch.empty(k, m, dtype=torch.uint8, device=words.device)
    _unpack_kernel[(triton.cdiv(m, ROWS), triton.cdiv(k, CODES))](
        words, codes, k, m, *words.stride(), BITS=bits, BK=CODES, BM=ROWS, num_warps=4
    )  # fmt: skip
    return codes


@triton.jit
def code_at(words, k, stride, mask, BITS: tl.constexpr):
    """Code number k of the bit streams that begin at ``words``. The words of a stream are ``stride`` apart."""
    bit = k.to(tl.int64) * BITS
    shift = (bit % 32).to(tl.uint32)
    at = words + bit // 32 * stride
    code = tl.load(at, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        split = (shift + BITS > 32) & mask
        more = tl.load(at + stride, mask=split, other=0).to(tl.uint32, bitcast=True)
        code |= tl.where(split, more << ((32 - shift) & 31), 0)
    return code & ((1 << BITS) - 1)


@triton.jit
def _pack_kernel(
    codes, words, cycles, m, stride_k, stride_m,
    BITS: tl.constexpr, CODES: tl.constexpr, WORDS: tl.constexpr, CYCLES: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cycle = tl.program_id(1) * CYCLES + tl.arange(0, CYCLES)
    live = (rows < m)[:, None] & (cycle < cycles)[None, :]
    i = tl.arange(0, CODES)
    k = cycle[:, None].to(tl.int64) * CODES + i[None, :]
    at = codes + rows[:, None, None].to(tl.int64) * stride_m + k[None, :, :] * stride_k
    tile = tl.load(at, mask=live[:, :, None], other=0).to(tl.int32)
    for word in tl.static_range(WORDS):
        shift = (i * BITS - 32 * word)[None, None, :]
        left = tl.where((shift >= 0) & (shift < 32), tile << (shift & 31), 0)
        right = tl.where((shift < 0) & (shift > -BITS), tile >> ((-shift) & 31), 0)
        value = tl.sum(left | right, 2)
        out = words + (cycle[None, :].to(tl.int64) * WORDS + word) * m + rows[:, None]
        tl.store(out, value, mask=live)


@triton.jit
def _unpack_kernel(words, codes, k, m, stride_w, stride_m, BITS: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr):
    ks = (tl.program_id(1) * BK + tl.arange(0, BK))[:, None]
    rows = (tl.program_id(0) * BM + tl.arange(0, BM))[None, :]
    mask = (ks < k) & (rows < m)
    code = code_at(words + rows.to(tl.int64) * stride_m, ks, stride_w, mask, BITS)
    tl.store(codes + ks.to(tl.int64) * m + rows, code.to(tl.uint8), mask=mask)
