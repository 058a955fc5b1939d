"""Spreading the errors of columns over a later one: the inner loop of ``columns``, as machine instructions."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

#: Rows of a tile: two vectors of 16. A block of 128 columns takes 16 KiB.
LANES = 32


@intrinsic
def spread(context: Any, tile: Any, factors: Any, width: Any, first: Any, end: Any, later: Any) -> Any:
    """Subtract the errors of columns [first, end) of a tile [columns, LANES] from a later column, in their order.

    tile, factors: addresses of fp32 numbers. width: bytes of a row of ``factors``; element [j, later] is the factor of column j.
    """
    return types.void(*[types.intp] * 6), _emit_spread


def _emit_spread(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    tile, factors, width, first, end, later = arguments
    index, number = ir.IntType(64), ir.FloatType()
    vector = ir.VectorType(number, 16)

    def load(address: Any, kind: Any) -> Any:
        loaded = builder.load(builder.inttoptr(address, ir.PointerType(kind)), typ=kind)
        loaded.align = 4
        return loaded

    def halves(column: Any) -> list[Any]:
        at = builder.add(tile, builder.mul(column, ir.Constant(index, 4 * LANES)))
        return [builder.add(at, ir.Constant(index, 4 * start)) for start in range(0, LANES, 16)]

    places = halves(later)
    loaded = [load(place, vector) for place in places]
    factor_at = builder.add(factors, builder.mul(later, ir.Constant(index, 4)))
    before = builder.block
    loop, after = builder.append_basic_block("columns"), builder.append_basic_block("end")
    builder.branch(loop)
    builder.position_at_end(loop)
    column = builder.phi(index)
    column.add_incoming(first, before)
    sums = [builder.phi(vector) for _ in places]
    factor = load(builder.add(factor_at, builder.mul(column, width)), number)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), factor, ir.Constant(ir.IntType(32), 0))
    repeated = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16))
    for total, start, place in zip(sums, loaded, halves(column), strict=True):
        total.add_incoming(start, before)
        total.add_incoming(builder.fsub(total, builder.fmul(load(place, vector), repeated)), loop)
    following = builder.add(column, ir.Constant(index, 1))
    column.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
    builder.position_at_end(after)
    for total, place in zip(sums, places, strict=True):
        builder.store(total.incomings[1][0], builder.inttoptr(place, ir.PointerType(vector)), align=4)
    return context.get_dummy_value()
