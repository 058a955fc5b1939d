#!/usr/bin/env python3
"""Plan published shapes with ``bigq plan``, for one GPU, and measure the command's time. Models with experts have headers, as their
checkpoints do; of others, config.json is enough.

    python scripts/plan_shapes.py --on h100 --json docs/results/plan_shapes.json
    python scripts/plan_shapes.py --experts --on h100 --json docs/results/plan_experts.json

A plan is a prediction: its times are lower bounds at the data sheet's rates. Disk and host memory are assumed to suffice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from facts import host, revision, versions
from moe_shapes import MOE_SHAPES, write_headers
from shapes import SHAPES, write_config


def planned(folder: Path, on: str, flags: Sequence[str] = ()) -> dict[str, Any]:
    """The plan as JSON, with the time of the whole command in seconds."""
    room = ("--ram", "128GB", "--disk", "1000GB")
    command = [sys.executable, "-m", "bigq", "plan", str(folder), "--on", on, *room, *flags, "--json"]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    seconds = time.monotonic() - begun
    if done.returncode:
        raise SystemExit(f"plan_shapes: {folder}: {done.stderr}")
    return {"command_seconds": round(seconds, 2), **json.loads(done.stdout)}


def dense(on: str) -> dict[str, Any]:
    """The plans of the models without experts."""
    plans = {}
    for name, shape in SHAPES.items():
        if name == "tiny":
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_config(shape, Path(folder))
            plans[name] = planned(Path(folder), on)
    return plans


def with_experts(on: str) -> dict[str, Any]:
    """The plans of the models with experts."""
    plans = {}
    for name, shape in MOE_SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            count = write_headers(shape.config, Path(folder))
            plans[name] = {"tensors": count, "note": shape.note, "flags": list(shape.flags), **planned(Path(folder), on, shape.flags)}
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", default="h100", help="the GPU to plan for")
    parser.add_argument("--experts", action="store_true", help="plan the models with experts")
    parser.add_argument("--json", type=Path, help="write the plans here")
    args = parser.parse_args()
    plans = with_experts(args.on) if args.experts else dense(args.on)
    heads = ("shape", "seconds", "tier", "batch", "GPU GiB", "host GiB", "read GB", "written GB", "floor min")
    print("".join(f"{head:>11}" if i else f"{head:16}" for i, head in enumerate(heads)))
    for name, plan in plans.items():
        memory = plan["device_bytes"] / 2**30, plan["host_bytes"] / 2**30
        figures = (*memory, plan["read_bytes"] / 1e9, plan["written_bytes"] / 1e9, plan["seconds_at_least"] / 60)
        said = (plan["command_seconds"], plan["activations"], plan["batch"])
        print(f"{name:16}" + "".join(f"{x:>11}" for x in said) + "".join(f"{x:>11.1f}" for x in figures))
    name = "plan_experts.json" if args.experts else "plan_shapes.json"
    result = {
        "command": f"python scripts/plan_shapes.py {'--experts ' * args.experts}--on {args.on} --json docs/results/{name}",
        "what": "predictions; times are floors at the data sheet's rates",
        "revision": revision(),
        **versions(),
        **host(),
        "plans": plans,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
