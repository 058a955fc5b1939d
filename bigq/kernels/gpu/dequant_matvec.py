"""``dequant_matvec`` on a GPU.

A program computes BM outputs for a share of the inputs. It reads some words of each output at a time; words of neighbouring
outputs are neighbours in memory. Codes become 16-bit floats without a conversion: an ``or`` puts them into the mantissa of
a power of two, and one subtraction removes that power and the zero point together. Both are exact. The tensor cores then
multiply with up to 16 vectors at once. With ONE_GROUP, all words read at a time belong to one group, so only the sums are
scaled; otherwise each weight is.

Programs with the same outputs store partial sums. The last one to finish adds them up in a fixed order, so the result is
deterministic.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq.kernels.pick import uses_interpreter

#: Outputs of a program, cycles of words that it reads at a time, and warps.
OUTPUTS, CYCLES, WARPS = 128, 16, 4

#: Stages of loads. Three at 3 bits take 77 KiB of shared memory; an AMD GPU of the CDNA 3 generation has 64.
STAGES, STAGES_AMD = 3, 2

#: The minimum number of programs: a few for each multiprocessor of the largest GPUs.
PROGRAMS = 1024

#: The bit patterns of 1024 as fp16 and 128 as bf16: the last bit of these numbers has the value 1.
MAGIC = {torch.float16: 0x6400, torch.bfloat16: 0x4300}


def supports_group(width: int, bits: int) -> bool:
    """Whether groups of ``width`` inputs begin at whole cycles of words, as the kernel requires."""
    return width % (32 // math.gcd(bits, 32)) == 0


def dequant_matvec_triton(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """``dequant_matvec``; groups must begin at whole cycles of words."""
    b, n = x.shape
    m = words.shape[1]
    cycle_words = bits // math.gcd(bits, 32)
    cycle_codes = cycle_words * 32 // bits
    cycles = n // cycle_codes
    group_cycles = n // scales.shape[0] // cycle_codes
    blocks = triton.cdiv(m, OUTPUTS)
    share = triton.cdiv(triton.cdiv(cycles, CYCLES), max(1, PROGRAMS // blocks)) * CYCLES
    splits = triton.cdiv(cycles, share)
    y = torch.empty(b, m, dtype=x.dtype, device=x.device)
    partial = torch.empty(splits, b, m, dtype=torch.float32, device=x.device)
    done = torch.zeros(blocks, dtype=torch.int32, device=x.device)
    assert words.is_contiguous() and scales.is_contiguous() and zeros.is_contiguous() and x.stride(1) == 1
    # bf16 represents 128 + code only for codes below 128. Triton's interpreter has no bf16 arithmetic.
    magic = MAGIC[x.dtype] if x.dtype == torch.float16 or (bits < 8 and not uses_interpreter(x)) else 0
    _matvec_kernel[(blocks, splits)](
        x, words, scales, zeros, y, partial, done, b, m, cycles, share, group_cycles, x.stride(0), splits,
        BITS=bits, CODES=cycle_codes, WORDS=cycle_words, CYCLES=CYCLES, BM=OUTPUTS, BB=16,
        ONE_GROUP=group_cycles % CYCLES == 0, MAGIC=magic, WIDEN=uses_interpreter(x), num_warps=WARPS,
        num_stages=STAGES if torch.version.hip is None else STAGES_AMD,
    )  # fmt: skip
    return y


@triton.jit
def _code(word, at, stride, mask, BIT: tl.constexpr, BITS: tl.constexpr):
    """The code at bit BIT of a word. It may continue in the next word, ``stride`` further."""
    if BIT + BITS > 32:
        more = tl.load(at + stride, mask=mask, other=0)
        return ((word >> BIT) & ((1 << (32 - BIT)) - 1)) | ((more & ((1 << (BIT + BITS - 32)) - 1)) << (32 - BIT))
    return (word >> BIT) & ((1 << BITS) - 1)


@triton.jit
def _as_float(code, DTYPE: tl.constexpr, MAGIC: tl.constexpr):
    """A code as a float, plus the power of two that MAGIC encodes."""
    if MAGIC > 0:
        value = (code.to(tl.int16) | MAGIC).to(DTYPE, bitcast=True)
    else:
        value = code.to(tl.float32)
    return value


@triton.jit
def _matvec_kernel(
    x, words, scales, zeros, y, partial, done, b, m, cycles, share, group_cycles, stride_x, splits,
    BITS: tl.constexpr, CODES: tl.constexpr, WORDS: tl.constexpr, CYCLES: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr,
    ONE_GROUP: tl.constexpr, MAGIC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    block = tl.program_id(0)
    outputs = block * BM + tl.arange(0, BM)
    live = outputs < m
    vectors = tl.arange(0, BB)
    first = tl.program_id(1) * share
    last = min(first + share, cycles)
    acc = tl.zeros((BM, BB), dtype=tl.float32)
    for start in range(first, last, CYCLES):
        cycle = start + tl.arange(0, CYCLES)
        mask = live[:, None] & (cycle < last)[None, :]
        at = words + cycle[None, :].to(tl.int64) * WORDS * m + outputs[:, None]
        if ONE_GROUP:
            group = tl.cast(start // group_cycles, tl.int64) * m + outputs
            scale = tl.load(scales + group, mask=live, other=0.0)[:, None]
            zero = _as_float(tl.load(zeros + group, mask=live, other=0), dtype, MAGIC)[:, None]
        else:
            group = (cycle[None, :] // group_cycles).to(tl.int64) * m + outputs[:, None]
            scale = tl.load(scales + group, mask=mask, other=0.0)
            zero = _as_float(tl.load(zeros + group, mask=mask, other=0), dtype, MAGIC)
        x_at = x + vectors[None, :].to(tl.int64) * stride_x + cycle[:, None] * CODES
        x_mask = (cycle < last)[:, None] & (vectors < b)[None, :]
        part = tl.zeros((BM, BB), dtype=tl.float32)
        for w in tl.static_range(WORDS):
            word = tl.load(at + w * m, mask=mask, other=0)
            for i in tl.static_range(CODES):
                if (i * BITS >= 32 * w) & (i * BITS < 32 * w + 32):
                    code = _code(word, at + w * m, m, mask, i * BITS - 32 * w, BITS)
                    weight = _as_float(code, dtype, MAGIC) - zero
                    if not ONE_GROUP:
                        weight *= scale.to(weight.dtype)
                    xs = tl.load(x_at + i, mask=x_mask, other=0.0)
                    if WIDEN:
                        part = tl.dot(weight.to(tl.float32), xs.to(tl.float32), part)
                    else:
                        part = tl.dot(weight.to(dtype), xs, part)
        if ONE_GROUP:
            part *= scale.to(tl.float32)
        acc += part

    at = vectors[None, :].to(tl.int64) * m + outputs[:, None]
    mask = live[:, None] & (vectors < b)[None, :]
    if splits == 1:
        tl.store(y + at, acc.to(dtype), mask=mask)
    else:
        tl.store(partial + tl.program_id(1).to(tl.int64) * b * m + at, acc, mask=mask)
        tl.debug_barrier()
        before = tl.atomic_add(done + block, 1, sem="acq_rel")
        if before == splits - 1:
            total = tl.zeros((BM, BB), dtype=tl.float32)
            for s in range(splits):
                total += tl.load(partial + tl.cast(s, tl.int64) * b * m + at, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(y + at, total.to(dtype), mask=mask)
