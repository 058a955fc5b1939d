#!/usr/bin/env python3
"""Quantize a model with GPTQModel, in its virtual environment without bigq, and write each result as a dense fp32 checkpoint.

    quantize_gptqmodel.py MODEL IDS JOBS

MODEL: an fp32 checkpoint. IDS: safetensors with input_ids int64 [N, T]. JOBS: a JSON list of {"out": folder, "settings": {…}}, where
settings are fields of GPTQModel's QuantizeConfig. OUT gets model.safetensors with GPTQModel's own dequantized weights (scales as
it stores them), and last peer.json: versions, seconds, number of Linears.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel compiles its unpacking, which takes most of the time

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import load_file, save_file
from torch import Tensor

PACKAGES = ("gptqmodel", "transformers", "torch")
#: Settings of all jobs that do not say otherwise: GPTQ only, without a fallback to rounding to nearest.
COMMON = {"true_sequential": True, "damp_percent": 0.01, "fallback": None, "offload_to_disk": False}


def quantize(model: Path, rows: list[dict[str, Any]], settings: dict[str, Any], packed: Path) -> str:
    """Quantize and save in GPTQModel's own format. Returns the compute dtype."""
    loaded = GPTQModel.load(str(model), QuantizeConfig(**COMMON | settings), device="cpu", dtype=torch.float32)
    dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    loaded.quantize(rows, batch_size=8)
    loaded.save(str(packed))
    return dtype


def dequantized(packed: Path) -> dict[str, Tensor]:
    """Every packed Linear's weight, fp32 [outputs, inputs]: the stored scales and codes, multiplied in fp32."""
    model = GPTQModel.load(str(packed), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseQuantLinear):
            module.scales = module.scales.float()
            weights[f"{name}.weight"] = module.dequantize_weight().T.contiguous()
    return weights


def main() -> None:
    model, ids_file, jobs_file = map(Path, sys.argv[1:])
    ids = load_file(ids_file)["input_ids"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    for job in json.loads(jobs_file.read_text()):
        out = Path(job["out"])
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        began = time.monotonic()
        dtype = quantize(model, rows, job["settings"], out / "packed")
        seconds = time.monotonic() - began
        weights = dequantized(out / "packed")
        save_file(load_file(model / "model.safetensors") | weights, out / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(out / "packed")
        said = {"linears": len(weights), "seconds": round(seconds, 1), "computed_in": dtype}
        said |= {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
        (out / "peer.json").write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
