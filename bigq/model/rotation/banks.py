"""What the parameters of a bank of experts do, proven on one expert of few units."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedModelError
from bigq.model.experts.bank import Expert
from bigq.model.experts.call import BankCall, RoutedCall
from bigq.model.experts.proof import prove_bank
from bigq.model.rotation.matrices import Rotation
from bigq.model.rotation.roles import STREAM_SEED, BankRole
from bigq.model.rotation.standins import Bare, generator_of

#: How messages about models that cannot be rotated end.
ADVICE = "leave out --rotate"
#: Units of an expert in the proof; the real number only makes it slower.
UNITS = 8
TOLERANCE = 1e-3


def bank_roles(bare: Bare, name: str, norm: str, call: BankCall) -> dict[str, BankRole]:
    """The roles of a bank's parameters, by their names in the block. norm: that it reads behind. call: of a run on stand-ins.

    Raises UnsupportedModelError where an expert with these roles does not compute the same once it is rotated.
    """
    module, path = bare.banks[name], f"{bare.name}.{name}"
    if not isinstance(call, RoutedCall):
        raise UnsupportedModelError(f"--rotate: {path} is called with the tokens of all experts; {ADVICE}")

    def load(e: int) -> dict[str, Tensor]:
        return few_units(module, bare.width, f"{path}.{e}")

    bank = prove_bank(path, module, call, load)
    parameters = load(0)
    first, last = bank.products[0].parameter, bank.products[-1].parameter
    roles = {product.parameter: BankRole(None if product.parameter == last else norm) for product in bank.products}
    biases = [key for key, value in parameters.items() if value.ndim == 1 and key.startswith(last) and len(value) == bare.width]
    roles |= dict.fromkeys(biases, BankRole(None))
    stream = Rotation(bare.width, STREAM_SEED)
    scale = 0.5 + torch.rand(bare.width, generator=generator_of(f"{path} scale")).to(call.tokens.device)
    turned = {}
    for product in bank.products:
        weight = parameters[product.parameter].T if product.transposed else parameters[product.parameter]
        weight = stream.turn(weight, 0) if product.parameter == last else stream.turn(weight * scale)
        turned[product.parameter] = weight.T.contiguous() if product.transposed else weight
    turned |= {key: stream.turn(parameters[key]) for key in biases}
    weights = torch.ones(len(call.tokens), device=call.tokens.device)
    expected = Expert(module, bank, call, parameters).run(call.tokens * scale, weights)
    found = Expert(module, bank, call, {**parameters, **turned}).run(stream.turn(call.tokens), weights)
    if first == last or not float((found - stream.turn(expected)).norm()) <= TOLERANCE * float(expected.norm()):
        raise UnsupportedModelError(f"--rotate: an expert of {path} does not compute the same once it is rotated; {ADVICE}")
    return {f"{name}.{key}": role for key, role in roles.items()}


def units_of(module: nn.Module, width: int) -> tuple[int, int]:
    """The units of an expert, and how many there are in the proof."""
    shapes = [tuple(param.shape[1:]) for param in module.parameters(recurse=False)]
    inner = math.gcd(*(size for shape in shapes for size in shape if size != width))
    clear = inner and all(sum(size == width for size in shape) == 1 for shape in shapes if len(shape) == 2)
    return inner, min(inner, UNITS) if clear else inner


def few_units(module: nn.Module, width: int, name: str) -> dict[str, Tensor]:
    """Random parameters of an expert, of the sizes of ``few_sizes``."""
    device = next((b.device for b in module.buffers()), torch.device("cpu"))
    sizes = few_sizes(module, width)
    return {key: 0.3 * torch.randn(size, generator=generator_of(f"{name}.{key}")).to(device) for key, size in sizes.items()}


def few_sizes(module: nn.Module, width: int) -> dict[str, list[int]]:
    """The sizes of an expert's parameters, with few units in place of all: those that are not the stream's keep their ratios.

    Where gate and up together have as many outputs as the stream is wide, all units stay.
    """
    inner, units = units_of(module, width)

    def few(size: int) -> int:
        return size if size == width else size // inner * units

    return {key: [few(size) for size in param.shape[1:]] for key, param in module.named_parameters(recurse=False)}
