#!/usr/bin/env python3
"""KL divergence and perplexity of LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339) from the original model, in bitsandbytes' environment.

    judge_llm_int8.py MODEL WINDOWS LENGTH

Inputs and weights are rounded to int8, and columns of inputs with a number above 6 are computed in 16 bits. WINDOWS is a safetensors file
with input_ids [rows, tokens], of which the first LENGTH tokens of each row are used. Prints a JSON object.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

BATCH = 8


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.cat([model(input_ids=part).logits.float().log_softmax(-1)[:, :-1] for part in ids.split(BATCH)])


def main() -> None:
    folder, file, length = sys.argv[1:4]
    ids = load_file(file)["input_ids"][:, : int(length)]
    original = log_probabilities(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    began = time.process_time()
    config = BitsAndBytesConfig(load_in_8bit=True)
    found = log_probabilities(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config), ids)
    seconds = time.process_time() - began
    rows = (original.exp() * (original - found)).sum(-1).double().mean(1)
    losses = {name: -each.gather(-1, ids[:, 1:, None]).double().mean() for name, each in (("", found), ("baseline_", original))}
    result = {
        "kl": float(rows.mean()),
        "kl_stderr": float(rows.std() / len(rows) ** 0.5),
        **{f"{name}perplexity": float(loss.exp()) for name, loss in losses.items()},
        "cpu_seconds": round(seconds, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
