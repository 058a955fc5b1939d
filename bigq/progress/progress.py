"""The progress of a job, for a display and for the record in the job's folder.

The loop over blocks reports its steps here. A report stores a few numbers and does not wait for the device. A thread reads them
periodically, so the display moves even while one Linear is being solved.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from typing import Any, TextIO

import torch

from bigq.progress.display import Display, Finished, Moment
from bigq.progress.live_line import display_for
from bigq.progress.records import device_memory, host_memory

#: Minimum seconds over which the rate of reading is averaged.
WINDOW = 60.0
#: The fraction of a block's time that solving takes; the rest is its replay. An estimate, used for the first block only:
#: 81 % on the model of ``scripts/bench_small.py``, on a CPU.
SOLVING = 0.8
#: The fraction of the first block that must be done before the remaining time is estimated from it.
ESTIMABLE = 0.1


class Pace:
    """Remaining seconds, estimated from the blocks that are done. ``now`` is a monotonic clock's.

    left: blocks to be solved, the current one included. part: the fraction of the current block that is done, 0 to 1, used while there is
    no finished block to compare with.
    """

    def __init__(self, left: int, now: float) -> None:
        self.left = left
        self.part = 0.0
        self._since = now
        self._spent, self._timed = 0.0, 0

    def begin(self, now: float) -> None:
        """A block begins. Time before the first one counts for no block."""
        if not self._timed:
            self._since = now
        self.part = 0.0

    def skip(self, now: float) -> None:
        """A block was already done: its time says nothing about others."""
        self._since, self.part = now, 0.0

    def done(self, left: int, now: float) -> None:
        self._spent += now - self._since
        self._timed += 1
        self.left, self._since, self.part = left, now, 0.0

    def fraction(self, now: float) -> float:
        """The fraction of the current block that is done."""
        return min(0.99, (now - self._since) * self._timed / max(self._spent, 1e-9)) if self._timed else self.part

    def eta(self, now: float) -> float | None:
        """None where there is no estimate yet."""
        here = now - self._since
        if self.left == 0:
            return 0.0
        if self._timed:
            mean = self._spent / self._timed
            return mean * (self.left - 1) + max(0.0, mean - here)
        return here / self.part * self.left - here if self.part >= ESTIMABLE else None


class Rate:
    """Bytes read, and bytes per second over the last minute or since the read before the last, whichever is longer."""

    def __init__(self, now: float) -> None:
        self.total = 0
        self._reads = deque([(now, 0)])

    def add(self, count: int, now: float) -> None:
        self.total += count
        self._reads.append((now, self.total))
        while len(self._reads) > 2 and self._reads[1][0] <= now - WINDOW:
            self._reads.popleft()

    def at(self, now: float) -> float | None:
        """Bytes per second; None before anything was read."""
        if not self.total:
            return None
        reads = list(self._reads)
        begun, before = next((read for read in reversed(reads[:-1]) if read[0] <= now - WINDOW), reads[0])
        return (self.total - before) / max(now - begun, 1e-9)


class Progress:
    """Receives the reports of the loop over blocks; a context around it. Messages and ``facts`` may be called from any thread.

    device: whose memory is reported. display: defaults to the one that suits ``stream`` (stderr), or to none with ``quiet``.
    """

    def __init__(
        self, blocks: int, device: torch.device, quiet: bool = False, stream: TextIO | None = None, display: Display | None = None
    ) -> None:
        self.blocks, self.device = blocks, device
        self._display = display or display_for(stream or sys.stderr, quiet=quiet)
        self._facts: dict[str, Any] = {}
        now = time.monotonic()
        self._pace, self._rate = Pace(blocks, now), Rate(now)
        self._begun = now
        self._index: int | None = None
        self._position = 0
        self._phase = ""
        self._steps: dict[str, tuple[int, int]] = {}
        self._solved = 0.0
        self._warned: set[str] = set()
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def facts(self) -> dict[str, Any]:
        """Progress as plain values, as far as they are known: blocks, block (how many are done), phase, eta_seconds."""
        eta = self._eta(time.monotonic()) if self._facts else None
        return {"blocks": self.blocks, **self._facts, **({} if eta is None else {"eta_seconds": round(eta, 1)})}

    def __enter__(self) -> Progress:
        with self._lock:
            self._display.open(self.moment())
        if self._display.period is not None:
            self._thread = threading.Thread(target=self._tick_on, args=(self._display.period,), name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self._display.close()

    def tick(self) -> None:
        """Have the display show the current state."""
        with self._lock:
            self._display.tick(self.moment())

    def moment(self) -> Moment:
        """The current state."""
        now = time.monotonic()
        under_way = self._index is not None and self._position == self._index
        return Moment(
            blocks=self.blocks,
            block=None if self._index is None else self._index + 1,
            phase=self._phase,
            seconds=now - self._begun,
            steps={name: (done, of) for name, (done, of) in self._steps.items() if done < of},
            fraction=min(1.0, (self._position + (self._pace.fraction(now) if under_way else 0.0)) / max(1, self.blocks)),
            eta=self._eta(now),
            rate=self._rate.at(now),
            bytes_read=self._rate.total,
            host=host_memory(),
            device=device_memory(self.device),
        )

    def _eta(self, now: float) -> float | None:
        """Remaining seconds; None where there is no estimate, as after the last block."""
        return None if self._index is None and self._position >= self.blocks else self._pace.eta(now)

    def planned(self, text: str, values: dict[str, Any]) -> None:
        """Report the job's plan, as text and as values."""
        with self._lock:
            self._display.plan(text, values)

    def start(self, resumed: int) -> None:
        """The work begins. resumed: blocks that an earlier run committed."""
        self._pace = Pace(self.blocks - resumed, time.monotonic())
        self.event("start", blocks=self.blocks, resumed_blocks=resumed)

    def phase(self, text: str, block: int | None = None) -> None:
        """A phase begins, in block ``block`` unless that is None."""
        now = time.monotonic()
        if block is not None and (block != self._index or self._position != block):
            self._index = self._position = block
            self._begun, self._solved = now, 0.0
            self._pace.begin(now)
        elif block is None:
            self._index, self._begun = None, now
        self._phase, self._steps = text, {}
        self._facts = {**self._facts, "phase": text if block is None else f"block {block + 1} {text}"}
        with self._lock:
            self._display.phase(self.moment())

    def step(self, what: str, done: int, of: int) -> None:
        """``done`` of the phase's ``of`` steps are done."""
        self._steps = {**self._steps, what: (done, of)}
        if self._phase == "replay" and self._solved:
            self._pace.part = SOLVING + (1 - SOLVING) * done / of

    def solved(self, linears: int, of: int, share: float) -> None:
        """``linears`` of the block's ``of`` Linears are solved. share: the fraction of its weights that they hold."""
        self._solved = share
        self._pace.part = SOLVING * share
        self.step("Linears", linears, of)

    def read(self, count: int) -> None:
        """``count`` more bytes of the source were read."""
        with self._lock:
            self._rate.add(count, time.monotonic())

    def say(self, line: str) -> None:
        """A message for people."""
        with self._lock:
            self._display.say(line)

    def warn_once(self, about: str, line: str) -> None:
        """A warning, unless there has been one about the same."""
        if about not in self._warned:
            self._warned.add(about)
            self.say(f"warning: {line}")

    def event(self, name: str, **values: Any) -> None:
        """An event for programs that read the job's output."""
        with self._lock:
            self._display.event(name, **values)

    def block_skipped(self) -> None:
        """A block is skipped, as an earlier run committed it."""
        self._position += 1
        self._pace.skip(time.monotonic())

    def block_passed(self, left: int) -> None:
        """A block is done that gets no line; ``left`` remain."""
        self._position += 1
        self._pace.done(left, time.monotonic())

    def block_done(self, index: int, seconds: float, worst: tuple[str, float] | None, left: int | None = None) -> None:
        """Block ``index`` is solved; ``left`` remain, by default those after it."""
        left = self.blocks - index - 1 if left is None else left
        self._position, self._steps = index + 1, {}
        self._pace.done(left, time.monotonic())
        self._facts = {**self._facts, "block": self.blocks - left}
        with self._lock:
            self._display.block(Finished(block=index + 1, seconds=seconds, worst=worst), self.moment())

    def _tick_on(self, period: float) -> None:
        while not self._ended.wait(period):
            self.tick()
