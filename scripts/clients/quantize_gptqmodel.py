#!/usr/bin/env python3
"""Quantize a model with GPTQModel, in its virtual environment without bigq, and write its weights dequantized.

    quantize_gptqmodel.py MODEL IDS OUT SETTINGS

MODEL: a checkpoint, loaded in fp32. IDS: safetensors with input_ids int64 [N, T]. SETTINGS: JSON, fields of GPTQModel's QuantizeConfig;
those that are not given keep its defaults. OUT gets weights.safetensors with GPTQModel's own dequantized weights (scales as stored),
under the checkpoint's names, and last used.json: what quantizing and saving took (used.py), number of Linears, compute dtype.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel compiles its unpacking, which takes most of the time

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.config import GPTAQConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from used import Used, write

BATCH = 8


def quantize(model: Path, rows: list[dict[str, Any]], settings: dict[str, Any], packed: Path) -> str:
    """Quantize and save in GPTQModel's own format. Returns the compute dtype."""
    if isinstance(settings.get("gptaq"), dict):
        settings = settings | {"gptaq": GPTAQConfig(**settings["gptaq"])}
    loaded = GPTQModel.load(str(model), QuantizeConfig(**settings), device="cpu", dtype=torch.float32)
    dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    loaded.quantize(rows, batch_size=BATCH)
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
    model, ids_file, out = map(Path, sys.argv[1:4])
    settings = json.loads(sys.argv[4])
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in load_file(ids_file)["input_ids"]]
    out.mkdir(parents=True, exist_ok=True)
    used = Used()
    dtype = quantize(model, rows, settings, out / "packed")
    said = used.said("gptqmodel", "transformers", "torch") | {"computed_in": dtype}
    weights = dequantized(out / "packed")
    save_file(weights, out / "weights.safetensors")
    shutil.rmtree(out / "packed")
    write(said | {"linears": len(weights)}, out / "used.json")


if __name__ == "__main__":
    main()
