"""Scales that are tuned by gradients, while codes and zero points stay.

A scale is ``s₀ · exp(t)``, rounded to the format's significant bits; ``t`` starts at 0. The gradient passes the rounding unchanged
(Bengio et al. 2013, arXiv 1308.3432), since a step of the optimizer is smaller than one of the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigq.kernels.dequantize import dequantize
from bigq.kernels.grid import round_scale
from bigq.kernels.pick import piece
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme

#: Adam's decay rates of both moments. The second is short, as there are only some tens of steps.
DECAY, SQUARE_DECAY = 0.9, 0.95
#: The loss over all rows is measured after each of so many parts of the steps.
MEASURED = 2
#: ``t`` stays within ±REACH: a scale at most halves or doubles.
REACH = 0.69
#: The largest scale: fp16's largest number of 7 significant bits, so that no rounding gives Inf.
LARGEST = 65024.0


class _Dequantize(torch.autograd.Function):
    """``dequantize`` with a gradient for the scales. Only codes and zero points are kept for it: one byte a weight."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, codes: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(codes, zeros)
        return dequantize(codes, scales, zeros, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        codes, zeros = ctx.saved_tensors
        return scale_gradient(gradients[0], codes, zeros), None, None, None


def scale_gradient(gradient: Tensor, codes: Tensor, zeros: Tensor) -> Tensor:
    """The gradient of scales [m, G] from that of the weight [m, n]: ``Σ gradient · (code − zero)`` over a group. fp32."""
    m, n = codes.shape
    groups = zeros.shape[1]
    found = torch.empty(m, groups, device=codes.device)
    rows = max(1, piece(on_gpu=codes.is_cuda) // n)
    for lo in range(0, m, rows):
        part = codes[lo : lo + rows].reshape(-1, groups, n // groups).float()
        part -= zeros[lo : lo + rows, :, None].float()
        part *= gradient[lo : lo + rows].reshape(part.shape)
        found[lo : lo + rows] = part.sum(-1)
    return found


class TunedScales:
    """The scales of one quantized Linear. tuned: ``t`` [m, G] in fp32, and Adam's two moments of it."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self._weight = weight
        self._start = weight.scales.float()
        self.tuned = torch.zeros_like(self._start).requires_grad_()
        self._mean, self._square = torch.zeros_like(self._start), torch.zeros_like(self._start)
        self._kept = weight.scales

    def value(self, dtype: torch.dtype) -> Tensor:
        """The weight [m, n] with the scales as they are now, differentiable by ``tuned``."""
        made: Tensor = _Dequantize.apply(  # type: ignore[no-untyped-call]
            self._scales(), self._weight.codes, self._weight.zeros, dtype
        )
        return made

    def step(self, gradient: Tensor, number: int, rate: float) -> None:
        """One step of Adam. number: of the step, from 1. rate: the length of a step of ``tuned``."""
        self._mean.lerp_(gradient, 1 - DECAY)
        self._square.lerp_(gradient.square(), 1 - SQUARE_DECAY)
        mean, square = self._mean / (1 - DECAY**number), self._square / (1 - SQUARE_DECAY**number)
        with torch.no_grad():
            # Groups without a gradient, as those of dead inputs, stay where they are.
            self.tuned -= rate * torch.where(square > 0, mean / square.sqrt(), 0.0)
            self.tuned.clamp_(-REACH, REACH)

    def keep(self) -> None:
        """Keep the scales as they are now: ``best`` has the ones that were kept last, at first the given ones."""
        with torch.no_grad():
            self._kept = self._scales().to(torch.float16)

    def best(self) -> Tensor:
        """fp16 [m, G]."""
        return self._kept

    def _scales(self) -> Tensor:
        exact = (self._start * self.tuned.exp()).clamp(-LARGEST, LARGEST)
        rounded = rounded_scales(exact.detach(), self._weight.scheme)
        return exact + (rounded - exact).detach() if exact.requires_grad else rounded


def rounded_scales(scales: Tensor, scheme: QuantScheme) -> Tensor:
    """Scales as the format stores them, in fp32."""
    return round_scale(scales, scheme.grid.scale_bits)


def relative_loss(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over tokens of ``‖output − target‖² / ‖target‖²`` in fp32, and how many tokens that are: those whose values are all finite.

    output, target: [..., d]. A block's outputs are normalised before they are used, so a token's error counts relative to its size.
    """
    sound = torch.isfinite(output).all(-1, keepdim=True) & torch.isfinite(target).all(-1, keepdim=True)
    target = torch.where(sound, target, 0).float()
    error = torch.where(sound, output, 0).float() - target
    size = target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (error.square().sum(-1) / size).sum(), sound.sum()


def rate_at(step: int, steps: int, first: float) -> float:
    """The rate of step 0, 1, …: it falls in a straight line, to 0 behind the last one."""
    return first * (1 - step / steps)


def order_of(batches: int, steps: int, seed: int) -> Sequence[int]:
    """Which batch each step uses: all of them in a random order, again and again. The same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < steps:
        found += torch.randperm(batches, generator=generator).tolist()
    return found[:steps]
