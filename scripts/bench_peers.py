#!/usr/bin/env python3
"""Measure bigq, GPTQModel and llm-compressor in turn, as whole processes on a CPU, with bench_small's model and rows.

4 bits, groups of 128, symmetric, 32 × 512 tokens. The others run in natural order and without a grid search, where they are fastest;
bigq runs with the same settings, with its defaults (act-order), and with act-order and the grid search. Every process starts from a
checkpoint and ends with a saved one; start-up counts. Wall seconds, CPU seconds (with child processes) and peak resident MiB.

    python scripts/bench_peers.py --work DIR --gptqmodel VENV --llmcompressor VENV --json docs/results/bench_peers.json

A VENV is an environment that holds the program: ``scripts/clients/venvs`` makes them. bigq runs once before it is measured, so that its
compiled kernels are cached; that run is reported too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_small import ROOT, ROWS, SEQLEN, make_inputs
from facts import revision

#: Run → what it adds to bigq's command line.
BIGQ: Mapping[str, Sequence[str]] = {
    "bigq, same settings": ("--quality", "fast", "--order", "natural"),
    "bigq, defaults": (),
    "bigq, fast": ("--quality", "fast"),
}
SAME, PEERS = "bigq, same settings", ("llmcompressor", "gptqmodel")
#: GPTQModel's pool of threads does not start with fewer workers on two cores.
PEER_ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}


def measure(command: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Run a command in a folder. Exits with its log's end if it fails."""
    began = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        sys.exit(f"bench_peers: {' '.join(command)} ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
    return {
        "wall_s": round(time.monotonic() - began, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_mib": round(usage.ru_maxrss / 1024),
    }


def commands(args: argparse.Namespace, model: Path, ids: Path, out: Path) -> dict[str, list[str]]:
    quantize = [sys.executable, "-m", "bigq", "quantize", str(model), str(out), "--calibration", str(ids), "--device", "cpu", "--quiet"]
    quantize += ["--samples", str(ROWS), "--seqlen", str(SEQLEN)]
    found = {name: [*quantize, *more] for name, more in BIGQ.items()}
    for peer in PEERS:
        if venv := getattr(args, peer):
            script = ROOT / "scripts/clients/time_peer.py"
            found[peer] = [str(venv.absolute() / "bin/python"), str(script), peer, str(model), str(ids), str(out)]
    return found


def last_object(log: Path) -> dict[str, Any]:
    """The last line of a log that is a JSON object."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model, outputs and logs")
    parser.add_argument("--gptqmodel", type=Path, metavar="VENV")
    parser.add_argument("--llmcompressor", type=Path, metavar="VENV")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    model, ids, out, log = args.work / "llama-small", args.work / "tokens.safetensors", args.work / "out", args.work / "log.txt"
    if not ids.exists():
        maker = multiprocessing.get_context("spawn").Process(target=make_inputs, args=(model, ids))
        maker.start()
        maker.join()
    runs: dict[str, list[dict[str, Any]]] = {}
    versions: dict[str, Any] = {}
    programs = commands(args, model, ids, out)
    cache = {"NUMBA_CACHE_DIR": str(args.work / "numba")}
    shutil.rmtree(cache["NUMBA_CACHE_DIR"], ignore_errors=True)
    for number in range(args.rounds + 1):
        for name, command in programs.items():
            if number == 0 and name != SAME:
                continue
            shutil.rmtree(out, ignore_errors=True)
            # Other programs leave files in the folder that they run in.
            result = measure(command, log, *((PEER_ENVIRONMENT, args.work) if name in PEERS else (cache, ROOT)))
            runs.setdefault(name if number else "bigq, same settings, first run: kernels are compiled", []).append(result)
            print(f"{name:34} {result['wall_s']:8.1f} s {result['cpu_s']:8.1f} CPU s {result['peak_rss_mib']:6} MiB", flush=True)
            if name in PEERS:
                versions[name] = last_object(log)
    medians = {name: {key: statistics.median(run[key] for run in each) for key in each[0]} for name, each in runs.items()}
    peers = [name for name in PEERS if name in medians]
    result: dict[str, Any] = {
        "command": "python scripts/bench_peers.py --work DIR --gptqmodel VENV --llmcompressor VENV "
        f"--rounds {args.rounds} --json {args.json}",
        "revision": revision(),
        "cores": os.cpu_count(),
        "peers": versions,
        "runs": runs,
        "medians": medians,
    }
    if peers:
        fastest = min(peers, key=lambda name: float(medians[name]["wall_s"]))
        result["fastest_peer"] = fastest
        result["times_as_fast"] = {name: round(medians[fastest]["wall_s"] / medians[name]["wall_s"], 2) for name in BIGQ}
        print(f"times as fast as {fastest}: {result['times_as_fast']}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
