"""What the simulated device found: problems of the program, and where the host waits for the device."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

#: One lock for all state of the simulated device.
LOCK = threading.RLock()

#: (kind of problem, place) → times.
PROBLEMS: Counter[tuple[str, str]] = Counter()
#: (kind of wait, place) → times that the host waited for the device.
SYNCS: Counter[tuple[str, str]] = Counter()
#: (transfer between unpinned host memory and the device, place) → times.
PAGEABLE: Counter[tuple[str, str]] = Counter()
#: What was done, to show that a job reached it: "late copy to the host", the names of kernels.
DONE: Counter[str] = Counter()

_HERE = str(Path(__file__).parent)
_BIGQ = "/bigq/"


def place() -> str:
    """The innermost function of bigq on the stack, as ``io/device_to_host.py:52 _begin``; outside of bigq the innermost caller."""
    frame: FrameType | None = sys._getframe(1)
    first = None
    while frame is not None:
        name = frame.f_code.co_filename
        if _BIGQ in name and not name.startswith(_HERE):
            return _named(frame)
        if first is None and not name.startswith(_HERE) and "/torch/" not in name:
            first = frame
        frame = frame.f_back
    return "?" if first is None else _named(first)


def _named(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename.rpartition(_BIGQ)[2]}:{frame.f_lineno} {frame.f_code.co_name}"


def problem(kind: str, at: str | None = None) -> None:
    """Record a problem."""
    with LOCK:
        PROBLEMS[kind, at or place()] += 1


def waited(kind: str) -> None:
    """Record that the host waits for the device."""
    with LOCK:
        SYNCS[kind, place()] += 1


def reset() -> None:
    """Forget everything."""
    for counter in (PROBLEMS, SYNCS, PAGEABLE, DONE):
        counter.clear()
