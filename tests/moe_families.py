"""Tiny random models of the families with experts. Their sizes are not the families' own; their structure is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bigq.model.experts.call import BankCall, bank_call

VOCABULARY = 128

_BASE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_TWO: Mapping[str, Any] = {"num_experts_per_tok": 2}
_GROUPED: Mapping[str, Any] = {
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
}

#: Model type → config values beyond ``_BASE``.
MOE_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"num_local_experts": 4, **_TWO},
    "qwen2_moe": {"num_experts": 8, **_TWO, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {"head_dim": 16, "num_experts": 8, **_TWO, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "qwen3_next": {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "num_experts": 4,
        **_TWO,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "deepseek_v2": {
        **_LATENT,
        **_GROUPED,
        "head_dim": 8,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": {**_LATENT, **_GROUPED, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    "glm4_moe": {"head_dim": 16, **_GROUPED, "n_routed_experts": 8, **_TWO, "use_qk_norm": True},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, **_TWO, "sliding_window": 16},
    "olmoe": {"num_experts": 8, **_TWO, "intermediate_size": 32},
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "dots1": {**_GROUPED, "n_routed_experts": 8, **_TWO},
    "minimax": {"head_dim": 16, "num_local_experts": 4, **_TWO},
    "minimax_m2": {"head_dim": 16, "num_local_experts": 8, **_TWO, "intermediate_size": 32, "rotary_dim": 8},
    "llama4_text": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 16,
    },
    "granitemoe": {"num_local_experts": 4, **_TWO},
    "phimoe": {"num_local_experts": 4, **_TWO},
    "lfm2_moe": {
        "num_experts": 4,
        **_TWO,
        "moe_intermediate_size": 32,
        "num_dense_layers": 1,
        "layer_types": ["full_attention", "conv"],
    },
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "n_routed_experts": 4,
        **_TWO,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "head_dim": 16,
    },
}


#: Families that differ most in how they compute; tests of others in whole programs are marked "long".
DISTINCT = ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h")


def families_and_dtypes(families: Iterable[str]) -> list[Any]:
    """Parameters (family, dtype) of a test: all of them, those of families that are like others marked as long."""
    return [
        pytest.param(family, dtype, marks=() if family in DISTINCT else pytest.mark.long, id=f"{family}-{name}")
        for family in families
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]


def moe_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A random model. Its experts run one after the other ("eager"), the same in every run."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**_BASE, **MOE_FAMILIES[family], **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim >= 2:
                param.copy_(0.15 * noise)
            else:
                param.add_(0.1 * noise)
    model.tie_weights()
    model.set_experts_implementation("eager")
    return model.to(dtype)


def call_of(bank: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BankCall:
    """The call of a bank with these arguments."""
    call = bank_call(args, kwargs, next(bank.parameters(recurse=False)).shape)
    assert call is not None
    return call


def random_tokens(rows: int = 3, length: int = 16) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))
