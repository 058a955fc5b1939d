"""``XᵀX`` of bf16 inputs with the processor's dot products of pairs (AVX-512 BF16), which sum in fp32, or with its matrix unit.

Products of bf16 numbers are exact in fp32, so only the order of the sums differs from fp32 arithmetic. On one core the rate is up to
twice as high, with the matrix unit (``bigq.kernels.cpu.tiles``) five times. torch has no such product: its bf16 products round their
results to bf16.

Tokens are taken in pairs. The inputs are packed into panels of 64 columns, [pairs, 64] words of two numbers each, in which both
operands of a tile are contiguous.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from bigq.kernels.cpu import tiles
from bigq.kernels.cpu.compiler import compiled
from bigq.kernels.cpu.threads import in_parts

#: Columns of a panel, and rows and vectors of 16 columns of a tile. Its sums fill 16 of the 32 vector registers.
PANEL = 64
ROWS, LANES = 4, 16
VECTORS = PANEL // LANES
#: Pairs of tokens that are packed at a time. A panel then takes 64 KiB, so that two of them stay in the second-level cache.
PAIRS = 256
#: Pairs that are summed from zero. As accurate as fp32 products are: the mean error on the diagonal is 1.5e-7 of its value,
#: theirs 1.9e-7; with 128 pairs it is 2.6e-7, with 256 1e-6 (4096 tokens).
SUMMED = 64

# numba does not initialize what assembles the instruction below.
binding.initialize_native_asmparser()


@functools.cache
def has_bf16_products() -> bool:
    """Whether the processor has AVX-512 BF16."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512bf16") and features.get("avx512f"))


def can_accumulate(h: Tensor, x: Tensor) -> bool:
    """Whether ``syrk_compiled_`` takes these arguments: bf16 inputs of whole panels, on a processor that multiplies them."""
    return x.dtype == torch.bfloat16 and h.is_contiguous() and h.shape[0] % PANEL == 0 and has_bf16_products()


