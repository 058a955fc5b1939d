"""How far the job of an output folder is, from its record alone: at once, without torch, and without disturbing who writes to it.

Nothing is repaired and no shard is read: what is damaged is said. Whether shards are sound is for ``verify`` to find out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.errors import BigqError, ResourceError, UsageError
from bigq.io.checksum import read_record_bytes, unseal
from bigq.io.folders import STATE_FOLDER
from bigq.job.journal import JOB_NAME, JOURNAL_NAME, RUNS_NAME, Commit, read_commits, read_job
from bigq.job.manifest import GGUF_NAME, lacks_gguf
from bigq.job.owner import OWNER_NAME, Holder
from bigq.progress.layout import rewrapped
from bigq.progress.sizes import show_duration, show_size

#: What may be said of a job, and what it means.
STATES: Mapping[str, str] = {
    "not begun": "no job was begun here; run bigq quantize",
    "running": "a process on this machine is at it",
    "unknown": "it may be running on another machine or in another container; look again whether its heartbeat goes on",
    "stopped": "it was asked to stop; run the same command again to go on",
    "failed": "it ended with an error; see to that and run the same command again to go on",
    "killed": "its process ended without a word; run the same command again to go on",
    "finished": "all is written",
}
#: States that the same command goes on from.
RESUMABLE = ("stopped", "failed", "killed")

_BLOCK = re.compile(r"block-\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderStatus:
    """Who owns, or last owned, the folder. last_heartbeat: its time by that machine's clock.

    heartbeat_age: seconds since then by the file system's clock, None where that cannot be told; a matter for people, as nothing is
    decided by clocks.
    """

    host: str
    pid: int
    beats: int
    last_heartbeat: str
    heartbeat_age: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far a job is.

    state: one of ``STATES``. resumable: whether the same command goes on with it.
    blocks_done: committed blocks; blocks: those of the model, None where nobody says. bytes_written: of the committed shards.
    phase, eta_seconds: what the job does, and how long it expects to take; None unless it may be running.
    said: what it said when it ended. warnings: of its last run. damaged: records and shards that are not as they were written.
    """

    out: str
    state: str
    resumable: bool
    blocks_done: int
    blocks: int | None
    shards: int
    bytes_written: int
    phase: str | None
    eta_seconds: float | None
    said: str | None
    holder: HolderStatus | None
    warnings: tuple[str, ...]
    damaged: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """A few lines for a person, of at most 60 columns."""
        what = "it can be loaded, but its record is damaged" if self.state == "finished" and self.damaged else STATES[self.state]
        if self.state in RESUMABLE and not self.resumable:
            what = what.partition(";")[0] + "; it cannot be taken up"
        of = "" if self.blocks is None else f" of {self.blocks}"
        lines = [
            f"{self.out}: {self.state} ({what})",
            f"  blocks    {self.blocks_done}{of} done",
            f"  written   {show_size(self.bytes_written)} in {self.shards} shards",
        ]
        if self.phase is not None:
            lines.append(f"  phase     {self.phase}")
        if self.eta_seconds is not None:
            lines.append(f"  left      about {show_duration(self.eta_seconds)}")
        if self.holder is not None:
            h = self.holder
            ago = "" if h.heartbeat_age is None else f", {show_duration(h.heartbeat_age)} ago"
            lines.append(f"  process   {h.pid} on {h.host}; heartbeat {h.beats} at {h.last_heartbeat}{ago}")
        if self.said is not None:
            lines.append(f"  said      {self.said}")
        lines += [f"  warning   {text}" for text in self.warnings]
        lines += [f"  damaged   {text}" for text in self.damaged]
        return "\n".join(rewrapped(lines, indent=12))


def status(out: Path) -> Status:
    """Look at the job in a folder.

    Records that are damaged are no error: the result says which ones are. Raises UsageError where ``out`` is neither empty nor the
    folder of a job, ResourceError where it cannot be looked at.
    """
    out = Path(os.path.expanduser(out))
    _require_job(out)
    state = out / STATE_FOLDER
    damaged: list[str] = []
    intact = _has_job(out, damaged)
    holder = _holder(state, damaged)
    commits = _commits(out, damaged)
    blocks = {commit.unit for commit in commits if _BLOCK.fullmatch(commit.unit)}
    facts = {} if holder is None else holder.facts
    verdict = _state(out, holder, damaged)
    live = verdict in ("running", "unknown")
    return Status(
        out=str(out),
        state=verdict,
        resumable=verdict in RESUMABLE and intact,
        blocks_done=len(blocks),
        blocks=_whole(facts.get("blocks")),
        shards=len(commits),
        bytes_written=sum(commit.shard.size for commit in commits),
        phase=_words(facts.get("phase")) if live else None,
        eta_seconds=_seconds(facts.get("eta_seconds")) if live else None,
        said=_words(facts.get("said")),
        holder=None if holder is None else _holder_status(holder, state),
        warnings=_warnings(state, damaged),
        damaged=tuple(damaged),
    )


