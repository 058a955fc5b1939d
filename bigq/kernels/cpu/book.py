"""The nearest point of a codebook, compiled for the processor. A loop over the points would not become vector instructions.

book: the 16 points in ascending order; bounds: the 15 numbers between them. The points of E4M3 are computed.
"""

from __future__ import annotations

import numpy as np
from numba import njit

f32, i32 = np.float32, np.int32

#: The largest and the smallest normal number of E4M3, and the steps between those below it.
LARGEST, SMALLEST_NORMAL, SUBNORMAL = f32(448), f32(2.0**-6), f32(2.0**-9)
#: A number with this added to its exponent, times 1.5, has fp32 neighbours as far from it as those of E4M3 are from the number.
EXPONENT, HIGHER = i32(0x7F800000), i32(20 << 23)
#: The code of 0, and the exponent and fraction in an fp32 number that stand for 0 in E4M3.
ZERO_CODE, BIAS = i32(126), i32(120 << 3)


@njit(nogil=True, inline="always")
def nearest_of_book(x, book, bounds):
    point = f32(book[0])
    point = f32(book[1]) if x > f32(bounds[0]) else point
    point = f32(book[2]) if x > f32(bounds[1]) else point
    point = f32(book[3]) if x > f32(bounds[2]) else point
    point = f32(book[4]) if x > f32(bounds[3]) else point
    point = f32(book[5]) if x > f32(bounds[4]) else point
    point = f32(book[6]) if x > f32(bounds[5]) else point
    point = f32(book[7]) if x > f32(bounds[6]) else point
    point = f32(book[8]) if x > f32(bounds[7]) else point
    point = f32(book[9]) if x > f32(bounds[8]) else point
    point = f32(book[10]) if x > f32(bounds[9]) else point
    point = f32(book[11]) if x > f32(bounds[10]) else point
    point = f32(book[12]) if x > f32(bounds[11]) else point
    point = f32(book[13]) if x > f32(bounds[12]) else point
    point = f32(book[14]) if x > f32(bounds[13]) else point
    return f32(book[15]) if x > f32(bounds[14]) else point


@njit(nogil=True, inline="always")
def code_of_book(p, b):
    low = (p > f32(b[0])) + (p > f32(b[1])) + (p > f32(b[2])) + (p > f32(b[3])) + (p > f32(b[4]))
    middle = (p > f32(b[5])) + (p > f32(b[6])) + (p > f32(b[7])) + (p > f32(b[8])) + (p > f32(b[9]))
    high = (p > f32(b[10])) + (p > f32(b[11])) + (p > f32(b[12])) + (p > f32(b[13])) + (p > f32(b[14]))
    return np.uint8(low + middle + high)


@njit(nogil=True, inline="always")
def nearest_e4m3(x):
    """Rounded to E4M3, ties to even."""
    x = min(max(x, -LARGEST), LARGEST)
    binade = i32(f32(max(abs(x), SMALLEST_NORMAL)).view(i32) & EXPONENT)
    rounder = i32(binade + HIGHER).view(f32) * f32(1.5)
    return (x + rounder) - rounder


@njit(nogil=True, inline="always")
def code_of_e4m3(point):
    size = abs(point)
    normal = (f32(size).view(i32) >> i32(20)) - BIAS
    pattern = normal if size >= SMALLEST_NORMAL else i32(size / SUBNORMAL)
    return np.uint8(ZERO_CODE - pattern if point < f32(0) else ZERO_CODE + pattern)
