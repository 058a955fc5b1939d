"""Rotated weights, as tensors of a checkpoint that are decoded as they are read (``bigq.io.index.Decoder``).

Notation: a vector x of the residual stream becomes x · Q, the values v of an attention head become v · U. A Linear y = x · Wᵀ + b that
reads the stream behind a norm of weight g gets W · diag(g) · Q; one that writes to it gets Qᵀ · W and b · Q. Everything is computed in
fp32 on the device of the parts, and rounded to the weight's dtype once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.precision import fp32_products
from bigq.model.rotation.matrices import Rotation

#: Numbers of a weight that are in fp32 at a time.
PIECE = 2**22
#: The largest error of a product with a rotated weight, relative to its norm: many times that of fp32, far below that of a wrong weight.
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Side:
    """How the inputs or the outputs of a weight are turned. heads: 0 turns all of them at once; else that many heads, from ``first`` on."""

    rotation: Rotation
    first: int = 0
    heads: int = 0

    def turn(self, x: Tensor, dim: int = -1) -> Tensor:
        """x with a dimension turned."""
        return self.rotation.turn(x, dim) if not self.heads else self._heads(x, dim, back=False)

    def back(self, x: Tensor, dim: int = -1) -> Tensor:
        """What ``turn`` made of x, undone."""
        return self.rotation.back(x, dim) if not self.heads else self._heads(x, dim, back=True)

    def _heads(self, x: Tensor, dim: int, *, back: bool) -> Tensor:
        dim %= x.ndim
        width = self.heads * self.rotation.size
        before, own, after = x.split([self.first, width, x.shape[dim] - self.first - width], dim)
        heads = own.unflatten(dim, (self.heads, self.rotation.size))
        heads = self.rotation.back(heads, dim + 1) if back else self.rotation.turn(heads, dim + 1)
        return torch.cat([before, heads.flatten(dim, dim + 1), after], dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turned:
    """A matrix [m, n] made of the stored one and, if it reads behind a norm, of that norm's weight [n].

    name: of the matrix, for errors. inputs, outputs: how its dimensions are turned. offset: what the norm adds to its weight (gemma's:
    1).
    """

    name: str
    inputs: Side | None = None
    outputs: Side | None = None
    offset: float = 0.0

    @property
    def by_rows(self) -> bool:
        """Whether each row is made of the same row of the stored matrix."""
        return self.outputs is None

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Raises NumericsError where a product with it differs from the one that it must give."""
        with fp32_products(parts[0], tf32=False):
            return self._decoded(parts, dtype)

    def _decoded(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        weight, *norm = parts
        scale = norm[0].float() + self.offset if norm else None
        turned = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        x = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
        z = x if self.inputs is None else self.inputs.back(x)
        z = z if scale is None else z * scale
        expected, found = torch.zeros(2, weight.shape[0], device=weight.device)
        for rows, columns, piece_of in self._pieces(*weight.shape):
            piece = weight[rows, columns].float()
            expected[rows] += piece @ z[columns]
            piece = piece_of._turned(piece, None if scale is None else scale[columns])
            found[rows] += piece @ x[columns]
            turned[rows, columns] = piece
        expected = expected if self.outputs is None else self.outputs.turn(expected)
        error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        if not error <= TOLERANCE:
            raise NumericsError(
                f"{self.name}: its rotated weight gives other products than it must, by {error:.1e} of their norm; check the device, or "
                "leave out --rotate"
            )
        return turned

    def _turned(self, weight: Tensor, scale: Tensor | None) -> Tensor:
        weight = weight if scale is None else weight * scale
        weight = weight if self.inputs is None else self.inputs.turn(weight, 1)
        return weight if self.outputs is None else self.outputs.turn(weight, 0)

    def _pieces(self, m: int, n: int) -> Iterator[tuple[slice, slice, Turned]]:
        """Parts of a matrix [m, n] that are turned apart, and how each is: rows, or columns where all rows are turned at once."""
        every = slice(None)
        if self.outputs is None or self.outputs.heads:
            for lo, hi, side in _parts(self.outputs, m, n):
                yield slice(lo, hi), every, dataclasses.replace(self, outputs=side)
        elif self.inputs is None or self.inputs.heads:
            for lo, hi, side in _parts(self.inputs, n, m):
                yield every, slice(lo, hi), dataclasses.replace(self, inputs=side)
        else:
            yield every, every, self


def _parts(side: Side | None, length: int, across: int) -> Iterator[tuple[int, int, Side | None]]:
    """Ranges of a dimension of so many rows, each of so many numbers, and how each is turned. side: turns heads, or nothing."""
    step = max(1, PIECE // across)
    first, last = (length, length) if side is None else (side.first, side.first + side.heads * side.rotation.size)
    for begin, end in ((0, first), (last, length)):
        yield from ((lo, min(lo + step, end), None) for lo in range(begin, end, step))
    if side is not None:
        size = side.rotation.size
        step = size * max(1, step // size)
        for lo in range(first, last, step):
            hi = min(lo + step, last)
            yield lo, hi, Side(side.rotation, 0, (hi - lo) // size)


@dataclass(frozen=True, slots=True)
class TurnedVector:
    """A bias, or one row for each expert, that is added to what a Linear returns: turned as its outputs are."""

    side: Side

    @property
    def by_rows(self) -> bool:
        return False

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return self.side.turn(parts[0].float()).to(dtype)


@dataclass(frozen=True, slots=True)
class Neutral:
    """The weight of a norm that others have taken over: 1 − offset everywhere, with which the norm only normalizes."""

    offset: float

    @property
    def by_rows(self) -> bool:
        return False

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.full_like(parts[0], 1.0 - self.offset, dtype=dtype)
