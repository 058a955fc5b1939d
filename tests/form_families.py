"""Tiny random models that store or call their weights in a form of their own: experts one behind the other, spare ones, sorted tokens,
adapters by masks, a norm within the embedding, a tower beside the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, aligned, randomize
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

_IDS: Mapping[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: Mapping[str, Any] = {
    **_IDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

#: Model type → its whole config.
FORMS: Mapping[str, Mapping[str, Any]] = {
    "dbrx": {
        **_IDS,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "git": {**_SIZES, "vision_config": {"hidden_size": 64, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}},
    "inkling_text": {
        **_SIZES,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 16,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
    },
    "jetmoe": {**_SIZES, "num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "longcat_flash": {
        **_IDS,
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_head_dim": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    "xmod": {**_SIZES, "is_decoder": True, "languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
}
KNOWN = [
    pytest.param(kind, marks=() if kind in CONFIG_MAPPING else pytest.mark.skip(reason=f"this transformers has no {kind}"))
    for kind in FORMS
]


def form_model(kind: str, **changes: Any) -> nn.Module:
    """A random model; norms and biases are random too."""
    model: nn.Module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**FORMS[kind], **changes})).eval()
    randomize(model)
    return model


def make_form(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a random model, in several shards."""
    form_model(kind, **changes).to(dtype).save_pretrained(folder, max_shard_size="100KB")  # type: ignore[operator]
    return folder


def whole_form(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The whole model as transformers loads it, its experts one after the other, as bigq runs them."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if model._can_set_experts_implementation():  # type: ignore[operator]
        model.set_experts_implementation("eager")  # type: ignore[operator]
    return aligned(model).eval().requires_grad_(False)
