"""Scales of a Linear's inputs, which the module before it divides by: weights are multiplied by them before they are quantized.

- AWQ (Lin et al. 2023, arXiv 2306.00978): inputs that are large on average matter most, so their weights are made larger, and with that
  the steps of their groups finer in comparison. The exponent is the one of the least error of the outputs.
- SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): inputs that are large at most are made smaller, so that they can be quantized too.

Notation: a Linear y = x · Wᵀ, W [m, n], becomes y = (x / s) · (W · diag(s))ᵀ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.kernels.grid import grid_for_range, nearest
from bigq.kernels.grid_spec import BLOCK_ROWS
from bigq.kernels.pick import piece
from bigq.scheme import QuantScheme
from bigq.solver.hessian import Reduction
from bigq.solver.settling import of_blocks

#: Tokens that the error of outputs is measured on.
SAMPLED_TOKENS = 256
#: Experts of a bank whose weights decide the scales of its input, evenly spaced.
SAMPLED_EXPERTS = 8
#: An expert with fewer tokens keeps the inputs of its last matrix as they are: on other tokens scales from fewer make larger errors.
LEAST_TOKENS = 32
#: Exponents that are tried: 0, 1/5, … 1, then half and a quarter of a step on either side of the best one.
STEPS = 5
#: So many trials at most.
TRIALS = 2 * (STEPS + 1) + 4
#: Scales are at least this, and at most its reciprocal, so that a weight divided by one stays in the range of fp16.
LEAST = 1e-4


class InputStatistics:
    """What is collected of an input [..., n]: Σ|x|, max |x|, and evenly spaced tokens.

    expected: tokens that will be added, all together, by all processes that share them. Tokens that are not finite are left out.
    """

    def __init__(self, n: int, device: torch.device, expected: int) -> None:
        self._sum = torch.zeros(n, device=device)
        self.largest = torch.zeros(n, device=device)
        self._step = max(1, -(-expected // SAMPLED_TOKENS))
        # One buffer: small ones, made between large ones, would leave holes in the heap.
        self._sampled = torch.empty(min(expected, SAMPLED_TOKENS), n, device=device)
        self.tokens = self._seen = self._filled = 0

    def add(self, x: Tensor) -> None:
        """Add the inputs of a batch."""
        x = x.detach().reshape(-1, x.shape[-1])
        first = -self._seen % self._step
        self._seen += len(x)
        picked = x[first :: self._step]
        finite = torch.isfinite(x).all(-1)
        if not bool(finite.all()):
            x, picked = x[finite], picked[torch.isfinite(picked).all(-1)]
        size = x.abs()
        self._sum += size.sum(0, dtype=torch.float32)
        if len(size):
            torch.maximum(self.largest, size.amax(0).float(), out=self.largest)
        self._sampled[self._filled : self._filled + len(picked)] = picked
        self._filled += len(picked)
        self.tokens += len(x)

    def reduce(self, reduction: Reduction) -> None:
        """Put together what all processes have collected."""
        reduction.tensor_(self._sum)
        reduction.largest_(self.largest)
        self._sampled = reduction.gathered(self.sample)
        self._filled = len(self._sampled)
        self.tokens = reduction.number(self.tokens)

    @property
    def mean(self) -> Tensor:
        """The mean of |x|, [n]."""
        return self._sum.div(max(1, self.tokens))

    @property
    def sample(self) -> Tensor:
        """Some of the tokens, fp32 [t, n]."""
        return self._sampled[: self._filled]


@dataclass(frozen=True, slots=True)
class Reader:
    """A Linear that will read the scaled input. weight: [m, n]."""

    weight: Tensor
    scheme: QuantScheme


def awq_scales(inputs: InputStatistics, readers: Sequence[Reader], channels: Tensor) -> Tensor:
    """The scales of AWQ, fp32 [count]: ``mean |x| ** a``, or that over ``mean |W| ** (1 − a)``, of the best a.

    The error is that of all readers' outputs on sampled tokens, where each weight is rounded to nearest on the grid that spans its group.
    channels: int64 [n], which scale an input takes.
    """
    x = _of_scales(inputs.mean, channels)
    w = _of_scales(_relative_size(readers), channels)
    sample = inputs.sample
    best, chosen = torch.inf, torch.ones_like(x)
    losses: dict[tuple[float, bool], float] = {}

    def attempt(exponent: float, both: bool) -> None:
        nonlocal best, chosen
        if (exponent, both) in losses or not 0 <= exponent <= 1:
            return
        scales = _centred(x.pow(exponent) / (w.pow(1 - exponent) if both else 1))
        losses[exponent, both] = loss = _output_error(scales[channels], readers, sample)
        if loss < best:
            best, chosen = loss, scales

    for both in (False, True):
        for i in range(STEPS + 1):
            attempt(i / STEPS, both)
    for part in (0.5, 0.25):
        middle, both = min(losses, key=losses.__getitem__)
        for offset in (-part, part):
            attempt(middle + offset / STEPS, both)
    return chosen


def smoothquant_scales(inputs: InputStatistics, readers: Sequence[Reader], channels: Tensor, strength: float = 0.5) -> Tensor:
    """The scales of SmoothQuant, fp32 [count]: ``max |x| ** strength / max |W| ** (1 − strength)``.

    Inputs or weights that are always 0 keep their scale.
    """
    x = _most_of_scales(inputs.largest, channels)
    w = _most_of_scales(torch.stack([reader.weight.float().abs().amax(0) for reader in readers]).amax(0), channels)
    scales = x.pow(strength) / w.pow(1 - strength)
    return torch.where((x > 0) & (w > 0), scales, torch.ones_like(scales)).clamp(LEAST, 1 / LEAST)


def powers_of_two(scales: Tensor) -> Tensor:
    """Scales rounded so that products with them are exact."""
    return torch.exp2(torch.round(torch.log2(scales)))


def _relative_size(readers: Sequence[Reader]) -> Tensor:
    """The mean of |w| over the largest weight of its group, over the rows of all readers: [n]."""
    total, rows = torch.zeros(readers[0].weight.shape[1], device=readers[0].weight.device), 0
    for reader in readers:
        m, n = reader.weight.shape
        width = reader.scheme.group_width(n)
        for part in reader.weight.split(max(1, piece(on_gpu=reader.weight.is_cuda) // n)):
            size = part.float().abs().view(len(part), -1, width)
            total += (size / size.amax(-1, keepdim=True).clamp(min=1e-12)).view(len(part), n).sum(0)
        rows += m
    return total / rows


def _of_scales(values: Tensor, channels: Tensor) -> Tensor:
    """The means over the inputs of each scale, above 0."""
    count = int(channels.max()) + 1
    sums = torch.zeros(count, device=values.device).index_add_(0, channels, values)
    return (sums / torch.bincount(channels, minlength=count)).clamp(min=LEAST)


def _most_of_scales(values: Tensor, channels: Tensor) -> Tensor:
    count = int(channels.max()) + 1
    return torch.zeros(count, device=values.device).scatter_reduce_(0, channels, values, "amax")


def _centred(scales: Tensor) -> Tensor:
    """Scales whose largest and smallest are each other's reciprocals: a factor of all of them changes nothing."""
    scales = scales.clamp(min=LEAST)
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(LEAST, 1 / LEAST)


