"""One slice of ``bench_176b``: a real job on a checkpoint whose blocks all share the bytes of one block on disk.

    python scripts/bench_slice.py FOLDER/spec.json

This script replaces these parts of bigq before it calls ``quantize``, and nothing else:

* ``Checkpoint.open`` gives every block the byte ranges of the one block shard. Hard links cannot do that: tensor names differ.
  Of a model with experts, later experts have the byte ranges of the first ones.
* ``Journal.commit`` also writes a line to FOLDER/progress.jsonl, deletes committed shards when disk space runs short, and
  interrupts the job, as Ctrl-C does, when no time is left for another block.
* ``Journal.record_run`` also keeps the planned peaks.
* ``Clock.__init__`` also keeps the clock, which every commit asks for the seconds by phase.
* ``faults.point`` starts and stops the profiler, if the spec names a block or experts to profile (FOLDER/profile.json).
* What ``expert_phases.py`` names, if the model has experts.
"""

from __future__ import annotations

import _thread
import ctypes
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch
from expert_phases import ExpertPhases
from expert_shapes import ONE_EXPERT, aliases
from facts import drop_from_cache, status_bytes

from bigq import faults
from bigq.cli.commands import build_parser
from bigq.cli.job import job_config
from bigq.errors import BigqError
from bigq.io.index import Checkpoint, TensorInfo, read_header
from bigq.job.journal import Commit, Journal
from bigq.progress.clock import Clock
from bigq.sched.run import quantize

#: Seconds between drops of the block shard from the page cache (``cold``).
DROP_SECONDS = 0.5
#: Free disk space below which committed shards are deleted, in addition to the size of three more of them.
FREE_BYTES = 2 * 10**9
#: Names of the CUDA allocator's statistics that every line of progress.jsonl holds.
ALLOCATOR = ("num_alloc_retries", "num_ooms", "allocated_bytes.all.peak", "reserved_bytes.all.peak", "inactive_split_bytes.all.peak")
#: Kernels listed in profile.json.
PROFILED_KERNELS = 45


def aliased_checkpoint(folder: Path, rest: Sequence[Path], block: Path, blocks_path: str, blocks: int, experts: int = 0) -> Checkpoint:
    """A checkpoint with ``blocks`` blocks that all have the bytes of block 0, in the shard ``block``.

    experts: of a block; those that the shard does not hold have the bytes of those that it holds.
    """
    tensors: dict[str, TensorInfo] = {}
    digest = hashlib.sha256(str(blocks).encode())
    for path in rest:
        infos, header = read_header(path)
        tensors |= infos
        digest.update(header)
    infos, header = read_header(block)
    digest.update(header)
    distinct = len({found[2] for name in infos if (found := ONE_EXPERT.fullmatch(name))})
    for i in range(blocks):
        for info in infos.values():
            own = f"{blocks_path}.{i}.{info.name.removeprefix(f'{blocks_path}.0.')}"
            tensors |= {name: dataclasses.replace(info, name=name) for name in aliases(own, distinct, experts)}
    return Checkpoint(folder, tensors, digest.hexdigest())


