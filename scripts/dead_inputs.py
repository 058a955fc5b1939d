#!/usr/bin/env python3
"""Inputs that are 0 in every calibration token: what bigq and other programs make of a Linear and of a model that have some.

    scripts/clients/venvs DIR gptqmodel llmc                    # once
    python scripts/dead_inputs.py --venvs DIR --json docs/results/dead_inputs.json

The Linear has 16 dead inputs of 256, and its inputs are given in several units. The model is the shipped one with ReLU, trained on for
some steps; the fewer calibration tokens, the more of its units never fire. There "usual" is the rule of the paper's code, which other
programs follow: such inputs get 1 on the Hessian's diagonal, which counts in the mean for damping, and their weights become 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch
from facts import host, revision, versions
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import bigq
from bigq.calibration import load_tokenizer
from bigq.cli.demo import MODEL
from bigq.data.opening import BUILTIN_CALIBRATION
from bigq.methods import gptq

INPUTS, OUTPUTS, TOKENS, DEAD = 256, 128, 4096, 16
#: Root mean squares of the live inputs.
UNITS = (10.0, 1.0, 0.1, 0.03, 0.01, 0.001)
PEERS = ("gptqmodel", "llmc")
STEPS, RATE = 200, 1e-3
#: Calibration: rows and their length.
ROWS = ((1, 16), (1, 64), (4, 64), (32, 128))
SEEDS = range(5)


def layer() -> tuple[Tensor, list[Tensor]]:
    """The weight [m, n], and its inputs [T, n] in each unit."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(INPUTS, generator=generator) ** 3
    x = torch.randn(TOKENS, INPUTS, generator=generator) @ (torch.randn(INPUTS, INPUTS, generator=generator) * sizes[:, None])
    x[:, :DEAD] = 0
    x /= x[:, DEAD:].square().mean().sqrt()
    return torch.randn(OUTPUTS, INPUTS, generator=generator) * 0.02, [unit * x for unit in UNITS]


def relative_error(weight: Tensor, quantized: Tensor, x: Tensor) -> float:
    """‖(Q − W)X‖² / ‖WX‖²."""
    hessian, error = x.double().T @ x.double(), (quantized - weight).double()
    return float(((error @ hessian) * error).sum() / ((weight.double() @ hessian) * weight.double()).sum())


def layer_errors(venvs: Path | None) -> dict[str, Any]:
    """The relative error in each unit, by program."""
    weight, inputs = layer()
    scheme = bigq.QuantScheme(bits=3, group_size=128, order="natural", scales="minmax", sweeps=0)
    ours = [bigq.quantize_linear(weight, 2 / TOKENS * x.T @ x, scheme).dequantize() for x in inputs]
    found = {"bigq": [relative_error(weight, q, x) for q, x in zip(ours, inputs, strict=True)]}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "layers.safetensors", Path(folder) / "out.safetensors"
        save_file({"w": weight, **{f"x{i}": x for i, x in enumerate(inputs)}}, source)
        for peer in PEERS if venvs is not None else ():
            assert venvs is not None
            program = (venvs.absolute() / peer / "bin/python", ROOT / "scripts/clients/quantize_layer.py", peer, source, out)
            subprocess.run(list(map(str, program)), check=True, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"}, stdout=subprocess.DEVNULL)
            results = load_file(out)
            with safe_open(out, "pt") as file:
                name = file.metadata()["version"]
            found[name] = [relative_error(weight, results[f"q{i}"], x) for i, x in enumerate(inputs)]
    return {"units": UNITS, "bits": 3, "group_size": 128, "inputs": INPUTS, "dead": DEAD, "relative_error": found}


def make_model(folder: Path) -> None:
    """The shipped model with ReLU, trained on the calibration text."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = load_tokenizer(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, hidden_act="relu", dtype=torch.float32)
    ids = torch.tensor(tokenizer(BUILTIN_CALIBRATION.read_text()).input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
    for step in range(STEPS):
        rows = torch.stack([ids[at : at + 128] for at in torch.randint(0, len(ids) - 128, (8,)).tolist()])
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def usual_rule() -> Iterator[None]:
    """Let bigq treat dead inputs as the paper's code does."""
    factorize, solve, dead = gptq.factorize, gptq.solve, torch.zeros(0)

    def one_on_the_diagonal(h: Tensor, **how: Any) -> Any:
        nonlocal dead
        dead = h.diagonal() == 0
        h.diagonal()[dead] = 1
        return factorize(h, **how)

    def without_their_weights(weights: list[Tensor], *how: Any) -> Any:
        return solve([weight.masked_fill(dead, 0) for weight in weights], *how)

    with mock.patch.object(gptq, "factorize", one_on_the_diagonal), mock.patch.object(gptq, "solve", without_their_weights):
        yield


def divergence(model: Path, out: Path, rows: int, seqlen: int, seed: int) -> tuple[float, float]:
    """The mean KL divergence per token from the model on held-out text, and the largest share of dead inputs in a Linear."""
    scheme = bigq.QuantScheme(group_size=32, order="activation", scales="minmax", sweeps=0)
    config = bigq.JobConfig(
        scheme=scheme, calibration="builtin", samples=rows, seqlen=seqlen, seed=seed, quiet=True, device="cpu", checkpoint_every=None
    )
    report = bigq.quantize(model, out, config)
    share = max(record["dead_inputs"] / record["shape"][1] for record in report.linears)
    found = bigq.evaluate(out, bigq.EvalConfig(data="builtin", seqlen=128, samples=64, quiet=True), baseline=model)
    assert found.kl is not None
    return found.kl, share


def model_errors() -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model)
        for rows, seqlen in ROWS:
            kl: dict[str, list[float]] = {"usual": [], "bigq": []}
            shares = []
            for seed in SEEDS:
                with usual_rule():
                    kl["usual"].append(divergence(model, Path(folder) / f"usual-{rows}-{seqlen}-{seed}", rows, seqlen, seed)[0])
                measured, share = divergence(model, Path(folder) / f"bigq-{rows}-{seqlen}-{seed}", rows, seqlen, seed)
                kl["bigq"].append(measured)
                shares.append(share)
            means = {name: statistics.mean(values) for name, values in kl.items()}
            print(f"{rows * seqlen} tokens, {max(shares):.0%} dead: {means}", flush=True)
            found.append({"tokens": rows * seqlen, "largest_dead_share": statistics.mean(shares), "kl": kl, "mean_kl": means})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, help="folder with the other programs' virtual environments")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    args = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    found = {"layer": layer_errors(args.venvs), "model": model_errors()}
    for name, errors in found["layer"]["relative_error"].items():
        print(f"{name:24} {' '.join(f'{error:.4f}' for error in errors)}")
    facts = {"command": "python scripts/dead_inputs.py --venvs DIR --json docs/results/dead_inputs.json", "revision": revision()}
    facts |= {"versions": versions(), "host": host(), "seconds": round(time.monotonic() - began)}
    args.json.write_text(json.dumps({**facts, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
