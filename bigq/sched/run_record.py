"""What is kept about each run of a job: how it was begun, and when it ends, how it went.

A line in OUT/.bigq/runs.jsonl, for ``bigq report`` and for whoever asks later. A run that was killed has no end in it. Nothing here
decides a byte of the output.
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
from pathlib import Path
from typing import Any

import psutil
import torch

from bigq.errors import BigqError, Stopped
from bigq.job.journal import Journal
from bigq.job.owner import Owner
from bigq.model.blocks import block_linears
from bigq.model.pager import Pager
from bigq.model.skeleton import linear_weight
from bigq.progress.clock import Clock
from bigq.progress.records import device_memory_peak, host_memory_peak
from bigq.sched.plan.planner import Plan


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
    """A run as it begins, whatever becomes of it. Sizes in bytes.

    model, command: as they were given; folder: where the model lies. planned: what the plan predicts. blocks: see ``_blocks``.
    resumed_blocks: blocks that were committed already.
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
        "planned": {"host": plan.cost.host, "device": plan.cost.device, "disk": plan.disk},
        "source_bytes": sum(info.nbytes for info in tensors),
        "parameters": sum(math.prod(info.shape) for info in tensors),
        "blocks": _blocks(pager),
        "resumed_blocks": sum(commit.unit.startswith("block-") for commit in journal.commits),
    }


def _blocks(pager: Pager) -> dict[str, Any]:
    """The Linears of the blocks, whether they are quantized or not.

    path: of the list of blocks. kinds: the Linears of blocks that are alike, as [name, outputs, inputs], in order of definition;
    of: the kind of each block.
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
    """What a run took so far. started: by ``time.monotonic``."""

    def __init__(self, started: float, clock: Clock, device: torch.device) -> None:
        self._started, self._clock, self._device = started, clock, device
        self._moved = _bytes_moved()

    def read(self) -> dict[str, Any]:
        """Seconds, and bytes. bytes_read, bytes_written: by this process, whatever for; None where the system does not tell.

        Of a device that failed the phases that have been read off already.
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


@contextlib.contextmanager
def record_run(journal: Journal, owner: Owner, run: Mapping[str, Any], meter: RunMeter, say: Callable[[str], None]) -> Iterator[None]:
    """Record a run when it begins, and how it went when it ends. Raises ResourceError where it cannot be recorded at the beginning.

    That the end cannot be recorded costs a finished job a warning; where the job failed, there is enough to say already.
    """
    journal.record_run(run)
    outcome, said = "failed", None
    try:
        yield
        outcome = "finished"
    except (Stopped, KeyboardInterrupt) as stopped:
        outcome, said = "stopped", str(stopped)
        raise
    except BigqError as error:
        said = str(error)
        raise
    finally:
        try:
            owner.check()
            journal.record_end({"at": _now(), "outcome": outcome, "said": said, "committed": len(journal.commits), **meter.read()})
        except (BigqError, RuntimeError) as error:
            # A job that failed has said why already; a folder that was taken over is another's.
            if outcome == "finished":
                say(f"warning: {error}; how this run went is not recorded, the output is complete")


def _bytes_moved() -> tuple[int, int] | None:
    """Bytes that this process has read and written by system calls."""
    try:
        counters = psutil.Process().io_counters()
        return int(counters.read_chars), int(counters.write_chars)
    except (psutil.Error, OSError, AttributeError, NotImplementedError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
