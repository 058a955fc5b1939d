#!/usr/bin/env python3
"""Write checkpoints in the shapes of published models with experts that consist of headers: all data are holes and read as zeros.

Such a folder takes a few MiB of disk space, however large the model: enough for ``bigq plan``, which reads headers only. Tensors have the
names with which transformers saves the model: matrix by matrix, or one tensor for all experts. They are bf16.

    python scripts/moe_shapes.py deepseek-v3 DIR                    # as published: 61 blocks
    python scripts/moe_shapes.py deepseek-v3 DIR --blocks 124       # 94,661 tensors
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from bigq.io.index import DTYPE_NAMES, INDEX_NAME, SINGLE_NAME
from bigq.model import skeleton

#: A shard is closed by the tensor with which it reaches this size.
SHARD_BYTES = 4 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """A model with experts. config: its config.json as published, as far as its shape depends on it, without dtype and quantization.

    parameters: the published number, in billions. flags: what ``bigq plan`` needs for it. note: what is not as published.
    """

    name: str
    config: Mapping[str, Any]
    parameters: float
    flags: tuple[str, ...] = ()
    note: str | None = None


_DEEPSEEK_V3: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}

MOE_SHAPES: Mapping[str, MoeShape] = {
    shape.name: shape
    for shape in (
        MoeShape(name="deepseek-v3", config=_DEEPSEEK_V3, parameters=671, note="without the layer for multi-token prediction"),
        MoeShape(
            name="kimi-k2",
            config={
                **_DEEPSEEK_V3,
                "first_k_dense_replace": 1,
                "max_position_embeddings": 131072,
                "n_group": 1,
                "n_routed_experts": 384,
                "num_attention_heads": 64,
                "num_key_value_heads": 64,
                "rope_scaling": {**_DEEPSEEK_V3["rope_scaling"], "beta_fast": 1.0, "factor": 32.0},
                "rope_theta": 50000.0,
                "routed_scaling_factor": 2.827,
                "topk_group": 1,
                "vocab_size": 163840,
            },
            parameters=1026,
            note="published with model type kimi_k2 and its own code; transformers has no such class, so this is its config as deepseek_v3",
        ),
        MoeShape(
            name="qwen3-235b-a22b",
            config={
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "attention_bias": False,
                "decoder_sparse_step": 1,
                "head_dim": 128,
                "hidden_act": "silu",
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "max_position_embeddings": 40960,
                "mlp_only_layers": [],
                "moe_intermediate_size": 1536,
                "norm_topk_prob": True,
                "num_attention_heads": 64,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "num_hidden_layers": 94,
                "num_key_value_heads": 4,
                "rms_norm_eps": 1e-06,
                "rope_theta": 1000000.0,
                "tie_word_embeddings": False,
                "vocab_size": 151936,
            },
            parameters=235,
        ),
        MoeShape(
            name="glm-4.5",
            config={
                "architectures": ["Glm4MoeForCausalLM"],
                "model_type": "glm4_moe",
                "attention_bias": True,
                "first_k_dense_replace": 3,
                "head_dim": 128,
                "hidden_act": "silu",
                "hidden_size": 5120,
                "intermediate_size": 12288,
                "max_position_embeddings": 131072,
                "moe_intermediate_size": 1536,
                "n_group": 1,
                "n_routed_experts": 160,
                "n_shared_experts": 1,
                "norm_topk_prob": True,
                "num_attention_heads": 96,
                "num_experts_per_tok": 8,
                "num_hidden_layers": 92,
                "num_key_value_heads": 8,
                "partial_rotary_factor": 0.5,
                "rms_norm_eps": 1e-05,
                "rope_theta": 1000000,
                "routed_scaling_factor": 2.5,
                "tie_word_embeddings": False,
                "topk_group": 1,
                "use_qk_norm": True,
                "vocab_size": 151552,
            },
            parameters=355,
            note="without the layer for multi-token prediction",
        ),
        MoeShape(
            name="mixtral-8x22b",
            config={
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "hidden_act": "silu",
                "hidden_size": 6144,
                "intermediate_size": 16384,
                "max_position_embeddings": 65536,
                "num_attention_heads": 48,
                "num_experts_per_tok": 2,
                "num_hidden_layers": 56,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "rms_norm_eps": 1e-05,
                "rope_theta": 1000000,
                "tie_word_embeddings": False,
                "vocab_size": 32000,
            },
            parameters=141,
        ),
        MoeShape(
            name="gpt-oss-120b",
            config={
                "architectures": ["GptOssForCausalLM"],
                "model_type": "gpt_oss",
                "attention_bias": True,
                "head_dim": 64,
                "hidden_act": "silu",
                "hidden_size": 2880,
                "intermediate_size": 2880,
                "layer_types": ["sliding_attention", "full_attention"] * 18,
                "max_position_embeddings": 131072,
                "num_attention_heads": 64,
                "num_experts_per_tok": 4,
                "num_hidden_layers": 36,
                "num_key_value_heads": 8,
                "num_local_experts": 128,
                "rms_norm_eps": 1e-05,
                "rope_scaling": {
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "factor": 32.0,
                    "original_max_position_embeddings": 4096,
                    "rope_type": "yarn",
                    "truncate": False,
                },
                "rope_theta": 150000,
                "sliding_window": 128,
                "swiglu_limit": 7.0,
                "tie_word_embeddings": False,
                "vocab_size": 201088,
            },
            parameters=117,
            flags=("--group-size", "64"),
            note="published in mxfp4; this is a bf16 copy",
        ),
    )
}


def tensors_of(config: Mapping[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """The tensors, on meta, that transformers saves for a config, by their names in the checkpoint. Writes config.json to ``folder``."""
    from transformers.core_model_loading import revert_weight_conversion

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    skeleton.silence_transformers()
    model = skeleton.build(skeleton.load_config(folder), torch.bfloat16, initialised=False)
    saved: dict[str, torch.Tensor] = revert_weight_conversion(model, model.state_dict())
    return saved


def write_headers(config: Mapping[str, Any], folder: Path) -> int:
    """Write config, index and shards without data. Returns the number of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of({**config, "dtype": "bfloat16"}, folder)
    shards = list(_shards(tensors))
    weight_map = {}
    for i, names in enumerate(shards, 1):
        path = folder / SINGLE_NAME.replace(".", f"-{i:05d}-of-{len(shards):05d}.")
        _write_shard(path, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, path.name)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return len(tensors)


def _shards(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """The names of the tensors of each shard, in their order."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        names.append(name)
        size += tensor.nbytes
        if size >= SHARD_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names


def _write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=MOE_SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, help="number of blocks (default: the shape's own)")
    args = parser.parse_args()
    config = dict(MOE_SHAPES[args.shape].config)
    if args.blocks is not None:
        config["num_hidden_layers"] = args.blocks
        if "layer_types" in config:
            config["layer_types"] = (config["layer_types"] * args.blocks)[: args.blocks]
    print(f"{write_headers(config, args.folder)} tensors")


if __name__ == "__main__":
    main()
