"""The records of a job: memory, results of Linears, and the final report.

Knows nothing of models; everything arrives as plain values, and nothing is printed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import psutil
import torch

from bigq.progress.layout import INDENT, WIDTH, entry, shortened
from bigq.progress.sizes import show_size


def host_memory() -> int:
    """Resident bytes of this process now."""
    return int(psutil.Process().memory_info().rss)


def host_memory_peak() -> int:
    """The peak of this program's resident bytes.

    Linux counts them per program (VmHWM); ``ru_maxrss`` begins with what the parent held when it started this one.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_memory(device: torch.device) -> int | None:
    """Bytes of GPU memory held by tensors now, by the allocator's count, without waiting for the device. None on a CPU."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else None


def device_memory_peak(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRecord:
    """The result of quantizing one Linear. seconds: of the factor and solve of its group, as numbers or laps of a clock.

    dead_inputs: inputs that were 0 in every calibration token. tokens: for a matrix of an expert, how many calibration tokens were routed
    to the expert. rounded: why it was rounded to nearest instead of solved; None if it was solved.
    """

    name: str
    bits: int
    group_size: int
    shape: tuple[int, int]
    loss: float
    relative_error: float
    damping: float
    dead_inputs: int
    seconds: Mapping[str, SupportsFloat]
    tokens: int | None = None
    rounded: str | None = None

    def to_json(self) -> dict[str, Any]:
        of_expert = {} if self.tokens is None else {"tokens": self.tokens, "rounded": self.rounded}
        return {
            "name": self.name,
            "bits": self.bits,
            "group_size": self.group_size,
            "shape": list(self.shape),
            "loss": self.loss,
            "relative_error": self.relative_error,
            "damping": self.damping,
            "dead_inputs": self.dead_inputs,
            "seconds": {k: round(float(v), 6) for k, v in self.seconds.items()},
            **of_expert,
        }


#: A Linear has many dead inputs if they are more than this fraction of its inputs.
MANY_DEAD = 0.1


def has_many_dead_inputs(dead: int, inputs: int) -> bool:
    return dead > MANY_DEAD * inputs


def dead_inputs_warning(records: Iterable[LinearRecord]) -> str | None:
    """The warning about Linears with many dead inputs; None if there are none. Names the Linear with most."""
    many = [record for record in records if has_many_dead_inputs(record.dead_inputs, record.shape[1])]
    if not many:
        return None
    most = max(many, key=lambda record: record.dead_inputs / record.shape[1])
    n = most.shape[1]
    share = f"all {n} inputs" if most.dead_inputs == n else f"{most.dead_inputs} of {n} inputs"
    others = "" if len(many) == 1 else f", and more than a tenth of those of {len(many) - 1} other Linear{'s' * (len(many) > 2)}"
    return (
        f"{most.name}: {share} were 0 in every calibration token{others}; the weights of such inputs are only rounded to nearest; "
        "use more --samples, or a --calibration text that is nearer to what the model will read (the summary counts all such Linears)"
    )


class Stages:
    """Wall time of the stages of a job before its phases. started: by ``time.monotonic``."""

    def __init__(self, started: float) -> None:
        self._last = started
        self._seconds: dict[str, float] = {}

    def ended(self, name: str) -> None:
        """End the stage ``name``, which began at the end of the last stage. A name may be used again."""
        now = time.monotonic()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, in order."""
        return dict(self._seconds)


#: Time outside all stages and phases.
OTHER = "other"


