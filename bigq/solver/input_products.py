"""Mean products of neighbouring inputs of a Linear: blocks on the diagonal of its Hessian, halved."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.finiteness import is_finite
from bigq.kernels.syrk import CHUNK_TOKENS
from bigq.solver.hessian import LEAVE_OUT, OTHER_DTYPE, Reduction, finite_tokens, usual_square

#: The widest block.
WIDEST = 128


def block_width(n: int) -> int:
    """How many of n inputs make a block: the largest power of two that divides n, up to 128."""
    return math.gcd(n, WIDEST)


class InputProducts:
    """Accumulates Σ x·xᵀ of blocks of b inputs over batches of activations, fp32 [n / b, b, b].

    finite_only: leave out tokens with NaN or Inf. tokens: number of tokens added. left_out: number of tokens left out.
    """

    def __init__(self, n: int, device: torch.device, *, finite_only: bool = False) -> None:
        self._width = block_width(n)
        self._sum = torch.zeros(n // self._width, self._width, self._width, dtype=torch.float32, device=device)
        self._finite_only = finite_only
        self.tokens = 0
        self.left_out = 0

    def add(self, x: Tensor) -> None:
        """Add activations [..., n] of any floating type."""
        for part in x.reshape(-1, x.shape[-1]).split(CHUNK_TOKENS):
            if self._finite_only and not is_finite(part):
                keep = finite_tokens(part)
                self.left_out += len(part) - int(keep.sum())
                part = part[keep]
            self.tokens += len(part)
            blocks = part.float().view(len(part), len(self._sum), self._width).transpose(0, 1)
            self._sum.baddbmm_(blocks.transpose(1, 2), blocks)

    def reduce(self, reduction: Reduction) -> None:
        """Add up the shares of all processes: sums and numbers of tokens."""
        reduction.tensor_(self._sum)
        self.tokens, self.left_out = reduction.number(self.tokens), reduction.number(self.left_out)

    def finish(self, name: str = "the Linear") -> Tensor:
        """The means, [n / b, b, b], in the memory of the sums; 0 if no token was there to be added.

        Raises NumericsError, naming ``name``, if they are not finite.
        """
        if not self.tokens and self.left_out:
            raise NumericsError(f"{name}: the calibration inputs of all tokens contain NaN or Inf; {OTHER_DTYPE}")
        if not is_finite(self._sum):
            raise NumericsError(f"{name}: products of its calibration inputs are not finite (NaN or Inf); {OTHER_DTYPE}, or {LEAVE_OUT}")
        return self._sum.div_(max(1, self.tokens))


def of_groups(products: Tensor, width: int, damping: float) -> Tensor:
    """The products in each group of ``width`` inputs, [groups, k, c, c]: of k parts of c inputs each. Others count as 0.

    products: [n / b, b, b]. c is the largest width that divides both b and the group's. damping: how much of the usual square of an
    input is added to each, so that few tokens do not decide alone. If all inputs were 0, all count alike.
    """
    count, b, _ = products.shape
    c = math.gcd(b, width)
    squares = products.diagonal(dim1=1, dim2=2)
    products = products.clone()
    products.diagonal(dim1=1, dim2=2).add_(damping * usual_square(squares))
    parts = products.view(count, b // c, c, b // c, c).diagonal(dim1=1, dim2=3)
    return parts.permute(0, 3, 1, 2).reshape(count * b // width, -1, c, c)


def quadratic(errors: Tensor, products: Tensor) -> Tensor:
    """``eᵀ·P·e`` of each group's errors.

    errors: [groups, rows, width]. products: of ``of_groups``. Returns [groups, rows].
    """
    _, parts, c, _ = products.shape
    e = errors.unflatten(-1, (parts, c)).transpose(1, 2)
    total: Tensor = (e @ products).mul_(e).sum((1, 3))
    return total
