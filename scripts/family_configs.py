"""Tiny configs for the model types of transformers: sizes by the names that configs have for them, and what single types need beyond."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from composite_families import VOCABULARY, shrunk_config
from transformers import CONFIG_MAPPING

#: Sizes of scans of states.
SCAN = ("chunk_size", "mamba_chunk_size", "mamba_d_state", "ssm_state_size")
#: Sizes of a tiny model, for whatever names a family's config has for them.
TINY: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "n_vocab", "vocabulary_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "model_dim", "embed_dim", "word_embed_proj_dim"), 64
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 3),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_key_value_heads",
        ),
        4,
    ),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim",), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok"), 4),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp", "moe_shared_expert_intermediate_size"), 64
    ),
    "sliding_window": 16,
    "attention_window": 16,
    "type_vocab_size": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "num_experts_per_token": 2,
    # Without its own kernels, transformers computes with the square of these for every state of a head.
    **dict.fromkeys(SCAN, 16),
    "rotary_dim": 8,
}
#: Settings of families for which the sizes above do not make a model that runs.
SPECIAL: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": {"index_topk": 8, "indexer_types": ["full", "shared", "full"]},
    "cpmant": {"prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "feed_forward_size": 64,
        "attention_head_size": 16,
    },
    "xlm": {"emb_dim": 64, "n_langs": 1, "causal": True},
    "transfo-xl": {},
    "opt": {"word_embed_proj_dim": 32},
    "rwkv": {"attention_hidden_size": 64, "context_length": 64},
    "mamba": {"state_size": 8, "time_step_rank": 8},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16, "chunk_size": 16},
}
#: Attention with latent keys and values, whose heads are wider for keys than for values, and experts in groups (DeepSeek's kind).
LATENT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Encoders that transformers also offers as causal models.
DECODER = ("is_decoder",)


IMAGE_TOKENS = {"<image>": 150, **{f"IMGIMG{letter}Z": 151 + i for i, letter in enumerate("ABCD")}}
_CODEBOOK: Mapping[str, Any] = {"base_channels": 32, "num_embeddings": 64, "channel_multiplier": [1, 1], "num_res_blocks": 1}
_COMPASS: Mapping[str, Any] = {
    "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}
}
#: Layers that take the keys and values of others, and inputs of their own for each layer.
_GEMMA3N: Mapping[str, Any] = {
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "laurel_rank": 16,
    "hidden_size_per_layer_input": 16,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
}
_GEMMA4: Mapping[str, Any] = {"hidden_size_per_layer_input": 16}
_MISTRAL4: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "qk_head_dim": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "llama_4_scaling_beta": 0.1}
    | {"original_max_position_embeddings": 64},
}
_DOTS: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 24,
    "moe_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "per_layer_config": {},
}


def _rope(*sections: int) -> Mapping[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


#: Settings of types whose defaults do not shrink by name alone, by the name of the part that they belong to. With one of these a config is
#: made by ``composite_families.shrunk_config`` only.
NESTED: Mapping[str, Mapping[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64, "vocab_size": 160},
    "chameleon": {"vocabulary_map": IMAGE_TOKENS, "vq_config": _CODEBOOK},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    },
    "diffusion_gemma": {"text_config": {"top_k_experts": 2}},
    "dots3_note": {"text_config": _DOTS},
    "dots3_note_text": _DOTS,
    "emu3": {"vocabulary_map": IMAGE_TOKENS, "vq_config": {**_CODEBOOK, "codebook_size": 64}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [32, 32], **_rope(2, 3, 3)}},
    "florence2": {
        "vision_config": {"embed_dim": [8, 16, 32, 64], "num_heads": [1, 2, 2, 4], "num_groups": [1, 2, 2, 4], "depths": [1, 1, 1, 1]}
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 3}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 3}},
    "gemma4_unified": {},
    "gemma4_unified_text": {},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "granite_speech": {"encoder_config": {"hidden_dim": 64, "dim_head": 16}},
    "granite_speech_plus": {"encoder_config": {"hidden_dim": 64, "dim_head": 16}},
    "hunyuan_vl": {"text_config": {**_rope(2, 2, 2, 2), "head_dim": 16}},
    "janus": {"vq_config": _CODEBOOK},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 64, "num_filters": 4}},
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "n_routed_experts": 4,
        "num_key_value_heads": 4,
        "qk_head_dim": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    "mistral4": _MISTRAL4,
    "mistral_large4": {"text_config": {**_MISTRAL4, "kv_source_layers": [0, 1, 2], "indexer_types": ["full"] * 3}},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [2, 1], "intermediate_size": 96, "text_hidden_size": 64},
        "text_config": {"rope_scaling_layers": None, "additional_vocab_size": 32},
    },
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 16, 32, 64]}, "text_config": {"moe_hidden_size": 64}},
    "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 64, "hidden_size": 64}}}},
    "prophetnet": {},
    "qwen2_5_omni": {"token2wav_config": {"bigvgan_config": {"upsample_initial_channel": 64}}},
    "vibevoice_asr": {
        part: {"num_filters": 4, "depths": [1] * 7} for part in ("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config")
    },
    "xlnet": {"d_head": 16, "d_inner": 96},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "chunk_size": 16,
        "n_mamba_heads": 8,
        "mamba_d_state": 16,
        "mamba_headdim": 16,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "use_mem_rope": True,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "kv_channels": 16,
        "num_query_groups": 4,
        "hybrid_layer_ids": [1, 3],
    },
}
SMALL = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def shrink(config: Any, kind: str) -> Any:
    """The config with tiny sizes, its inner configs too."""
    for name in list(vars(config)):
        value = getattr(config, name, None)
        if hasattr(value, "to_dict"):
            shrink(value, kind)
    for name, tiny in TINY.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > tiny:
            setattr(config, name, tiny)
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in list(vars(config).items()):
        if (
            isinstance(value, list)
            and isinstance(layers, int)
            and len(value) > layers
            and name.lstrip("_").startswith(("layer", "block", "attention", "mlp"))
        ):
            setattr(config, name, [*value[: layers - 1], value[-1]])
        elif name.endswith(("token_id", "_index")) and isinstance(value, int) and value >= VOCABULARY:
            setattr(config, name, 2)
    for name in DECODER:
        if hasattr(config, name):
            setattr(config, name, True)
    return config


def configs(kind: str, table: str) -> list[Callable[[], Any]]:
    """What makes tiny configs of a model type, to be tried in order; each may raise. table: "causal" or "multimodal"."""
    if kind in NESTED or table == "multimodal":
        return [lambda: shrunk_config(kind, **NESTED.get(kind, {}))]
    special = SPECIAL.get(kind, {})
    scan = {name: TINY[name] for name in SCAN if hasattr(CONFIG_MAPPING[kind], name)}
    small = {**{name: TINY[name] for name in SMALL}, "max_position_embeddings": 128, "pad_token_id": 0}
    given = [small, {**small, "num_hidden_layers": 4}, LATENT, {**LATENT, "layer_types": ["full_attention"] * 3}]

    def shrunk() -> Any:
        config = shrink(CONFIG_MAPPING[kind](), kind)
        for name, value in special.items():
            setattr(config, name, value)
        return config

    def made(values: Mapping[str, Any]) -> Callable[[], Any]:
        return lambda: CONFIG_MAPPING[kind](**{**values, **scan, **special})

    return [shrunk, *map(made, given), lambda: shrunk_config(kind, **special)]
