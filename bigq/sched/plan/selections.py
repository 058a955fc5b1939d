"""Selections by masks, for models on meta: which elements a mask selects is not known there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AllSelected(TorchFunctionMode):
    """Lets masks on meta select everything: what is computed from a selection then has the largest size that it can have, and depends on
    all that it can depend on. Other tensors, and other ways to select, are left alone."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.Tensor.__getitem__ and _is_mask(args[0], args[1]):
            return args[0].flatten(0, args[1].ndim - 1)
        if func is torch.Tensor.__setitem__ and _is_mask(args[0], args[1]):
            whole, mask, value = args
            target = whole.flatten(0, mask.ndim - 1) if isinstance(value, Tensor) else whole
            whole.copy_((value.expand_as(target) if isinstance(value, Tensor) else torch.full_like(target, value)).view_as(whole))
            return None
        return func(*args, **(kwargs or {}))


def _is_mask(x: Tensor, index: Any) -> bool:
    """Whether an index of a tensor is one mask over its first dimensions, without values."""
    return isinstance(index, Tensor) and index.is_meta and index.dtype == torch.bool and 0 < index.ndim <= x.ndim
