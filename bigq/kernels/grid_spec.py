"""What the grid of a group may be. Apart from ``grid``, which computes it, so that it can be named without torch."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

#: What codes stand for: integers, or the points of a codebook.
PointsName = Literal["int", "nf4", "fp4", "e2m1", "e4m3"]
#: How scales are stored: each as an fp16 number; as an fp16 number that E4M3 or E8M0 can hold, times a power of two; or "nested", as 8-bit
#: numbers with scales of their own (``bigq.nested_scales``); or "block", each as a bf16 number that ``BLOCK_ROWS`` rows share.
ScaleForm = Literal["fp16", "e4m3", "e8m0", "nested", "block"]
#: Rows of a matrix that share a scale in the form "block". The last block may have fewer.
BLOCK_ROWS = 128

#: Significant bits of fp16, and the fewest that a scale may be rounded to.
SCALE_BITS = 11
FEWEST_SCALE_BITS = 7

#: Significant bits of scales in forms that decide them. fp16 numbers of 4 bits, from 2^-17 on, are E4M3's over 256, also where these lose
#: bits; and powers of two are E8M0's.
BITS_OF_FORM: Mapping[ScaleForm, int] = {"e4m3": 4, "e8m0": 1}
#: The largest scale of a form, if it is not that of fp16.
LARGEST_OF_FORM: Mapping[ScaleForm, float] = {"e4m3": 448 / 256}

#: The smallest scale that a search by squared error tries, in hundredths of the one that spans the group's weights.
SMALLEST_TRIED = 21

#: The widest range that is tried with a codebook, in the same unit: its second largest point is then at the largest weight or near it.
WIDEST_BOOK = 132

#: What a search by the loss in a group tries, in the same unit, and the steps by which it then moves from the best one.
SOLVED = (100, 92, 84, 108, 76, 116, 68, 124, 60, 52, 44)
REFINED = (4, 2)

#: The smallest fp16 number above 0.
FP16_TINY = 2.0**-24


def smallest_scale(bits: int) -> float:
    """What a scale of so many significant bits becomes, if it is rounded to 0. Forms of E4M3 and E8M0 do not hold ``FP16_TINY``."""
    return FP16_TINY if bits >= FEWEST_SCALE_BITS else FP16_TINY * 2.0 ** (SCALE_BITS - bits)


def _e4m3(pattern: int) -> float:
    """The number of 7 bits without a sign: exponent and fraction of E4M3."""
    exponent, fraction = divmod(pattern, 8)
    return (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9


#: What codes stand for, if not integers: the points of a codebook in ascending order, each an fp32 number. A code is the place of a point
#: here; formats that number them otherwise translate. Two points of 0 are those of formats with a sign bit.
#: "nf4" and "fp4" are those of bitsandbytes (Dettmers et al. 2023, arXiv 2305.14314), "e2m1" the 4-bit floats of OCP's MX formats, and
#: "e4m3" the 8-bit floats of Micikevicius et al. 2022 (arXiv 2209.05433), with one point of 0.
BOOKS: Mapping[PointsName, tuple[float, ...]] = {
    "int": (),
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        -1.0, -0.6666666865348816, -0.5, -0.3333333432674408, -0.25, -0.1666666716337204, -0.0052083334885537624, 0.0,
        0.0, 0.0052083334885537624, 0.1666666716337204, 0.25, 0.3333333432674408, 0.5, 0.6666666865348816, 1.0,
    ),
    "e2m1": (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "e4m3": (*(-_e4m3(pattern) for pattern in range(126, 0, -1)), *(_e4m3(pattern) for pattern in range(127))),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSpec:
    """What the points ``scale · (code − zero)`` of a group may be, or ``scale · book[code]`` with a codebook, whose zero points are 0.

    The fields mean what they mean in ``QuantScheme``.
    search: the grid is the best of several: by the loss that GPTQ reaches in the group where the column loop finds it, else by squared
        error. Otherwise it spans the group's weights.
    """

    bits: int
    symmetric: bool
    min_zero: int = 0
    search: bool = False
    scale_bits: int = SCALE_BITS
    points: PointsName = "int"
    scale_form: ScaleForm = "fp16"

    @property
    def settles(self) -> bool:
        """Whether scales are rounded together with all others of the matrix, once they are found. Until then they are fp32 numbers."""
        return self.scale_form in ("nested", "block")

    @property
    def book(self) -> tuple[float, ...]:
        """The points that codes stand for, in ascending order; none for integers."""
        return BOOKS[self.points]

    @property
    def is_float(self) -> bool:
        """Whether the points are so many that they are computed: of E4M3, to which numbers are rounded, ties to even."""
        return self.points == "e4m3"

    @property
    def bounds(self) -> tuple[float, ...]:
        """The numbers between neighbours of the book, rounded to fp32. One on a bound goes to the lower point."""
        book = self.book
        return tuple(struct.unpack("f", struct.pack("f", (a + b) / 2))[0] for a, b in itertools.pairwise(book))

    @property
    def largest(self) -> float:
        """The largest point of the book, and minus the smallest one."""
        return self.book[-1]

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def widest(self) -> int:
        """The widest range that a search by squared error tries, in hundredths of the one that spans the group's weights.

        A symmetric grid has ``2^(bits−1)`` steps on one side of 0 and one fewer on the other. A search puts the longer side where the
        largest weight is; its scale is negative if that weight is positive. At 100, ±reach in ``max_code`` steps, a weight as large on
        the other side is half a step off. It is a point of the widest grid; the largest weight is one at 100 · (1 − 2^−bits).
        """
        if self.is_float:
            return 100
        if self.book:
            return WIDEST_BOOK
        return -(-100 * self.max_code // (self.max_code - 1)) if self.symmetric else 100

    @property
    def both_sides(self) -> bool:
        """Whether a search also tries to put the longer side where the largest weight is not. At 2 bits, with one step on the other side,
        KL fell by 2 to 10 % in every run; at 3 and 4 bits the changes had both signs, and the search takes twice as long."""
        return self.symmetric and self.bits == 2 and not self.book

    @property
    def tried(self) -> tuple[int, ...]:
        """The ranges that a search by squared error tries, the widest first; negative ones have the other side longer."""
        parts = tuple(range(self.widest, SMALLEST_TRIED - 1, -1))
        return (*parts, *(-part for part in parts)) if self.both_sides else parts

    @property
    def parts(self) -> tuple[int, ...]:
        """The ranges that a search by the loss in a group tries. Errors of a group's first columns widen its last ones.

        It begins on either side of the likely best one, so that others are soon seen to be worse. Then come those ± each of ``REFINED``
        around the best one of each row.
        """
        return *SOLVED, max(132, self.widest)

    @property
    def solved(self) -> tuple[int, ...]:
        """The same with those that have the other side longer, which are negative."""
        return (*self.parts, *(-part for part in self.parts)) if self.both_sides else self.parts


@dataclass(frozen=True, slots=True)
class GroupGrid:
    """Scales and zero points of the groups of k columns.

    scale, zero: [..., g, m] in the working dtype. group: int32 [..., k], the group of each column.
    find: scale and zero are not known yet. The kernel finds them from the corrected weights when it reaches a group's first
        column; groups must then be consecutive runs of k / g columns.
    """

    spec: GridSpec
    scale: Tensor
    zero: Tensor
    group: Tensor
    find: bool

    def each(self) -> Iterator[GroupGrid]:
        """The grid of each matrix of a batch."""
        for scale, zero, group in zip(self.scale, self.zero, self.group, strict=True):
            yield GroupGrid(self.spec, scale, zero, group, self.find)