def syrk_compiled_(h: Tensor, x: Tensor, by_tiles: bool | None = None) -> None:
    """``syrk_`` for fp32 h [n, n] and bf16 x [tokens, n] on a CPU. Below the diagonal, tiles of 64 × 64 on it are written.

    by_tiles: whether the matrix unit computes; by default if there is one.
    """
    by_tiles = tiles.has_tiles() if by_tiles is None else by_tiles
    panels = h.shape[0] // PANEL
    pairs, step = (tiles.PAIRS, tiles.STEP) if by_tiles else (PAIRS, 1)
    for part in x.contiguous().view(torch.int16).split(2 * pairs):
        packed = np.empty((panels, VECTORS, -(-len(part) // (2 * step)) * step, LANES), np.int32)
        in_parts(panels, 1, functools.partial(_pack, part.numpy(), packed))
        if by_tiles:
            turned = np.empty((panels, VECTORS, packed.shape[2] // tiles.STEP, LANES, tiles.STEP), np.int32)
            in_parts(panels, 1, functools.partial(tiles.transpose_tiles, packed, turned))
            add = functools.partial(tiles.add_products, tiles.CONFIGURATION, turned, packed)
        else:
            add = functools.partial(_accumulate, packed)
        in_parts(panels * (panels + 1) // 2, 1, functools.partial(add, h.numpy()))


@intrinsic
def _add_tile(context: Any, a: Any, b: Any, vector: Any, c: Any, stride: Any, pairs: Any) -> Any:
    """Add the products of 4 columns at address a and 64 columns at b to a tile [4, 64] at address c.

    vector: bytes between the vectors of a panel. stride: bytes of a row of c.
    """
    return types.void(*[types.intp] * 6), _emit_tile


def _emit_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    a, b, apart, c, stride, pairs = arguments
    word, index = ir.IntType(32), ir.IntType(64)
    words, sums = ir.VectorType(word, 16), ir.VectorType(ir.FloatType(), 16)
    product = ir.InlineAsm(ir.FunctionType(sums, [sums, words, words]), "vdpbf16ps $3, $2, $0", "=v,0,v,v")

    def vector(address: Any, kind: Any) -> Any:
        return builder.inttoptr(address, ir.PointerType(kind))

    def load(address: Any, kind: Any) -> Any:
        loaded = builder.load(vector(address, kind), typ=kind)
        loaded.align = 4
        return loaded

    def plus(address: Any, offset: int) -> Any:
        return builder.add(address, ir.Constant(index, offset))

    starts = [builder.add(b, builder.mul(apart, ir.Constant(index, v))) for v in range(VECTORS)]
    before = builder.block
    loop, after = builder.append_basic_block("pairs"), builder.append_basic_block("end")
    builder.branch(loop)
    builder.position_at_end(loop)
    done = builder.phi(index)
    done.add_incoming(ir.Constant(index, 0), before)
    tile = [[builder.phi(sums) for _ in range(VECTORS)] for _ in range(ROWS)]
    offset = builder.mul(done, ir.Constant(index, 4 * LANES))
    at_a = builder.add(a, offset)
    columns = [load(builder.add(start, offset), words) for start in starts]
    zero = ir.Constant(words, [0] * 16)
    for r, row in enumerate(tile):
        one = builder.insert_element(ir.Constant(words, ir.Undefined), load(plus(at_a, 4 * r), word), ir.Constant(word, 0))
        repeated = builder.shuffle_vector(one, one, zero)
        for v, total in enumerate(row):
            total.add_incoming(ir.Constant(sums, [0.0] * 16), before)
            total.add_incoming(builder.call(product, [total, repeated, columns[v]]), loop)
    following = plus(done, 1)
    done.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after)
    builder.position_at_end(after)
    for r, row in enumerate(tile):
        at_c = builder.add(c, builder.mul(stride, ir.Constant(index, r)))
        for v, total in enumerate(row):
            place = plus(at_c, 64 * v)
            final = total.incomings[1][0]
            builder.store(builder.fadd(load(place, sums), final), vector(place, sums), align=4)
    return context.get_dummy_value()


@compiled()
def _pack(words, packed, start, stop):
    """Pack panels [start, stop): words int16 [tokens, n] → int32 [panel, vector, pair, lane], the earlier token in the lower half.

    Tokens that are missing are zeros.
    """
    tokens = words.shape[0]
    for pair in range(packed.shape[2]):
        even, odd = 2 * pair < tokens, 2 * pair + 1 < tokens
        for panel in range(start, stop):
            for v in range(VECTORS):
                for c in range(LANES):
                    at = panel * PANEL + v * LANES + c
                    high = np.int32(words[2 * pair + 1, at]) if odd else np.int32(0)
                    low = np.int32(words[2 * pair, at]) if even else np.int32(0)
                    packed[panel, v, pair, c] = (high << np.int32(16)) | (low & np.int32(0xFFFF))


@compiled()
def _accumulate(packed, sums, start, stop):
    """Add to the tiles of panels i ≤ j, of which those numbered [start, stop), row by row."""
    panels, pairs, n = packed.shape[0], packed.shape[2], sums.shape[0]
    source, target = packed.ctypes.data, sums.ctypes.data
    vector_bytes = pairs * LANES * 4
    panel_bytes = VECTORS * vector_bytes
    number = 0
    for i in range(panels):
        for j in range(i, panels):
            if start <= number < stop:
                for first in range(0, pairs, SUMMED):
                    a = source + i * panel_bytes + first * LANES * 4
                    b = source + j * panel_bytes + first * LANES * 4
                    for r in range(0, PANEL, ROWS):
                        at_a = a + r // LANES * vector_bytes + r % LANES * 4
                        at = target + ((i * PANEL + r) * n + j * PANEL) * 4
                        _add_tile(at_a, b, vector_bytes, at, n * 4, min(SUMMED, pairs - first))
            number += 1
