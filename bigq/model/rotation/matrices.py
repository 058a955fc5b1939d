"""Orthogonal matrices that spread every coordinate over all others: random signs, then a Kronecker product of small Hadamard matrices.

Of a size 2^k · m with m odd, the product is one of Sylvester's matrices and, for m > 1, one matrix of m · 2^j rows: Paley's, where a prime
of the right kind exists (12, 20, 28, 36, 60, …, such as 576 = 16 · 36), or else the discrete Hartley transform of m rows, which is
orthogonal too, though its entries differ by up to a factor of √2 from the mean.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: The largest power of two that is one factor; larger ones are split, since a product of factors takes fewer operations.
_SYLVESTER = 64
#: The largest of Paley's matrices that is used. A larger factor takes more time and spreads no better.
_PALEY = 512


@dataclass(frozen=True, slots=True)
class Rotation:
    """The orthogonal matrix Q [size, size] of a seed: Q = diag(±1) · (F₁ ⊗ F₂ ⊗ …) / √size."""

    size: int
    seed: int

    def turn(self, x: Tensor, dim: int = -1) -> Tensor:
        """x · Q along a dimension, in x's dtype: of vectors v in that dimension, v · Q."""
        shape = [1] * x.ndim
        shape[dim] = self.size
        return self._product(x * self._signs(x).reshape(shape), dim, transposed=False)

    def back(self, x: Tensor, dim: int = -1) -> Tensor:
        """x · Qᵀ along a dimension, which undoes ``turn``."""
        shape = [1] * x.ndim
        shape[dim] = self.size
        return self._product(x, dim, transposed=True) * self._signs(x).reshape(shape)

    def matrix(self) -> Tensor:
        """Q itself, fp64."""
        return self.turn(torch.eye(self.size, dtype=torch.float64))

    def _signs(self, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (self.size,), generator=generator) * 2 - 1
        return signs.to(device=like.device, dtype=like.dtype)

    def _product(self, x: Tensor, dim: int, *, transposed: bool) -> Tensor:
        dim %= x.ndim
        before, after = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
        y, left = x, before
        right = self.size * after
        for name, n in factors(self.size):
            f = _factor(name, n).to(device=x.device, dtype=x.dtype)
            right //= n
            f = f.T if transposed else f
            y = torch.matmul(f.T, y.reshape(left, n, right)) if right > 1 else y.reshape(left, n) @ f
            left *= n
        return y.reshape(x.shape)


@functools.cache
def factors(size: int) -> tuple[tuple[str, int], ...]:
    """The factors of a size: the kind of each and its number of rows. Their product is the size."""
    twos = size & -size
    odd = size // twos
    found: list[tuple[str, int]] = []
    if odd > 1:
        kind, rows = _odd_factor(odd, twos)
        found.append((kind, rows))
        twos //= rows // odd
    while twos > 1:
        rows = min(twos, _SYLVESTER)
        found.insert(0, ("sylvester", rows))
        twos //= rows
    return tuple(found) or (("sylvester", 1),)


def _odd_factor(odd: int, twos: int) -> tuple[str, int]:
    rows = 2 * odd
    while rows <= min(_PALEY, odd * twos):
        if _is_prime(rows - 1) and rows % 4 == 0:
            return "paley", rows
        if _is_prime(rows // 2 - 1) and rows % 8 == 4:
            return "paley double", rows
        rows *= 2
    return "hartley", odd


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


@functools.cache
def _factor(kind: str, n: int) -> Tensor:
    """A factor divided by √n, fp64."""
    if kind == "sylvester":
        return _sylvester(n) / math.sqrt(n)
    if kind == "hartley":
        angles = 2 * math.pi / n * (torch.outer(torch.arange(n), torch.arange(n)) % n).double()
        return (angles.cos() + angles.sin()) / math.sqrt(n)
    return (_paley(n) if kind == "paley" else _paley_double(n)) / math.sqrt(n)


def _sylvester(n: int) -> Tensor:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(matrix, two)
    return matrix


def _paley(n: int) -> Tensor:
    """Paley's first construction, for a prime q = n − 1 with q ≡ 3 (mod 4): I + S, S antisymmetric."""
    return torch.eye(n, dtype=torch.float64) + _bordered(n - 1, -1.0)


def _paley_double(n: int) -> Tensor:
    """Paley's second construction, for a prime q = n/2 − 1 with q ≡ 1 (mod 4), from the symmetric S."""
    q = n // 2 - 1
    off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    on = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(_bordered(q, 1.0), off) + torch.kron(torch.eye(q + 1, dtype=torch.float64), on)


def _bordered(q: int, corner: float) -> Tensor:
    """S [q + 1, q + 1]: 0 and a border of ones around the quadratic characters of i − j (mod q). corner: the sign of the first column."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    rows = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, corner
    matrix[1:, 1:] = character[(rows[:, None] - rows[None, :]) % q]
    return matrix
