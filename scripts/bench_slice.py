"""One slice of ``bench_176b``: a real job, whose checkpoint has one block's bytes on disk under all blocks' names.

    python scripts/bench_slice.py FOLDER/spec.json

Three things are put in bigq's place before its ``quantize`` runs, and nothing else of it changes:

* ``Checkpoint.open`` gives every block the byte ranges of the one block shard (hard links could not: names differ);
* ``Journal.commit`` also writes a line to FOLDER/progress.jsonl, gives up finished shards when the disk gets short, and
  interrupts the job, as Ctrl-C would, where there is no time left for another block;
* ``Clock`` is remembered, to be asked for the seconds by phase at every commit.
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
from facts import drop_from_cache, status_bytes

from bigq.cli.commands import build_parser
from bigq.cli.job import job_config
from bigq.errors import BigqError
from bigq.io.index import Checkpoint, TensorInfo, read_header
from bigq.job.journal import Commit, Journal
from bigq.progress.clock import Clock
from bigq.sched.run import quantize

#: Seconds between two times that the block shard is dropped from the page cache (``cold``).
DROP_SECONDS = 0.5
#: What committed shards are deleted to keep free on the disk, besides room for some more of them.
FREE_BYTES = 2 * 10**9


def aliased_checkpoint(folder: Path, rest: Sequence[Path], block: Path, blocks_path: str, blocks: int) -> Checkpoint:
    """A checkpoint whose blocks 0 … all lie in the same bytes: those of block 0, in the shard ``block``."""
    tensors: dict[str, TensorInfo] = {}
    digest = hashlib.sha256(str(blocks).encode())
    for path in rest:
        infos, header = read_header(path)
        tensors |= infos
        digest.update(header)
    infos, header = read_header(block)
    digest.update(header)
    for i in range(blocks):
        for info in infos.values():
            name = f"{blocks_path}.{i}.{info.name.removeprefix(f'{blocks_path}.0.')}"
            tensors[name] = dataclasses.replace(info, name=name)
    return Checkpoint(folder, tensors, digest.hexdigest())


def enough_time(now: float, stop_at: float, block_seconds: Sequence[float]) -> bool:
    """Whether another block like the slower of the last two would end in time, with a quarter to spare. Times in seconds.

    Not the slowest of all: the first one has kernels compiled.
    """
    return now + 1.25 * max(block_seconds[-2:]) + 2 < stop_at


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of some spans (begin, end) was under way."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def lanes(trace: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """A job's trace by lane: seconds in which the lane was busy, and the bytes of the tensors that its spans are named by."""
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
    """What is written down at every commit: seconds since the job began, seconds by phase, sizes and peaks in bytes."""

    def __init__(self, folder: Path, layers: int, launched_at: float, stop_at: float) -> None:
        self.stopped = False
        self._folder, self._layers, self._stop_at = folder, layers, stop_at
        self._begun = time.monotonic()
        self._start_s = time.time() - launched_at
        self._before_clock_s = 0.0
        self._clock: Clock | None = None
        self._commits: list[float] = []
        self._block_seconds: list[float] = []

    def clock_made(self, clock: Clock) -> None:
        self._clock = clock
        self._before_clock_s = time.monotonic() - self._begun

    def committed(self, out: Path, commit: Commit) -> None:
        """A shard is on disk and in the journal."""
        now = time.monotonic()
        self.write(commit.unit, shard_bytes=commit.shard.size)
        if not commit.unit.startswith("block-"):
            self._commits = [now]
            return
        if shutil.disk_usage(out).free < FREE_BYTES + 3 * commit.shard.size:
            _give_up_shards(out)
        self._block_seconds.append(now - (self._commits[-1] if self._commits else self._begun))
        self._commits.append(now)
        more = len(self._block_seconds) < self._layers
        if more and not self.stopped and not enough_time(time.time(), self._stop_at, self._block_seconds):
            self.stopped = True
            _thread.interrupt_main()

    def write(self, unit: str, **more: Any) -> None:
        """Append a line. It is on disk when this returns, whatever happens next."""
        line = {
            "unit": unit,
            "seconds": time.monotonic() - self._begun,
            "start_s": self._start_s,
            "before_clock_s": self._before_clock_s,
            "phases": phases_so_far(self._clock),
            "host_peak_bytes": status_bytes("self", "VmHWM"),
            "device_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0,
            "device_reserved_peak_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0,
            **more,
        }
        with open(self._folder / "progress.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def phases_so_far(clock: Clock | None) -> dict[str, float]:
    """Seconds by phase, of phases that have ended and been read off. A commit runs in a thread of its own, beside the clock's."""
    return {} if clock is None else clock.seconds_so_far()


def _give_up_shards(out: Path) -> None:
    """Delete what is committed: nothing reads it again in this job."""
    for shard in out.glob("*.safetensors"):
        shard.unlink()


def _watch(notes: Notes) -> None:
    """Let ``notes`` see the job's clock and its commits."""
    init, commit = Clock.__init__, Journal.commit

    def made(self: Clock, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        notes.clock_made(self)

    def committed(self: Journal, done: Commit) -> None:
        commit(self, done)
        notes.committed(self.out, done)

    Clock.__init__ = made  # type: ignore[method-assign]
    Journal.commit = committed  # type: ignore[method-assign,assignment]


def _keep_cold(path: Path) -> None:
    """Drop a file from the page cache again and again, so that every block is read from the disk."""

    def run() -> None:
        while True:
            drop_from_cache(path)
            time.sleep(DROP_SECONDS)

    threading.Thread(target=run, daemon=True).start()


def main() -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with the benchmark
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells turn off for what runs in the background
    spec_path = Path(sys.argv[1])
    spec = json.loads(spec_path.read_text())
    folder, block = spec_path.parent, Path(spec["block_shard"])
    checkpoint = aliased_checkpoint(
        folder / "model", [Path(path) for path in spec["rest_shards"]], block, spec["blocks_path"], spec["layers"]
    )
    Checkpoint.open = classmethod(lambda cls, folder: checkpoint)  # type: ignore[method-assign,assignment]
    if spec["cold"]:
        _keep_cold(block)
    args = build_parser().parse_args(spec["arguments"])
    notes = Notes(folder, spec["layers"], spec["launched_at"], spec["stop_at"])
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
