#!/usr/bin/env python3
"""Quantize a bf16 model with another program, in its virtual environment without bigq, and save it in that program's own format.

    time_peer.py gptqmodel|llmcompressor MODEL IDS OUT

MODEL: a checkpoint folder. IDS: safetensors with input_ids int64 [N, T]. 4 bits, groups of 128, symmetric, natural order; damping 0.01;
batches of 8 rows, or what the program makes of them. Prints one JSON object: versions and the number of quantized Linears.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

PACKAGES = ("gptqmodel", "llmcompressor", "transformers", "torch")
BITS, GROUP, BATCH = 4, 128, 8


def gptqmodel(model: str, ids: list[list[int]], out: str) -> int:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=BITS, group_size=GROUP, sym=True, desc_act=False, act_group_aware=False, damp_percent=0.01)
    loaded = GPTQModel.load(model, config, device="cpu", dtype=torch.bfloat16)
    loaded.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=BATCH)
    loaded.save(out)
    return sum(type(module).__name__.endswith("QuantLinear") or hasattr(module, "qweight") for module in loaded.model.modules())


def llmcompressor(model: str, ids: list[list[int]], out: str) -> int:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    weights = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "actorder": None}
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    oneshot(
        model=loaded,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=GPTQModifier(ignore=["lm_head"], config_groups=groups, dampening_frac=0.01),
        # It asks for a tokenizer although the rows are token ids.
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), pad_token="?"),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        batch_size=BATCH,
    )
    count = sum(getattr(module, "quantization_scheme", None) is not None for module in loaded.modules())
    loaded.save_pretrained(out, save_compressed=True)
    return count


def main() -> None:
    program, model, ids_file, out = sys.argv[1:]
    from safetensors.torch import load_file

    ids = load_file(ids_file)["input_ids"].tolist()
    linears = {"gptqmodel": gptqmodel, "llmcompressor": llmcompressor}[program](model, ids, out)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    size = sum(path.stat().st_size for path in Path(out).glob("*.safetensors"))
    print(json.dumps({"linears": linears, "versions": versions, "bytes": size}), flush=True)


if __name__ == "__main__":
    main()
