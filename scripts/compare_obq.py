#!/usr/bin/env python3
"""Compare GPTQ with exact OBQ (Frantar et al. 2022, arXiv 2208.11580), which quantizes the weights of each row in an order of its own.

    python scripts/compare_obq.py --json docs/results/obq.json

OBQ always takes the weight whose rounding costs least, and corrects the others of its row exactly. Each row then needs an inverse Hessian
of its own: n³ operations a row, where GPTQ needs n² beside one factor for all. Both get the Hessians of the model that ships with bigq, on
its calibration text, and the same grids, of whole rows. The time of GPTQ is also measured on the shapes of a BERT of 336 million
parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch
from facts import host, revision, versions
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bigq.calibration import read_calibration
from bigq.cli.demo import MODEL
from bigq.scheme import QuantScheme
from bigq.solver.gptq import quantize_linear
from bigq.solver.hessian import HessianSum
from bigq.solver.rtn import round_to_nearest

SAMPLES, SEQLEN, ROWS = 32, 256, 48
#: Whole rows, grids that span them: what OBQ's authors do, and what all of these can have alike.
SCHEME = QuantScheme(group_size=-1, scales="minmax", sweeps=0, scale_bits=11)
WAYS = {
    "gptq, from left to right": {"order": "natural"},
    "gptq": {"order": "activation"},
    "gptq, 1 sweep": {"order": "activation", "sweeps": 1},
    "gptq, 4 sweeps": {"order": "activation", "sweeps": 4},
}
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
#: Linears of BERT-large by [outputs, inputs], and how many of each its 24 blocks have.
BERT = {(1024, 1024): 4 * 24, (4096, 1024): 24, (1024, 4096): 24}


def obq(weight: Tensor, h: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
    """The weight [m, n] that OBQ chooses on the grids ``scale · (code − zero)``, 0 ≤ code ≤ most, of its rows [m, 1]. h: damped, [n, n].

    All rows go through the steps side by side, each with its own inverse and order. Everything in fp64.
    """
    w = weight.double().clone()
    m, n = w.shape
    scale, zero = scale.double(), zero.double()
    inverse = torch.linalg.inv(h.double()).expand(m, n, n).clone()
    left = torch.ones(m, n, dtype=torch.bool)
    done = torch.zeros_like(w)
    rows = torch.arange(m)

    def nearest(x: Tensor) -> Tensor:
        return scale * torch.clamp(torch.round(x / scale), -zero, most - zero)

    for _ in range(n):
        cost = (nearest(w) - w).square() / inverse.diagonal(dim1=1, dim2=2)
        at = cost.masked_fill(~left, torch.inf).argmin(1)
        column = inverse[rows, :, at]
        pivot = inverse[rows, at, at]
        value = nearest(w)[rows, at]
        error = (w[rows, at] - value) / pivot
        w -= error[:, None] * column
        done[rows, at] = value
        left[rows, at] = False
        inverse -= column[:, :, None] * (column / pivot[:, None])[:, None, :]
        # What is done takes no further corrections, and rounding must not revive it.
        inverse[rows, at, :] = 0
        inverse[rows, :, at] = 0
        inverse[rows, at, at] = 1
    return done


def loss(weight: Tensor, found: Tensor, h: Tensor) -> float:
    """``tr(E·H·Eᵀ)`` over ``tr(W·H·Wᵀ)``."""
    error = weight.double() - found.double()
    return float(((error @ h.double()) * error).sum() / ((weight.double() @ h.double()) * weight.double()).sum())


@torch.no_grad()
def hessians() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Linears of the first and the last block: name, weight, damped Hessian."""
    rows = read_calibration("builtin", MODEL, samples=SAMPLES, seqlen=SEQLEN, seed=0).rows
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    last = model.config.num_hidden_layers - 1
    wanted = [f"model.layers.{i}.{name}" for i in (0, last) for name in LINEARS]
    sums = {name: HessianSum(model.get_submodule(name).in_features, torch.device("cpu")) for name in wanted}

    def watch(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            sums[name].add(args[0])

        return before

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in wanted]
    for part in rows.split(8):
        model(part, use_cache=False)
    for handle in handles:
        handle.remove()
    for name in wanted:
        h = sums[name].finish(name)
        h.diagonal().add_(SCHEME.damping * h.diagonal().mean())
        yield name, model.get_submodule(name).weight.detach()[:ROWS], h


def compare(bits: int, name: str, weight: Tensor, h: Tensor) -> dict[str, Any]:
    scheme = dataclasses.replace(SCHEME, bits=bits)
    rounded = round_to_nearest(weight, scheme)
    losses = {"rtn": loss(weight, rounded.dequantize(), h)}
    # The Hessian is damped already; the least damping that a scheme takes does not change it.
    for way, fields in WAYS.items():
        solved = quantize_linear(weight.double(), h.double(), dataclasses.replace(scheme, damping=1e-9, **fields))
        assert torch.equal(solved.scales, rounded.scales), "the grids must be the same"
        losses[way] = loss(weight, solved.dequantize(), h)
    started = time.process_time()
    losses["obq"] = loss(weight, obq(weight, h, rounded.scales, rounded.zeros, 2**bits - 1), h)
    return {
        "linear": name,
        "bits": bits,
        "rows": len(weight),
        "inputs": weight.shape[1],
        "losses": losses,
        "obq_cpu_s": round(time.process_time() - started, 2),
    }


def bert_seconds() -> float:
    """CPU seconds of GPTQ for all Linears of a BERT-large, apart from its forward passes."""
    total = 0.0
    for (m, n), count in BERT.items():
        generator = torch.Generator().manual_seed(n)
        x = torch.randn(2 * n, n, generator=generator)
        weight, h = torch.randn(m, n, generator=generator) * 0.02, x.T @ x / n
        quantize_linear(weight[:32], h, SCHEME)  # kernels are compiled
        started = time.process_time()
        quantize_linear(weight, h, SCHEME)
        total += count * (time.process_time() - started)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = list(hessians())
    runs = [compare(bits, *one) for bits in (4, 3, 2) for one in found]
    result = {
        "command": "python scripts/compare_obq.py --json docs/results/obq.json",
        "revision": revision(),
        "versions": versions(),
        "machine": host(),
        "runs": runs,
        "bert_large_gptq_cpu_s": round(bert_seconds(), 1),
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    for bits in (4, 3, 2):
        of = [run["losses"] for run in runs if run["bits"] == bits]
        means = {way: torch.tensor([each[way] / each["obq"] for each in of]).log().mean().exp() for way in of[0]}
        print(f"{bits} bits, loss over OBQ's (geometric mean):", ", ".join(f"{way} {float(mean):.3f}" for way, mean in means.items()))
    print(f"BERT-large by GPTQ: {result['bert_large_gptq_cpu_s']} s of CPU time")


if __name__ == "__main__":
    main()
