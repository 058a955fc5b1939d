"""The Hessian of a Linear's output error, and its factor.

With calibration inputs X [T, n], ``H = 2/T · XᵀX`` [n, n]. Linears with the same input share one Hessian and one factor. The
factor is immutable, so a shared H is damped and permuted only once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.cholesky import SHARED_FROM, Sharing, upper_cholesky_, upper_cholesky_shared_
from bigq.kernels.finiteness import is_finite
from bigq.kernels.syrk import CHUNK_TOKENS, syrk_
from bigq.kernels.triangles import mirror_, permute_, restore_upper_
from bigq.vocabulary import OrderName

#: If the factorization fails, damping is multiplied by 10, up to 1; up to 10, 100, … if the mean square of all inputs is that much larger
#: than the usual one.
LADDER_FACTOR = 10.0
LADDER_TOP = 1.0
#: One input in so many may be an outlier, whose square is no measure for the others.
OUTLIERS = 20

#: Advice in messages: about values that overflow, and about a Linear that cannot be solved.
OTHER_DTYPE = "use another --dtype (bfloat16 has more range than float16)"
LEAVE_OUT = "leave this Linear unquantized with --skip or --on-nonfinite skip"


def finite_tokens(x: Tensor) -> Tensor:
    """Which tokens of activations [..., n] contain neither NaN nor Inf: bool [...].

    Like ``is_finite``, it checks the minimum and maximum and needs no mask as large as x. For 2048 × 2816 values on two CPU cores
    this takes 0.5 ms (fp32) to 2.4 ms (bf16), ``isfinite(x).all(-1)`` takes 14 ms.
    """
    return torch.isfinite(x.amin(-1)) & torch.isfinite(x.amax(-1))


def usual_square(squares: Tensor) -> float:
    """The mean of those that are not 0, without the largest twentieth; 1 if all are 0. Damping is a fraction of it.

    With the mean of all, 4 of 256 inputs that are 32 to 64 times larger than the others would damp these by 0.2 to 0.6 of their own square
    where 0.01 was asked for.
    """
    live = squares[squares != 0].double().sort().values  # in fp64: a sum of large fp32 numbers may overflow
    return float(live[: len(live) - len(live) // OUTLIERS].mean()) if len(live) else 1.0


class Reduction(Protocol):
    """Adds up what several processes have accumulated."""

    def tensor_(self, share: Tensor) -> None:
        """Replace this process's share by the sum over all processes, in place."""

    def triangle_(self, share: Tensor) -> None:
        """The same for the upper triangle of a matrix [n, n]; the rest is not used."""

    def dealt_triangles_(self, share: Tensor) -> None:
        """Of matrices [k, n, n], each process gets the sums of some. The others are not used any more."""

    def number(self, share: int) -> int:
        """The sum over all processes."""

    def numbers(self, shares: Sequence[int]) -> list[int]:
        """The sums over all processes of several numbers."""

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows [k, …] of all processes, in their order."""

    def largest_(self, share: Tensor) -> None:
        """Replace each element of this process's share by the largest over all processes, in place."""


@dataclass(frozen=True, slots=True)
class Order:
    """The order in which columns are quantized. name: see ``QuantScheme.order``. width: inputs per group, for the order "group"."""

    name: OrderName
    width: int

    def permutation(self, diagonal: Tensor) -> Tensor | None:
        """int64 [n] for the Hessian's diagonal [n]; None for the natural order."""
        if self.name == "natural":
            return None
        if self.name == "activation" or self.width == len(diagonal):
            return torch.argsort(diagonal, descending=True, stable=True)
        # Groups by the sum of their columns, and the columns inside each.
        grouped = diagonal.view(-1, self.width)
        groups = torch.argsort(grouped.double().sum(1), descending=True, stable=True)
        inside = torch.argsort(grouped[groups], dim=1, descending=True, stable=True)
        return (groups[:, None] * self.width + inside).flatten()


#: Orders that do not depend on groups.
NATURAL, ACTIVATION = Order("natural", 0), Order("activation", 0)


