#!/usr/bin/env python3
"""Read bigq's output with bitsandbytes in several ways, in the client's virtual environment without bigq.

    reader_bitsandbytes.py RESULTS FOLDER…

route "transformers": ``AutoModelForCausalLM.from_pretrained``; the model computes in fp32, and bitsandbytes dequantizes to that type. The
logits are compared with those of a model that holds bigq's own dequantized weights.
route "quantize": bitsandbytes quantizes the source itself, and its bytes are compared with bigq's. Scales of scales are rounded by its
portable version, which rounds to nearest as its CUDA kernel does. Its own code for CPUs looks up one of 65536 parts of the range.
route "peft": LoRA adapters on four outputs are trained for eight steps.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.backends.default import ops
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

PACKAGES = ("bitsandbytes", "transformers", "torch", "accelerate", "peft", "safetensors")
STEPS = 8


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    return tensors


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, info = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float16, output_loading_info=True)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.support_avx512bf16_for_cpu = False  # its products are in bf16
    torch.nn.Module.float(model)  # transformers' own float() refuses quantized models; norms and biases are in the type of the source
    return model.eval(), info


def dense(folder: Path, weights: dict[str, Tensor]) -> Any:
    """The source with other weights, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return model.eval()


def by_transformers(folder: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    model, info = load(folder)
    held = {name: module.weight for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    weights = {name: functional.dequantize_4bit(weight.data, weight.quant_state).float() for name, weight in held.items()}
    with torch.no_grad():
        got = model(input_ids=tensors["ids"], use_cache=False).logits
        wanted = dense(folder, expected)(input_ids=tensors["ids"], use_cache=False).logits
    difference = (got - wanted).abs()
    return {
        **{key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")},
        "linears": len(held),
        "linears_expected": len(expected),
        "weights_equal": sum(torch.equal(weight, expected[name].half().float()) for name, weight in weights.items()),
        "logits_max_abs_diff": float(difference.max()),
        "logits_rel_diff": float(difference.norm() / wanted.norm()),
        "logits_max": float(tensors["logits"].abs().max()),
    }


def portable(operator: str) -> Any:
    """The version in plain torch of an operator of bitsandbytes, which has another one for CPUs."""
    for node in ast.parse(inspect.getsource(ops)).body:
        if isinstance(node, ast.FunctionDef) and f"'bitsandbytes::{operator}'" in ast.unparse(node):
            node.decorator_list, node.name, space = [], "found", dict(vars(ops))
            exec(compile(ast.Module([node], []), "ops", "exec"), space)
            return space["found"]
    raise LookupError(operator)


def by_quantizing(folder: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    source, stored, round_scales = read_all(folder / "model"), read_all(folder / "out"), portable("quantize_blockwise")
    kind = json.loads((folder / "out/config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"]
    same, scales, other = 0, 0, 0
    for name in expected:
        prefix, weight = f"{name}.weight", source[f"{name}.weight"]
        _, plain = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
        made = state.as_dict(packed=True)
        own = {key: stored[f"{prefix}.{key}"] for key in made}
        codes, blocks = round_scales(plain.absmax - plain.absmax.mean(), state.state2.code, 256)
        scales, other = scales + codes.numel(), other + int((made["absmax"] != own["absmax"]).sum())
        made |= {"absmax": codes, "nested_absmax": blocks}
        key = f"quant_state.bitsandbytes__{kind}"
        described = [json.loads(bytes(each.pop(key).tolist())) for each in (made, own)]
        equal = all(torch.equal(own[key], value) for key, value in made.items())
        same += equal and torch.equal(stored[prefix], packed) and described[0] == described[1]
    return {"linears": same, "linears_expected": len(expected), "weights_equal": same, "scales": scales, "other_scales_on_cpus": other}


def by_training(folder: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    model, _ = load(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if isinstance(p, Params4bit)}
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).train()
    adapters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(adapters, lr=1e-2), []
    for _ in range(STEPS):
        loss = tuned(input_ids=tensors["ids"], labels=tensors["ids"], use_cache=False).loss
        loss.backward()
        losses.append(float(loss))
        with_gradient = sum(p.grad is not None for p in adapters)
        optimizer.step()
        optimizer.zero_grad()
    after = [p for p in tuned.parameters() if isinstance(p, Params4bit)]
    return {
        "losses": losses,
        "lora_parameters": len(adapters),
        "lora_parameters_with_gradient": with_gradient,
        "base_unchanged": all(torch.equal(old, new) for old, new in zip(before.values(), after, strict=True)),
    }


ROUTES = {"transformers": by_transformers, "quantize": by_quantizing, "peft": by_training}


def read(folder: Path, route: str) -> dict[str, Any]:
    """The findings of one case by one route."""
    began = time.monotonic()
    row: dict[str, Any] = {"case": folder.name, "route": route}
    with safe_open(folder / "expected.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    expected = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
    try:
        row |= ROUTES[route](folder, tensors, expected)
    except Exception as error:  # any error of the reader is a finding
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row | {"seconds": round(time.monotonic() - began, 2)}


def main() -> None:
    results, *folders = map(Path, sys.argv[1:])
    torch.set_num_threads(2)
    torch.manual_seed(0)
    for folder in folders:
        for route in json.loads((folder / "case.json").read_text())["routes"]:
            row = read(folder, route)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main()
