#!/usr/bin/env python3
"""Test and time bigq's kernels on a GPU, in one command of at most nine minutes.

Measures the device's ceilings (bf16, TF32 and fp32 products, copy), times every kernel against them and against torch
alone, runs whole Linears through Hessian, factor and solve, and runs the kernel and solver tests on the GPU. Writes
gpu_check.json to --out after every step and prints a table at the end.

    scripts/gpu_check --out docs/results
    scripts/gpu_check --out /tmp/x --only ceilings,syrk,linears

``--smoke`` runs every step on tiny shapes, on a CPU where there is no GPU: it tests this script. Its times mean nothing,
and the result is marked as a smoke run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from facts import print_table
from gpu_bench import Bench, ceilings, machine
from kernel_benchmarks import BENCHMARKS

SECONDS = 540


def test_command(*, smoke: bool) -> list[str]:
    """pytest over the kernel and solver tests; of a few for a smoke run."""
    command = [sys.executable, "-m", "pytest", "--maxfail=20", "-p", "no:cacheprovider", "tests/kernels", "tests/solver"]
    if smoke:
        return [*command, "-k", "test_pack and words"]
    return [*command, "-n", "8"] if importlib.util.find_spec("xdist") else command


def tests(bench: Bench) -> dict[str, Any]:
    """The kernel and solver tests on this device, in 8 processes where pytest-xdist is installed."""
    command = test_command(smoke=bench.smoke)
    begin = time.monotonic()
    left = max(30.0, SECONDS - (begin - bench.started))
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left, check=False)
        printed, passed = done.stdout + done.stderr[-300:], done.returncode == 0
    except subprocess.TimeoutExpired as cut:
        printed, passed = (cut.stdout or b"").decode(errors="replace") + f"\ncut off after {left:.0f} s", False
    lines = printed.strip().splitlines()
    return {
        "passed": passed,
        "summary": lines[-1] if lines else "",
        "failures": [line for line in lines if line.startswith(("FAILED", "E  "))][:20],
        "seconds": time.monotonic() - begin,
    }


def targets(result: dict[str, Any]) -> dict[str, Any]:
    """The targets that this run has measured: name with the aim → the value reached."""

    def ratio(*path: str, over: tuple[str, ...] = ()) -> float | None:
        values = []
        for names in (path, over):
            value: Any = result
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            values.append(value if names else 1.0)
        return values[0] / values[1] if all(isinstance(v, (int, float)) for v in values) else None

    bf16, copy = ("ceilings", "bf16_tflops"), ("ceilings", "copy_gbs")
    found: dict[str, float | None] = {
        f"Hessian over bf16 rate, n = {n} (≥ 0.7)": ratio("syrk", n, "tflops", over=bf16) for n in ("8192", "14336", "28672")
    }
    for name, aim in (("4096 × 4096", 0.03), ("14336 × 57344", 2.5)):
        parts = [ratio("linears", name, part) for part in ("factor_s", "solve_s")]
        found[f"{name}: factor + solve (≤ {aim} s)"] = None if None in parts else sum(part for part in parts if part is not None)
    found["14336 × 57344: peak over H and W (≤ 1.1)"] = ratio(
        "linears", "14336 × 57344", "peak_bytes", over=("linears", "14336 × 57344", "h_and_w_bytes")
    )
    for name in ("4096 × 4096", "8192 × 28672"):
        found[f"{name}: column loop's share of the solve (≤ 0.15)"] = ratio("profile", name, "column_loop_share")
    for name in ("8192², 4 bits, 1 vectors", "16384², 4 bits, 1 vectors", "16384², 4 bits, 16 vectors"):
        found[f"matvec {name} over copy rate (≥ 0.8)"] = ratio("matvec", name, "gbs", over=copy)
    return {name: value for name, value in found.items() if value is not None}


STEPS: dict[str, Callable[[Bench], dict[str, Any]]] = {"ceilings": ceilings, **BENCHMARKS, "tests": tests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json")
    parser.add_argument("--only", help=f"some of {','.join(STEPS)}")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any device: does this script work?")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else list(STEPS)
    if unknown := set(wanted) - set(STEPS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(STEPS)}")
    if not args.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device here; --smoke tries the script on tiny shapes")
    bench = Bench(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), args.smoke)
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"command": f"scripts/gpu_check {' '.join(sys.argv[1:])}", "smoke": args.smoke, "machine": machine(bench)}
    failed = False
    for name in wanted:
        if time.monotonic() - bench.started > SECONDS - 45:
            result[name] = {"left_out": "no time left"}
            continue
        torch.manual_seed(0)
        try:
            result[name] = STEPS[name](bench)
            failed |= result[name].get("passed") is False
        except Exception as error:  # one broken step must not cost the others' results
            result[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
            failed = True
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        result["targets"] = targets(result)
        # Written after every step: a run that is cut short keeps what it has.
        result["seconds"] = time.monotonic() - bench.started
        (args.out / "gpu_check.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        print(f"{name}: {result['seconds']:.0f} s", file=sys.stderr, flush=True)
    print_table(result)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
