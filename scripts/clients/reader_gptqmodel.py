#!/usr/bin/env python3
"""Read bigq's output (gptq or awq) with GPTQModel in two ways, and train PEFT adapters on it, in the client's virtual environment
without bigq.

    reader_gptqmodel.py RESULTS FOLDER…

route "transformers": ``AutoModelForCausalLM.from_pretrained``, where optimum replaces Linears by GPTQModel's.
route "gptqmodel": ``GPTQModel.load``. route "peft": as "transformers", then some training steps of LoRA adapters.
Weights are unpacked by GPTQModel. Its torch kernel for gptq takes activations of any type, so the model runs in fp32. That for awq
multiplies in fp16, also where the rest of the model is in fp32.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel compiles its unpacking, which takes most of the time

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

PACKAGES = ("gptqmodel", "transformers", "optimum", "peft", "torch", "accelerate", "safetensors")
BACKENDS = {"transformers": "gptq_torch", "peft": "auto_trainable"}
LORA_STEPS = 8
PACKED = ("qweight", "qzeros", "scales", "g_idx")


def load(folder: Path, route: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model, loaded by a route, in fp32 except the packed Linears; and the keys that its loader reports."""
    is_awq = json.loads((folder / "out/config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    if route == "gptqmodel":
        backend = BACKEND.AWQ_TORCH if is_awq else BACKEND.GPTQ_TORCH
        model = GPTQModel.load(str(folder / "out"), backend=backend, device="cpu", dtype=torch.float16).model.float()
        for module in quantized_modules(model).values():
            module.scales = module.scales.half()
        return model, {}
    # bits is required, but only the backend overrides the checkpoint
    quantization = AwqConfig(bits=4, backend="torch_awq") if is_awq else GPTQConfig(bits=4, backend=BACKENDS[route])
    model, info = AutoModelForCausalLM.from_pretrained(
        folder / "out", dtype=torch.float32, quantization_config=quantization, output_loading_info=True
    )
    return model, {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def quantized_modules(model: torch.nn.Module) -> dict[str, BaseQuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)}


def unpacked(module: BaseQuantLinear) -> Tensor:
    """The weight [outputs, inputs] of a packed Linear."""
    if isinstance(module, AwqTorchLinear):
        return module._dequantize_weight_for_inference(torch.empty(0), dtype=torch.float16).T
    return module.dequantize_weight().T


def compare_weights(modules: dict[str, BaseQuantLinear], expected: dict[str, Tensor]) -> dict[str, Any]:
    """weights_equal: Linears whose unpacked weight equals bigq's, rounded to the client's type."""
    equal, dtypes, largest = 0, set(), 0.0
    for name, weight in expected.items():
        if name not in modules:
            continue
        got = unpacked(modules[name])
        dtypes.add(str(got.dtype).removeprefix("torch."))
        equal += bool(torch.equal(got, weight.to(got.dtype)))
        largest = max(largest, float((got.float() - weight).abs().max()))
    return {
        "linears": len(modules),
        "linears_expected": len(expected),
        "weights_equal": equal,
        "weights_dtype": "/".join(sorted(dtypes)),
        "weights_max_abs_diff": largest,
    }


def compare_logits(model: torch.nn.Module, ids: Tensor, expected: Tensor) -> dict[str, Any]:
    """Differences of the logits. Both sides compute in fp32."""
    with torch.no_grad():
        got = model(input_ids=ids, use_cache=False).logits.float()
    difference = (got - expected).abs()
    return {
        "logits_max_abs_diff": float(difference.max()),
        "logits_rel_diff": float(difference.norm() / expected.norm()),
        "logits_max": float(expected.abs().max()),
    }


def train_lora(model: torch.nn.Module, ids: Tensor) -> dict[str, Any]:
    """Train LoRA on the packed model for some steps: the losses, whether every adapter had a gradient, whether the base is unchanged."""
    from peft import LoraConfig, get_peft_model

    packed = [(module, name, getattr(module, name).clone()) for module in quantized_modules(model).values() for name in PACKED]
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj"]
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    kinds = {type(module).__name__ for module in tuned.modules() if "Lora" in type(module).__name__ or "lora" in type(module).__module__}
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses, touched = [], set()
    tuned.train()
    for _ in range(LORA_STEPS):
        loss = tuned(input_ids=ids, labels=ids).loss
        losses.append(float(loss))
        loss.backward()
        touched |= {
            name for name, p in trained.items() if p.grad is not None and bool(torch.isfinite(p.grad).all()) and bool((p.grad != 0).any())
        }
        optimizer.step()
        optimizer.zero_grad()
    tuned.eval()
    return {
        "lora_classes": sorted(kinds),
        "lora_parameters": len(trained),
        "lora_parameters_with_gradient": len(touched),
        "losses": losses,
        "base_unchanged": all(torch.equal(before, getattr(module, name)) for module, name, before in packed),
    }


def read(folder: Path, route: str) -> dict[str, Any]:
    """The findings of one case by one route."""
    began = time.monotonic()
    row: dict[str, Any] = {"case": folder.name, "route": route}
    with safe_open(folder / "expected.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    expected = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
    try:
        model, keys = load(folder, route)
        model.eval()
        modules = quantized_modules(model)
        row |= keys | {"kernel": "/".join(sorted({type(m).__name__ for m in modules.values()}))}
        row |= compare_weights(modules, expected) | compare_logits(model, tensors["ids"], tensors["logits"])
        if route == "peft":
            row |= train_lora(model, tensors["ids"])
    except Exception as error:  # any error of the reader is a finding
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row | {"seconds": round(time.monotonic() - began, 2)}


def main() -> None:
    results, *folders = map(Path, sys.argv[1:])
    torch.set_num_threads(2)
    routes = [(folder, route) for folder in folders for route in json.loads((folder / "case.json").read_text())["routes"]]
    # GPTQModel.load changes transformers' models with experts for the rest of the process, so it comes last.
    for folder, route in sorted(routes, key=lambda each: each[1] == "gptqmodel"):
        row = read(folder, route)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main()