def enough_time(now: float, stop_at: float, block_seconds: Sequence[float]) -> bool:
    """Whether another block as slow as the slower of the last two ends in time, with a quarter to spare. Times in seconds.

    Earlier blocks do not count: the first one compiles kernels.
    """
    return now + 1.25 * max(block_seconds[-2:]) + 2 < stop_at


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds covered by at least one of the spans (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def lanes(trace: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The trace of a job by lane: seconds in which the lane was busy, and the bytes of the tensors that its spans name."""
    spans: dict[str, list[Any]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            spans.setdefault(event["cat"], []).append(event)
    return {
        lane: {
            "busy_s": busy_seconds((e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events),
            "bytes": sum(sizes.get(e["name"], 0) for e in events),
        }
        for lane, events in spans.items()
    }


class Notes:
    """Writes progress.jsonl: at every commit, seconds since the job began, seconds by phase, and sizes and peaks in bytes."""

    def __init__(self, folder: Path, layers: int, launched_at: float, stop_at: float, experts: ExpertPhases | None = None) -> None:
        self.stopped = False
        self._experts = experts
        self._folder, self._layers, self._stop_at = folder, layers, stop_at
        self._begun = time.monotonic()
        self._start_s = time.time() - launched_at
        self._before_clock_s = 0.0
        self._clock: Clock | None = None
        self._planned: dict[str, Any] = {}
        self._commits: list[float] = []
        self._block_seconds: list[float] = []

    def clock_made(self, clock: Clock) -> None:
        self._clock = clock
        self._before_clock_s = time.monotonic() - self._begun

    def run_recorded(self, run: Mapping[str, Any]) -> None:
        self._planned = dict(run["planned"])

    def committed(self, out: Path, commit: Commit) -> None:
        """Called when a shard is on disk and in the journal."""
        now = time.monotonic()
        is_block = commit.unit.startswith("block-")
        more = {"tokens_of_experts": self._experts.summary()} if is_block and self._experts else {}
        self.write(commit.unit, shard_bytes=commit.shard.size, **more)
        if shutil.disk_usage(out).free < FREE_BYTES + 3 * commit.shard.size:
            _delete_shards(out)
        if not is_block:
            if not commit.unit.startswith("experts-"):
                self._commits = [now]
            return
        self._block_seconds.append(now - (self._commits[-1] if self._commits else self._begun))
        self._commits.append(now)
        left = len(self._block_seconds) < self._layers
        if left and not self.stopped and not enough_time(time.time(), self._stop_at, self._block_seconds):
            self.stopped = True
            _thread.interrupt_main()

    def write(self, unit: str, **more: Any) -> None:
        """Append a line and flush it to the disk."""
        on_gpu = torch.cuda.is_initialized()
        statistics = torch.cuda.memory_stats() if on_gpu else {}
        line = {
            "unit": unit,
            "seconds": time.monotonic() - self._begun,
            "start_s": self._start_s,
            "before_clock_s": self._before_clock_s,
            "phases": phases_so_far(self._clock),
            "host_peak_bytes": status_bytes("self", "VmHWM"),
            "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
            "device_reserved_peak_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
            "allocator": {name: statistics.get(name, 0) for name in ALLOCATOR} if on_gpu else {},
            "planned": self._planned,
            **more,
        }
        with open(self._folder / "progress.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def phases_so_far(clock: Clock | None) -> dict[str, float]:
    """Seconds by phase, of the phases that have ended and been read. Commits run in another thread than the clock."""
    return {} if clock is None else clock.seconds_so_far()


def _delete_shards(out: Path) -> None:
    """Delete the committed shards: this job does not read them again."""
    for shard in out.glob("*.safetensors"):
        shard.unlink()


def _watch(notes: Notes) -> None:
    """Pass the clock, the run record and the commits of the job to ``notes``."""
    init, commit, record_run = Clock.__init__, Journal.commit, Journal.record_run

    def made(self: Clock, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        notes.clock_made(self)

    def committed(self: Journal, done: Commit) -> None:
        commit(self, done)
        notes.committed(self.out, done)

    def run_recorded(self: Journal, run: Mapping[str, Any]) -> None:
        record_run(self, run)
        notes.run_recorded(run)

    Clock.__init__ = made  # type: ignore[method-assign]
    Journal.record_run = run_recorded  # type: ignore[method-assign]
    Journal.commit = committed  # type: ignore[method-assign,assignment]


def _profile(where: str, begin: int, end: int, file: Path, *, shapes: bool) -> None:
    """Profile from the time when the job has passed the fault point ``where`` ``begin`` times until it passes it again for the ``end``-th.

    shapes: also by operation and shapes of its inputs.
    """
    point, passes = faults.point, 0
    on_gpu = torch.cuda.is_available()
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    kinds = list({kind, torch.profiler.ProfilerActivity.CPU}) if shapes else [kind]
    profiler = torch.profiler.profile(activities=kinds, record_shapes=shapes)

    def passed(name: str) -> None:
        nonlocal passes
        if name == where:
            passes += 1
            if passes == begin:
                profiler.start()
            elif passes == end:
                if on_gpu:
                    torch.cuda.synchronize()
                profiler.stop()
                found = kernel_times(profiler, on_gpu=on_gpu) | (operation_times(profiler, on_gpu=on_gpu) if shapes else {})
                file.write_text(json.dumps(found, indent=1) + "\n")
        point(name)

    faults.point = passed


def kernel_times(profiler: torch.profiler.profile, *, on_gpu: bool) -> dict[str, Any]:
    """``kernels``: name → [milliseconds, launches], the longest first. ``total``: of all kernels. On a CPU: of torch's operations."""

    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    events.sort(key=lambda event: _milliseconds(event, on_gpu), reverse=True)
    return {
        "total": [round(sum(_milliseconds(event, on_gpu) for event in events), 1), sum(event.count for event in events)],
        "kernels": {event.key[:90]: [round(_milliseconds(event, on_gpu), 2), event.count] for event in events[:PROFILED_KERNELS]},
    }


def operation_times(profiler: torch.profiler.profile, *, on_gpu: bool) -> dict[str, Any]:
    """``operations``: torch's operations with the shapes of their inputs → [milliseconds on the device, calls], the longest first."""
    events = [e for e in profiler.key_averages(group_by_input_shape=True) if e.device_type == torch.autograd.DeviceType.CPU]
    events.sort(key=lambda event: _milliseconds(event, on_gpu), reverse=True)
    names = [f"{event.key[:60]} {event.input_shapes}"[:150] for event in events[:PROFILED_KERNELS]]
    return {"operations": {name: [round(_milliseconds(e, on_gpu), 2), e.count] for name, e in zip(names, events, strict=False)}}


def _milliseconds(event: Any, on_gpu: bool) -> float:
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3


def _keep_cold(path: Path) -> None:
    """Drop a file from the page cache every ``DROP_SECONDS``, so that every block is read from the disk."""

    def run() -> None:
        while True:
            drop_from_cache(path)
            time.sleep(DROP_SECONDS)

    threading.Thread(target=run, daemon=True).start()


def main() -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: this process ends when its parent does
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background processes
    spec_path = Path(sys.argv[1])
    spec = json.loads(spec_path.read_text())
    folder, block = spec_path.parent, Path(spec["block_shard"])
    checkpoint = aliased_checkpoint(
        folder / "model", [Path(path) for path in spec["rest_shards"]], block, spec["blocks_path"], spec["layers"], spec.get("experts", 0)
    )
    Checkpoint.open = classmethod(lambda cls, folder, remote=None: checkpoint)  # type: ignore[method-assign,assignment]
    if spec["cold"]:
        _keep_cold(block)
    number, profile, shapes = spec.get("profile_block"), folder / "profile.json", spec.get("profile_shapes", False)
    if number is not None:
        _profile("block.loaded", number + 1, number + 2, profile, shapes=shapes)
    elif spec.get("profile_experts"):
        first, count = spec["profile_experts"]
        _profile("expert.solved", first, first + count, profile, shapes=shapes)
    args = build_parser().parse_args(spec["arguments"])
    experts = ExpertPhases() if spec.get("experts") else None
    if experts is not None:
        experts.install()
    notes = Notes(folder, spec["layers"], spec["launched_at"], spec["stop_at"], experts)
    _watch(notes)
    try:
        report = quantize(args.model, args.out, job_config(args))
    except BigqError as error:
        print(f"bigq: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("bench_slice: stopped for lack of time", file=sys.stderr)
    else:
        notes.write("end", report_phases=dict(report.seconds_by_phase), report_device_peak_bytes=report.device_peak_bytes)
    if Path(args.trace).exists():
        sizes = {name: info.nbytes for name, info in checkpoint.tensors.items()}
        notes.write("trace", lanes=lanes(json.loads(Path(args.trace).read_text()), sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
