"""Tiny random checkpoints of every family, and an independent reading of the packed format, for the end-to-end tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from bigq.infer.evaluate import Stream
from bigq.model.pager import Pager

VOCABULARY = 128
#: Rows and length of the calibration ids, and where ids start (below lie special tokens).
ROWS, SEQLEN, FIRST_ID = 16, 40, 3

_LLAMA_LIKE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SMALL: Mapping[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}

#: Family → (model type, config values). Every attention, norm, position and residual variant that occurs is in one of them.
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 3, "n_head": 4, "pad_token_id": 0}),
    "opt": (
        "opt",
        {
            **_SMALL,
            "ffn_dim": 96,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": True,
            "pad_token_id": 1,
        },
    ),
    "llama": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "gpt_neox": (
        "gpt_neox",
        {**_SMALL, "intermediate_size": 96, "max_position_embeddings": 128, "use_parallel_residual": True},
    ),
    "falcon": ("falcon", {**_SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": False}),
    "falcon_alibi": (
        "falcon",
        {**_SMALL, "new_decoder_architecture": False, "multi_query": False, "alibi": True, "bias": True, "parallel_attn": False},
    ),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": 16}),
    "qwen2": ("qwen2", {**_LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 16}),
    "gemma2": ("gemma2", {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 16}),
    "gemma3": (
        "gemma3_text",
        {
            **_LLAMA_LIKE,
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", dict(_LLAMA_LIKE)),
}

#: One with experts; more are in ``moe_families``.
WITH_EXPERTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
}

#: Models that bigq must refuse, each for another reason.
UNSUPPORTED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "rwkv": (
        "rwkv",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "attention_hidden_size": 64,
            "num_hidden_layers": 4,
            "context_length": 128,
            "rescale_every": 2,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            **_LLAMA_LIKE,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "n_mamba_heads": 8,
            "mamba_d_state": 16,
            "mamba_headdim": 16,
            "num_mem_blocks": 1,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "adapter_rank": 8,
            "use_mem_rope": True,
        },
    ),
}

#: For every family: the Linears of a block by level, level by level. Linears of one inner tuple share one input.
LEVELS: Mapping[str, tuple[tuple[tuple[str, ...], ...], ...]] = {
    "bloom": (
        (("self_attention.query_key_value",),),
        (("self_attention.dense",),),
        (("mlp.dense_h_to_4h",),),
        (("mlp.dense_4h_to_h",),),
    ),
    "opt": (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
        (("self_attn.out_proj",),),
        (("fc1",),),
        (("fc2",),),
    ),
    "gpt2": ((("attn.c_attn",),), (("attn.c_proj",),), (("mlp.c_fc",),), (("mlp.c_proj",),)),
    "gpt_neox": (
        (("attention.query_key_value",), ("mlp.dense_h_to_4h",)),
        (("attention.dense",), ("mlp.dense_4h_to_h",)),
    ),
    "falcon": (
        (("self_attention.query_key_value",), ("mlp.dense_h_to_4h",)),
        (("self_attention.dense",), ("mlp.dense_4h_to_h",)),
    ),
    "falcon_alibi": (
        (("self_attention.query_key_value",),),
        (("self_attention.dense",),),
        (("mlp.dense_h_to_4h",),),
        (("mlp.dense_4h_to_h",),),
    ),
    "phi3": ((("self_attn.qkv_proj",),), (("self_attn.o_proj",),), (("mlp.gate_up_proj",),), (("mlp.down_proj",),)),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"),
        (
            (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
            (("self_attn.o_proj",),),
            (("mlp.gate_proj", "mlp.up_proj"),),
            (("mlp.down_proj",),),
        ),
    ),
}


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random weights; norms and biases are random too, so that none of them can go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim >= 2:
                param.normal_(0, 0.15, generator=generator)
            else:
                param.add_(torch.randn(param.shape, generator=generator) * 0.1)
    model.tie_weights()  # type: ignore[operator]


def make_checkpoint(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, shard: str = "60KB", seed: int = 0, **overrides: Any
) -> Path:
    """Save a random model of a family."""
    model_type, values = {**FAMILIES, **WITH_EXPERTS, **UNSUPPORTED}[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**values, **overrides}))
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def word_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that makes token 5 of the word "w5"; with ``bos``, token 1 stands before every text."""
    words = {f"w{i}": i for i in range(FIRST_ID, VOCABULARY)}
    model = WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **words}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def random_ids(rows: int = ROWS, seqlen: int = SEQLEN, seed: int = 0) -> Tensor:
    return torch.randint(FIRST_ID, VOCABULARY, (rows, seqlen), generator=torch.Generator().manual_seed(seed))


