"""How progress is shown: as plain lines, as events for programs, or not at all. ``bigq.progress.live_line`` adds a live line.

Knows nothing of jobs: ``bigq.progress.progress`` provides the content. Everything goes to one stream, normally stderr; stdout is for
results. If the stream can no longer be written, the job continues without it. docs/progress.md describes the events.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from bigq.errors import ResourceError
from bigq.progress.sizes import show_duration, show_size
from bigq.progress.terminal import one_line, printable, tell

#: Version of the events, in the first one of a run. Within a version fields are added, and none is removed or changes its meaning.
VERSION = 1
#: Fields of a job's report that are in its last event.
DONE_FIELDS = ("out", "blocks", "resumed_blocks", "seconds", "source_bytes", "output_bytes", "host_peak_bytes", "device_peak_bytes")
#: Seconds within a block before the first heartbeat, and from one to the next.
HEARTBEAT = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The state of a job at a moment.

    block: the one in progress, from 1; None before the first. seconds: since that block began. steps: counters of the phase, as
    (done, of). fraction: of the job, 0 to 1. eta: seconds left, None where there is no estimate. rate: source bytes per second, None
    before any were read. bytes_read: of the source, in this run. host, device: bytes of memory held now; device None on a CPU.
    """

    blocks: int
    block: int | None = None
    phase: str = ""
    seconds: float = 0.0
    steps: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    fraction: float = 0.0
    eta: float | None = None
    rate: float | None = None
    bytes_read: int = 0
    host: int = 0
    device: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A solved block and the seconds it took. worst: the Linear with the largest relative error, as (name in the block, error)."""

    block: int
    seconds: float
    worst: tuple[str, float] | None


class Display:
    """Shows only the error that ends a command, as ``--quiet`` asks for; the base of the other displays.

    period: seconds between calls of ``tick``; None for no calls. Calls come one at a time, from any thread.
    """

    period: float | None = None

    def open(self, moment: Moment) -> None:
        """A loop over blocks begins."""

    def close(self) -> None:
        """The loop ended, with or without an error."""

    def tick(self, moment: Moment) -> None:
        """Time has passed."""

    def phase(self, moment: Moment) -> None:
        """Another phase began."""

    def block(self, done: Finished, moment: Moment) -> None:
        """A block was solved."""

    def say(self, text: str) -> None:
        """A message for people. A note begins with "note: ", a warning with "warning: "."""

    def reading(self, model: str) -> None:
        """A command begins to read a model; the first sign of life, before libraries that take seconds are imported."""

    def plan(self, text: str, values: Mapping[str, Any]) -> None:
        """The plan of the job, as text and as values."""

    def event(self, name: str, **values: Any) -> None:
        """An event that only programs see."""

    def error(self, exit_code: int, kind: str, message: str) -> None:
        """The command ends with this error. kind: the error's class, or "Interrupted"."""
        tell(f"bigq: {'' if kind == 'Interrupted' else 'error: '}{one_line(message)}")


class Lines(Display):
    """One plain line per block, and one a minute within a block that takes longer."""

    period = 5.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._beat = _Beat()

    def open(self, moment: Moment) -> None:
        self._beat.reset()

    def tick(self, moment: Moment) -> None:
        if self._beat.due():
            self.say(heartbeat_line(moment, self.columns()))

    def block(self, done: Finished, moment: Moment) -> None:
        self._beat.reset()
        self.say(block_line(done, moment, self.columns()))

    def columns(self) -> int | None:
        """The most columns that a line may have; None where it does not matter, as in a file."""
        return None

    def say(self, text: str) -> None:
        with while_writable():
            self._stream.write(printable_lines(text) + "\n")
            self._stream.flush()

    def reading(self, model: str) -> None:
        self.say(f"reading {model} …")

    def plan(self, text: str, values: Mapping[str, Any]) -> None:
        self.say(text)


