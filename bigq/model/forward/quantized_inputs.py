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
#: The largest number of E2M1, and inputs that share a scale with it.
E2M1_MOST, E2M1_GROUP = 6.0, 16


def rounded_to_int8(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Inputs [..., n] as fp32 numbers that int8 times a scale can represent. scale: one for all tokens, fp32 [1]; else each has its own.

    Its own is the largest magnitude over 127. A scale is multiplied by as its inverse, and ties go to even numbers, as in vLLM's kernels:
    on a CPU the numbers are bit for bit theirs. What is beyond the largest number becomes that.
    """
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / INT8_MOST if scale is None else scale
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return torch.clamp(torch.round(wide * inverse), -INT8_MOST - 1, INT8_MOST) * scale


def rounded_to_e4m3(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """The same with E4M3, whose largest number is 448."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / E4M3_MOST).clamp(min=E4M3_SMALLEST) if scale is None else scale
    return torch.clamp(wide * scale.reciprocal(), -E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).float() * scale


def rounded_in_groups(x: Tensor, number: Tensor | None = None) -> Tensor:
    """The same with a scale for each token and 128 inputs, by which readers divide; no number is stored for them."""
    assert number is None, "each token and group has its own scale"
    groups = x.float().unflatten(-1, (-1, E4M3_GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / E4M3_MOST).clamp(min=E4M3_SMALLEST)
    rounded: Tensor = torch.clamp(groups / scale, -E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2)


def rounded_to_e2m1(x: Tensor, number: Tensor | None = None) -> Tensor:
    """Inputs [..., n] as fp32 numbers that E2M1 times a scale for 16 of them can represent. number: by which scales are divided, fp32 [1].

    A scale is the largest magnitude over 6, times the number, rounded to E4M3. All of it is computed as by vLLM's emulation in fp32: with
    inverses, one of 0 taken for 0, and ties go to even numbers.
    """
    assert number is not None, "scales of 4-bit inputs are divided by a stored number"
    wide = x.float().unflatten(-1, (-1, E2M1_GROUP))
    scale = number * (wide.abs().amax(-1, keepdim=True) * (1 / E2M1_MOST))
    scale = scale.clamp(max=E4M3_MOST).to(torch.float8_e4m3fn).float() * number.reciprocal()
    scaled = torch.clamp(wide * torch.where(scale > 0, 1 / scale, torch.zeros_like(scale)), -E2M1_MOST, E2M1_MOST)
    size = scaled.abs()
    spacing = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    rounded: Tensor = torch.round(scaled / spacing) * spacing * scale
    return rounded.flatten(-2)


#: How inputs are rounded to a type, as fp32 numbers; with the number for all tokens that a format stores for them, or without.
ROUNDINGS: Mapping[InputType, Callable[[Tensor, Tensor | None], Tensor]] = {
    "int8": rounded_to_int8,
    "e4m3": rounded_to_e4m3,
    "e4m3-groups": rounded_in_groups,
    "e2m1": rounded_to_e2m1,
}


class QuantizedInputs(nn.Linear):
    """A Linear that first quantizes its inputs, to ``input_type``. The weight is in fp32, and so is the product, in which 8-bit numbers are
    nearly exact. input_number: what its format stores for inputs, fp32 [1]; None if a scale is found for each token."""

    input_type: InputType
    input_number: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        number = None if self.input_number is None else self.input_number.to(input.device)
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(ROUNDINGS[self.input_type](input, number), self.weight.float(), bias).to(input.dtype)


def quantize_inputs(folder: Path, modules: Iterable[nn.Module], kind: InputType, *, stored: bool = False) -> None:
    """Let Linears quantize their inputs to a type from now on. folder: of the checkpoint, for messages.

    stored: whether each has an ``input_number``, which ``set_input_number`` sets when its weight is loaded.
    Raises UnsupportedModelError for what is no Linear.
    """
    for module in modules:
        if not isinstance(module, nn.Linear):
            name = type(module).__name__
            raise UnsupportedModelError(f"{folder}: readers quantize the inputs of a {name}, which bigq cannot; give the original model")
        module.__class__ = QuantizedInputs
        assert isinstance(module, QuantizedInputs)
        module.input_type = kind
        # On meta as the weight is, so that a forward on meta passes, and one without the number fails.
        module.input_number = torch.empty(1, device="meta") if stored else None


def set_input_number(module: nn.Module, number: Tensor) -> None:
    """Set what the format of a Linear stores for its inputs, fp32 [1]."""
    assert isinstance(module, QuantizedInputs), f"a {type(module).__name__} rounds no inputs"
    module.input_number = number
