#!/usr/bin/env python3
"""Plan published shapes for 1, 2, 4 and 8 processes on one host of GPUs and 16 on two, and say how much of so many times one process's
rate each number reaches. With a slow disk and a fast one.

    python scripts/plan_scaling.py --on h100 --json docs/results/plan_scaling.json

These are predictions: floors at data sheets' rates, and what they leave out (launches, packing and hashing by the first process, small
messages) is not shared. ``table`` makes the table in docs/cluster.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from facts import revision, versions
from moe_shapes import MOE_SHAPES, write_headers
from plan_shapes import planned
from shapes import SHAPES, write_config

#: Processes, and the hosts that they run on.
PLACES = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 2))
#: Of a host: the default of plans, and eight NVMe disks of 5 GB/s each.
DISKS = ("3GB", "40GB")
ROOM = ("--ram", "2000GB", "--disk", "4000GB")
DENSE, EXPERTS = ("llama-2-70b", "bloom-176b"), ("deepseek-v3",)
HEADING = (
    "| model | processes | computing | of N × one | traffic hidden | disk of 3 GB/s | disk of 40 GB/s | disk needed | GPU memory |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def folders() -> Iterator[tuple[str, Path]]:
    """The models, as folders that a plan can read."""
    for name in (*DENSE, *EXPERTS):
        with tempfile.TemporaryDirectory() as folder:
            if name in SHAPES:
                write_config(SHAPES[name], Path(folder))
            else:
                write_headers(MOE_SHAPES[name].config, Path(folder))
            yield name, Path(folder)


def scaled(folder: Path, on: str) -> list[dict[str, Any]]:
    """A model's plans, with what differs between numbers of processes."""
    found = []
    for ranks, hosts in PLACES:
        plans = {disk: planned(folder, on, (*ROOM, "--ranks", str(ranks), "--hosts", str(hosts), "--disk-rate", disk)) for disk in DISKS}
        plan = plans[DISKS[0]]
        shared = plan["ranks"]
        computing = sum(phase["seconds"] for phase in plan["phases"])
        found.append(
            {
                "ranks": ranks,
                "hosts": hosts,
                "device_bytes": plan["device_bytes"],
                "host_bytes": plan["host_bytes"],
                "batch": plan["batch"],
                "experts_at_once": plan["experts_at_once"],
                "computing_seconds": computing,
                "scaling_computing": None if shared is None else shared["scaling_computing"],
                "phases": {phase["phase"]: phase["seconds"] for phase in plan["phases"] if phase["seconds"]},
                "traffic": None if shared is None else shared["traffic"],
                "scaling_if_hidden": None if shared is None else hidden(shared, computing),
                "moved_bytes": plan["read_bytes"] + plan["written_bytes"],
                "disks": {
                    disk: {
                        "seconds_at_least": each["seconds_at_least"],
                        "scaling": None if shared is None else each["ranks"]["scaling"],
                        "bound_by": None if shared is None else each["ranks"]["bound_by"],
                        "excess_seconds": None if shared is None else each["ranks"]["excess_seconds"],
                    }
                    for disk, each in plans.items()
                },
            }
        )
    return found


def hidden(shared: Mapping[str, Any], computing: float) -> float:
    """What computing alone would reach if all traffic went on while something else is computed."""
    return float(shared["scaling_computing"] * computing / (computing - sum(each["seconds"] for each in shared["traffic"].values())))


def table(result: Mapping[str, Any]) -> str:
    """The table of a result, as Markdown."""
    lines = []
    for name, plans in result["models"].items():
        for plan in plans:
            disks = [plan["disks"][disk] for disk in DISKS]
            needed = plan["moved_bytes"] / plan["computing_seconds"] / 1e9
            cells = [
                name if plan["ranks"] == 1 else "",
                f"{plan['ranks']}" + (f" on {plan['hosts']} hosts" if plan["hosts"] > 1 else ""),
                f"{plan['computing_seconds']:.1f} s",
                _percent(plan["scaling_computing"]),
                _percent(plan["scaling_if_hidden"]),
                *(f"{each['seconds_at_least']:.1f} s, {_percent(each['scaling'])}".removesuffix(", –") for each in disks),
                f"{needed:.1f} GB/s",
                f"{plan['device_bytes'] / 1e9:.1f} GB",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return HEADING + "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", default="h100", help="the GPU to plan for")
    parser.add_argument("--json", type=Path, help="write the plans here")
    args = parser.parse_args()
    result = {
        "command": f"python scripts/plan_scaling.py --on {args.on} --json docs/results/plan_scaling.json",
        "what": "predictions; times are floors at the data sheets' rates",
        "revision": revision(),
        **versions(),
        "models": {},
    }
    for name, folder in folders():
        result["models"][name] = scaled(folder, args.on)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
