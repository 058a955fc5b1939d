#!/usr/bin/env python3
"""What scales inside experts change: KL from the original with and without them, and from how many tokens on they help.

    python scripts/train_moe.py --out MODEL                        # once: 10 to 15 minutes
    python scripts/expert_folds.py --model MODEL --json docs/results/expert_folds.json

All compute in fp32, on rows of the shipped calibration text, four draws; KL is measured on the shipped held-out text. Without scales
inside, those in norms and behind values stay. Then scales are chosen on a few tokens of each expert of the unquantized model, and the error
of its last matrix is measured on other tokens of it, relative to no scales: the geometric mean over experts. AWQ is judged at 4 bits in
groups of 32, SmoothQuant with weights and inputs of 8 bits. A result that is in the file is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch
from facts import revision, versions
from safetensors.torch import save_file
from torch import Tensor

import bigq
from bigq.calibration import calibration_rows
from bigq.infer.evaluate import EvalConfig, evaluate
from bigq.methods.scaling import SCALINGS
from bigq.sched.solve import bank
from bigq.solver.scaling import LEAST_TOKENS, InputStatistics, Reader, rounded

SAMPLES, SEQLEN, WINDOWS, DRAWS = 16, 256, 64, (0, 1, 2, 3)
#: Way → the job's settings, and its scheme.
WAYS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "awq, 4 bits": ({"method": "awq", "format": "compressed-tensors"}, {"bits": 4, "group_size": 32}),
    "awq, 3 bits": ({"method": "awq", "format": "compressed-tensors"}, {"bits": 3, "group_size": 32}),
    "gptq, --fold awq, 3 bits": ({"method": "gptq", "fold": "awq", "format": "compressed-tensors"}, {"bits": 3, "group_size": 32}),
    "gptq, --fold smoothquant, w8a8-int8": ({"fold": "smoothquant", "format": "w8a8-int8"}, {}),
}
#: Tokens that scales are chosen on, and how many others the error is measured on.
FEW, HELD = (1, 2, 4, 8, 16, 32, 64, 128, 256), 256
#: Rule → the scheme of the weights in the error.
SCHEMES: Mapping[str, bigq.QuantScheme] = {
    "awq": bigq.QuantScheme(bits=4, group_size=32),
    "smoothquant": bigq.QuantScheme(bits=8, group_size=-1),
}


@contextlib.contextmanager
def inside(scaled: bool) -> Iterator[None]:
    """Whether experts are scaled inside."""
    with contextlib.nullcontext() if scaled else mock.patch.object(bank, "is_scaled", return_value=False):
        yield


def judged(model: Path, way: str, scaled: bool, draw: int) -> dict[str, Any]:
    settings, scheme = WAYS[way]
    rows = calibration_rows("builtin", model, samples=SAMPLES, seqlen=SEQLEN, seed=draw)
    with tempfile.TemporaryDirectory() as folder, inside(scaled):
        ids, out = Path(folder) / "ids.safetensors", Path(folder) / "out"
        save_file({"input_ids": rows}, ids)
        given = {"samples": SAMPLES, "seqlen": SEQLEN, "device": "cpu", "dtype": "float32", "quiet": True, **settings}
        made = {"scheme": bigq.QuantScheme(**scheme)} if scheme else {}
        report = bigq.quantize(str(model), out, bigq.JobConfig(calibration=str(ids), **made, **given))
        config = EvalConfig(data="builtin", samples=WINDOWS, seqlen=SEQLEN, device="cpu", dtype="float32", quiet=True)
        result = evaluate(str(out), config, baseline=str(model))
    downs = [record for record in report.linears if record["name"].endswith(".down_proj")]
    return {
        "kl": result.kl,
        "kl_stderr": result.kl_stderr,
        "perplexity": result.perplexity,
        "mean_error_of_down_proj": statistics.fmean(record["relative_error"] for record in downs),
        "experts_below_the_least_tokens": sum(record["tokens"] < LEAST_TOKENS for record in downs),
        "experts": len(downs),
    }


def inputs_of_experts(model: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each expert the last matrix [m, n], and its inputs on calibration text [t, n]."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager").eval()
    rows = calibration_rows("builtin", model, samples=64, seqlen=SEQLEN, seed=7)
    for layer in loaded.model.layers:
        seen: dict[int, list[Tensor]] = {}
        experts = layer.mlp.experts
        linear, places = torch.nn.functional.linear, {experts.down_proj[e].data_ptr(): e for e in range(len(experts.down_proj))}

        def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None, known: Any = (linear, places, seen)) -> Tensor:
            product, numbers, found = known
            if weight.data_ptr() in numbers:
                found.setdefault(numbers[weight.data_ptr()], []).append(x)
            return product(x, weight, bias)

        with mock.patch.object(torch.nn.functional, "linear", watched):
            for part in rows.split(16):
                loaded(input_ids=part, use_cache=False)
        for e, parts in seen.items():
            yield experts.down_proj[e], torch.cat(parts)


def error(rule: str, weight: Tensor, x: Tensor, scales: Tensor) -> float:
    """The squared error of an expert's outputs. weight: [m, n]. x: its inputs [t, n]. scales: [n]."""
    given = x / scales
    if rule == "smoothquant":
        step = given.abs().amax(-1, keepdim=True) / 127
        given = (given / step).round() * step
    return float((given @ rounded(weight * scales, SCHEMES[rule]).T - x @ weight.T).square().sum())


def errors_by_tokens(model: Path) -> list[dict[str, Any]]:
    """For each rule and number of tokens, the error on other tokens over that without scales."""
    ratios: dict[tuple[str, int], list[float]] = {}
    for weight, x in inputs_of_experts(model):
        if len(x) < max(FEW) + HELD:
            continue
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
        held, n = x[-HELD:], weight.shape[1]
        for (rule, scheme), t in itertools.product(SCHEMES.items(), FEW):
            seen = InputStatistics(n, x.device, t)
            seen.add(x[:t])
            scales = SCALINGS[rule].choose(seen, [Reader(weight, scheme)], torch.arange(n))
            ratios.setdefault((rule, t), []).append(error(rule, weight, held, scales) / error(rule, weight, held, torch.ones(n)))
    return [
        {
            "rule": name,
            "tokens": t,
            "experts": len(found),
            "error": math.exp(statistics.fmean(map(math.log, found))),
            "worse": sum(ratio > 1 for ratio in found),
        }
        for (name, t), found in sorted(ratios.items())
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="what train_moe.py made")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    given = parser.parse_args()
    result: dict[str, Any] = {"command": "python scripts/expert_folds.py --model MODEL --json docs/results/expert_folds.json"}
    result |= {"versions": versions(), "runs": []}
    if given.json.exists():
        result = json.loads(given.json.read_text(encoding="utf-8"))

    def keep() -> None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    if "by_tokens" not in result:
        result["by_tokens"] = errors_by_tokens(given.model)
        keep()
    known = {(run["way"], run["inside"], run["draw"]) for run in result["runs"]}
    for way, draw, scaled in itertools.product(WAYS, DRAWS, (False, True)):
        if (way, scaled, draw) not in known:
            began = time.monotonic()
            run = {"way": way, "inside": scaled, "draw": draw, **judged(given.model, way, scaled, draw)}
            result["runs"].append(run | {"seconds": round(time.monotonic() - began, 1), "revision": revision()})
            keep()
            print(f"{way}, {'with' if scaled else 'without'}, draw {draw}: {run['kl']:.6f} ± {run['kl_stderr']:.6f}", flush=True)


if __name__ == "__main__":
    main()
