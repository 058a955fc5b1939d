#!/usr/bin/env python3
"""Every method with the formats that it is used for, on one model and the same tokens: KL, perplexity, time, memory, and bits per weight.

    python scripts/compare_methods.py --json docs/results/methods.json
    python scripts/compare_methods.py --json docs/results/methods.json --name NAME --model FOLDER --ids FILE --heldout FILE
    python scripts/compare_methods.py --json docs/results/methods.json --table       # print the table of docs/methods.md

Without --model: the model that ships with bigq and its texts. FILE holds token ids (safetensors). Each job runs in a process of its own
on a CPU with one thread. An existing result file is resumed: remove a row to repeat it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from facts import calibration_flags, revision, versions

from bigq.cli.demo import MODEL
from bigq.infer.evaluate import EvalConfig, evaluate
from bigq.inspect.history import read_history
from bigq.io.formats.readers import readers_of

COMMAND = "python scripts/compare_methods.py --json docs/results/methods.json"
SHIPPED = "shipped"
NEAREST = "--method rtn"
#: Row → options of ``bigq quantize``.
ROWS: Mapping[str, str] = {
    "8 bits, groups of 64": "--bits 8 --group-size 64",
    "w8a8-int8, nearest": f"--format w8a8-int8 {NEAREST}",
    "w8a8-int8": "--format w8a8-int8",
    "w8a8-int8, SmoothQuant": "--format w8a8-int8 --fold smoothquant",
    "w8a8-int8, static": "--format w8a8-int8 --input-scales static",
    "w8a8-int8, static, SmoothQuant": "--format w8a8-int8 --input-scales static --fold smoothquant",
    "fp8, nearest": f"--format fp8 {NEAREST}",
    "fp8": "--format fp8",
    "fp8, static": "--format fp8 --input-scales static",
    "fp8-block, nearest": f"--format fp8-block {NEAREST}",
    "fp8-block": "--format fp8-block",
    "4 bits, nearest": f"--group-size 64 --asym --format gptq_v2 {NEAREST}",
    "4 bits, AWQ": "--group-size 64 --asym --format awq --method awq",
    "4 bits, fast": "--group-size 64 --asym --format gptq_v2 --quality fast",
    "4 bits, balanced": "--group-size 64 --asym --format gptq_v2",
    "4 bits, AWQ before balanced": "--group-size 64 --asym --format gptq_v2 --fold awq",
    "4 bits, best": "--group-size 64 --asym --format gptq_v2 --quality best",
    "Q4_1": "--group-size 32 --asym --format gguf",
    "NF4, nearest": f"--format bnb-nf4 {NEAREST} --scales minmax",
    "NF4": "--format bnb-nf4",
    "nvfp4, nearest": f"--format nvfp4 {NEAREST}",
    "nvfp4": "--format nvfp4",
    "nvfp4-w4a4": "--format nvfp4-w4a4",
    "mxfp4, nearest": f"--format mxfp4 {NEAREST}",
    "mxfp4": "--format mxfp4",
    "3 bits, balanced": "--bits 3 --group-size 64 --asym --format gptq_v2",
    "3 bits, best": "--bits 3 --group-size 64 --asym --format gptq_v2 --quality best",
    "2 bits, balanced": "--bits 2 --group-size 64 --asym --format gptq_v2",
    "2 bits, best": "--bits 2 --group-size 64 --asym --format gptq_v2 --quality best",
}


def run(flags: list[str], given: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The findings of one job."""
    data = calibration_flags(given.ids) if given.ids else ["--calibration", "builtin", "--samples", "64", "--seqlen", "256"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "bigq", "quantize", str(given.model), str(out), *data, *flags, "--device", "cpu", "--quiet", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads(done.stdout)
    rows = {} if given.heldout else {"samples": 128}
    config = EvalConfig(data=str(given.heldout or "builtin"), seqlen=given.window, device="cpu", dtype="float32", quiet=True, **rows)
    judged = evaluate(str(out), config, baseline=str(given.model))
    history = read_history(out)
    assert history.config is not None
    return {
        "format": history.config.format,
        "readers": readers_of(history.config.made.name),
        "bits_per_weight": history.linear_bits,
        "cpu_seconds": round(sum(getattr(after, key) - getattr(before, key) for key in ("ru_utime", "ru_stime")), 1),
        "host_peak_bytes": report["host_peak_bytes"],
        "kl": judged.kl,
        "kl_stderr": judged.kl_stderr,
        "perplexity": judged.perplexity,
        "baseline_perplexity": judged.baseline_perplexity,
        "top1_agreement": judged.top1_agreement,
    }


def table(result: Mapping[str, Any]) -> str:
    """The table of docs/methods.md."""
    names = list(result["models"])
    found = {name: result["models"][name]["rows"] for name in names}
    named = f", {names[-1]}" if len(names) > 1 else ""
    head = ["", "options", "bits per weight", *(f"KL, {name}" if len(names) > 1 else "KL" for name in names)]
    head += [f"{what}{named}" for what in ("perplexity", "CPU s", "MiB")] + ["read by"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row, flags in ROWS.items():
        last = found[names[-1]].get(row)
        if last is None:
            continue
        kl = [f"{found[name][row]['kl']:.5f}" if row in found[name] else "–" for name in names]
        rest = [
            f"{last['perplexity']:.3f}",
            f"{last['cpu_seconds']:.0f}",
            f"{last['host_peak_bytes'] / 2**20:.0f}",
            ", ".join([*last["readers"], *(["llama.cpp"] if "--format gguf" in flags else [])]),
        ]
        bits = f"{last['bits_per_weight']:.2f}"
        lines.append(f"| {' | '.join([row, f'`{flags}`', bits, *kl, *rest])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument("--name", default=SHIPPED, help="what the model is called in the results (default: shipped)")
    parser.add_argument("--model", type=Path, default=MODEL, help="a model folder (default: the one that ships with bigq)")
    parser.add_argument("--ids", type=Path, help="token ids of the calibration rows (default: the text that ships with bigq)")
    parser.add_argument("--heldout", type=Path, help="token ids that KL is measured on (default: the text that ships with bigq)")
    parser.add_argument("--window", type=int, default=256, help="tokens of a held-out row (default: 256)")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    given = parser.parse_args()
    result: dict[str, Any] = {"command": COMMAND, "versions": versions(), "models": {}}
    if given.json.exists():
        result = json.loads(given.json.read_text(encoding="utf-8"))
    if given.table:
        print(table(result))
        return
    entry = result["models"].setdefault(given.name, {"window": given.window, "rows": {}})
    for name, flags in ROWS.items():
        if name in entry["rows"] or (given.only and given.only not in name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            entry["rows"][name] = {"flags": flags, "revision": revision(), **run(flags.split(), given, Path(folder) / "out")}
        print(f"{name}: KL {entry['rows'][name]['kl']:.5f}", flush=True)
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
