"""``--fold``: the rules by which scales of inputs are chosen (``bigq.solver.scaling``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from bigq.methods.base import Divider, Scaling
from bigq.solver.scaling import InputStatistics, Reader, awq_scales, smoothquant_scales
from bigq.vocabulary import FoldName


class AwqScaling:
    """By the least error of the readers' outputs (AWQ)."""

    def takes(self, divider: Divider) -> bool:
        return True

    def choose(self, inputs: InputStatistics, readers: Sequence[Reader], channels: Tensor) -> Tensor:
        return awq_scales(inputs, readers, channels)


class SmoothQuantScaling:
    """By the largest inputs and weights (SmoothQuant). Norms divide, as in the paper, and what is inside experts; other Linears do not."""

    def takes(self, divider: Divider) -> bool:
        return divider != "linear"

    def choose(self, inputs: InputStatistics, readers: Sequence[Reader], channels: Tensor) -> Tensor:
        return smoothquant_scales(inputs, readers, channels)


#: For each value of ``--fold``.
SCALINGS: Mapping[FoldName, Scaling | None] = {"none": None, "awq": AwqScaling(), "smoothquant": SmoothQuantScaling()}
