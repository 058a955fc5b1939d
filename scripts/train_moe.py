#!/usr/bin/env python3
"""Train a small model with experts, in the shape of Qwen3-MoE, for scripts/quality_moe.py and scripts/quality.py.

    python scripts/train_moe.py --out DIR

Text and tokenizer are those of train_tiny.py: the sources of the Python standard library, without the files held out by the hash of
their path, byte by byte. One thread and fp32 throughout, so that the same interpreter and torch make the same weights on the same kind
of processor. DIR gets the checkpoint as transformers saves it (bf16, a tensor for each expert), its tokenizer, and training.json: text,
steps, seconds, held-out perplexity and how many tokens each expert was given.

The loss that balances experts has a small coefficient, so that some experts get few tokens and some none, as in models with many more
of them. Embeddings have no common vector, as train_tiny.py gives them: with one, all tokens choose the same experts from the start
(after 80 steps 26 to 29 of 32 experts of a layer had no token of 4096).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_tiny import byte_tokenizer, corpus, learning_rate
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

EXPERTS, CHOSEN = 32, 2
CONFIG: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.005,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
STEPS, BATCH, SEQLEN, RATE = 1200, 16, 256, 3e-3
#: Tokens on which the share of each expert is counted: as many as a small calibration has.
COUNTED = 4096


def new_model() -> Qwen3MoeForCausalLM:
    """A random model, fp32."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG, attn_implementation="eager", experts_implementation="eager")).float()


def batch_at(step: int, data: Tensor, batch: int, seqlen: int) -> Tensor:
    """Token ids int64 [batch, seqlen] of a step, from data uint8 [N]."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(data) - seqlen, (batch,), generator=generator)
    return torch.stack([data[s : s + seqlen] for s in starts.tolist()]).long()


def train(model: PreTrainedModel, data: Tensor, *, steps: int, rate: Callable[[int], float], **forward: Any) -> None:
    """AdamW without weight decay. data: uint8 [N]. rate: the learning rate of a step. forward: arguments of the model's forward."""
    began = time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    model.train()
    for step in range(steps):
        rows = batch_at(step, data, BATCH, SEQLEN)
        found = model(input_ids=rows, labels=rows, use_cache=False, **forward)
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0:
            print(f"step {step + 1} loss {found.loss.item():.4f} {time.monotonic() - began:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def measure(model: PreTrainedModel, rows: Tensor) -> tuple[float, list[list[int]]]:
    """The perplexity on rows int64 [N, T], and for each layer the number of tokens that each expert was given."""
    total = 0.0
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.int64)
    for part in rows.split(BATCH):
        found = model(input_ids=part, use_cache=False, output_router_logits=True)
        total += float(torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        for count, logits in zip(counts, found.router_logits, strict=True):
            chosen = logits.topk(model.config.num_experts_per_tok).indices
            count += torch.bincount(chosen.flatten(), minlength=len(count))
    return math.exp(total / (len(rows) * (rows.shape[1] - 1))), counts.tolist()


def spread(counts: list[list[int]]) -> list[dict[str, float]]:
    """For each layer: tokens of an expert (least, median, most), how many experts had none, how many below a tenth of the mean."""
    return [
        {
            "min": min(layer),
            "median": statistics.median(layer),
            "max": max(layer),
            "without": sum(n == 0 for n in layer),
            "below_a_tenth_of_the_mean": sum(n < statistics.mean(layer) / 10 for n in layer),
        }
        for layer in counts
    ]


def make(out: Path, steps: int = STEPS) -> dict[str, Any]:
    """Train the model and write it. Returns what training.json says."""
    torch.set_num_threads(1)
    began = time.monotonic()
    text, _, heldout = corpus()
    data, held = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (text, heldout))
    model = new_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes to train on", flush=True)
    train(model, data, steps=steps, rate=lambda step: learning_rate(step, steps, RATE), output_router_logits=True)
    model.to(torch.bfloat16).float()
    rows = held[: len(held) // SEQLEN * SEQLEN].view(-1, SEQLEN).long()
    perplexity, _ = measure(model, rows)
    _, counts = measure(model, rows[: COUNTED // SEQLEN])
    said = {
        "text": f"Python {platform.python_version()} standard library sources, PSF licence",
        "versions": {"torch": torch.__version__},
        "steps": steps,
        "tokens": steps * BATCH * SEQLEN,
        "seconds": round(time.monotonic() - began),
        "heldout_perplexity": perplexity,
        "tokens_counted": COUNTED,
        "tokens_of_experts": spread(counts),
    }
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    (out / "training.json").write_text(json.dumps(said, indent=1) + "\n")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of 16 × 256 tokens (default: %(default)s)")
    args = parser.parse_args()
    print(json.dumps(make(args.out, args.steps), indent=1))


if __name__ == "__main__":
    main()
