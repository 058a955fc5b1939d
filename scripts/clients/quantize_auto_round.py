#!/usr/bin/env python3
"""Quantize a model with auto-round, in its virtual environment without bigq, and write its weights dequantized.

    quantize_auto_round.py MODEL IDS OUT SETTINGS

Arguments and output are those of quantize_gptqmodel.py; SETTINGS are arguments of AutoRound, where those that are not given keep its
defaults. It leaves scale · (code − zero point) in the place of each weight, with scales in fp16 as its formats have them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from used import Used, write

BATCH = 8


def quantize(folder: Path, ids: Tensor, settings: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Every quantized Linear's weight, fp32 [outputs, inputs], and the compute dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rounder = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        dataset=[{"input_ids": rows} for rows in ids.split(BATCH)],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=BATCH,
        device_map="cpu",
        **settings,
    )
    made, _ = rounder.quantize()
    after = {name.replace(".orig_layer.", "."): parameter.detach() for name, parameter in made.named_parameters()}
    changed = {name: after[name] for name, was in before.items() if name in after and not torch.equal(after[name].float(), was)}
    return {name: weight.float().contiguous() for name, weight in changed.items()}, dtype


def main() -> None:
    model, ids_file, out = map(Path, sys.argv[1:4])
    ids = load_file(ids_file)["input_ids"]
    out.mkdir(parents=True, exist_ok=True)
    used = Used()
    weights, dtype = quantize(model, ids, json.loads(sys.argv[4]))
    said = used.said("auto-round", "transformers", "torch") | {"computed_in": dtype}
    save_file(weights, out / "weights.safetensors")
    write(said | {"linears": len(weights)}, out / "used.json")


if __name__ == "__main__":
    main()
