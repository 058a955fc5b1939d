"""Finds the decoder blocks of a model and the Linears in a block from the modules themselves, without a table of families."""

from __future__ import annotations

from torch import nn

from bigq.errors import UnsupportedModelError
from bigq.model.experts.bank import bank_modules
from bigq.model.skeleton import is_linear


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of the decoder blocks: the largest ModuleList whose classes are all in ``_no_split_modules``.

    Raises UnsupportedModelError where there is none, or where blocks hold experts or share parameters.
    """
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    found: list[tuple[int, str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(type(m).__name__ in unsplit for m in module):
            found.append((sum(p.numel() for p in module.parameters()), path, module))
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__}: no list of decoder blocks found; this architecture is not supported")
    _, path, blocks = max(found, key=lambda f: f[0])
    _refuse_shared(model, path)
    _refuse_experts(path, blocks)
    return path, blocks


def block_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The Linears of a block by their name in it, in order of definition."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}


def _refuse_shared(model: nn.Module, path: str) -> None:
    first_name: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        other = first_name.setdefault(id(param), name)
        if other != name and (name.startswith(path + ".") or other.startswith(path + ".")):
            raise UnsupportedModelError(f"{name} and {other} are one shared parameter; models whose blocks share weights are not supported")


def _refuse_experts(path: str, blocks: nn.ModuleList) -> None:
    banks = bank_modules(blocks)
    for name, param in blocks.named_parameters():
        if param.ndim > 2 and "expert" in name and name.rpartition(".")[0] not in banks:
            raise UnsupportedModelError(
                f"{path}.{name} holds the weights of several experts in another form than one matrix an expert; this architecture is not "
                "supported yet"
            )
    for name, module in blocks.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts":
            raise UnsupportedModelError(
                f"{path}.{name} is a list of experts, each a module of its own; only banks of experts with one parameter for all of them "
                "are supported"
            )
