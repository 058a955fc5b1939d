"""The mean square of each input of a Linear: the diagonal of its Hessian, halved."""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.finiteness import is_finite
from bigq.kernels.syrk import CHUNK_TOKENS
from bigq.solver.hessian import LEAVE_OUT, OTHER_DTYPE, Reduction, finite_tokens


class InputSquares:
    """Accumulates Σx² over batches of activations, fp32 [n].

    finite_only: leave out tokens with NaN or Inf. tokens: number of tokens added. left_out: number of tokens left out.
    """

    def __init__(self, n: int, device: torch.device, *, finite_only: bool = False) -> None:
        self._sum = torch.zeros(n, dtype=torch.float32, device=device)
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
            self._sum += part.float().square().sum(0)

    def reduce(self, reduction: Reduction) -> None:
        """Add up the shares of all processes: sums and numbers of tokens."""
        reduction.tensor_(self._sum)
        self.tokens, self.left_out = reduction.number(self.tokens), reduction.number(self.left_out)

    def finish(self, name: str = "the Linear") -> Tensor:
        """The means, [n]; 0 where no token was there to be added. Raises NumericsError, naming ``name``, if they are not finite."""
        if not self.tokens and self.left_out:
            raise NumericsError(f"{name}: the calibration inputs of all tokens contain NaN or Inf; {OTHER_DTYPE}")
        if not is_finite(self._sum):
            raise NumericsError(f"{name}: squares of its calibration inputs are not finite (NaN or Inf); {OTHER_DTYPE}, or {LEAVE_OUT}")
        return self._sum / max(1, self.tokens)
