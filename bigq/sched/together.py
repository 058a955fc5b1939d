"""What the ranks of a job have to agree on before it begins."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from bigq.errors import ResourceError, UsageError
from bigq.io.folders import STATE_FOLDER
from bigq.job.batches import Halving
from bigq.machine.ranks import Ranks
from bigq.sched.plan.planner import Plan


def require_same_count(out: Path, begun: Mapping[str, Any] | None, ranks: Ranks, *, allowed: bool) -> None:
    """Raise UsageError if the job in OUT was begun with another number of ranks, unless that is allowed: bytes depend on it."""
    machine = None if begun is None else begun.get("machine")
    before = machine.get("ranks", 1) if isinstance(machine, Mapping) else ranks.count
    if before != ranks.count and not allowed:
        raise UsageError(
            f"the job in {out} was begun with {before} process{'es' if before != 1 else ''}, now there {_are(ranks.count)}: what is "
            f"quantized from here on would have other bytes; start it with {before}, or add --allow-ranks"
        )


def agreed_plan(plan: Plan, ranks: Ranks) -> Plan:
    """This rank's plan with the smallest batch of all, the fewest experts at once, and what is short on any of them.

    Bytes depend on the first two, and ranks solve the experts of one batch together.
    """
    of_all: Any = ranks.everyone((plan.choice.batch, plan.choice.experts_at_once, plan.shortages))
    batches, experts, texts = zip(*of_all, strict=True)
    fewest = min((number for number in experts if number is not None), default=None)
    choice = dataclasses.replace(plan.choice, batch=min(batches), experts_at_once=fewest)
    return dataclasses.replace(plan, choice=choice, shortages=tuple(dict.fromkeys(text for each in texts for text in each)))


def require_same_request(request: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise UsageError if ranks were started with different options, inputs or versions: each decides by its own what comes next."""
    parts = {name: value for name, value in request.items() if name not in ("settings", "machine")}
    parts |= {f"settings.{name}": value for name, value in request["settings"].items() if name != "calibration"}  # tokens are compared
    of_all: Any = ranks.everyone(parts)
    first, absent = of_all[0], object()
    for rank, other in enumerate(of_all):
        names = [name for name in {**first, **other} if first.get(name, absent) != other.get(name, absent)]
        if names:
            raise UsageError(
                f"rank {rank} of {ranks.count}: its {' and '.join(names)} differ from those of rank 0; start all processes with the same "
                "command, and with the same model, text and versions on each host"
            )


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


def make_rank_folder(out: Path, ranks: Ranks) -> Path:
    """The same folder, which is made. The state folder is there: the first rank owns it. Raises ResourceError."""
    folder = rank_folder(out, ranks)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"rank {ranks.index}: {folder}: cannot be made: {error.strerror}; OUT must be on a file system that all hosts share, at the "
            "same path, and every process must be allowed to write there"
        ) from error
    return folder


def remove_rank_folder(out: Path, ranks: Ranks) -> None:
    """Remove the empty folder of one of several ranks, when the job is done."""
    if ranks.count > 1:
        with contextlib.suppress(OSError):
            rank_folder(out, ranks).rmdir()


def remove_other_counts(out: Path, ranks: Ranks) -> None:
    """Remove hidden states of an earlier run with another number of ranks, which this one cannot use. For the owner of the folder."""
    for folder in (out / STATE_FOLDER).glob("rank-*-of-*"):
        if ranks.count == 1 or not folder.name.endswith(f"-of-{ranks.count}"):
            shutil.rmtree(folder, ignore_errors=True)


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"