def rounded_shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Parts of a total in tenths of a second, the largest first, that sum to the rounded total exactly.

    Parts of less than 0.05 s are added to ``OTHER``. A part is off by at most 0.1 s.
    """
    tenths = {name: 10 * value for name, value in seconds.items() if value >= 0.05 and name != OTHER}
    total = sum(seconds.values())
    tenths[OTHER] = max(0.0, 10 * total - sum(tenths.values()))
    units = {name: int(value) for name, value in tenths.items()}
    missing = round(10 * float(f"{total:.1f}")) - sum(units.values())
    for name in sorted(tenths, key=lambda name: units[name] - tenths[name])[: max(0, missing)]:
        units[name] += 1
    return {name: units[name] / 10 for name in sorted(units, key=lambda name: -units[name]) if units[name]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of a job. Sizes in bytes, times in seconds.

    seconds: of wall time; seconds_before: of the stages before the first phase (start-up, calibration, planning); seconds_by_phase: of the
    device that computes. waiting: the seconds that this device waited for files or the host, by cause.
    planned_host_bytes, planned_device_bytes: predicted by the plan; 0 for a job that was finished before, which has no phases.
    batches: calibration rows per forward, from the job's beginning on; more than one number if the device ran out of memory and the
    batch was halved. Empty if no rows are needed.
    read_by: programs that load the output; reader_notes: sentences about those that do not.
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
    seconds_before: Mapping[str, float] = field(default_factory=dict)
    read_by: tuple[str, ...] = ()
    reader_notes: tuple[str, ...] = ()
    bits: str = ""

    @property
    def many_dead(self) -> list[Mapping[str, Any]]:
        """The records of Linears with many dead inputs."""
        return [each for each in self.linears if (dead := each.get("dead_inputs")) and has_many_dead_inputs(dead, each["shape"][1])]

    @property
    def worst(self) -> Mapping[str, Any] | None:
        """The record of the Linear with the largest relative error, or None."""
        return max(self.linears, key=lambda r: float(r["relative_error"]), default=None)

    def times(self) -> dict[str, float]:
        """Seconds by stage and phase, and of the remaining time; they sum to ``seconds``."""
        parts: dict[str, float] = dict(self.seconds_before)
        for name, seconds in self.seconds_by_phase.items():
            parts[name] = parts.get(name, 0.0) + seconds
        return {**parts, OTHER: parts.get(OTHER, 0.0) + max(0.0, self.seconds - sum(parts.values()))}

    def to_json(self) -> dict[str, Any]:
        """As plain values, with the name of the worst Linear among them."""
        worst = None if self.worst is None else self.worst["name"]
        return {**dataclasses.asdict(self), "linears": [dict(linear) for linear in self.linears], "worst": worst}

    def waiting_lines(self) -> list[str]:
        """How long the device waited, by cause; causes of less than 0.05 s are left out."""
        total = sum(self.waiting.values())
        text = f"{total:.1f} s of {self.seconds:.1f} s ({100 * total / max(self.seconds, 1e-9):.1f} %)"
        causes = [f"{cause} {s:.1f} s" for cause, s in sorted(self.waiting.items(), key=lambda item: -item[1]) if s >= 0.05]
        if not causes:
            return entry("waiting", text)
        return entry("waiting", [f"{text}: {causes[0]}", *causes[1:]])

    def experts_lines(self) -> list[str]:
        """How many calibration tokens reached the experts, and how many matrices were rounded to nearest."""
        tokens = sorted(int(each["tokens"]) for each in self.linears if each.get("tokens") is not None)
        if not tokens:
            return []
        rounded = sum(each.get("rounded") is not None for each in self.linears)
        lines = [f"calibration tokens of one: {tokens[0]} to {tokens[-1]}, median {tokens[len(tokens) // 2]}"]
        if rounded:
            lines.append(f"{rounded} of {len(tokens)} matrices only rounded to nearest: no token, or no solution")
        return entry("experts", lines)

    def summary(self) -> str:
        """The final summary as text, in lines of at most 60 columns."""
        done = f"done in {self.seconds:.1f} s: "
        lines = [done + shortened(self.out, WIDTH - len(done))]
        if self.resumed_blocks:
            lines += entry("resumed", f"{self.resumed_blocks} of {self.blocks} blocks were already done")
        ratio = self.output_bytes / self.source_bytes
        lines += entry("size", f"{show_size(self.source_bytes)} → {show_size(self.output_bytes)} ({100 * ratio:.0f} %)")
        if self.bits:
            lines += entry("bits", self.bits)
        if self.planned_host_bytes:
            lines += entry("time", [f"{name} {seconds:.1f} s" for name, seconds in rounded_shares(self.times()).items()])
            lines += self.waiting_lines()
        if len(self.batches) > 1:
            lines += entry("batch", f"{' → '.join(map(str, self.batches))} rows: the device ran out of memory")
        if self.planned_host_bytes:
            memory = [f"host peak {show_size(self.host_peak_bytes)} (planned {show_size(self.planned_host_bytes)})"]
            if self.device_peak_bytes:
                memory.append(f"device peak {show_size(self.device_peak_bytes)} (planned {show_size(self.planned_device_bytes)})")
            lines += entry("memory", memory)
        room = WIDTH - INDENT
        if self.worst is not None:
            name, error = shortened(str(self.worst["name"]), room - 1), f"relative error {self.worst['relative_error']:.2e}"
            lines += entry("worst", f"{name}: {error}")
        lines += self.experts_lines()
        if self.many_dead:
            many = f"{len(self.many_dead)} Linear{'s' * (len(self.many_dead) > 1)}"
            lines += entry("dead", f"more than a tenth of the inputs of {many} were 0 in all calibration tokens")
        if self.left_out:
            names = [shortened(name, room - 1) for name in self.left_out[:4]] + ["…"] * (len(self.left_out) > 4)
            lines += entry("kept", f"{len(self.left_out)} Linears unquantized:") + entry("", names)
        if self.read_by or self.reader_notes:
            lines += entry("read by", list(self.read_by) or "no program known to bigq but bigq")
        for note in self.reader_notes:
            lines += entry("note", note)
        return "\n".join(lines)
