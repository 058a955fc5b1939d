#!/usr/bin/env python3
"""Quantizes whole models of published shapes on one GPU, with random weights: minutes, rates against the machine's own
ceilings, memory. For machines whose disk holds neither the model nor its output, and that are lent for minutes at a time.

    scripts/bench_176b --shape bloom-176b --work /tmp/bench --out docs/results --seconds 540
    scripts/bench_176b --shape llama-2-70b --work /tmp/bench --out docs/results -- --batch 4      # options of bigq quantize
    scripts/bench_176b --shape tiny --device cpu --work /tmp/bench --out /tmp/results             # does this script work?

How it differs from quantizing a real checkpoint, all of which the result file says too:

* On disk are one block's shard and the shards of what lies outside the blocks. All blocks have the bytes of the one (see
  bench_slice.py, which reads them with bigq's own reader). With ``--cold`` the shard is dropped from the page cache
  twice a second; without, reads after the first may come from memory, and the disk's own speed stands beside them.
* A run is made of slices, one for each call. bigq's own resume replays finished blocks from their shards, which do not fit
  the disk here, so a slice is a fresh job of a model that has as many blocks as are still missing, from the
  embedding on. As all blocks have one shape, that is the same work. A block counts once its shard is on disk and in
  the journal; what a slice did behind its last commit is not counted. What happens once in a job (copying what lies outside the
  blocks, probing, embedding) is counted in the first slice alone; ``wall_s`` has it all.
* Committed shards are deleted when the disk gets short.

WORK/…/slice-N/progress.jsonl gets a line at every commit, so a call may be cut off at any moment. Run again with the same
arguments to go on; if WORK was lost, ``--continue-from`` takes the slices from an earlier result file. The exit status is
0 when all blocks are done, 75 when there is more to do, 1 when the job failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import psutil
import torch
from facts import print_table, status_bytes
from flops import block_flops, groups_of
from shapes import SHAPES, Layout, Shape, ensure_shard, layout_of, rest_shards, write_config, write_ids, zipf_ids

DONE, FAILED, MORE = 0, 1, 75
#: What a job does once, however many blocks it has.
ONCE = ("copy", "embed", "probe")
#: While the compute thread is in one of these, it waits for the disk or for memory of the host.
WAITING = ("load", "write", "transfer")
POLL_SECONDS = 0.5
HONESTY = "random weights; all blocks have the bytes of one shard on disk; slices are jobs of their own (see scripts/bench_176b.py)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a job reads. block_bytes, rest_bytes: of the tensors of one block, and of all that lie outside the blocks."""

    layout: Layout
    block: Path
    rest: tuple[Path, ...]
    ids: Path
    block_bytes: int
    rest_bytes: int


def ensure_inputs(shape: Shape, folder: Path, samples: int, seqlen: int, device: torch.device) -> Inputs:
    """Write the shards and the token ids that are not there yet."""
    write_config(shape, folder)
    layout = layout_of(folder)
    block, ids = folder / "block.safetensors", folder / f"ids-{samples}x{seqlen}.safetensors"
    rest = {folder / f"rest-{i}.safetensors": tensors for i, tensors in enumerate(rest_shards(layout.rest))}
    block_bytes = sum(t.nbytes for t in ensure_shard(block, layout.of_block(0), 0, device).values())
    rest_bytes = sum(t.nbytes for path, tensors in rest.items() for t in ensure_shard(path, tensors, 0, device).values())
    if not ids.exists():
        write_ids(ids, zipf_ids(samples, seqlen, shape.vocabulary))
    return Inputs(layout=layout, block=block, rest=tuple(rest), ids=ids, block_bytes=block_bytes, rest_bytes=rest_bytes)


def measured_ceilings(device: str, file: Path, log: Path) -> dict[str, Any]:
    """What the machine can do at best, and what it is; measured in a process of its own, which leaves the GPU empty."""
    command = [sys.executable, str(ROOT / "scripts/ceilings.py"), "--device", device, "--file", str(file)]
    with open(log, "wb") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench_176b: measuring the ceilings failed:\n{_tail(log)}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_slice(folder: Path, spec: Mapping[str, Any], on_progress: Callable[[], object]) -> int:
    """Run a slice's job to its end, or to ``stop_at``. Returns its exit status, 0 where it was stopped.

    Peaks of memory, of its process and by what is missing from the machine's, go to FOLDER/samples.json.
    on_progress: called when the slice has committed something.
    """
    spec_path = folder / "spec.json"
    spec_path.write_text(json.dumps({**spec, "launched_at": time.time()}, indent=2) + "\n")
    log = folder / "log.txt"
    with open(log, "wb") as output:
        command = [sys.executable, str(ROOT / "scripts/bench_slice.py"), str(spec_path)]
        child = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    free_before = psutil.virtual_memory().available
    peaks = {"resident_bytes": 0, "taken_from_host_bytes": 0}
    seen, stopped = 0, False
    try:
        while child.poll() is None:
            peaks["resident_bytes"] = max(peaks["resident_bytes"], status_bytes(child.pid, "VmRSS"))
            peaks["taken_from_host_bytes"] = max(peaks["taken_from_host_bytes"], free_before - psutil.virtual_memory().available)
            if len(lines := read_lines(folder)) > seen:
                seen = len(lines)
                (folder / "samples.json").write_text(json.dumps(peaks) + "\n")
                on_progress()
            if time.time() > spec["stop_at"]:
                stopped = True
                child.send_signal(signal.SIGINT)
                with_grace(child, 20)
            time.sleep(POLL_SECONDS)
    finally:
        child.kill()
        child.wait()
    return 0 if stopped else int(child.returncode)


