"""Attention with ALiBi, computed without a matrix of scores where a model's own code writes one.

transformers runs most families through ``scaled_dot_product_attention``, which fuses product, softmax and product. BLOOM and MPT write
the scores, add the bias of ALiBi (Press et al. 2022), and take their softmax step by step. Here the bias and the causal mask become the
additive mask of the fused function, row by row: one row's mask is the largest tensor, whatever the batch. Results differ from the model's
own in their last bits, since scores are not rounded on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bigq.errors import UsageError


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Callable[[int], Tensor]) -> Tensor:
    """Attention of all heads, [B, T, heads · width]. query, key, value: [B, heads, T, width]. bias: what is added to a row's scores."""
    parts = [
        scaled_dot_product_attention(query[i : i + 1], key[i : i + 1], value[i : i + 1], attn_mask=bias(i), scale=scale)
        for i in range(len(query))
    ]
    return torch.cat(parts).transpose(1, 2).flatten(2)


def _of_row(tensor: Tensor, i: int) -> Tensor:
    """Row i of [B, …] or of the one row [1, …] that stands for all."""
    return tensor[i : i + 1] if len(tensor) > 1 else tensor


def _bloom(
    self: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    slopes = alibi.view(-1, self.num_heads, *alibi.shape[1:])

    def bias(i: int) -> Tensor:
        return _of_row(slopes, i) if attention_mask is None else _of_row(slopes, i) + _of_row(attention_mask, i)

    attended = _attend(query, key, value, self.inv_norm_factor, bias)
    return residual + self.dense(attended), None


def _mpt(
    self: Any, hidden_states: Tensor, position_bias: Tensor, attention_mask: Tensor | None = None, **others: Any
) -> tuple[Tensor, None]:
    projected = self.Wqkv(hidden_states)
    if self.clip_qkv:
        projected = projected.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = projected.unflatten(-1, (3, self.n_heads, self.head_dim)).movedim(2, 0).transpose(2, 3)
    queries, keys = query.shape[-2], key.shape[-2]
    slopes = position_bias[None, :, max(0, position_bias.shape[1] - queries) :, max(0, position_bias.shape[2] - keys) :]
    lowest = torch.finfo(query.dtype).min

    def bias(i: int) -> Tensor:
        added = slopes.to(query.dtype)
        return added if attention_mask is None else added.masked_fill(_of_row(attention_mask, i), lowest)

    return self.out_proj(_attend(query, key, value, self.softmax_scale, bias)), None


#: What takes the place of ``forward``, by module and class of transformers. Both are called with whole rows and without a cache.
_FORWARDS: Mapping[str, Callable[..., tuple[Tensor, None]]] = {
    "transformers.models.bloom.modeling_bloom.BloomAttention": _bloom,
    "transformers.models.mpt.modeling_mpt.MptAttention": _mpt,
}

#: The class with fused attention of each class of transformers: one, so that modules of a kind stay of one kind.
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _fused(module: nn.Module) -> type[nn.Module] | None:
    """The module's class with fused attention, or None if it is not known how the module attends."""
    kind = type(module)
    forward = _FORWARDS.get(f"{kind.__module__}.{kind.__qualname__}")
    if forward is None or getattr(module, "slow_but_exact", False):
        return None
    return _CLASSES.setdefault(kind, type(f"Fused{kind.__name__}", (kind,), {"forward": forward}))


def fuse_attention(model: nn.Module) -> None:
    """Let attention that the model writes step by step run fused, in place. Raises UsageError if there is none.

    A BLOOM that sums its projections in parts (``slow_but_exact``) has none.
    """
    fused = [(module, kind) for module in model.modules() if (kind := _fused(module)) is not None]
    if not fused:
        name = type(model).__name__
        raise UsageError(f"--attention fused: no effect on {name}, only on BLOOM and MPT; leave out --attention")
    for module, kind in fused:
        module.__class__ = kind
