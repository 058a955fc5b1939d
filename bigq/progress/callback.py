"""Progress for programs: a display that calls a function of the caller with small frozen events."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from bigq.progress.display import Display, Finished, Moment

EventKind = Literal["plan", "start", "phase", "block", "tick", "note", "warning", "checkpoint", "done"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """Something that happened in a job or an evaluation.

    kind:
        "plan"        how the job will run; values: the plan, as ``Plan.to_json`` gives it
        "start"       the work begins; values: resumed_blocks
        "phase"       another phase begins: block, phase
        "block"       a block is quantized; values: seconds, and worst_name and worst_error of its Linear with the largest error
        "tick"        a second has passed; values: steps, what the phase counts, as (done, total) by name
        "checkpoint"  activations were saved; values: block
        "note", "warning"   message
        "done"        the job is complete; values: seconds, output_bytes, …
    blocks: decoder blocks of the model. block: the one in progress or done, from 1; None outside the blocks.
    phase: such as "solve" or "load". fraction: of the work, 0 to 1. eta_seconds: None while that is unknown.
    bytes_read: of the source, in this run. host_bytes, device_bytes: memory in use now; device_bytes is None on a CPU.
    message: one line for people, of a note or warning. values: fields that only this kind of event has.
    """

    kind: EventKind
    blocks: int = 0
    block: int | None = None
    phase: str = ""
    fraction: float = 0.0
    eta_seconds: float | None = None
    bytes_read: int = 0
    host_bytes: int = 0
    device_bytes: int | None = None
    message: str = ""
    values: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


class CallbackDisplay(Display):
    """Shows progress by calling ``callback``. Nothing is printed.

    Calls come one at a time; "tick" comes from a separate thread. An exception of the callback does not end the job: it becomes a
    RuntimeWarning, and the callback is not called again. KeyboardInterrupt and other BaseExceptions pass through.
    """

    period = 1.0

    def __init__(self, callback: Callable[[ProgressEvent], object]) -> None:
        self._callback: Callable[[ProgressEvent], object] | None = callback
        self._moment = Moment(blocks=0)

    def open(self, moment: Moment) -> None:
        self._moment = moment

    def tick(self, moment: Moment) -> None:
        self._emit("tick", moment, steps=dict(moment.steps), seconds=moment.seconds)

    def phase(self, moment: Moment) -> None:
        self._emit("phase", moment)

    def block(self, done: Finished, moment: Moment) -> None:
        name, error = done.worst or (None, None)
        self._emit("block", moment, block=done.block, seconds=done.seconds, worst_name=name, worst_error=error)

    def say(self, text: str) -> None:
        kind: EventKind = "warning" if text.startswith("warning: ") else "note"
        self._emit(kind, self._moment, message=text.removeprefix("warning: "))

    def plan(self, text: str, values: Mapping[str, Any]) -> None:
        self._emit("plan", self._moment, message=text, **values)

    def event(self, name: str, **values: Any) -> None:
        if name in ("start", "checkpoint", "done"):
            self._emit(name, self._moment, **values)  # type: ignore[arg-type]

    def error(self, exit_code: int, kind: str, message: str) -> None:
        """Does nothing: the caller gets the exception."""

    def _emit(self, kind: EventKind, moment: Moment, *, message: str = "", **values: Any) -> None:
        self._moment = moment
        callback = self._callback
        if callback is None:
            return
        block = values["block"] if kind in ("block", "checkpoint") else moment.block
        event = ProgressEvent(
            kind=kind,
            blocks=moment.blocks or int(values.get("blocks", 0)),
            block=block,
            phase=moment.phase,
            fraction=moment.fraction,
            eta_seconds=moment.eta,
            bytes_read=moment.bytes_read,
            host_bytes=moment.host,
            device_bytes=moment.device,
            message=message,
            values=MappingProxyType(values),
        )
        try:
            callback(event)
        except Exception as error:
            self._callback = None
            warnings.warn(f"the progress callback raised {error!r} and is not called again", RuntimeWarning, stacklevel=2)