class Events(Display):
    """One JSON object a line. quiet: only the error that ends a command."""

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._stream, self._quiet = stream, quiet
        self._begun = False
        self._beat = _Beat()
        self.period = None if quiet else Lines.period

    def open(self, moment: Moment) -> None:
        self._beat.reset()

    def tick(self, moment: Moment) -> None:
        if self._beat.due():
            steps = {name: list(counted) for name, counted in moment.steps.items()}
            self.event("heartbeat", **_where(moment), steps=steps, seconds=round(moment.seconds, 3), **_measured(moment))

    def phase(self, moment: Moment) -> None:
        self.event("phase", **_where(moment))

    def block(self, done: Finished, moment: Moment) -> None:
        self._beat.reset()
        worst = None if done.worst is None else {"name": done.worst[0], "relative_error": done.worst[1]}
        self.event("block", block=done.block, blocks=moment.blocks, seconds=round(done.seconds, 3), worst=worst, **_measured(moment))

    def say(self, text: str) -> None:
        kind = "warning" if text.startswith("warning: ") else "note"
        self.event(kind, message=text.removeprefix("warning: ").removeprefix("note: "))

    def reading(self, model: str) -> None:
        self.event("reading", model=model)

    def plan(self, text: str, values: Mapping[str, Any]) -> None:
        self.event("plan", blocks=values["blocks"], plan=values)

    def event(self, name: str, **values: Any) -> None:
        if not self._quiet:
            self._emit(name, values)

    def error(self, exit_code: int, kind: str, message: str) -> None:
        self._emit("error", {"exit_code": exit_code, "kind": kind, "message": message})

    def signalled(self, message: str, exit_code: int | None) -> None:
        """A signal arrived; with an exit code, the process ends now. Does not wait for other threads that may be writing."""
        if exit_code is not None:
            kind = "ResourceError" if exit_code == ResourceError.exit_code else "Stopped"
            line = self._line("error", {"exit_code": exit_code, "kind": kind, "message": message})
        elif self._quiet:
            return
        else:
            line = self._line("note", {"message": message})
        with while_writable():
            os.write(self._stream.fileno(), line.encode())

    def _emit(self, name: str, values: Mapping[str, Any]) -> None:
        with while_writable():
            self._stream.write(self._line(name, values))
            self._stream.flush()

    def _line(self, name: str, values: Mapping[str, Any]) -> str:
        version = {} if self._begun else {"v": VERSION}
        self._begun = True
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        return to_json({**version, "event": name, "time": now, **values}) + "\n"


def to_json(value: Any) -> str:
    """JSON in one line of ASCII; numbers that are not finite become null."""
    return json.dumps(_finite(value), allow_nan=False)


def block_line(done: Finished, moment: Moment, width: int | None = None) -> str:
    """A finished block, for a person. width: columns at most; None for any number."""
    parts = [f"block {done.block}/{moment.blocks}", f"{done.seconds:.1f} s"]
    if done.worst is not None:
        parts.append(f"worst {done.worst[0]} {done.worst[1]:.2e}")
    return _joined(parts, moment, width)


def heartbeat_line(moment: Moment, width: int | None = None) -> str:
    """A block in progress, for a person. width: columns at most; None for any number."""
    return _joined([head_of(moment), *parts_of(moment, ("steps",)), f"{moment.seconds:.0f} s"], moment, width)


def _joined(parts: list[str], moment: Moment, width: int | None) -> str:
    """The parts and the measurements in one line. If it is too wide, the least important parts are dropped, then it is cut."""
    measured = ["rate", "host", "gpu", "eta"]
    for left_out in ("", "rate", "host", "gpu"):
        measured = [name for name in measured if name != left_out]
        line = "  ".join([*parts, *parts_of(moment, measured)])
        if width is None or len(line) <= width:
            return line
    return f"{line[: (width or 1) - 1]}…"


def show_rate(rate: float) -> str:
    """Bytes per second."""
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e8 else f"{rate / 1e6:.1f} MB/s"


class _Beat:
    """When a heartbeat is due."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether a heartbeat is due; if so, the next one is due a period later."""
        if time.monotonic() - self._last < HEARTBEAT:
            return False
        self.reset()
        return True


@contextlib.contextmanager
def while_writable() -> Iterator[None]:
    """Ignore errors of a stream that cannot be written: a closed terminal or pipe, or a full disk under a log."""
    with contextlib.suppress(OSError, ValueError):
        yield


def printable_lines(text: str) -> str:
    """Lines without control characters."""
    return "\n".join(map(printable, text.split("\n")))


def head_of(moment: Moment) -> str:
    """Block and phase, for a person."""
    place = "" if moment.block is None else f"block {moment.block}/{moment.blocks}"
    return f"{place} {printable(moment.phase)}".strip() or "starting"


def parts_of(moment: Moment, names: Iterable[str]) -> list[str]:
    """The requested parts among "steps", "percent", "eta", "rate", "host" and "gpu", if they are known, for a person."""
    return [text for name in names if (text := _part(moment, name))]


def _part(moment: Moment, name: str) -> str:
    if name == "steps":
        return ", ".join(f"{done}/{of} {what}" for what, (done, of) in moment.steps.items())
    if name == "percent":
        return f"{100 * moment.fraction:.0f} %"
    if name == "eta":
        return "eta –" if moment.eta is None else f"eta {show_duration(moment.eta)}"
    if name == "rate":
        return "" if moment.rate is None else show_rate(moment.rate)
    if name == "host":
        return f"host {show_size(moment.host)}"
    if name == "gpu":
        return "" if moment.device is None else f"gpu {show_size(moment.device)}"
    return ""


def _where(moment: Moment) -> dict[str, Any]:
    return {"block": moment.block, "blocks": moment.blocks, "phase": moment.phase}


def _measured(moment: Moment) -> dict[str, Any]:
    return {
        "eta_seconds": None if moment.eta is None else round(moment.eta, 1),
        "bytes_read": moment.bytes_read,
        "host_bytes": moment.host,
        "device_bytes": moment.device,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
