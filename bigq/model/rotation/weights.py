"""Rotated weights, as tensors of a checkpoint that are decoded as they are read (``bigq.io.index.Decoder``).

Notation: a vector x of the residual stream becomes x · Q, the values v of an attention head become v · U. A Linear y = x · Wᵀ + b that
reads the stream behind a norm of weight g gets W · diag(g) · Q; one that writes to it gets Qᵀ · W and b · Q. Everything is computed in
fp32 on the device of the parts, and rounded to the weight's dtype once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.model.rotation.matrices import Rotation

#: Numbers of a weight that are in fp32 at a time.
PIECE = 2**24
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

    name: of the matrix, for errors. inputs, outputs: how its dimensions are turned. offset: is added to the norm's weight, as norms of gemma
    add 1. transposed: whether it is stored as [n, m].
    """

    name: str
    inputs: Side | None = None
    outputs: Side | None = None
    offset: float = 0.0
    transposed: bool = False

    @property
    def by_rows(self) -> bool:
        """Whether each row is made of the same row of the stored matrix."""
        return self.outputs is None and not self.transposed

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Raises NumericsError where a product with it differs from the one that it must give."""
        stored, *norm = parts
        weight = stored.T if self.transposed else stored
        scale = norm[0].float() + self.offset if norm else None
        turned = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        x = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
        z = x if self.inputs is None else self.inputs.back(x)
        z = z if scale is None else z * scale
        expected, found = torch.zeros(2, weight.shape[0], device=weight.device)
        for rows, columns in self._pieces(weight):
            piece = weight[rows, columns].float()
            expected[rows] += piece @ z[columns]
            piece = self._turned(piece, None if scale is None else scale[columns])
            found[rows] += piece @ x[columns]
            turned[rows, columns] = piece
        expected = expected if self.outputs is None else self.outputs.turn(expected)
        error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        if not error <= TOLERANCE:
            raise NumericsError(
                f"{self.name}: its rotated weight gives other products than it must, by {error:.1e} of their norm; check the device, or leave "
                "out --rotate"
            )
        return turned.T.contiguous() if self.transposed else turned

    def _turned(self, weight: Tensor, scale: Tensor | None) -> Tensor:
        weight = weight if scale is None else weight * scale
        if self.inputs is not None:
            inputs = self.inputs
            if inputs.heads and weight.shape[1] < inputs.heads * inputs.rotation.size:
                inputs = Side(inputs.rotation, 0, weight.shape[1] // inputs.rotation.size)
            weight = inputs.turn(weight, 1)
        return weight if self.outputs is None else self.outputs.turn(weight, 0)

    def _pieces(self, weight: Tensor) -> Iterator[tuple[slice, slice]]:
        """Parts of a matrix [m, n] that are turned apart: rows, columns (of whole heads), or all of it."""
        m, n = weight.shape
        every = slice(None)
        if self.outputs is None:
            step = max(1, PIECE // n)
            yield from ((slice(lo, lo + step), every) for lo in range(0, m, step))
        elif not self.outputs.heads and (self.inputs is None or self.inputs.heads * self.inputs.rotation.size == n):
            unit = 1 if self.inputs is None else self.inputs.rotation.size
            step = unit * max(1, PIECE // (m * unit))
            yield from ((every, slice(lo, lo + step)) for lo in range(0, n, step))
        else:
            yield every, every


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