class HessianSum:
    """Accumulates XᵀX over batches of activations, upper triangle only, in one fp32 buffer.

    finite_only: leave out tokens with NaN or Inf. This synchronizes with the device once per batch. Otherwise nothing is checked, and
        such tokens make the sum NaN or Inf.
    into: the buffer, zeros [n, n]; by default one of its own.
    tokens: number of tokens added. left_out: number of tokens left out.
    """

    def __init__(self, n: int, device: torch.device, *, finite_only: bool = False, into: Tensor | None = None) -> None:
        self._sum = torch.zeros(n, n, dtype=torch.float32, device=device) if into is None else into
        self._finite_only = finite_only
        self.tokens = 0
        self.left_out = 0

    def add(self, x: Tensor) -> None:
        """Add activations [..., n] of any floating type."""
        rows = x.reshape(-1, x.shape[-1])
        if self._finite_only and not is_finite(rows):
            self._add_finite(rows)
            return
        syrk_(self._sum, rows)
        self.tokens += rows.shape[0]

    def _add_finite(self, rows: Tensor) -> None:
        """Add the finite tokens of [tokens, n]. The others are set to 0 in copies of ``CHUNK_TOKENS`` tokens."""
        keep = finite_tokens(rows)
        kept = int(keep.sum())
        if kept:
            for part, mask in zip(rows.split(CHUNK_TOKENS), keep.split(CHUNK_TOKENS), strict=True):
                syrk_(self._sum, part.masked_fill(~mask[:, None], 0))
        self.tokens += kept
        self.left_out += rows.shape[0] - kept

    def reduce(self, reduction: Reduction) -> None:
        """Add up the shares of all processes: sums and numbers of tokens."""
        reduction.triangle_(self._sum)
        self.tokens, self.left_out = reduction.number(self.tokens), reduction.number(self.left_out)

    def finish(self, name: str = "the Linear") -> Tensor:
        """``2/T · XᵀX`` as a full symmetric matrix, in the accumulator's storage. This object cannot be used afterwards.

        Where no token was there to be added, as for the adapter of another language, it is 0: every input is dead.
        Raises NumericsError, naming ``name``, if all tokens were left out.
        """
        h = self.scaled(name)
        mirror_(h)
        return h

    def scaled(self, name: str) -> Tensor:
        """``finish``, but only the upper triangle."""
        if not self.tokens and self.left_out:
            raise NumericsError(f"{name}: the calibration inputs of all tokens contain NaN or Inf; {OTHER_DTYPE}")
        h = self._sum
        del self._sum
        return h.mul_(2.0 / max(1, self.tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """``H' = R·Rᵀ``, where H' is H damped and permuted by ``perm``.

    r: [n, n], R in the upper triangle. Below it is H', which the factorization does not overwrite.
    perm: the order in which columns are quantized, int64 [n], or None for the natural order.
    dead_inputs: inputs that were 0 in every token, so that their row of H is 0.
    damping: the fraction of the usual square of the other inputs (``usual_square``) that was added to the diagonal.
    """

    r: Tensor
    perm: Tensor | None
    dead_inputs: int
    damping: float


def factorize(h: Tensor, *, order: Order, damping: float, name: str = "the Linear", sharing: Sharing | None = None) -> Factor:
    """Factor a symmetric H [n, n] (fp32 or fp64) in its own storage; the caller must not use h afterwards.

    Damping is a fraction of a live input's usual square (``usual_square``), so the factor of c·H is √c times that of H. In H' a dead input
    has only the damping on its diagonal: it is corrected for no other input and corrects none, so its weights are rounded to nearest. An
    input that was nearly always 0 is treated in nearly the same way.
    If the factorization fails, damping is raised and it is repeated. Raises NumericsError, naming ``name``, if H is not finite or
    not positive definite even with the highest damping.
    sharing: processes that have the same h. They factor it together if it is large.
    """

    def cholesky_(h: Tensor) -> bool:
        return upper_cholesky_(h) if sharing is None or len(h) < SHARED_FROM else upper_cholesky_shared_(h, sharing)

    undamped = Undamped.of(h, order=order, name=name)
    undamped.damp_(h, damping)
    return undamped.factor(h, damping, name, done=cholesky_(h), cholesky_=cholesky_)


@dataclass(frozen=True, slots=True, kw_only=True)
class Undamped:
    """What is kept of a Hessian while it is damped and factored in its own storage.

    diagonal: [n], permuted. perm: as in ``Factor``. live: inputs that are not dead. usual: what damping is a fraction of. top: the highest.
    """

    diagonal: Tensor
    perm: Tensor | None
    live: int
    usual: float
    top: float

    @classmethod
    def of(cls, h: Tensor, *, order: Order, name: str) -> Undamped:
        """Look at a symmetric h [n, n], and permute it if asked to. Raises NumericsError if it is not finite."""
        diagonal = h.diagonal()
        if not bool(torch.isfinite(diagonal).all()):
            raise NumericsError(
                f"{name}: the calibration inputs contain NaN or Inf, or their squares overflow (NaN or Inf in the Hessian); "
                f"{OTHER_DTYPE}, or leave out such tokens with --on-nonfinite skip"
            )
        live = int((diagonal != 0).sum())
        usual = usual_square(diagonal)
        above = float(diagonal.double().sum()) / max(1, live) / usual
        top = LADDER_TOP * LADDER_FACTOR ** max(0, math.floor(math.log(above, LADDER_FACTOR))) if above > 1 else LADDER_TOP
        perm = order.permutation(diagonal)
        if perm is not None:
            permute_(h, perm)
        return cls(diagonal=h.diagonal().clone(), perm=perm, live=live, usual=usual, top=top)

    def damp_(self, h: Tensor, damping: float) -> None:
        """Set the diagonal to the damped one."""
        h.diagonal().copy_(self.diagonal + damping * self.usual)

    def factor(self, h: Tensor, damping: float, name: str, *, done: bool, cholesky_: Callable[[Tensor], bool] = upper_cholesky_) -> Factor:
        """The factor, with more damping where an attempt failed. damping: of the first attempt, which was made. done: whether it succeeded.
        cholesky_: makes another attempt.

        Raises NumericsError if h is not positive definite even with the highest damping.
        """
        while not done:
            if damping >= self.top:
                raise NumericsError(
                    f"{name}: its Hessian is not positive definite even with damping {damping:g}; "
                    f"use more calibration samples, or {LEAVE_OUT}"
                )
            damping = min(damping * LADDER_FACTOR, self.top)
            restore_upper_(h, self.diagonal)
            self.damp_(h, damping)
            done = cholesky_(h)
        return Factor(r=h, perm=self.perm, dead_inputs=len(h) - self.live, damping=damping)
