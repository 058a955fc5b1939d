#!/usr/bin/env python3
"""Read bigq's output in w8a8-int8, fp8, fp8-block, nvfp4, nvfp4-w4a4 or mxfp4 with transformers and compressed-tensors, in the client's
virtual environment without bigq.

    reader_numbers.py RESULTS FOLDER…

route "transformers": ``AutoModelForCausalLM.from_pretrained``. It unpacks the weights, and rounds the inputs of Linears itself if the
    format says so. In fp32; 4-bit weights become bf16 whatever dtype is asked for, so models with such are loaded in bf16.
route "unpacked": the same in fp32 for 4-bit weights. The first forward unpacks them to bf16, in which they are exact, and fails since the
    rest of the model is in fp32; then they are made fp32 too.
route "dequantize": the same with its option for unpacking weights at once, in fp32.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

#: A matrix of an expert, by its name in a file: of layer, number and part.
EXPERT = re.compile(r"model\.layers\.(\d+)\..+\.experts\.(\d+)\.(\w+)")
DOWN, UP = ("down_proj", "w2"), ("up_proj", "w3")
PACKAGES = ("compressed-tensors", "transformers", "torch", "accelerate", "safetensors")


def experts_equal(model: nn.Module, expected: dict[str, Tensor]) -> int:
    """How many matrices of experts are those of the file. The model has a parameter for all experts of a layer, gate and up together."""
    parameters = dict(model.named_parameters())
    equal = 0
    for name, weight in expected.items():
        found = EXPERT.fullmatch(name)
        if found is None:
            continue
        layer, expert, part = found.groups()
        whole = parameters[f"model.layers.{layer}.mlp.experts.{'down_proj' if part in DOWN else 'gate_up_proj'}"][int(expert)]
        if part not in DOWN:
            whole = whole.chunk(2)[part in UP]
        equal += torch.equal(whole.float(), weight)
    return equal


def unpack(model: nn.Module, ids: Tensor) -> None:
    with contextlib.suppress(RuntimeError), torch.no_grad():
        model.eval()(input_ids=ids, use_cache=False)
    nn.Module.float(model)  # transformers' own float() refuses quantized models


def read(folder: Path, route: str, dtype: torch.dtype) -> dict[str, Any]:
    began = time.monotonic()
    row: dict[str, Any] = {"case": folder.name, "route": route}
    with safe_open(folder / "expected.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    expected = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if route == "dequantize" else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=dtype, output_loading_info=True, **more)
        if route == "unpacked":
            unpack(model, tensors["ids"])
        with torch.no_grad():
            got = model.eval()(input_ids=tensors["ids"], use_cache=False).logits.float()
        modules = dict(model.named_modules())
        dense = {name: weight for name, weight in expected.items() if name in modules}
        row |= {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        row |= {
            "dtype": str(dtype).removeprefix("torch."),
            "linears": len(dense) if more else sum(hasattr(module, "weight_scale") for module in modules.values()),
            "linears_expected": len(dense),
            "of_experts": len(expected) - len(dense),
            "of_experts_equal": experts_equal(model, expected),
            "weights_equal": sum(torch.equal(modules[name].weight.float(), weight) for name, weight in dense.items()),
            "logits_rel_diff": float((got - tensors["logits"]).norm() / tensors["logits"].norm()),
            "original_rel_diff": float((tensors["original"] - tensors["logits"]).norm() / tensors["logits"].norm()),
        }
    except Exception as error:  # any error of the reader is a finding
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row | {"seconds": round(time.monotonic() - began, 2)}


def main() -> None:
    results, *folders = map(Path, sys.argv[1:])
    torch.set_num_threads(2)
    for folder in folders:
        for route in json.loads((folder / "case.json").read_text())["routes"]:
            four_bits = '"num_bits": 4' in (folder / "out/config.json").read_text()
            row = read(folder, route, torch.bfloat16 if four_bits and route == "transformers" else torch.float32)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main()
