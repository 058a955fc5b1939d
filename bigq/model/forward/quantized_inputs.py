"""Linears whose inputs are quantized when they compute, as readers of some formats do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedModelError

#: The largest number of a quantized input.
MOST = 127


def rounded_tokens(x: Tensor) -> Tensor:
    """Inputs [..., n] as fp32 numbers that int8 times a scale for each token can represent.

    The scale is the largest magnitude over 127. It is multiplied by as its inverse, and ties go to even numbers, as in vLLM's kernels:
    on a CPU the numbers are bit for bit theirs.
    """
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / MOST
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return torch.clamp(torch.round(wide * inverse), -MOST - 1, MOST) * scale


class Int8Inputs(nn.Linear):
    """A Linear that first quantizes its inputs. The weight is in fp32, and so is the product, in which integers are nearly exact."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(rounded_tokens(input), self.weight.float(), bias).to(input.dtype)


def quantize_inputs(folder: Path, modules: Iterable[nn.Module], experts: bool) -> None:
    """Let Linears quantize their inputs from now on. experts: whether the checkpoint in ``folder`` holds experts that would have to.

    Raises UnsupportedModelError for experts, and for what is no Linear.
    """
    if experts:
        raise UnsupportedModelError(f"{folder}: readers quantize the inputs of experts too, which bigq cannot; give the original model")
    for module in modules:
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise UnsupportedModelError(f"{folder}: readers quantize the inputs of a {kind}, which bigq cannot; give the original model")
        module.__class__ = Int8Inputs
