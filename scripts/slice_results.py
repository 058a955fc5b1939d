"""The figures of a ``bench_176b`` run from its slices: one job's time, rates, peaks.

A slice is one job of the benchmark, in a folder of its own: spec.json, progress.jsonl (a line per commit), samples.json and
ceilings.json. All sizes are in bytes, all times in seconds unless a name says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Phases that a job runs once, whatever its number of blocks.
ONCE = ("copy", "embed", "probe")
#: Phases in which the computation waits for the disk or for host memory.
WAITING = ("load", "write", "transfer")
HONESTY = "random weights; all blocks have the bytes of one shard on disk; every slice is a job of its own (see scripts/bench_176b.py)"


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The progress of a slice. A torn last line, as a slice that was killed may leave it, is ignored."""
    path = folder / "progress.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_slice(folder: Path) -> dict[str, Any]:
    """Everything known about a slice: ``lines``, and what its other files hold."""
    spec = json.loads((folder / "spec.json").read_text()) if (folder / "spec.json").exists() else {}
    found: dict[str, Any] = {"lines": read_lines(folder)} | {name: spec[name] for name in ("launched_at", "layers") if name in spec}
    for name in ("samples", "ceilings"):
        path = folder / f"{name}.json"
        if path.exists():
            found |= json.loads(path.read_text())
    return found


def slice_folders(job: Path) -> list[Path]:
    return sorted(job.glob("slice-*"))


def blocks_in(lines: Sequence[Mapping[str, Any]]) -> int:
    return sum(line["unit"].startswith("block-") for line in lines)


def earlier_slices(result: Path | None, request: Mapping[str, Any], job: Path) -> list[dict[str, Any]]:
    """Slices that committed a block: those of the result file, and those in WORK that it does not hold.

    Exits with an error if the file is the result of another request.
    """
    before: dict[str, Any] = {"result": request, "slices": []} if result is None else json.loads(result.read_text())
    if any(before["result"].get(name) != value for name, value in request.items()):
        raise SystemExit(f"bench_176b: {result} is the result of another request; use other arguments, or another file for --continue-from")
    found: list[dict[str, Any]] = before["slices"]
    known = {one["launched_at"] for one in found}
    in_work = [read_slice(folder) for folder in slice_folders(job)]
    return found + [one for one in in_work if blocks_in(one["lines"]) and one["launched_at"] not in known]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a slice contributes to the run.

    seconds: from the start of the job to its last commit or, if it finished, to its end. once: the seconds of ``ONCE`` and of the start.
    written, written_rest: bytes of the blocks' shards and of the others.
    """

    blocks: int
    seconds: float
    once: float
    phases: Mapping[str, float]
    written: int
    written_rest: int

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]]) -> Share:
        counted = [line for line in lines if line["unit"].startswith("block-") or line["unit"] == "end"]
        last = counted[-1]
        phases = last.get("report_phases", last["phases"])
        shards = [line for line in lines if "shard_bytes" in line]
        blocks = sum(line["shard_bytes"] for line in shards if line["unit"].startswith("block-"))
        return cls(
            blocks=blocks_in(lines),
            seconds=last["seconds"],
            once=last["before_clock_s"] + sum(phases.get(name, 0.0) for name in ONCE),
            phases=phases,
            written=blocks,
            written_rest=sum(line["shard_bytes"] for line in shards) - blocks,
        )


def waiting_seconds(phases: Mapping[str, float]) -> float:
    """Seconds in which the computation waited for the disk or the host."""
    return sum(phases.get(name, 0.0) for name in WAITING)


def whole_run(shares: Sequence[Share]) -> dict[str, Any]:
    """The time of one job, in all and by phase, from its slices. Phases that run once per job count in the first slice only."""
    phases: dict[str, float] = {}
    for number, share in enumerate(shares):
        for name, seconds in share.phases.items():
            if number == 0 or name not in ONCE:
                phases[name] = phases.get(name, 0.0) + seconds
    once = shares[0].once
    blocks_s = sum(share.seconds - share.once for share in shares)
    phases["none of these"] = max(0.0, once + blocks_s - sum(phases.values()))
    return {"seconds": once + blocks_s, "once_s": once, "blocks_s": blocks_s, "phases": phases}


def rates(flops: Mapping[str, float], phases: Mapping[str, float], seconds: float, bf16_tflops: float) -> dict[str, Any]:
    """TFLOP/s by phase and in all, and as shares of the device's rate in a bf16 product."""
    found = {name: count / phases[name] / 1e12 for name, count in flops.items() if phases.get(name)}
    found["all"] = sum(flops.values()) / seconds / 1e12
    return {name: {"tflops": rate, "of_bf16_ceiling": rate / bf16_tflops} for name, rate in found.items()}


