"""A model as its config and its checkpoint's headers describe it, without weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

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
