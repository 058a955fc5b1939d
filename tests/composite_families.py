"""Tiny random models of composite types: a language model with towers for images or audio. Sizes are reduced, the structure is not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from models import aligned, randomize
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM

#: Size of the vocabulary. Tokens that stand for images, audio and the like are the last ones, so that random ids below 128 are text.
VOCABULARY, TEXT = 160, 128


def _mrope(*sections: int) -> dict[str, Any]:
    """The settings of a language model with three position ids a token. sections: of a head's frequencies."""
    return {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}}


_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

#: Model type → settings beyond ``_SIZES``, by the name of the part that they belong to.
COMPOSITE: Mapping[str, Mapping[str, Any]] = {
    "qwen2_vl": _mrope(2, 3, 3),
    "qwen2_5_vl": _mrope(2, 3, 3),
    "gemma3": {"text_config": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}},
    "idefics3": {},
    "internvl": {},
    "llama4": {},
    "llava": {},
    "mistral3": {},
    "paligemma": {},
    "qwen3_vl": {},
    "smolvlm": {},
    "voxtral": {},
}

_LIKE_THEIR_DEFAULTS = """
aria aya_vision cohere2_vision cosmos3_edge cosmos3_omni deepseek_vl deepseek_vl_hybrid exaone4_5 fuyu
gemma4_unified glmasr got_ocr2 granite_docling hyperclovax_vision_v2 idefics2 kosmos-2.5 lfm2_vl lfm3_vl
lighton_ocr llava_next llava_next_video llava_onevision minicpm_ocr minicpmv4_6 minicpmv4_7
moss_transcribe_diarize muse_glimmer ovis2 phi4_multimodal pp_chart2table qianfan_ocr qwen2_audio qwen3_5
qwen3_5_moe qwen3_asr qwen3_omni_moe_thinker qwen4_exp step3p7 unlimited_ocr video_llama_3 video_llava
vipllava
"""

#: More types, for the long tests.
MORE: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("qwen2_5_omni_thinker", "glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl"), _mrope(2, 3, 3)),
    "glm4v_moe": _mrope(2, 1, 1),
    "qwen3_vl_moe": {"text_config": {"moe_intermediate_size": 96}},
    "kimi_k25": {"text_config": _LATENT},
    **{kind: {} for kind in _LIKE_THEIR_DEFAULTS.split()},
}

#: Settings by the pattern of their name. The first that matches counts.
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"^(num_hidden_layers|num_layers|n_layers?|depth|encoder_layers|decoder_layers|num_decoder_layers|vision_layers)$", 3),
    (r"^(hidden_size|d_model|embed_dim|out_hidden_size|projection_dim|text_hidden_size|output_dim|projector_hidden_size)$", 64),
    (r"^(intermediate_size|ffn_dim|encoder_ffn_dim|intermediate_size_mlp|projector_input_dim|projector_output_dim)$", 96),
    (r"^(num_attention_heads|num_heads|encoder_attention_heads|n_heads?)$", 4),
    (r"^(num_key_value_heads|num_kv_heads)$", 2),
    (r"^(head_dim|global_head_dim|query_pre_attn_scalar)$", 16),
    (r"^max_position_embeddings$", 128),
    (r"^(sliding_window|attention_chunk_size)$", 16),
    (r"^vocab_size(_per_layer_input)?$", VOCABULARY),
    (r"^mrope_section$", [2, 3, 3]),
    (r"^image_size$", 28),
    (r"^patch_size$", 14),
    (r"^(moe_intermediate_size|shared_expert_intermediate_size|kv_lora_rank|q_lora_rank)$", 32),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", 4),
    (r"^(num_experts_per_tok|moe_k|moe_topk)$", 2),
    (r"^(pad_token_id)$", 0),
    (r"^(bos_token_id)$", 1),
    (r"^(eos_token_id)$", 2),
)

#: Settings that follow from others, such as the number of layers.
_DERIVED = ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers", "layers_block_type", "per_layer_config")


def shrunk_config(kind: str, **overrides: Any) -> Any:
    """The default config of a composite type with the sizes of ``_SIZES``. overrides: settings by the name of their part."""
    special = iter(range(VOCABULARY - 1, TEXT - 1, -1))
    given = CONFIG_MAPPING[kind]().to_dict()

    def value_of(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: value_of(str(name), inner) for name, inner in value.items() if name not in _DERIVED}
        for pattern, size in _SIZES:
            if re.search(pattern, key):
                return size if isinstance(value, type(size)) or value is None else value
        if re.search(r"_token_(id|index)$", key) and isinstance(value, int):
            return next(special)
        return value

    shrunk = {key: value_of(key, value) for key, value in given.items() if key not in _DERIVED}
    return CONFIG_MAPPING[kind].from_dict(_merged(shrunk, {**(COMPOSITE | MORE).get(kind, {}), **overrides}))


def _merged(settings: Any, changes: Mapping[str, Any]) -> Any:
    merged = dict(settings)
    for key, value in changes.items():
        merged[key] = _merged(merged.get(key) or {}, value) if isinstance(value, Mapping) else value
    return merged


def make_composite(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Path:
    """Save a random model of a composite type; norms and biases are random too."""
    model = AutoModelForMultimodalLM.from_config(shrunk_config(kind, **overrides))
    randomize(model, seed)
    if dtype != torch.float32:
        model.to(dtype)
    model.save_pretrained(folder, max_shard_size="300KB")
    return folder


def reference_composite(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The whole composite model as transformers loads it; experts run one after the other ("eager"), as bigq runs them."""
    model: nn.Module = AutoModelForMultimodalLM.from_pretrained(folder, dtype=dtype)
    if model._can_set_experts_implementation():  # type: ignore[operator]
        model.set_experts_implementation("eager")  # type: ignore[operator]
    return aligned(model).eval().requires_grad_(False)
