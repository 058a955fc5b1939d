#!/usr/bin/env python3
"""Quantize a model with llm-compressor, in its virtual environment without bigq, and write each result as a dense fp32 checkpoint.

    quantize_llmc.py MODEL IDS JOBS

Arguments and output are those of quantize_gptqmodel.py; a job's settings are {"weights": QuantizationArgs, "modifier": GPTQModifier's own,
"oneshot": further arguments of oneshot, if any}.
The weights are llm-compressor's own: it replaces each weight by scale · code, with fp32 scales.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def quantize(folder: Path, ids: Tensor, settings: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Every quantized Linear's weight, fp32 [outputs, inputs], and the compute dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    groups = {"all": {"targets": ["Linear"], "weights": {"type": "int", **settings["weights"]}}}
    recipe = GPTQModifier(ignore=["lm_head"], config_groups=groups, dampening_frac=0.01, **settings["modifier"])
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        batch_size=8,
        **settings.get("oneshot", {}),
    )
    linears = {name: m for name, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {f"{name}.weight": m.weight.detach().float().contiguous() for name, m in linears.items()}, dtype


def main() -> None:
    model, ids_file, jobs_file = map(Path, sys.argv[1:])
    ids = load_file(ids_file)["input_ids"]
    for job in json.loads(jobs_file.read_text()):
        out = Path(job["out"])
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        began = time.monotonic()
        weights, dtype = quantize(model, ids, job["settings"])
        seconds = time.monotonic() - began
        save_file(load_file(model / "model.safetensors") | weights, out / "model.safetensors", metadata={"format": "pt"})
        said = {"linears": len(weights), "seconds": round(seconds, 1), "computed_in": dtype}
        said |= {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
        (out / "peer.json").write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
