#!/usr/bin/env python3
"""Compare GPTAQ at several strengths, and by the rule of its paper, with GPTQ on the model that ships with bigq.

    python scripts/compare_gptaq.py --json docs/results/gptaq.json [--seeds 3] [--seconds S]

Compares the KL divergence from the original model on held-out text. The default strength is chosen on the even rows and reported
on the odd rows. An existing result file is resumed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "solver"), str(Path(__file__).resolve().parent)]

import torch
from facts import revision, versions
from paper_rule import solve_by_columns
from torch import Tensor

import bigq
from bigq.calibration import evaluation_rows
from bigq.cli.demo import MODEL
from bigq.infer.evaluate import Stream
from bigq.methods import gptq
from bigq.model.pager import Pager
from bigq.sched.plan import inputs
from bigq.solver.gptq import solve

SEQLEN, SAMPLES, HELD_OUT = 256, 48, 128
#: Name → (method, strength, the paper's rule).
METHODS = {
    "gptq": ("gptq", 0.0, False),
    **{f"gptaq {alpha}": ("gptaq", alpha, False) for alpha in (0.25, 0.5, 0.75, 1.0)},
    **{f"by columns {alpha}": ("gptaq", alpha, True) for alpha in (0.25, 1.0)},
}
#: (group size, symmetric, act-order)
WAYS = [*itertools.product((-1,), (True, False), (False, True)), *((g, s, not s) for g in (128, 32) for s in (True, False))]


def jobs(seeds: int) -> Iterator[dict[str, Any]]:
    for seed, (group, symmetric, act_order), bits, method in itertools.product(range(seeds), WAYS, (4, 3, 2), METHODS):
        yield {"seed": seed, "bits": bits, "group_size": group, "sym": symmetric, "act_order": act_order, "method": method}


class Judge:
    """Perplexity and KL divergence on the even rows and on the odd rows of the held-out text."""

    def __init__(self) -> None:
        self._rows = evaluation_rows("builtin", MODEL, seqlen=SEQLEN, samples=HELD_OUT)
        self._baseline = list(self._log_probabilities(MODEL))

    def _log_probabilities(self, folder: Path) -> Iterator[Tensor]:
        pager = Pager(folder, device=torch.device("cpu"), dtype="float32")
        stream = Stream(pager, self._rows, 8)
        with stream.tail_ready():
            for lo in range(0, len(self._rows), 8):
                yield from stream.logits(lo, lo + 8)[:, :-1].log_softmax(-1)

    def judge(self, folder: Path) -> dict[str, float]:
        kl, nll = [], []
        for row, p, q in zip(self._rows, self._log_probabilities(folder), self._baseline, strict=True):
            kl.append(float((q.exp() * (q - p)).sum(-1).double().mean()))
            nll.append(float(-p.gather(1, row[1:, None]).double().mean()))
        kls, nlls = torch.tensor(kl), torch.tensor(nll)
        halves = {"choose": slice(0, None, 2), "report": slice(1, None, 2)}
        return {
            **{f"kl_{name}": float(kls[half].mean()) for name, half in halves.items()},
            **{f"perplexity_{name}": float(nlls[half].mean().exp()) for name, half in halves.items()},
        }


def run(job: dict[str, Any], work: Path, judge: Judge) -> dict[str, Any]:
    method, alpha, by_columns = METHODS[job["method"]]
    gptq.solve = solve_by_columns if by_columns else solve  # type: ignore[attr-defined]
    scheme = bigq.QuantScheme(
        bits=job["bits"],
        group_size=job["group_size"],
        symmetric=job["sym"],
        order="activation" if job["act_order"] else "natural",
        scales="minmax",
        sweeps=0,
    )
    how = {"samples": SAMPLES, "seqlen": SEQLEN, "seed": job["seed"], "device": "cpu", "dtype": "float32", "quiet": True}
    config = bigq.JobConfig(scheme=scheme, method=method, alpha=alpha, calibration="builtin", checkpoint_every=None, **how)
    shutil.rmtree(work / "out", ignore_errors=True)
    started = time.monotonic()
    bigq.quantize(str(MODEL), work / "out", config)
    seconds = time.monotonic() - started
    return {**job, **judge.judge(work / "out"), "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    results = json.loads(args.json.read_text())["results"] if args.json.exists() else []
    until = time.monotonic() + args.seconds
    for name in ("survey", "measure"):  # equal for all jobs, and half of their time
        setattr(inputs, name, once(getattr(inputs, name)))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        judge = Judge()
        for job in jobs(args.seeds):
            if time.monotonic() > until:
                break
            if any(all(done[key] == value for key, value in job.items()) for done in results):
                continue
            results.append(run(job, Path(folder), judge))
            settings = {"calibration_rows": SAMPLES, "held_out_rows": HELD_OUT, "seqlen": SEQLEN}
            text = json.dumps({"revision": revision(), **versions(), "settings": settings, "results": results}, indent=1)
            args.json.write_text(text + "\n")
            print(json.dumps(results[-1]), flush=True)
    return 0


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    results: list[Any] = []

    def remembered(*given: Any) -> Any:
        if not results:
            results.append(function(*given))
        return results[0]

    return remembered


if __name__ == "__main__":
    sys.exit(main())
