#!/usr/bin/env python3
"""Quantize one Linear on given inputs with GPTQModel or llm-compressor, in its virtual environment without bigq.

    quantize_layer.py gptqmodel|llmc LAYERS OUT

LAYERS: safetensors with the weight ``w`` [m, n] and inputs ``x0``, ``x1``, … [T, n], fp32. OUT gets the dequantized weights ``q0``,
``q1``, … and, as metadata, the program's version. Symmetric, 3 bits, groups of 128, natural order, damping 0.01.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BITS, GROUP, DAMPING = 3, 128, 0.01


def gptqmodel(w: Tensor, x: Tensor) -> Tensor:
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    module = nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight.data = w.clone()
    config = QuantizeConfig(
        bits=BITS, group_size=GROUP, sym=True, desc_act=False, act_group_aware=False, damp_percent=DAMPING, fallback=None
    )
    task = GPTQ(module, config)
    task.quantizer.configure(perchannel=True)
    task.add_batch(x[None], x[None] @ w.T, batch_index=0)
    return task.quantize()[0].float()


def llmc(w: Tensor, x: Tensor) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=GROUP)
    groups = w.reshape(len(w), -1, GROUP)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    hessian = 2 / len(x) * x.T @ x
    return quantize_weight(w[None].clone(), hessian[None], scale[None], zero[None], None, args, percdamp=DAMPING)[0][0]


def main() -> None:
    peer, source, out = sys.argv[1:]
    layers = load_file(source)
    quantize = {"gptqmodel": gptqmodel, "llmc": llmc}[peer]
    results = {f"q{name[1:]}": quantize(layers["w"], x).contiguous() for name, x in layers.items() if name != "w"}
    package = {"gptqmodel": "gptqmodel", "llmc": "llmcompressor"}[peer]
    save_file(results, Path(out), metadata={"version": f"{package} {importlib.metadata.version(package)}"})


if __name__ == "__main__":
    main()
