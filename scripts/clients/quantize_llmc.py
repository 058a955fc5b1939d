#!/usr/bin/env python3
"""Quantize a model with llm-compressor, in its virtual environment without bigq, and write its weights dequantized.

    quantize_llmc.py MODEL IDS OUT SETTINGS

Arguments and output are those of quantize_gptqmodel.py; SETTINGS are {"weights": fields of QuantizationArgs, "modifier": fields of
GPTQModifier, "oneshot": further arguments of oneshot}; with "awq": fields of AWQModifier, it runs AWQ instead of GPTQ, and the norms that
AWQ changes are written too. The weights are llm-compressor's own: scale · code, with fp32 scales. It is not saved in its packed format,
which takes no time to speak of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from used import Used, write

BATCH = 8


def quantize(folder: Path, ids: Tensor, settings: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Every quantized Linear's weight, fp32 [outputs, inputs], and the compute dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 1 and name.endswith("weight")}
    groups = {"all": {"targets": ["Linear"], "weights": {"type": "int", **settings["weights"]}}}
    awq = settings.get("awq")
    if awq is None:
        recipe: Any = GPTQModifier(ignore=["lm_head"], config_groups=groups, **settings.get("modifier", {}))
    else:
        recipe = [AWQModifier(**awq), QuantizationModifier(ignore=["lm_head"], config_groups=groups)]
        if not torch.accelerator.is_available():  # it pins memory where there is nothing to pin it for
            IntermediatesCache.pin_memory = lambda *_, **__: None
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
        recipe=recipe,
        # It asks for a tokenizer although the rows are token ids.
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), pad_token="?"),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        batch_size=BATCH,
        **settings.get("oneshot", {}),
    )
    linears = {name: m for name, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if awq is None:
        return {f"{name}.weight": m.weight.detach().float().contiguous() for name, m in linears.items()}, dtype
    made = {f"{name}.weight": quantized(m) for name, m in linears.items()}
    vectors = {name: p.detach().float().contiguous() for name, p in model.named_parameters() if name in before}
    return {name: p for name, p in vectors.items() if not torch.equal(p, before[name].float())} | made, dtype


@torch.no_grad()
def quantized(linear: torch.nn.Module) -> Tensor:
    """What a Linear computes with: its weight on its grid, fp32."""
    zero = getattr(linear, "weight_zero_point", None)
    args = linear.quantization_scheme.weights
    return fake_quantize(linear.weight, scale=linear.weight_scale, zero_point=zero, args=args).float().contiguous()


def main() -> None:
    model, ids_file, out = map(Path, sys.argv[1:4])
    ids = load_file(ids_file)["input_ids"]
    out.mkdir(parents=True, exist_ok=True)
    used = Used()
    weights, dtype = quantize(model, ids, json.loads(sys.argv[4]))
    said = used.said("llmcompressor", "compressed-tensors", "transformers", "torch") | {"computed_in": dtype}
    save_file(weights, out / "weights.safetensors")
    write(said | {"linears": len(weights)}, out / "used.json")


if __name__ == "__main__":
    main()
