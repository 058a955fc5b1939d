#!/usr/bin/env python3
"""Quantize a model with AutoAWQ, in its virtual environment without bigq, and write its weights dequantized.

    quantize_autoawq.py MODEL IDS OUT SETTINGS

Arguments and output are those of quantize_gptqmodel.py; SETTINGS are {"w_bit", "q_group_size", "zero_point"}, fields of its quant_config.
The norms that AWQ scales are written too. Weights are rounded by AutoAWQ's own function in fp32; when it packs them, it does so in fp16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.module import get_named_linears
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig
from used import Used, write


class Quantizer(AwqQuantizer):
    """AutoAWQ's, mended for a CPU: it keeps a module's weights with ``.cpu()`` while it tries scales on them, which is no copy there."""

    def _compute_best_scale(self, *args: Any, **kwargs: Any) -> Tensor:
        module = kwargs.get("module2inspect", args[3])
        kept = module.state_dict
        module.state_dict = lambda: {name: t.clone() for name, t in kept().items()}
        try:
            return super()._compute_best_scale(*args, **kwargs)
        finally:
            del module.state_dict


def set_rotary_base(folder: Path) -> None:
    """Older transformers than 5 take the base of rotary positions from another field, and silently another base if it is not there."""
    told = json.loads((folder / "config.json").read_text())
    base = told.get("rope_parameters", {}).get("rope_theta")
    if base is not None and AutoConfig.from_pretrained(folder).rope_theta != base:
        told["rope_theta"] = base
        (folder / "config.json").write_text(json.dumps(told))


def quantize(folder: Path, ids: Tensor, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Every weight that changed, fp32."""
    awq = AutoAWQForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, device_map="cpu", safetensors=True)
    norms = {name: m.weight.detach().clone() for name, m in awq.model.named_modules() if name.endswith("norm")}
    rows, seqlen = ids.shape
    awq.quantize(
        None,
        quant_config={"version": "GEMM", **settings},
        calib_data=ids.tolist(),
        max_calib_samples=rows,
        max_calib_seq_len=seqlen,
        quantizer_cls=Quantizer,
        export_compatible=True,  # scaled and clipped, not packed
    )
    blocks = awq.get_model_layers(awq.model)
    linears = {id(linear) for block in blocks for linear in get_named_linears(block).values()}
    made = {}
    with torch.no_grad():
        for name, module in awq.model.named_modules():
            if id(module) in linears:
                made[f"{name}.weight"] = awq.quantizer.pseudo_quantize_tensor(module.weight.data)[0].float().contiguous()
            elif name in norms and not torch.equal(module.weight, norms[name]):
                made[f"{name}.weight"] = module.weight.detach().float().contiguous()
    return made


def main() -> None:
    model, ids_file, out = map(Path, sys.argv[1:4])
    ids = load_file(ids_file)["input_ids"]
    out.mkdir(parents=True, exist_ok=True)
    used = Used()
    copy = out / "model"
    copy.mkdir(exist_ok=True)
    for file in model.iterdir():
        (copy / file.name).unlink(missing_ok=True)
        if file.name == "config.json":
            (copy / file.name).write_bytes(file.read_bytes())
        else:
            (copy / file.name).symlink_to(file.resolve())
    set_rotary_base(copy)
    weights = quantize(copy, ids, json.loads(sys.argv[4]))
    said = used.said("autoawq", "transformers", "torch") | {"computed_in": "float32"}
    save_file(weights, out / "weights.safetensors")
    write(said | {"linears": len(weights)}, out / "used.json")


if __name__ == "__main__":
    main()