def lane_rates(slices: Sequence[Mapping[str, Any]], written: int) -> dict[str, float]:
    """GB/s while anything was read, and while shards were committed, from the traces of the slices that have one."""
    totals: dict[str, tuple[float, float]] = {}
    for one in slices:
        for line in one["lines"]:
            for lane, had in line.get("lanes", {}).items():
                busy, size = totals.get(lane, (0.0, 0.0))
                totals[lane] = busy + had["busy_s"], size + had["bytes"]
    found = {}
    if "read" in totals and totals["read"][0]:
        found["gbs_while_reading"] = totals["read"][1] / totals["read"][0] / 1e9
    if "commit" in totals and totals["commit"][0] and all(any("lanes" in line for line in one["lines"]) for one in slices):
        found["gbs_while_committing"] = written / totals["commit"][0] / 1e9
    return found


def max_of_each(rows: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The largest value of each name."""
    return {name: max(row.get(name, 0) for row in rows) for name in sorted({name for row in rows for name in row})}


def over_plan(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The peaks of host and device memory as shares of the plan's; only those that are planned."""
    planned = lines[-1].get("planned", {})
    return {kind: max(line[f"{kind}_peak_bytes"] for line in lines) / planned[kind] for kind in ("host", "device") if planned.get(kind)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """blocks: of the whole model. flops: of one block, by phase. block_bytes, rest_bytes: of one block's tensors and of all others.

    note: what else differs from quantizing a real checkpoint.
    """

    blocks: int
    flops: Mapping[str, float]
    block_bytes: int
    rest_bytes: int
    note: str = ""


def result_of(request: Mapping[str, Any], work: Workload, slices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a run, from its slices that committed a block."""
    what = "; ".join(filter(None, (HONESTY, work.note)))
    result: dict[str, Any] = {"what": what, **request, "slices": len(slices), "blocks_done": 0, "complete": False}
    if not slices:
        return result
    shares = [Share.of(one["lines"]) for one in slices]
    whole, done = whole_run(shares), sum(share.blocks for share in shares)
    lines = [line for one in slices for line in one["lines"]]
    ceilings = slices[-1]["ceilings"]
    flops = {name: count * done for name, count in work.flops.items()}
    read = work.block_bytes * done + work.rest_bytes
    written = sum(share.written for share in shares) + shares[0].written_rest
    result |= {
        "blocks_done": done,
        "complete": done == request["blocks"],
        "minutes": whole["seconds"] / 60,
        "once_s": whole["once_s"],
        "seconds_per_block": whole["blocks_s"] / done,
        "wall_s": sum(share.seconds for share in shares),
        "start_s": max(line["start_s"] for line in lines),
    }
    if done < work.blocks:
        estimate = (whole["once_s"] + whole["blocks_s"] / done * work.blocks) / 60
        result["extrapolated"] = {f"minutes for all {work.blocks} blocks, from {done} (not measured)": estimate}
    result |= {
        "seconds_by_phase": dict(sorted(whole["phases"].items(), key=lambda item: -item[1])),
        "waiting_share": waiting_seconds(whole["phases"]) / whole["seconds"],
        "rates": rates(flops, whole["phases"], whole["seconds"], ceilings["bf16_tflops"]),
        "bytes_read": read,
        "bytes_written": written,
        "read_gbs": read / whole["seconds"] / 1e9,
        "written_gbs": written / whole["seconds"] / 1e9,
        **lane_rates(slices, sum(share.written + share.written_rest for share in shares)),
        "ceilings": ceilings,
        "peaks": {
            "device_bytes": max(line["device_peak_bytes"] for line in lines),
            "device_reserved_bytes": max(line["device_reserved_peak_bytes"] for line in lines),
            "host_resident_bytes": max(line["host_peak_bytes"] for line in lines),
            "taken_from_host_bytes": max(one.get("taken_from_host_bytes", 0) for one in slices),
        },
        "planned": lines[-1].get("planned", {}),
        "peak_over_plan": over_plan(lines),
        "tokens_of_experts": [line["tokens_of_experts"] for line in lines if line.get("tokens_of_experts")],
        "allocator": max_of_each([line.get("allocator", {}) for line in lines]),
        "machine": slices[-1]["machine"],
        "revisions": sorted({one["machine"]["revision"] for one in slices}),
        "devices": sorted({one["machine"].get("device", "CPU") for one in slices}),
    }
    return result
