"""Folding scales into the weights of a block, in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bigq.kernels.pick import piece
from bigq.model.experts.bank import Expert
from bigq.model.folding.fold import ExpertFold, Fold
from bigq.model.skeleton import is_linear, linear_weight


def fold_(block: nn.Module, fold: Fold, scales: Tensor) -> Tensor:
    """Divide the producer's outputs by ``scales`` [count], and multiply the inputs of the readers. Returns the factors of inputs, fp32 [n].

    A norm's weight is rounded to its dtype, and the readers are multiplied by what it was really divided by, so that nothing but their own
    rounding is lost. Readers that are banks are not changed: an expert is multiplied when it is loaded.
    """
    producer = block.get_submodule(fold.producer)
    scales = scales.float()
    if fold.rows is None:
        factors = _divide_norm(producer, scales, fold.offset)
    else:
        weight = linear_weight(producer)
        weight[fold.rows] = (weight[fold.rows].float() / scales[:, None]).to(weight.dtype)
        bias = getattr(producer, "bias", None)
        if bias is not None:
            bias[fold.rows] = (bias[fold.rows].float() / scales).to(bias.dtype)
        factors = scales[fold.channels]
    for _, weight in matrices(block, fold):
        for part in weight.split(max(1, piece(on_gpu=weight.is_cuda) // weight.shape[1])):
            part.copy_(part.float() * factors)
    return factors


def fold_expert_(expert: Expert, fold: ExpertFold, scales: Tensor) -> None:
    """Divide outputs of one of an expert's matrices by ``scales`` [n], and multiply the inputs of the last one."""
    producer, reader = expert.weight(fold.producer), expert.weight(fold.reader)
    rows, scales = fold.rows.to(producer.device), scales.float()
    producer[rows] = (producer[rows].float() / scales[:, None]).to(producer.dtype)
    for part in reader.split(max(1, piece(on_gpu=reader.is_cuda) // reader.shape[1])):
        part.copy_(part.float() * scales)


def matrices(block: nn.Module, fold: Fold) -> Iterator[tuple[str, Tensor]]:
    """The readers' parameters that scales multiply, by their names in the block, each as [outputs, inputs]; not those of banks."""
    n = len(fold.channels)
    for name in fold.readers:
        module = block.get_submodule(name)
        if is_linear(module):
            yield f"{name}.weight", linear_weight(module)
            continue
        own = dict(module.named_parameters(recurse=False))
        if any(param.ndim > 2 for param in own.values()):  # a bank, which may have a bias for each expert
            continue
        for leaf, param in own.items():
            if param.ndim == 2 and param.shape[1] == n:
                yield f"{name}.{leaf}", param


def touched(block: nn.Module, fold: Fold) -> list[str]:
    """The names of all parameters in the block that ``fold_`` may change."""
    own = [f"{fold.producer}.{leaf}" for leaf, _ in block.get_submodule(fold.producer).named_parameters()]
    return [*own, *(name for name, _ in matrices(block, fold))]


def factors_of(before: Tensor, after: Tensor, offset: float) -> Tensor:
    """What a norm's weight was divided by, fp32 [n]. Where it is 0 it does not tell, so that what it belongs to keeps its scale."""
    old, new = before.float() + offset, after.float() + offset
    found = old / new
    return torch.where((old != 0) & (new != 0), found, torch.ones_like(found))


def norm_weight(norm: nn.Module) -> str:
    """The name of the parameter that a norm multiplies by."""
    names = [name for name, _ in norm.named_parameters()]
    return "weight" if "weight" in names else names[0]


def _divide_norm(norm: nn.Module, scales: Tensor, offset: float) -> Tensor:
    parameters = dict(norm.named_parameters())
    weight = parameters.pop(norm_weight(norm))
    before = weight.clone()
    weight.copy_((weight.float() + offset) / scales - offset)
    factors = factors_of(before, weight, offset)
    for bias in parameters.values():
        bias.copy_(bias.float() / factors)
    return factors
