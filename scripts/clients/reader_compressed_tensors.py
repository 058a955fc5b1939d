#!/usr/bin/env python3
"""Read bigq's output with compressed-tensors in two ways, in the client's virtual environment without bigq.

    reader_compressed_tensors.py RESULTS FOLDER…

route "transformers": ``AutoModelForCausalLM.from_pretrained``, or ``AutoModelForImageTextToText`` for composite classes, in fp16, the
type of the source; unpacked, the model computes in fp32.
route "unpack": the library's own functions on the stored tensors. ``unpack_from_int32`` gives codes and zero points, the compressor
for pack-quantized gives the weight.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import is_match
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

#: Names of an expert's matrices in files → the parameter in which transformers holds those of all experts, and which part of it they are.
EXPERT_PARTS = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
}
PACKAGES = ("compressed-tensors", "transformers", "torch", "accelerate", "safetensors")


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    return tensors


def expert_weights(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The matrices of experts that transformers holds, by their names in the file."""
    held = {}
    for name in names:
        found = re.search(r"\.layers\.(\d+)\..*experts\.(\d+)\.(\w+)$", name)
        if found is None:
            continue
        parameter, part = EXPERT_PARTS[found[3]]
        (whole,) = (p for n, p in model.named_parameters() if re.search(rf"\.layers\.{found[1]}\..*experts\.{parameter}$", n))
        rows = whole.detach()[int(found[2])]
        held[name] = rows.chunk(2)[part] if parameter == "gate_up_proj" else rows
    return held


def by_transformers(folder: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    composite = json.loads((folder / "out/config.json").read_text())["architectures"][0].endswith("ForConditionalGeneration")
    model, info = (AutoModelForImageTextToText if composite else AutoModelForCausalLM).from_pretrained(
        folder / "out", dtype=torch.float16, experts_implementation="eager", output_loading_info=True
    )
    model.eval()
    packed = sum(hasattr(module, "weight_packed") for module in model.modules())
    with torch.no_grad():
        model(input_ids=tensors["ids"], use_cache=False)  # the first forward unpacks the weights
        torch.nn.Module.float(model)  # transformers' own float() refuses quantized models
        got = model(input_ids=tensors["ids"], use_cache=False).logits.float()
    difference = (got - tensors["logits"]).abs()
    weights = dict(model.named_parameters())
    held = {name: weights[f"{name}.weight"].detach().float() for name in expected if f"{name}.weight" in weights}
    experts = expert_weights(model, list(expected))
    held |= {name: weight.float() for name, weight in experts.items()}
    return {
        **{key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")},
        "linears": packed + len(experts),
        "linears_expected": len(expected),
        "weights_equal": sum(torch.equal(weight, expected[name].half().float()) for name, weight in held.items()),
        "logits_max_abs_diff": float(difference.max()),
        "logits_rel_diff": float(difference.norm() / tensors["logits"].norm()),
        "logits_max": float(tensors["logits"].abs().max()),
    }


def by_unpacking(folder: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """codes_equal: Linears for which scale · (code − zero point) equals bigq's weight everywhere."""
    said = json.loads((folder / "out/config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(said)
    stored = read_all(folder / "out")
    compressor = BaseCompressor.get_value_from_registry(said["format"])
    codes = weights = 0
    for name, weight in expected.items():
        scheme = scheme_of(config, name)
        args = scheme.weights
        assert isinstance(args, QuantizationArgs)
        parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.weight")}
        shape = torch.Size(parts["weight_shape"].tolist())
        scale = parts["weight_scale"].float()
        code = unpack_from_int32(parts["weight_packed"], args.num_bits, shape).float()
        zero = torch.zeros_like(scale)
        if not args.symmetric:
            zero = unpack_from_int32(parts["weight_zero_point"], args.num_bits, torch.Size(scale.shape), packed_dim=0).float()
        grouped = code.view(len(code), scale.shape[1], -1)
        codes += torch.equal(((grouped - zero[..., None]) * scale[..., None]).reshape(shape), weight)
        whole = parts | {"weight_scale": scale, "weight_shape": shape}
        weights += torch.equal(compressor.decompress(whole, scheme)["weight"].float(), weight)
    return {"linears": codes, "linears_expected": len(expected), "codes_equal": codes, "weights_equal": weights}


def scheme_of(config: QuantizationConfig, name: str) -> QuantizationScheme:
    """The scheme of a Linear by the library's own matching: by name first, then by class. It must not be ignored."""
    linear = nn.Linear(1, 1)
    assert not any(is_match(name, linear, ignored) for ignored in config.ignore or ()), f"{name} is ignored"
    schemes = [scheme for scheme in config.config_groups.values() if isinstance(scheme, QuantizationScheme)]
    named = [scheme for scheme in schemes if name in scheme.targets]
    return (named or [scheme for scheme in schemes if any(is_match(name, linear, target) for target in scheme.targets)])[0]


def read(folder: Path, route: str) -> dict[str, Any]:
    """The findings of one case by one route."""
    began = time.monotonic()
    row: dict[str, Any] = {"case": folder.name, "route": route}
    with safe_open(folder / "expected.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    expected = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
    try:
        row |= {"transformers": by_transformers, "unpack": by_unpacking}[route](folder, tensors, expected)
    except Exception as error:  # any error of the reader is a finding
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row | {"seconds": round(time.monotonic() - began, 2)}


def main() -> None:
    results, *folders = map(Path, sys.argv[1:])
    torch.set_num_threads(2)
    for folder in folders:
        for route in json.loads((folder / "case.json").read_text())["routes"]:
            row = read(folder, route)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main()