def _require_job(out: Path) -> None:
    try:
        if (out / STATE_FOLDER).is_dir() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise ResourceError(f"{out}: cannot be looked at: {error.strerror}") from error
    raise UsageError(f"{out}: holds no job of bigq; name the output folder of bigq quantize")


def _has_job(out: Path, damaged: list[str]) -> bool:
    """Whether what the job was asked for is known."""
    try:
        return read_job(out) is not None
    except BigqError as error:
        damaged.append(_about(out, error))
        return False


def _holder(state: Path, damaged: list[str]) -> Holder | None:
    try:
        holder = Holder.read(state)
        there = os.path.lexists(state / OWNER_NAME)
    except BigqError as error:
        damaged.append(_about(state.parent, error))
        return None
    if holder is None and there:
        damaged.append(f"{STATE_FOLDER}/{OWNER_NAME}: cannot be read, so who wrote to the folder last is unknown")
    return holder


def _commits(out: Path, damaged: list[str]) -> list[Commit]:
    """The commits whose shards are there with the size that they should have, one of each unit."""
    try:
        commits, bad = read_commits(out)
    except BigqError as error:
        damaged.append(_about(out, error))
        return []
    if bad:
        damaged.append(f"{STATE_FOLDER}/{JOURNAL_NAME}: {bad} of {len(commits) + bad} lines are damaged; their shards will be made again")
    found: dict[str, Commit] = {}
    for commit in commits:
        try:
            size = os.stat(out / commit.shard.file).st_size
        except (OSError, ValueError, TypeError):
            damaged.append(f"{commit.shard.file}: is missing; it will be made again")
            continue
        if size == commit.shard.size:
            found[commit.unit] = commit
        else:
            damaged.append(f"{commit.shard.file}: has {size} bytes instead of {commit.shard.size}; it will be made again")
    return list(found.values())


def _warnings(state: Path, damaged: list[str]) -> tuple[str, ...]:
    """What was unusual about the job's last run."""
    try:
        lines = (read_record_bytes(state / RUNS_NAME) or b"").splitlines(keepends=True)
    except BigqError as error:
        damaged.append(_about(state.parent, error))
        return ()
    runs = [unseal(line, line=True) for line in lines]
    known = [run for run in runs if run is not None]
    if len(known) < len(runs):
        damaged.append(f"{STATE_FOLDER}/{RUNS_NAME}: {len(runs) - len(known)} of {len(runs)} lines are damaged")
    notes = known[-1].get("notes") if known else None
    return tuple(str(note) for note in notes) if isinstance(notes, list) else ()


def _state(out: Path, holder: Holder | None, damaged: list[str]) -> str:
    if holder is not None and holder.alive:
        return "running"
    loadable = (out / "config.json").exists()  # it comes last but for a GGUF file, and goes first when a finished job is opened again
    if loadable and not lacks_gguf(out):
        return "finished"
    if holder is None:
        begun = any((out / STATE_FOLDER / name).exists() for name in (JOB_NAME, JOURNAL_NAME, OWNER_NAME))
        return "unknown" if begun else "not begun"
    if holder.alive is None:
        return "unknown"
    if holder.outcome == "finished":
        missing = GGUF_NAME if loadable else "config.json"
        damaged.append(f"{missing}: is missing although the job had finished; it will be written again")
        return "failed"
    return holder.outcome if holder.outcome in ("stopped", "failed") else "killed"


def _holder_status(holder: Holder, state: Path) -> HolderStatus:
    return HolderStatus(
        host=holder.host,
        pid=holder.pid,
        beats=holder.beat,
        last_heartbeat=holder.at,
        heartbeat_age=_age(state / OWNER_NAME),
    )


def _age(path: Path) -> float | None:
    """Seconds since a file was written; by the clock of its file system, where a file can be made there for a moment."""
    now = time.time()
    try:
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as probe:
            now = os.fstat(probe.fileno()).st_mtime
        return max(0.0, round(now - path.stat().st_mtime, 1))
    except OSError:
        return None


def _about(out: Path, error: BigqError) -> str:
    """An error's message, with files named by their place in the folder."""
    return str(error).replace(f"{out}/", "")


# What a heartbeat tells may be anything.


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _seconds(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value < 1e9 else None


def _words(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
