#!/usr/bin/env python3
"""Plan published shapes from their config.json alone with ``bigq plan``, for one GPU, and measure the command's time.

    python scripts/plan_shapes.py --on h100 --json docs/results/plan_shapes.json

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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from facts import host, revision, versions
from shapes import SHAPES, write_config


def planned(name: str, on: str) -> dict[str, Any]:
    """The plan as JSON, with the time of the whole command in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        write_config(SHAPES[name], Path(folder))
        command = [sys.executable, "-m", "bigq", "plan", folder, "--on", on, "--ram", "128GB", "--disk", "1000GB", "--json"]
        begun = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
        seconds = time.monotonic() - begun
    if done.returncode:
        raise SystemExit(f"plan_shapes: {name}: {done.stderr}")
    return {"command_seconds": round(seconds, 2), **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", default="h100", help="the GPU to plan for")
    parser.add_argument("--json", type=Path, help="write the plans here")
    args = parser.parse_args()
    plans = {name: planned(name, args.on) for name in SHAPES if name != "tiny"}
    heads = ("shape", "seconds", "tier", "batch", "GPU GiB", "host GiB", "read GB", "written GB", "floor min")
    print("".join(f"{head:>11}" if i else f"{head:16}" for i, head in enumerate(heads)))
    for name, plan in plans.items():
        memory = plan["device_bytes"] / 2**30, plan["host_bytes"] / 2**30
        figures = (*memory, plan["read_bytes"] / 1e9, plan["written_bytes"] / 1e9, plan["seconds_at_least"] / 60)
        said = (plan["command_seconds"], plan["activations"], plan["batch"])
        print(f"{name:16}" + "".join(f"{x:>11}" for x in said) + "".join(f"{x:>11.1f}" for x in figures))
    result = {
        "command": f"python scripts/plan_shapes.py --on {args.on} --json docs/results/plan_shapes.json",
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
