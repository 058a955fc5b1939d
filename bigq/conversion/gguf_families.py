"""The model families of llama.cpp: names of tensors, order of rows, metadata. Models that it would compute differently are refused.

A family is in the table once ``scripts/check_gguf.py`` has compared llama.cpp's logits for it with those of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigq.errors import UnsupportedModelError
from bigq.io.gguf_file import Value
from bigq.io.json_file import show_value
from bigq.model.description import ModelDescription


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model family.

    arch: llama.cpp's name. inside: module of a block → tensor name. outside: module → tensor name. paired: modules whose rows llama.cpp
    wants with the two halves of each rotated pair next to each other. llama3: whether it reads Llama 3's frequency factors.
    """

    arch: str
    inside: Mapping[str, str]
    outside: Mapping[str, str]
    paired: tuple[str, ...] = ()
    llama3: bool = False


_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_LLAMA = Family(arch="llama", inside=_INSIDE, outside=_OUTSIDE, paired=("self_attn.q_proj", "self_attn.k_proj"), llama3=True)

#: model_type → family.
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family(arch="qwen2", inside=_INSIDE, outside=_OUTSIDE),
    "qwen3": Family(arch="qwen3", inside=_INSIDE | _QK_NORMS, outside=_OUTSIDE),
}


def family_of(model: ModelDescription) -> Family:
    """The family of a model. Raises UnsupportedModelError where the table does not have it."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"{model.folder}: bigq writes no GGUF files of model type {show_value(kind)}, only of {', '.join(FAMILIES)}; use --format gptq "
            "or compressed-tensors"
        )
    return FAMILIES[kind]


def tensor_name(model: ModelDescription, family: Family, name: str) -> tuple[str, Tensor | None]:
    """(the GGUF name of a parameter, the order of its rows as int64 [m], None for unchanged). Raises UnsupportedModelError."""
    module, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        if module in family.outside:
            return f"{family.outside[module]}.{leaf}", None
        block, _, inner = module.removeprefix(f"{model.blocks_path}.").partition(".")
        if module.startswith(f"{model.blocks_path}.") and inner in family.inside:
            order = _paired_rows(model.config, inner) if inner in family.paired else None
            return f"blk.{block}.{family.inside[inner]}.{leaf}", order
    raise UnsupportedModelError(f"{model.folder}: llama.cpp's {family.arch} has no place for tensor {name}; use --format gptq")


def _paired_rows(config: Any, inner: str) -> Tensor:
    """An order that alternates the first and second half of each head's rows: llama.cpp rotates neighbours, transformers halves."""
    heads = config.num_key_value_heads if inner.endswith("k_proj") else config.num_attention_heads
    return torch.arange(heads * _head_dim(config)).view(heads, 2, -1).transpose(1, 2).flatten()


def metadata(model: ModelDescription, family: Family) -> dict[str, Value]:
    """The metadata of the architecture; keys begin with a dot. Raises UnsupportedModelError where llama.cpp would compute differently."""
    config = model.config
    if config.hidden_act != "silu":
        raise _differs(model, "hidden_act", config.hidden_act)
    head_dim = _head_dim(config)
    return {
        ".vocab_size": config.vocab_size,
        ".context_length": min(config.max_position_embeddings, sliding_window(config) or config.max_position_embeddings),
        ".embedding_length": config.hidden_size,
        ".block_count": config.num_hidden_layers,
        ".feed_forward_length": config.intermediate_size,
        ".attention.head_count": config.num_attention_heads,
        ".attention.head_count_kv": config.num_key_value_heads,
        ".attention.key_length": head_dim,
        ".attention.value_length": head_dim,
        ".attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        ".rope.dimension_count": head_dim,
        **_rope(model, family),
    }


def sliding_window(config: Any) -> int | None:
    """The smallest window of positions that a block attends to; None where blocks attend to all.

    In these families llama.cpp attends to all positions. Within the window it computes the same, so the file's context length is the
    window.
    """
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    return window if window is not None and (layers is None or "sliding_attention" in layers) else None


def _rope(model: ModelDescription, family: Family) -> dict[str, Value]:
    rope = model.config.rope_parameters
    values: dict[str, Value] = {".rope.freq_base": float(rope["rope_theta"])}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _differs(model, "partial_rotary_factor", rope["partial_rotary_factor"])
    kind = rope["rope_type"]
    if kind == "default" or (kind == "llama3" and family.llama3):
        return values
    if kind == "linear":
        return values | {".rope.scaling.type": "linear", ".rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        for name, usual in (("attention_factor", None), ("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
            if rope.get(name, usual) != usual:
                raise _differs(model, f"rope_parameters.{name}", rope[name])
        return values | {
            ".rope.scaling.type": "yarn",
            ".rope.scaling.factor": float(rope["factor"]),
            ".rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
            ".rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
            ".rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
        }
    raise _differs(model, "rope_type", kind)


def rope_factors(config: Any) -> Tensor | None:
    """The divisors of Llama 3's frequencies, fp32 [head_dim / 2], the shortest wave first; None for other kinds of scaling.

    Waves of up to ``original / high`` positions are unchanged, those of more than ``original / low`` become ``factor`` times as long.
    Between the two, the scale is interpolated linearly in the frequency.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    head_dim = _head_dim(config)
    turns = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns * rope["original_max_position_embeddings"] - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / (kept + (1 - kept) / rope["factor"])
    return factors.float()


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _differs(model: ModelDescription, name: str, value: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model.folder / 'config.json'}: {name} is {show_value(value)}, which llama.cpp computes differently; use --format gptq"
    )
