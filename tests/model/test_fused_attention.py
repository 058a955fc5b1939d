"""Attention with ALiBi in one function is what the model's own steps compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import FAMILIES, random_ids, randomize
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bigq.errors import UsageError
from bigq.model.forward.fused_attention import fuse_attention

MPT: dict[str, Any] = {"vocab_size": 128, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}
#: Name → (model type, config values).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": FAMILIES["bloom"],
    "bloom, 6 heads": ("bloom", FAMILIES["bloom"][1] | {"hidden_size": 96, "n_head": 6}),
    "bloom, residual of norms": ("bloom", FAMILIES["bloom"][1] | {"apply_residual_connection_post_layernorm": True}),
    "mpt": ("mpt", MPT),
    "mpt, scaled and clipped": ("mpt", MPT | {"attn_config": {"softmax_scale": 0.4, "clip_qkv": 0.5}}),
}


def model_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    kind, values = MODELS[name]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values))
    randomize(model)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_attention_of_the_model(name: str, padded: bool) -> None:
    """In fp64, up to the fp32 of the models' own softmax; rows of different padding have different masks."""
    model = model_of(name)
    ids = random_ids(3, 40)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 33:] = mask[2, 15:] = 0
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    fused = copy.deepcopy(model)
    fuse_attention(fused)
    alike = copy.deepcopy(fused)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert 0 < (alike - expected)[mask == 1].abs().max() < 3e-6 * expected.abs().max()
    # A token in another place is something else.
    shifted = model(input_ids=ids.roll(1, 1), attention_mask=mask, use_cache=False).logits
    assert (shifted - expected)[mask == 1].abs().max() > 0.1 * expected.abs().max()


def test_no_matrix_of_scores_of_a_batch() -> None:
    """The largest tensor is the mask of one row, [1, heads, T, T]."""
    model, rows = model_of("bloom", torch.float32), 5
    fuse_attention(model)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor))])
            return output

    with Sizes():
        model.transformer.h[0](
            torch.randn(rows, 256, 64),
            alibi=torch.randn(rows * 4, 1, 256),
            attention_mask=torch.full((rows, 1, 256, 256), -1e9).triu(1),
        )
    assert largest == max(4 * 256 * 256, rows * 256 * 256)


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("bloom", {"slow_but_exact": True, "pretraining_tp": 2})])
def test_nothing_to_fuse_is_refused(family: str, changes: dict[str, Any]) -> None:
    kind, values = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values | changes))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UsageError, match=r"^--attention fused: no effect on .*ForCausalLM, only on BLOOM and MPT; leave out --attention$"):
        fuse_attention(model)
    assert [type(module) for module in model.modules()] == kinds
