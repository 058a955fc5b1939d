"""The record of each run of a job: how it started, and how it ended.

A run is a line in OUT/.bigq/runs.jsonl, which ``bigq report`` reads. The line of a run that was killed has no end. The record does not
affect the output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bigq.errors import BigqError, RankLostError, Stopped
from bigq.job.journal import Journal
from bigq.job.owner import Owner
from bigq.model.blocks import block_linears
from bigq.model.pager import Pager
from bigq.model.skeleton import linear_weight
from bigq.progress.clock import Clock
from bigq.progress.records import device_memory_peak, host_memory_peak
from bigq.sched.plan.planner import Plan
from bigq.sched.short_runs import Patience, reached


def run_entry(
    pager: Pager,
    request: Mapping[str, Any],
    plan: Plan,
    journal: Journal,
    notes: Sequence[str],
    *,
    model: str,
    command: Sequence[str],
) -> dict[str, Any]:
    """The entry of a run at its start. Sizes are in bytes.

    text: what was made of the calibration text, an entry per text.
    model, command: as the user gave them; folder: the model's folder. planned: the predicted memory and disk use.
    blocks: see ``_blocks``. resumed_blocks: the number of blocks that earlier runs committed.
    """
    tensors = pager.checkpoint.tensors.values()
    return {
        "at": _now(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "versions": request["versions"],
        "machine": request["machine"],
        "choice": dataclasses.asdict(plan.choice),
        "committed": len(journal.commits),
        "notes": list(notes),
        "model": model,
        "folder": str(Path(pager.folder).resolve()),
        "command": list(command),
        "text": [made.to_json() for made in plan.texts],
        "planned": {"host": plan.cost.host, "device": plan.cost.device, "disk": plan.disk},
        "source_bytes": pager.checkpoint.stored_bytes,
        "parameters": sum(math.prod(info.shape) for info in tensors),
        "blocks": _blocks(pager),
        "resumed_blocks": sum(commit.unit.startswith("block-") for commit in journal.commits),
    }


def _blocks(pager: Pager) -> dict[str, Any]:
    """The Linears of the blocks, quantized or not.

    path: the module path of the list of blocks. kinds: for each kind of block its Linears as [name, outputs, inputs], in order of
    definition. of: the kind of each block.
    """
    kinds: list[list[list[Any]]] = []
    of: list[int] = []
    for block in pager.blocks:
        kind = [[name, *linear_weight(module).shape] for name, module in block_linears(block).items()]
        if kind not in kinds:
            kinds.append(kind)
        of.append(kinds.index(kind))
    return {"path": pager.blocks_path, "kinds": kinds, "of": of}


class RunMeter:
    """Measures the time and bytes of a run. started: its start by ``time.monotonic``."""

    def __init__(self, started: float, clock: Clock, device: torch.device) -> None:
        self._started, self._clock, self._device = started, clock, device
        self._moved = _bytes_moved()

    def read(self) -> dict[str, Any]:
        """The seconds and bytes so far. bytes_read, bytes_written: all I/O of this process; None where the system has no counters.

        After an error of the device only the phases measured before it are included.
        """
        try:
            by_phase, waiting = self._clock.seconds, self._clock.wait_seconds()
        except RuntimeError:
            by_phase, waiting = self._clock.seconds_so_far(), {}
        now = _bytes_moved()
        moved = (None, None) if now is None or self._moved is None else (now[0] - self._moved[0], now[1] - self._moved[1])
        return {
            "seconds": round(time.monotonic() - self._started, 3),
            "seconds_by_phase": {name: round(seconds, 3) for name, seconds in by_phase.items()},
            "waiting": {cause: round(seconds, 3) for cause, seconds in waiting.items()},
            "host_peak_bytes": host_memory_peak(),
            "device_peak_bytes": device_memory_peak(self._device),
            "bytes_read": moved[0],
            "bytes_written": moved[1],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecorder:
    """Writes the record of a run into the journal of the folder that ``owner`` owns."""

    journal: Journal
    owner: Owner
    meter: RunMeter
    patience: Patience

    @contextlib.contextmanager
    def recording(self, run: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[None]:
        """Record a run at its start and at its end. Raises ResourceError where the start cannot be recorded.

        If the end cannot be recorded, a finished job gets a warning. A failed job already has an error to report.
        """
        self.journal.record_run(run)
        outcome, message = "failed", None
        try:
            yield
            outcome = "finished"
        except (Stopped, RankLostError, KeyboardInterrupt) as stopped:
            outcome, message = "stopped", str(stopped)
            raise
        except BigqError as error:
            message = str(error)
            raise
        finally:
            try:
                self.owner.check()
                self.journal.record_end({**self._ended(outcome, message), **self.meter.read()})
            except (BigqError, RuntimeError) as error:
                # A failed job has reported why; a folder that was taken over belongs to another job.
                if outcome == "finished":
                    say(f"warning: {error}; the end of this run is not recorded, but the output is complete")

    def leave(self, message: str) -> None:
        """Record that the job failed, from the thread that ends the process. Nothing that may wait for the device is read."""
        with contextlib.suppress(BigqError):
            self.owner.check()
            self.journal.record_end(self._ended("failed", message))
            self.owner.leave("failed", {"said": message})

    def _ended(self, outcome: str, message: str | None) -> dict[str, Any]:
        """asked_by: the signal that stopped the run, or None. reached: see ``short_runs``."""
        return {
            "at": _now(),
            "outcome": outcome,
            "said": message,
            "committed": len(self.journal.commits),
            "asked_by": self.patience.stop.asked_by,
            "reached": reached(self.journal, self.patience.checkpoints),
            "units": self.patience.times.to_json(),
        }


def _bytes_moved() -> tuple[int, int] | None:
    """Bytes that this process has read and written by system calls; None where the system has no counters."""
    try:
        counters = psutil.Process().io_counters()
        return int(counters.read_chars), int(counters.write_chars)
    except (psutil.Error, OSError, AttributeError, NotImplementedError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
