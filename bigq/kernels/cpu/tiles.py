"""``XᵀX`` of bf16 inputs with the processor's matrix unit (AMX): tiles of 16 × 16 sums, to which one instruction adds 32 tokens.

An instruction sums its tokens from zero before it adds them to a tile, and tiles start from zero every 1024 tokens, so Hessians are more
accurate than those of fp32 products.
The right operand is packed as for ``bigq.kernels.cpu.syrk``; the left one has the same tiles, each transposed.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from bigq.kernels.cpu.compiler import compiled

#: Sums of a block: 2 × 2 tiles of 16 × 16. Each operand's tile is then loaded once for two products.
BLOCK, TILE = 32, 16
#: Pairs of tokens that one instruction adds.
STEP = 16
#: Pairs of tokens that are summed before they are added to the Hessian. More take fewer passes over it, and more memory.
PAIRS = 512

#: Linux grants the tile registers, feature 18 of the saved state, to a process that asks for them.
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18

# numba does not initialize what assembles the instructions below.
binding.initialize_native_asmparser()


@functools.cache
def has_tiles() -> bool:
    """Whether the processor has AMX for bf16, and the system lets this process use it."""
    features = binding.get_host_cpu_features()
    if not (sys.platform == "linux" and features.get("amx-tile") and features.get("amx-bf16")):
        return False
    return int(ctypes.CDLL(None).syscall(*map(ctypes.c_long, (_ARCH_PRCTL, _REQUEST, _TILE_DATA)))) == 0


def _configuration() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Eight tiles of 16 rows of 64 bytes: palette 1, bytes of a row from byte 16 on, rows from byte 48 on."""
    config = np.zeros(64, np.uint8)
    config[0], config[16:32:2], config[48:56] = 1, 64, TILE
    return config


#: What ``add_products`` passes to its threads.
CONFIGURATION = _configuration()


def _assemble(builder: Any, text: str, *arguments: Any) -> None:
    """An instruction that reads or writes memory or tiles; ``$0`` and ``$1`` are its arguments."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(arguments))
    constraints = ",".join([*["r"] * len(arguments), "~{memory}"])
    builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), arguments)


@intrinsic
def _configure(context: Any, address: Any) -> Any:
    """Give this thread the tiles described at an address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _assemble(builder, "ldtilecfg ($0)", arguments[0])
        return context.get_dummy_value()

    return types.void(types.intp), emit


@intrinsic
def _release(context: Any) -> Any:
    """Give the tiles back, so that the system need not save them any more."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _assemble(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def _add_block(context: Any, a: Any, b: Any, apart: Any, pairs: Any, block: Any, c: Any, stride: Any) -> Any:
    """Add the products of 32 columns at address a and 32 at b to sums [32, 32] at address c, by way of a block of that size.

    apart: bytes between two vectors of 16 columns. pairs: of tokens, a multiple of 16. stride: bytes of a row of c.
    """
    return types.void(*[types.intp] * 7), _emit_block


def _emit_block(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    a, b, apart, pairs, block, c, stride = arguments
    index = ir.IntType(64)

    def number(value: int) -> Any:
        return ir.Constant(index, value)

    operands = {4: a, 5: builder.add(a, apart), 6: b, 7: builder.add(b, apart)}
    for tile in range(4):
        _assemble(builder, f"tilezero %tmm{tile}")
    before = builder.block
    loop, after = builder.append_basic_block("pairs"), builder.append_basic_block("end")
    builder.branch(loop)
    builder.position_at_end(loop)
    done = builder.phi(index)
    done.add_incoming(number(0), before)
    offset = builder.mul(done, number(4 * TILE))
    for tile, start in operands.items():
        _assemble(builder, f"tileloadd ($0,$1,1), %tmm{tile}", builder.add(start, offset), number(4 * TILE))
    for tile in range(4):
        _assemble(builder, f"tdpbf16ps %tmm{6 + tile % 2}, %tmm{4 + tile // 2}, %tmm{tile}")
    following = builder.add(done, number(STEP))
    done.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after)
    builder.position_at_end(after)
    for tile in range(4):
        at = (tile // 2 * TILE * BLOCK + tile % 2 * TILE) * 4
        _assemble(builder, f"tilestored %tmm{tile}, ($0,$1,1)", builder.add(block, number(at)), number(4 * BLOCK))
    vector = ir.VectorType(ir.FloatType(), TILE)
    for y in range(BLOCK):
        row = builder.add(c, builder.mul(stride, number(y)))
        for x in range(0, BLOCK, TILE):
            new = builder.load(builder.inttoptr(builder.add(block, number((y * BLOCK + x) * 4)), ir.PointerType(vector)), typ=vector)
            place = builder.inttoptr(builder.add(row, number(4 * x)), ir.PointerType(vector))
            old = builder.load(place, typ=vector)
            new.align = old.align = 4
            builder.store(builder.fadd(old, new), place, align=4)
    return context.get_dummy_value()


@compiled()
def transpose_tiles(packed, turned, start, stop):
    """The tiles of panels [start, stop), transposed: int32 [panel, vector, pair, lane] → [panel, vector, step, lane, pair of the step]."""
    for panel in range(start, stop):
        for v in range(packed.shape[1]):
            for step in range(turned.shape[2]):
                for lane in range(TILE):
                    for pair in range(STEP):
                        turned[panel, v, step, lane, pair] = packed[panel, v, step * STEP + pair, lane]


@compiled()
def add_products(configuration, turned, packed, sums, start, stop):
    """Add to the tiles of panels i ≤ j, of which those numbered [start, stop), row by row.

    turned, packed: see ``transpose_tiles``. sums: fp32 [n, n]. Of the panels on the diagonal, all is written.
    """
    panels, vectors, pairs, n = packed.shape[0], packed.shape[1], packed.shape[2], sums.shape[0]
    vector = pairs * TILE * 4
    block = np.empty((BLOCK, BLOCK), np.float32)
    number = 0
    _configure(configuration.ctypes.data)
    for i in range(panels):
        for j in range(i, panels):
            if start <= number < stop:
                for u in range(i * vectors, (i + 1) * vectors, 2):
                    for v in range(j * vectors, (j + 1) * vectors, 2):
                        a, b = turned.ctypes.data + u * vector, packed.ctypes.data + v * vector
                        c = sums.ctypes.data + (u * n + v) * TILE * 4
                        _add_block(a, b, vector, pairs, block.ctypes.data, c, n * 4)
            number += 1
    _release()
