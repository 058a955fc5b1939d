"""What a job tells: memory, records of Linears, and in the end its report.

Knows nothing of models; everything arrives as plain values, and nothing is printed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import psutil
import torch

from bigq.progress.sizes import show_size


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


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that tensors take now, by the allocator's own count: the device is not asked. None on a CPU."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else None


def device_memory_peak(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRecord:
    """How quantizing one Linear went. seconds: the factor and solve of the group that it was solved with, numbers or laps of a clock."""

    name: str
    bits: int
    group_size: int
    shape: tuple[int, int]
    loss: float
    relative_error: float
    damping: float
    seconds: Mapping[str, SupportsFloat]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "bits": self.bits,
            "group_size": self.group_size,
            "shape": list(self.shape),
            "loss": self.loss,
            "relative_error": self.relative_error,
            "damping": self.damping,
            "seconds": {k: round(float(v), 6) for k, v in self.seconds.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of a job. Sizes in bytes, times in seconds.

    waiting: the seconds that the device which computes waited for files or the host, by cause.
    batches: how many calibration rows went through a block at once, from the job's beginning on; more than one number where the
        device ran out of memory and the job went on with fewer. Empty where no rows are needed.
    """

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
    waiting: Mapping[str, float] = field(default_factory=dict)
    batches: tuple[int, ...] = ()

    @property
    def worst(self) -> Mapping[str, Any] | None:
        return max(self.linears, key=lambda r: float(r["relative_error"]), default=None)

    def to_json(self) -> dict[str, Any]:
        """As plain values, with the name of the worst Linear among them."""
        worst = None if self.worst is None else self.worst["name"]
        return {**dataclasses.asdict(self), "linears": [dict(linear) for linear in self.linears], "worst": worst}

    def waiting_line(self) -> str:
        """How long the device waited, and for what; causes that are too short to be told are left out."""
        total = sum(self.waiting.values())
        line = f"waiting {total:.1f} s of {self.seconds:.1f} s ({100 * total / max(self.seconds, 1e-9):.1f} %)"
        told = [f"{cause} {s:.1f} s" for cause, s in sorted(self.waiting.items(), key=lambda item: -item[1]) if s >= 0.05]
        return f"{line}: {', '.join(told)}" if told else line

    def summary(self) -> str:
        """The closing lines for a person."""
        lines = [f"done in {self.seconds:.1f} s: {self.out}"]
        if self.resumed_blocks:
            lines[0] += f" ({self.resumed_blocks} of {self.blocks} blocks were there already)"
        ratio = self.output_bytes / self.source_bytes
        lines.append(f"  size    {show_size(self.source_bytes)} → {show_size(self.output_bytes)} ({100 * ratio:.0f} %)")
        lines.append("  time    " + ", ".join(f"{k} {v:.1f} s" for k, v in sorted(self.seconds_by_phase.items(), key=lambda kv: -kv[1])))
        lines.append("  " + self.waiting_line())
        if len(self.batches) > 1:
            lines.append(f"  batch   {' → '.join(map(str, self.batches))} rows: the device ran out of memory")
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
