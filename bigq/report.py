"""What a job tells: seconds by phase, records of Linears, progress on the terminal, the closing summary.

Knows nothing of models; everything arrives as plain values. Only stderr is written to: stdout is for results.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

import psutil
import torch
from tqdm import tqdm

from bigq.sizes import show_size
from bigq.trace import Trace

MIB = 2**20


@dataclass(slots=True)
class Lap:
    """One timed stretch; ``seconds`` is set when it ends."""

    seconds: float = 0.0


class Clock:
    """Seconds by phase. A phase inside another is not counted in the outer one. Phases are also lanes of the trace."""

    def __init__(self, device: torch.device, trace: Trace | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._trace = trace or Trace()
        #: What the job is working on, for the trace.
        self.subject = ""
        self._inner: list[float] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Lap]:
        """Time what runs inside, waiting for the device at both ends."""
        lap = Lap()
        self._sync()
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield lap
        finally:
            self._sync()
            end = time.perf_counter()
            self._trace.add(name, self.subject or name, start, end)
            lap.seconds = end - start
            own = lap.seconds - self._inner.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + own
            if self._inner:
                self._inner[-1] += lap.seconds

    def _sync(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def host_memory() -> int:
    """Resident bytes of this process now."""
    return int(psutil.Process().memory_info().rss)


def host_memory_peak() -> int:
    """The most resident bytes that this program ever had.

    Linux counts them per program (VmHWM); ``ru_maxrss`` begins with what the parent held when it started this one.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_memory_peak(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRecord:
    """How quantizing one Linear went. seconds: the factor and solve of the group that it was solved with."""

    name: str
    bits: int
    group_size: int
    shape: tuple[int, int]
    loss: float
    relative_error: float
    damping: float
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "bits": self.bits,
            "group_size": self.group_size,
            "shape": list(self.shape),
            "loss": self.loss,
            "relative_error": self.relative_error,
            "damping": self.damping,
            "seconds": {k: round(v, 6) for k, v in self.seconds.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of a job. Sizes in bytes, times in seconds."""

    out: str
    blocks: int
    linears: tuple[Mapping[str, Any], ...]
    seconds: float
    seconds_by_phase: Mapping[str, float]
    source_bytes: int
    output_bytes: int
    host_peak_bytes: int
    device_peak_bytes: int
    planned_host_bytes: int
    planned_device_bytes: int
    resumed_blocks: int
    left_out: tuple[str, ...] = ()

    @property
    def worst(self) -> Mapping[str, Any] | None:
        return max(self.linears, key=lambda r: float(r["relative_error"]), default=None)

    def summary(self) -> str:
        """The closing lines for a person."""
        lines = [f"done in {self.seconds:.1f} s: {self.out}"]
        if self.resumed_blocks:
            lines[0] += f" ({self.resumed_blocks} of {self.blocks} blocks were there already)"
        ratio = self.output_bytes / self.source_bytes
        lines.append(f"  size    {show_size(self.source_bytes)} → {show_size(self.output_bytes)} ({100 * ratio:.0f} %)")
        lines.append("  time    " + ", ".join(f"{k} {v:.1f} s" for k, v in sorted(self.seconds_by_phase.items(), key=lambda kv: -kv[1])))
        memory = f"  memory  host peak {show_size(self.host_peak_bytes)} (planned {show_size(self.planned_host_bytes)})"
        if self.device_peak_bytes:
            memory += f", device peak {show_size(self.device_peak_bytes)} (planned {show_size(self.planned_device_bytes)})"
        lines.append(memory)
        if self.worst is not None:
            lines.append(f"  worst   {self.worst['name']}: relative error {self.worst['relative_error']:.2e}")
        if self.left_out:
            some = ", ".join(self.left_out[:4]) + (" …" if len(self.left_out) > 4 else "")
            lines.append(f"  kept    {len(self.left_out)} Linears unquantized: {some}")
        return "\n".join(lines)


@dataclass(slots=True)
class Progress:
    """One line per finished block, and on a terminal a live bar for the phase under way."""

    blocks: int
    device: torch.device
    quiet: bool = False
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    _started: float = field(default_factory=time.monotonic)
    _timed: int = 0
    _bar: Any = None

    def __enter__(self) -> Progress:
        live = not self.quiet and self.stream.isatty()
        self._bar = tqdm(total=self.blocks, file=self.stream, disable=not live, leave=False, unit="block", dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def phase(self, text: str) -> None:
        """What is being done now; seen on a terminal only."""
        self._bar.set_description_str(text)

    def say(self, line: str) -> None:
        if not self.quiet:
            tqdm.write(line, file=self.stream)
            self.stream.flush()

    def block_skipped(self) -> None:
        """A block that an earlier run had committed."""
        self._bar.update()
        self._started = time.monotonic()

    def block_done(self, index: int, seconds: float, worst: tuple[str, float] | None) -> None:
        self._timed += 1
        remaining = (time.monotonic() - self._started) / self._timed * (self.blocks - index - 1)
        parts = [f"block {index + 1}/{self.blocks}", f"{seconds:.1f} s"]
        if worst is not None:
            parts.append(f"worst {worst[0]} {worst[1]:.2e}")
        parts.append(f"host {show_size(host_memory())}")
        if self.device.type == "cuda":
            parts.append(f"gpu {show_size(torch.cuda.memory_allocated(self.device))}")
        parts.append(f"eta {_duration(remaining)}")
        self.say("  ".join(parts))
        self._bar.update()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
