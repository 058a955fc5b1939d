#!/usr/bin/env python3
"""Read bigq's output in w8a8-int8 with transformers and compressed-tensors, in the client's virtual environment without bigq.

    reader_w8a8.py RESULTS FOLDER…

route "transformers": ``AutoModelForCausalLM.from_pretrained`` in fp32. It unpacks the weights, and rounds the inputs of Linears itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

PACKAGES = ("compressed-tensors", "transformers", "torch", "accelerate", "safetensors")


def read(folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    row: dict[str, Any] = {"case": folder.name, "route": "transformers"}
    with safe_open(folder / "expected.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    expected = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32, output_loading_info=True)
        with torch.no_grad():
            got = model.eval()(input_ids=tensors["ids"], use_cache=False).logits
        modules = dict(model.named_modules())
        row |= {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        row |= {
            "linears": sum(hasattr(module, "weight_scale") for module in modules.values()),
            "linears_expected": len(expected),
            "weights_equal": sum(torch.equal(modules[name].weight, weight) for name, weight in expected.items()),
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
        row = read(folder)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main()