def save_ids(path: Path, ids: Tensor) -> Path:
    save_file({"input_ids": ids}, path)
    return path


def reference_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The whole model as transformers loads it."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return aligned(model).eval().requires_grad_(False)


def aligned(model: nn.Module) -> nn.Module:
    """The model with its weights in memory of their own.

    transformers maps shards, where a weight begins at any multiple of 8 bytes; the bits of a product depend on that on some processors.
    """
    for param in model.parameters():
        param.data = param.data.clone()
    return model


def logits_of(model: nn.Module, ids: Tensor, batch: int) -> Tensor:
    """Logits of the whole model, ``batch`` rows at a time."""
    with torch.no_grad():
        return torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(batch)])


def streamed_logits(folder: Path, ids: Tensor, batch: int, dtype: str = "auto") -> Tensor:
    """Logits by bigq's streaming, read off in the batches that the blocks ran in."""
    with torch.no_grad():
        stream = Stream(Pager(folder, device=torch.device("cpu"), dtype=dtype), ids, batch)
        with stream.tail_ready():
            return torch.cat([stream.logits(lo, min(lo + batch, len(ids))) for lo in range(0, len(ids), batch)])


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, by name."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in tensors, f"{name} is stored twice"
            tensors[name] = tensor
    return tensors


def shard_of(folder: Path, name: str) -> Path:
    """The shard that holds a tensor."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder / str(json.loads(index.read_text())["weight_map"][name])
    return folder / "model.safetensors"


def rewrite(folder: Path, name: str, tensor: Tensor | None) -> Path:
    """Replace one tensor of a checkpoint (None drops it from its shard); returns the shard."""
    path = shard_of(folder, name)
    tensors = load_file(path)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@dataclass(frozen=True)
class Decoded:
    """A packed Linear as this module reads it. codes [N, K], scales [N, G], zeros [N, G], group [K]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: Tensor

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[N, K]: multiplied in fp32, rounded once."""
        scales, zeros = self.scales[:, self.group].float(), self.zeros[:, self.group].float()
        return (scales * (self.codes.float() - zeros)).to(dtype)


def decode(tensors: Mapping[str, Tensor], prefix: str, bits: int, version: int = 1) -> Decoded:
    """Read X.qweight, X.qzeros, X.scales and X.g_idx by the format's definition, sharing no code with bigq."""
    qweight, qzeros = tensors[f"{prefix}.qweight"], tensors[f"{prefix}.qzeros"]
    assert qweight.dtype == torch.int32 and qzeros.dtype == torch.int32
    assert tensors[f"{prefix}.scales"].dtype == torch.float16 and tensors[f"{prefix}.g_idx"].dtype == torch.int32
    zeros = _bit_stream(qzeros, bits).T
    return Decoded(
        codes=_bit_stream(qweight.T, bits),
        scales=tensors[f"{prefix}.scales"].T,
        zeros=zeros + 1 if version == 1 else zeros,
        group=tensors[f"{prefix}.g_idx"].long(),
    )


def _bit_stream(words: Tensor, bits: int) -> Tensor:
    """int32 words [R, W] as a stream of little-endian bits → numbers int64 [R, 32·W / bits]."""
    octets = np.ascontiguousarray(words.numpy()).view(np.uint8)
    stream = np.unpackbits(octets, axis=1, bitorder="little")
    digits = stream.reshape(len(stream), -1, bits).astype(np.int64)
    return torch.from_numpy(digits @ (1 << np.arange(bits)))


def linear_module(model: nn.Module, prefix: str) -> nn.Module:
    """The module that a checkpoint prefix stands for, with or without the base model's own prefix."""
    base = getattr(model, "base_model_prefix", "")
    for path in (prefix, f"{base}.{prefix}", prefix.removeprefix(f"{base}.")):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(f"no module for {prefix}")


def matrix(module: nn.Module) -> Tensor:
    """A Linear's or Conv1D's weight as [outputs, inputs]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if type(module).__name__ == "Conv1D" else weight


def put_matrix(module: nn.Module, weight: Tensor) -> None:
    with torch.no_grad():
        matrix(module).copy_(weight)


def linear_names(family: str) -> list[str]:
    """The Linears of a block of a family, by name inside it."""
    return [name for level in LEVELS[family] for group in level for name in group]


def block_prefixes(tensors: Mapping[str, Tensor], linear: str) -> list[str]:
    """The paths of the blocks, by one of the Linears in them, as checkpoint names have it."""
    tails = (f".{linear}.weight", f".{linear}.qweight")
    found = {name.removesuffix(tail) for name in tensors for tail in tails if name.endswith(tail)}
    return sorted(found, key=lambda p: int(p.rpartition(".")[2]))


def packed_prefixes(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    return (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
