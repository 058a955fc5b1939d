"""Linears whose inputs are quantized when they compute, as readers of some formats do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedModelError
from bigq.io.formats.base import InputType

#: The largest number of an input in int8 and in E4M3, and the smallest scale there, as in vLLM.
INT8_MOST, E4M3_MOST = 127, 448.0
E4M3_SMALLEST = 1 / (E4M3_MOST * 512)
#: Inputs that share a scale with the weights in blocks.
E4M3_GROUP = 128


def rounded_to_int8(x: Tensor) -> Tensor:
    """Inputs [..., n] as fp32 numbers that int8 times a scale for each token can represent.

    The scale is the largest magnitude over 127. It is multiplied by as its inverse, and ties go to even numbers, as in vLLM's kernels:
    on a CPU the numbers are bit for bit theirs.
    """
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / INT8_MOST
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return torch.clamp(torch.round(wide * inverse), -INT8_MOST - 1, INT8_MOST) * scale


def rounded_to_e4m3(x: Tensor) -> Tensor:
    """The same with E4M3, whose largest number is 448."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / E4M3_MOST).clamp(min=E4M3_SMALLEST)
    return torch.clamp(wide * scale.reciprocal(), -E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).float() * scale


def rounded_in_groups(x: Tensor) -> Tensor:
    """The same with a scale for each token and 128 inputs, by which readers divide."""
    groups = x.float().unflatten(-1, (-1, E4M3_GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / E4M3_MOST).clamp(min=E4M3_SMALLEST)
    rounded: Tensor = torch.clamp(groups / scale, -E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2)


#: How inputs are rounded to a type, as fp32 numbers.
ROUNDINGS: Mapping[InputType, Callable[[Tensor], Tensor]] = {
    "int8": rounded_to_int8,
    "e4m3": rounded_to_e4m3,
    "e4m3-groups": rounded_in_groups,
}


class QuantizedInputs(nn.Linear):
    """A Linear that first quantizes its inputs, to ``input_type``. The weight is in fp32, and so is the product, in which 8-bit numbers are
    nearly exact."""

    input_type: InputType

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(ROUNDINGS[self.input_type](input), self.weight.float(), bias).to(input.dtype)


def quantize_inputs(folder: Path, modules: Iterable[nn.Module], kind: InputType) -> None:
    """Let Linears quantize their inputs to a type from now on. folder: of the checkpoint, for messages.

    Raises UnsupportedModelError for what is no Linear.
    """
    for module in modules:
        if not isinstance(module, nn.Linear):
            name = type(module).__name__
            raise UnsupportedModelError(f"{folder}: readers quantize the inputs of a {name}, which bigq cannot; give the original model")
        module.__class__ = QuantizedInputs
        assert isinstance(module, QuantizedInputs)
        module.input_type = kind
