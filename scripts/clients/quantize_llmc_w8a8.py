#!/usr/bin/env python3
"""Quantize a model to W8A8 with llm-compressor, in its virtual environment without bigq, and save it as it does (int-quantized).

    quantize_llmc_w8a8.py MODEL IDS OUT SETTINGS

IDS is a safetensors file with input_ids [rows, tokens]. SETTINGS are {"smoothquant": fields of SmoothQuantModifier or null}; GPTQ follows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform import SmoothQuantModifier
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from used import Used, write

BATCH = 8


def main() -> None:
    folder, ids_file, out = map(Path, sys.argv[1:4])
    settings: dict[str, Any] = json.loads(sys.argv[4])
    ids = load_file(ids_file)["input_ids"]
    used = Used()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    recipe: list[Any] = [GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    if settings["smoothquant"] is not None:
        recipe.insert(0, SmoothQuantModifier(**settings["smoothquant"]))
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
        recipe=recipe,
        # It asks for a tokenizer although the rows are token ids.
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), pad_token="?"),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        batch_size=BATCH,
    )
    said = used.said("llmcompressor", "compressed-tensors", "transformers", "torch")
    model.save_pretrained(out, save_compressed=True)
    write(said, out / "used.json")


if __name__ == "__main__":
    main()
