#!/usr/bin/env python3
"""Train small models of other families than the shipped one, for scripts/quality.py.

    python scripts/train_small.py opt --out DIR
    python scripts/train_small.py outliers --out DIR

opt: OPT's structure: biases in every Linear, LayerNorm, ReLU, learned positions, tied embeddings.
outliers: Qwen2's structure (biases of q, k and v), and after training some inputs of every Linear are made 32 or 64 times larger, its
weights for them as much smaller. Factors are powers of two, so that the function stays the same to the bit. Large models have such inputs
(Dettmers et al. 2022, "LLM.int8()"): products of large inputs and small weights that matter as much as others.

Text, tokenizer, optimizer and schedule are those of train_moe.py. One thread and fp32, so that the same interpreter and torch make the
same weights on the same kind of processor. DIR gets the checkpoint (bf16), its tokenizer and training.json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_moe import BATCH, RATE, SEQLEN, train
from train_tiny import byte_tokenizer, corpus, learning_rate
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

STEPS = 400
COMMON: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
FACTORS = (32.0, 64.0)
#: One input in so many is made larger.
EVERY = 64


def opt() -> PreTrainedModel:
    config = OPTConfig(**COMMON, ffn_dim=1024, word_embed_proj_dim=256, dropout=0.0, pad_token_id=257, attn_implementation="eager")
    return OPTForCausalLM(config)


def qwen2() -> PreTrainedModel:
    config = Qwen2Config(
        **COMMON, intermediate_size=512, num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=257, attn_implementation="eager"
    )
    return Qwen2ForCausalLM(config)


@torch.no_grad()
def add_outliers(model: PreTrainedModel, seed: int = 0) -> None:
    """Make some inputs of every Linear in the blocks larger, and its weights for them smaller: the same function, exactly."""
    generator = torch.Generator().manual_seed(seed)

    def factors(n: int) -> Tensor:
        made = torch.ones(n)
        chosen = torch.randperm(n, generator=generator)[: max(1, n // EVERY)]
        made[chosen] = torch.tensor(FACTORS)[torch.randint(len(FACTORS), (len(chosen),), generator=generator)]
        return made

    for layer in model.base_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        norms = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, readers in norms.items():
            larger = factors(len(norm.weight))
            norm.weight *= larger
            for linear in readers:
                linear.weight /= larger
        for before, after, repeats in (
            (attention.v_proj, attention.o_proj, attention.num_key_value_groups),
            (mlp.up_proj, mlp.down_proj, 1),
        ):
            larger = factors(before.out_features)
            before.weight *= larger[:, None]
            if before.bias is not None:
                before.bias *= larger
            # Each head of values is read by several heads of queries, whose outputs lie side by side.
            after.weight /= larger.view(-1, attention.head_dim).repeat_interleave(repeats, 0).flatten() if repeats > 1 else larger


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Tensor) -> float:
    """On rows int64 [N, T]."""
    total = sum(float(model(input_ids=part, labels=part, use_cache=False).loss) * len(part) for part in rows.split(BATCH))
    return math.exp(total / len(rows))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"opt": opt, "outliers": qwen2}


def make(name: str, out: Path, steps: int = STEPS) -> dict[str, Any]:
    """Train the model called ``name`` and write it. Returns what training.json says."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    began = time.monotonic()
    text, _, heldout = corpus()
    data, held = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (text, heldout))
    model = MODELS[name]().float()
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes to train on", flush=True)
    train(model, data, steps=steps, rate=lambda step: learning_rate(step, steps, RATE))
    model.to(torch.bfloat16)
    if name == "outliers":
        add_outliers(model)
    said = {
        "text": f"Python {platform.python_version()} standard library sources, PSF licence",
        "versions": {"torch": torch.__version__},
        "command": f"python scripts/train_small.py {name} --out DIR --steps {steps}",
        "steps": steps,
        "tokens": steps * BATCH * SEQLEN,
        "seconds": round(time.monotonic() - began),
        "heldout_perplexity": perplexity(model.float(), held[: len(held) // SEQLEN * SEQLEN].view(-1, SEQLEN).long()),
    }
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    (out / "training.json").write_text(json.dumps(said, indent=1) + "\n")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of 16 × 256 tokens (default: %(default)s)")
    args = parser.parse_args()
    print(json.dumps(make(args.model, args.out, args.steps), indent=1))


if __name__ == "__main__":
    main()
