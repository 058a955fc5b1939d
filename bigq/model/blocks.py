"""Finds the decoder blocks of a model and the Linears in a block from the modules themselves, without a table of families."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from bigq.errors import UnsupportedModelError
from bigq.model.architecture import text_config
from bigq.model.skeleton import is_linear, linear_weight


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of the decoder blocks: a ModuleList whose classes are all in ``_no_split_modules``, or of a model that has no
    such list, one outside of others that holds Linears.

    Of several, the one that shares most of its path with the input embedding, as towers for images and audio do not; then one that is not
    in a part of the model with a config of its own, such as a tower; then the largest.
    Raises UnsupportedModelError where there is none, or where blocks hold experts or share parameters.
    """
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    if not any(_consists_of(unsplit, module) for module in lists.values()):
        unsplit = _classes_in_lists(lists)
    embedding = _embedding_path(model)
    found: list[tuple[int, bool, int, str, nn.ModuleList]] = []
    for path, module in lists.items():
        if _consists_of(unsplit, module):
            size = sum(p.numel() for p in module.parameters())
            found.append((_shared_parts(path, embedding), _is_of_language(model, path), size, path, module))
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__}: no list of decoder blocks found; this architecture is not supported")
    *_, path, blocks = max(found, key=lambda f: f[:3])
    _refuse_shared(model, path)
    _refuse_experts(path, blocks)
    return path, blocks


def block_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The Linears of a block by their name in it, in order of definition."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}


def is_product(module: nn.Module, x: Tensor, output: Any) -> bool:
    """Whether the output of a Linear for inputs x has the shape of x · Wᵀ; that of one that works on groups of its inputs has not."""
    outputs, inputs = linear_weight(module).shape
    return isinstance(output, Tensor) and x.shape[-1] == inputs and output.shape == (*x.shape[:-1], outputs)


def _consists_of(classes: Collection[str], modules: nn.ModuleList) -> bool:
    return all(type(module).__name__ in classes for module in modules)


def _classes_in_lists(lists: Mapping[str, nn.ModuleList]) -> set[str]:
    """The classes of the outermost lists with Linears. That their modules hand on hidden states alone is seen when they are called."""
    outermost = [module for path, module in lists.items() if not any(path.startswith(f"{other}.") for other in lists)]
    return {type(member).__name__ for module in outermost if any(map(block_linears, module)) for member in module}


def _embedding_path(model: nn.Module) -> str:
    """The path of the module that embeds tokens; empty where the model does not say."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return ""
    return next((path for path, module in model.named_modules() if module is embedding), "")


def _shared_parts(one: str, other: str) -> int:
    """How many parts two paths have in common at their beginning."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _is_of_language(model: nn.Module, path: str) -> bool:
    """Whether the innermost model around a module has the config of the language model, by its class; a tower has another."""
    parts, whole = path.split("."), getattr(model, "config", None)
    outer = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts) - 1, 0, -1))
    own = next((config for module in outer if (config := getattr(module, "config", None)) is not None), whole)
    return type(own) in (type(whole), type(text_config(whole)))


def _refuse_shared(model: nn.Module, path: str) -> None:
    first_name: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        other = first_name.setdefault(id(param), name)
        if other != name and (name.startswith(path + ".") or other.startswith(path + ".")):
            raise UnsupportedModelError(f"{name} and {other} are one shared parameter; models whose blocks share weights are not supported")


def _refuse_experts(path: str, blocks: nn.ModuleList) -> None:
    for name, module in blocks.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts":
            raise UnsupportedModelError(
                f"{path}.{name} is a list of experts, each a module of its own; only banks of experts with one parameter for all of them "
                "are supported"
            )
