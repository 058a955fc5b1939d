"""What the ranks of a job have to agree on before it begins, and what several of them cannot do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bigq.errors import ResourceError, UsageError
from bigq.io.folders import STATE_FOLDER
from bigq.job.batches import Halving
from bigq.machine.ranks import Ranks
from bigq.methods.base import CalibratedMethod
from bigq.sched.plan.work import Choice

if TYPE_CHECKING:
    from bigq.sched.resolve import Job


def require_shareable(job: Job) -> None:
    """Raise UsageError if the job has a part that several processes do not share."""
    config = job.config
    alone = {
        f"--method {config.method}": not isinstance(job.method, CalibratedMethod) or not job.method.hessians,
        f"--fold {config.fold}": job.method.scaling is not None,
        "--tune-steps": bool(config.tune_steps),
        "--bits-per-weight": config.bits_per_weight is not None,
        "a model with experts": bool(job.pager.banks),
        "a model that stays on a server": job.pager.remote is not None,
    }
    for what, there in alone.items():
        if there:
            raise UsageError(f"{what}: {job.ranks.count} processes cannot share such a job; start it in one process")
    assert job.rows is not None
    if len(job.rows) < job.ranks.count:
        raise UsageError(
            f"--samples {len(job.rows)}: {job.ranks.count} processes share the calibration rows, and each needs at least one; "
            f"give at least {job.ranks.count}, or start fewer processes"
        )


def require_same_count(out: Path, begun: Mapping[str, Any] | None, ranks: Ranks, *, allowed: bool) -> None:
    """Raise UsageError if the job in OUT was begun with another number of ranks, unless that is allowed: bytes depend on it."""
    machine = None if begun is None else begun.get("machine")
    before = machine.get("ranks", 1) if isinstance(machine, Mapping) else ranks.count
    if before != ranks.count and not allowed:
        raise UsageError(
            f"the job in {out} was begun with {before} process{'es' if before != 1 else ''}, now there {_are(ranks.count)}: what is "
            f"quantized from here on would have other bytes; start it with {before}, or add --allow-ranks"
        )


def agreed_choice(choice: Choice, ranks: Ranks) -> Choice:
    """The choice of this rank's plan, with the smallest batch of all: bytes depend on it."""
    batches = [batch for batch in ranks.everyone(choice.batch) if isinstance(batch, int)]
    return dataclasses.replace(choice, batch=min(batches))


def refuse_halving(before: int, halving: Halving, rank: int) -> NoReturn:
    """The device of one of several ranks is out of memory: all of them would have to halve at the same place. Raises ResourceError."""
    raise ResourceError(
        f"rank {rank}: the device is out of memory with --batch {before}; several processes do not halve it by themselves: run the same "
        f"command with --batch {halving.batch}"
    )


def rank_folder(out: Path, ranks: Ranks) -> Path:
    """Where a rank keeps hidden states: the state folder of the job, or one of its own in there."""
    state = out / STATE_FOLDER
    return state if ranks.count == 1 else state / f"rank-{ranks.index}-of-{ranks.count}"


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"
