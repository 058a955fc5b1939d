"""A Linear's quantized weight. Shapes: m output features, n input features, G groups along the inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.kernels.dequantize import dequantize
from bigq.nested_scales import NestedScales
from bigq.scheme import QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A Linear's weight as codes, scales and zero points.

    codes: uint8 [m, n]. scales: fp16 [m, G], fp32 in the forms "nested" and "block". zeros: uint8 [m, G]; 0 with a codebook.
    nested: how the scales are stored, where the scheme's form of scales is "nested".
    loss: Σ over rows of (w−q)ᵀ·H·(w−q), with the damped Hessian that was factored. For round-to-nearest,
        which has no Hessian, H is the identity.
    energy: the same quadratic form of w itself, so that ``loss / energy`` is the relative output error. Where there
        are more than 128 rows, GPTQ estimates it from at most 128 evenly spaced ones.
    damping: the damping that the factorization took (the scheme's, or a step up the ladder).
    dead_inputs: inputs that were 0 in every calibration token. Their weights are rounded to nearest.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: QuantScheme
    loss: float
    energy: float
    damping: float
    dead_inputs: int = 0
    nested: NestedScales | None = None

    @property
    def relative_error(self) -> float:
        return self.loss / self.energy if self.energy > 0 else 0.0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [m, n] that a reader of the codes sees: computed in fp32, rounded once to ``dtype``."""
        return dequantize(self.codes, self.scales, self.zeros, dtype, self.scheme.points)
