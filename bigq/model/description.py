"""A model as its config and its checkpoint's headers describe it, without weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from bigq.errors import UnsupportedModelError
from bigq.io.index import TensorInfo
from bigq.model import skeleton
from bigq.model.blocks import find_blocks
from bigq.model.experts.bank import bank_modules
from bigq.model.experts.naming import ExpertLinear


class ModelDescription:
    """A model before any of its weights is read.

    folder: holds config.json. model: the skeleton; blocks, blocks_path: its decoder blocks and their module path.
    sources: parameter or buffer name → the checkpoint's tensor; empty where the headers are unknown.
    expert_linears: the matrices of all experts by their name in the output, apart for each bank, by what its names begin with.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        model: nn.Module,
        sources: dict[str, TensorInfo],
        expert_linears: Mapping[str, Mapping[str, ExpertLinear]] | None = None,
    ) -> None:
        self.expert_linears: Mapping[str, Mapping[str, ExpertLinear]] = expert_linears or {}
        self.folder, self.config, self.model, self.sources = folder, config, model, sources
        self.blocks_path, self.blocks = find_blocks(model)

    @functools.cached_property
    def has_experts(self) -> bool:
        """Whether the model has banks of experts, quantized or not."""
        return bool(bank_modules(self.model))

    @functools.cached_property
    def linears(self) -> tuple[str, ...]:
        """Module names of all Linears of the model, inside and outside the blocks."""
        return skeleton.linears(self.model)

    @property
    def embedding(self) -> nn.Embedding:
        module = self.model.get_input_embeddings()  # type: ignore[operator]
        if not isinstance(module, nn.Embedding):
            raise UnsupportedModelError(f"{type(self.model).__name__}: its input embedding is a {type(module).__name__}")
        return module

    @property
    def head(self) -> nn.Module:
        module = self.model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(module, nn.Module):
            raise UnsupportedModelError(f"{type(self.model).__name__}: has no output head")
        return module

    @property
    def head_name(self) -> str:
        """The head's module name."""
        head = self.head
        return next(str(name) for name, module in self.model.named_modules() if module is head)

    @functools.cached_property
    def state_names(self) -> tuple[str, ...]:
        """Names of all parameters and persistent buffers."""
        return tuple(self.model.state_dict())

    def rest_names(self) -> list[str]:
        """Names of the parameters and persistent buffers outside blocks, embedding and head. A norm within the embedding is one of them."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        large = {id(p) for p in (self.embedding.weight, *self.head.parameters(recurse=False))}
        names = (name for name in self.state_names if not name.startswith(f"{self.blocks_path}."))
        return [name for name in names if name not in parameters or id(parameters[name]) not in large]


class OnUse(TorchFunctionMode):
    """While it is entered, whatever computes with one of some parameters on meta gets what ``use`` returns for its name instead.

    Any parameter that is not used is left alone, so this finds what of a composite model runs for text. Operations that mix a real tensor
    with one on meta need not fail. device: what these parameters say of themselves; models ask their first one where they are.
    """

    #: What tells nothing of a tensor's values.
    _FORM = (torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.stride, torch.Tensor.is_floating_point)

    def __init__(self, parameters: Mapping[str, Tensor], device: torch.device, use: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._names = {id(param): name for name, param in parameters.items()}
        self._alive = list(parameters.values())  # so that no other tensor gets one of these ids
        self._device, self._use = device, use

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if not any(id(leaf) in self._names for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__:
            return self._device
        if func in self._FORM:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__" and not isinstance(value := func(*args, **kwargs), Tensor):
            return value
        args, kwargs = tree_map(self._replaced, (args, kwargs))
        return func(*args, **kwargs)

    def _replaced(self, value: Any) -> Any:
        name = self._names.get(id(value))
        return value if name is None else self._use(name)


@contextlib.contextmanager
def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of one module instance while the context is open."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before