def with_grace(child: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for a process that was told to stop; kill it if it does not."""
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """A slice's progress; the last line may have been torn when the slice was cut off, and is left out then."""
    path = folder / "progress.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_slice(folder: Path) -> dict[str, Any]:
    """All that is known of a slice."""
    spec = json.loads((folder / "spec.json").read_text()) if (folder / "spec.json").exists() else {}
    found: dict[str, Any] = {"lines": read_lines(folder)} | {name: spec[name] for name in ("launched_at", "layers") if name in spec}
    for name in ("samples", "ceilings"):
        path = folder / f"{name}.json"
        if path.exists():
            found |= json.loads(path.read_text())
    return found


def blocks_in(lines: Sequence[Mapping[str, Any]]) -> int:
    return sum(line["unit"].startswith("block-") for line in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a slice contributes. All in seconds but ``blocks`` and ``written``, which is in bytes.

    seconds: from the job's begin to its last commit or, if it ended by itself, its end. once: what a job does once.
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
    """How long the computation stood still for disk or host."""
    return sum(phases.get(name, 0.0) for name in WAITING)


def whole_run(shares: Sequence[Share]) -> dict[str, Any]:
    """One job's time from those of its slices, and its phases: what happens once is counted in the first slice alone."""
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
    """TFLOP/s by phase and over all, and as a share of the rate that the device reaches in a bf16 product."""
    found = {name: count / phases[name] / 1e12 for name, count in flops.items() if phases.get(name)}
    found["all"] = sum(flops.values()) / seconds / 1e12
    return {name: {"tflops": rate, "of_bf16_ceiling": rate / bf16_tflops} for name, rate in found.items()}


def lane_rates(slices: Sequence[Mapping[str, Any]], written: int) -> dict[str, float]:
    """GB/s while something was being read, and while shards were being committed, from the traces of slices that left one."""
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


def result_of(request: Mapping[str, Any], shape: Shape, inputs: Inputs, slices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of all slices that committed a block."""
    result: dict[str, Any] = {"what": HONESTY, **request, "slices": len(slices), "blocks_done": 0, "complete": False}
    if not slices:
        return result
    shares = [Share.of(one["lines"]) for one in slices]
    whole, done = whole_run(shares), sum(share.blocks for share in shares)
    lines = [line for one in slices for line in one["lines"]]
    ceilings = slices[-1]["ceilings"]
    groups = groups_of(inputs.layout.block, shape.groups)
    one_block = block_flops(groups, shape.hidden, request["samples"], request["seqlen"])
    flops = {name: count * done for name, count in one_block.items()}
    read = inputs.block_bytes * done + inputs.rest_bytes
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
    if done < shape.blocks:
        estimate = (whole["once_s"] + whole["blocks_s"] / done * shape.blocks) / 60
        result["extrapolated"] = {f"minutes for all {shape.blocks} blocks, from {done} (not measured)": estimate}
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
        "machine": slices[-1]["machine"],
        "revisions": sorted({one["machine"]["revision"] for one in slices}),
        "devices": sorted({one["machine"].get("device", "CPU") for one in slices}),
    }
    return result


def slice_spec(request: Mapping[str, Any], inputs: Inputs, folder: Path, layers: int, stop_at: float) -> dict[str, Any]:
    """What bench_slice.py is told: a job of so many blocks, to be stopped in time."""
    arguments = ["quantize", str(folder / "model"), str(folder / "out"), "--calibration", str(inputs.ids)]
    arguments += ["--samples", str(request["samples"]), "--seqlen", str(request["seqlen"]), "--device", request["device"]]
    arguments += ["--trace", str(folder / "trace.json"), *request["options"]]
    # Shards are given up as they are committed, so the output need not fit the disk.
    arguments += ["--disk", "1000TB"]
    return {
        "layers": layers,
        "blocks_path": inputs.layout.blocks_path,
        "block_shard": str(inputs.block),
        "rest_shards": [str(path) for path in inputs.rest],
        "arguments": arguments,
        "cold": request["cold"],
        "stop_at": stop_at,
    }


def slice_folders(job: Path) -> list[Path]:
    return sorted(job.glob("slice-*"))


def earlier_slices(result: Path | None, request: Mapping[str, Any], job: Path) -> list[dict[str, Any]]:
    """Slices that committed a block: those of a result file that was named, and those in WORK that it does not hold."""
    before: dict[str, Any] = {"result": request, "slices": []} if result is None else json.loads(result.read_text())
    if any(before["result"].get(name) != value for name, value in request.items()):
        raise SystemExit(f"bench_176b: {result} is the result of another request")
    found: list[dict[str, Any]] = before["slices"]
    known = {one["launched_at"] for one in found}
    in_work = [read_slice(folder) for folder in slice_folders(job)]
    return found + [one for one in in_work if blocks_in(one["lines"]) and one["launched_at"] not in known]


def shown_command(request: Mapping[str, Any]) -> str:
    """The command that makes the same measurement elsewhere."""
    words = ["scripts/bench_176b"]
    for name in ("shape", "blocks", "samples", "seqlen", "device"):
        words += [f"--{name}", str(request[name])]
    words += ["--cold"] * request["cold"] + ["--work", "DIR", "--out", "DIR"]
    return shlex.join([*words, *(["--", *request["options"]] if request["options"] else [])])


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-15:])


def _write_json(path: Path, value: object) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    partial.rename(path)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those behind ``--``, which are bigq's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="bloom-176b")
    parser.add_argument("--blocks", type=int, help="only so many blocks; the time for all is then extrapolated, and labelled so")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--work", type=Path, required=True, help="folder for shards and slices")
    parser.add_argument("--out", type=Path, required=True, help="folder for bench_SHAPE.json, and the last slice's trace and log")
    parser.add_argument("--seconds", type=float, default=540.0, help="end this call before so many seconds are over (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="drop the block shard from the page cache twice a second")
    parser.add_argument("--continue-from", type=Path, help="an earlier call's result file, where WORK was lost since")
    own, _, options = [*argv], None, []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here; --shape tiny --device cpu tries the script")
    return args, options


def shards_made(shape: Shape, folder: Path, samples: int, seqlen: int, device: torch.device) -> Inputs:
    """``ensure_inputs``, its writing done in a process of its own, so that this one holds nothing of the GPU."""
    wanted = (shape, folder, samples, seqlen, device)
    if device.type == "cpu":
        return ensure_inputs(*wanted)
    maker = multiprocessing.get_context("spawn").Process(target=ensure_inputs, args=wanted)
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit("bench_176b: the shards could not be written")
    return ensure_inputs(*wanted)


def main() -> int:
    called_at = time.time()
    args, options = parse(sys.argv[1:])
    shape = SHAPES[args.shape]
    request = {
        "shape": args.shape,
        "blocks": min(args.blocks or shape.blocks, shape.blocks),
        "samples": args.samples,
        "seqlen": args.seqlen,
        "device": args.device,
        "cold": args.cold,
        "options": options,
    }
    job = args.work / f"job-{args.shape}-{hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12]}"
    for folder in (job, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    inputs = shards_made(shape, args.work / f"shards-{args.shape}", args.samples, args.seqlen, torch.device(args.device))
    before = earlier_slices(args.continue_from, request, job)
    old = slice_folders(job)
    for folder in old:
        shutil.rmtree(folder / "out", ignore_errors=True)
    own = job / f"slice-{len(old):03d}"

    def save() -> dict[str, Any]:
        """Called at every commit: a call that is cut off leaves the figures so far."""
        slices = [*before, *([read_slice(own)] if blocks_in(read_lines(own)) else [])]
        result = result_of(request, shape, inputs, slices)
        written = {"command": shown_command(request), "result": result, "slices": slices}
        _write_json(args.out / f"bench_{args.shape}.json", written)
        return result

    status, layers = 0, request["blocks"] - sum(blocks_in(one["lines"]) for one in before)
    stop_at = called_at + args.seconds
    if layers and time.time() < stop_at:
        write_config(shape, own / "model", layers)
        _write_json(own / "ceilings.json", measured_ceilings(args.device, inputs.block, own / "ceilings.log"))
        status = run_slice(own, slice_spec(request, inputs, own, layers, stop_at), save)
        for name in ("trace.json", "log.txt"):
            if (own / name).exists():
                shutil.copy(own / name, args.out / f"bench_{args.shape}.{name}")
    result = save()
    print_table(result)
    if status:
        print(f"bench_176b: the job ended with status {status}:\n{_tail(own / 'log.txt')}", file=sys.stderr)
        return FAILED
    return DONE if result["complete"] else MORE


if __name__ == "__main__":
    sys.exit(main())
