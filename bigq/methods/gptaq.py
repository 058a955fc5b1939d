"""GPTQ with upstream error correction (Li et al. 2025, "GPTAQ", arXiv 2504.02692): see ``bigq.solver.upstream_error``."""

from __future__ import annotations

import torch
from torch import Tensor

from bigq.methods.base import CalibratedMethod, Scaling
from bigq.methods.gptq import Gptq, HessianSolver
from bigq.solver.hessian import HessianSum, Reduction
from bigq.solver.upstream_error import Correction, CrossSum


class Gptaq(CalibratedMethod):
    """``--method gptaq``. alpha: the strength of the correction, 0 to 1."""

    name = "gptaq"
    title = "GPTQ with asymmetric calibration, GPTAQ"
    passes = 2
    error_meaning = (
        "Relative errors of outputs on the calibration text (squared norms), against the weights corrected for the upstream error: "
        "‖(W* − Q)X‖² / ‖W*X‖². W* is the weight corrected for the upstream error in X; an output head is not corrected."
    )

    def __init__(self, alpha: float, scaling: Scaling | None = None) -> None:
        self.alpha = alpha
        self.scaling = scaling

    def collector(self, n: int, device: torch.device, *, finite_only: bool) -> CrossCollector:
        return CrossCollector(n, device, self.alpha, finite_only=finite_only)

    def for_head(self) -> Gptq:
        """GPTQ: unquantized rows are not kept after the last block, so the head is solved with its Hessian alone."""
        return Gptq()


class CrossCollector:
    """Accumulates the Hessian of one input, and its product with the upstream error."""

    def __init__(self, n: int, device: torch.device, alpha: float, *, finite_only: bool) -> None:
        self._alpha = alpha
        self._hessian = HessianSum(n, device, finite_only=finite_only)
        self._cross = CrossSum(n, device, finite_only=finite_only)

    @property
    def left_out(self) -> int:
        return self._hessian.left_out

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        if reference is None:
            raise TypeError("gptaq needs the inputs of the unquantized model")
        self._hessian.add(x)
        self._cross.add(reference, x)

    def reduce(self, reduction: Reduction) -> None:
        self._hessian.reduce(reduction)
        self._cross.reduce(reduction)

    def finish(self, label: str) -> HessianSolver:
        tokens = self._hessian.tokens
        h = self._hessian.finish(label)
        return HessianSolver(h, Correction(self._cross.finish(tokens, label), self._alpha))