def _output_error(scales: Tensor, readers: Sequence[Reader], sample: Tensor) -> float:
    """``Σ ‖(Q(W·diag(s))·diag(1/s) − W)·x‖²`` over readers and sampled tokens."""
    total = 0.0
    for reader in readers:
        n = reader.weight.shape[1]
        rows = max(1, piece(on_gpu=reader.weight.is_cuda) // n)
        for part in reader.weight.split(rows if reader.scheme.scale_form != "block" else -(-rows // BLOCK_ROWS) * BLOCK_ROWS):
            exact = part.float()
            error = rounded(exact * scales, reader.scheme).div_(scales).sub_(exact)
            total += float((error @ sample.T).square_().sum(dtype=torch.float64))
    return total


def rounded(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """A weight fp32 [m, n], each element at the nearest point of the grid that spans its group. With scales of blocks, m counts whole ones,
    or ends the matrix."""
    spec = dataclasses.replace(scheme.grid, search=False)
    groups = weight.view(len(weight), -1, scheme.group_width(weight.shape[1]))
    scale, zero = grid_for_range(groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0), spec)
    if scheme.scale_form == "block":
        scale = of_blocks(scale.T).T
    scale, zero = scale[..., None], zero[..., None]
    return nearest(groups / scale, zero, spec).mul_(scale).view_as(weight)
