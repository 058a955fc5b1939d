"""The state of an output folder, from its records alone: fast, without torch, and without disturbing a job that writes to it.

Nothing is repaired and no shard is read. Damaged records are reported; ``verify`` checks the shards.
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
from bigq.job.conversion_record import CONVERT_AGAIN, ConversionRecord, is_conversion, read_conversion
from bigq.job.journal import JOB_NAME, JOURNAL_NAME, RUNS_NAME, Commit, read_commits, read_job
from bigq.job.manifest import GGUF_NAME, lacks_gguf
from bigq.job.owner import OWNER_NAME, Holder
from bigq.job.pushed import PUSHED_NAME, Pushed, read_pushed
from bigq.progress.layout import rewrapped
from bigq.progress.sizes import show_duration, show_size

#: The states of a job, and what they mean.
STATES: Mapping[str, str] = {
    "not begun": "no job was begun here; run bigq quantize",
    "running": "a process on this machine is running it",
    "unknown": "it may be running on another machine or in another container; check again whether its heartbeat advances",
    "stopped": "it was asked to stop; run the same command again to resume it",
    "failed": "it ended with an error; fix that and run the same command again to resume it",
    "killed": "its process was killed; run the same command again to resume it",
    "finished": "everything is written",
}
#: States from which the same command resumes the job.
RESUMABLE = ("stopped", "failed", "killed")

_BLOCK = re.compile(r"block-\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderStatus:
    """The process that owns, or last owned, the folder. last_heartbeat: its time by that machine's clock.

    heartbeat_age: seconds since then by the file system's clock, None where that is unknown. It is for people only: no decision
    depends on clocks.
    """

    host: str
    pid: int
    beats: int
    last_heartbeat: str
    heartbeat_age: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of a job, or of a converted folder: "finished", or "failed" where its config.json is gone.

    state: one of ``STATES``. resumable: whether the same command resumes the job.
    blocks_done: committed blocks; blocks: those of the model, None where unknown. bytes_written: of the committed shards.
    phase, eta_seconds: the current phase, and the estimated time left; None unless the job may be running.
    said: the message with which it ended. warnings: of its last run. damaged: records and shards that were changed or are missing.
    converted: of a converted folder, the formats and the source, such as "gptq → gptq_v2 from /models/q"; else None.
    pushed: shards that a hub repository has confirmed, and repository, its name; None without ``--push``.
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
    converted: str | None = None
    pushed: int | None = None
    repository: str | None = None

    @property
    def may_run(self) -> bool:
        """Whether a process runs it, as far as is known."""
        return self.state in ("running", "unknown")

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """A few lines for a person, of at most 60 columns."""
        what = "it can be loaded, but its record is damaged" if self.state == "finished" and self.damaged else STATES[self.state]
        if self.state in RESUMABLE and not self.resumable:
            what = what.partition(";")[0] + "; it cannot be resumed"
        of = "" if self.blocks is None else f" of {self.blocks}"
        lines = [
            f"{self.out}: {self.state} ({what})",
            f"  blocks    {self.blocks_done}{of} done",
            f"  written   {show_size(self.bytes_written)} in {self.shards} shards",
        ]
        if self.pushed is not None:
            lines.append(f"  pushed    {self.pushed} of {self.shards} shards to {self.repository}")
        if self.converted is not None:
            lines.append(f"  converted {self.converted}")
        if self.phase is not None:
            lines.append(f"  phase     {self.phase}")
        if self.eta_seconds is not None:
            lines.append(f"  left      about {show_duration(self.eta_seconds)}")
        if self.holder is not None:
            h = self.holder
            ago = "" if h.heartbeat_age is None else f", {show_duration(h.heartbeat_age)} ago"
            if self.state in ("running", "unknown"):
                lines.append(f"  process   {h.pid} on {h.host}; heartbeat {h.beats} at {h.last_heartbeat}{ago}")
            else:
                lines.append(f"  last run  process {h.pid} on {h.host}, last heartbeat at {h.last_heartbeat}{ago}")
        if self.said is not None:
            lines.append(f"  said      {self.said}")
        lines += [f"  warning   {text}" for text in self.warnings]
        lines += [f"  damaged   {text}" for text in self.damaged]
        return "\n".join(rewrapped(lines, indent=12))


def status(out: Path) -> Status:
    """The state of the job in a folder, or of a converted folder.

    Damaged records are not an error: the result names them. Raises UsageError if ``out`` is neither empty nor a folder that ``quantize``
    or ``convert`` wrote, ResourceError if it cannot be read.
    """
    out = Path(os.path.expanduser(out))
    _require_job(out)
    state = out / STATE_FOLDER
    damaged: list[str] = []
    conversion = _conversion(out, damaged)
    again = CONVERT_AGAIN if is_conversion(out) else "it will be written again"
    intact = _has_job(out, damaged)
    # Before the look at its owner, for a job may begin now.
    begun = any((state / name).exists() for name in (JOB_NAME, JOURNAL_NAME, OWNER_NAME))
    holder = _holder(state, damaged)
    pushed = _pushed(out, damaged)
    commits = _commits(out, damaged, again, pushed)
    there = [commit for commit in commits if _is_pushed(commit, pushed)]
    blocks = {commit.unit for commit in commits if _BLOCK.fullmatch(commit.unit)}
    facts = {} if holder is None else holder.facts
    last = pushed.get("config.json")
    verdict = _state(out, holder, damaged, begun=begun, uploaded=not pushed or (last is not None and last.confirmed))
    live = verdict in ("running", "unknown")
    return Status(
        out=str(out),
        state=verdict,
        resumable=verdict in RESUMABLE and intact,
        blocks_done=len(blocks) if conversion is None else conversion.blocks,
        blocks=_count(facts.get("blocks")) if conversion is None else conversion.blocks,
        shards=len(commits),
        bytes_written=sum(commit.shard.size for commit in commits),
        phase=_text(facts.get("phase")) if live else None,
        eta_seconds=_seconds(facts.get("eta_seconds")) if live else None,
        said=_text(facts.get("said")),
        holder=None if holder is None else _holder_status(holder, state),
        warnings=_warnings(state, damaged),
        damaged=tuple(damaged),
        converted=None if conversion is None else f"{conversion.format_before} → {conversion.format} from {conversion.source}",
        pushed=len(there) if pushed else None,
        repository=list(pushed.values())[-1].repository if pushed else None,
    )


def _pushed(out: Path, damaged: list[str]) -> Mapping[str, Pushed]:
    """The files that were uploaded to a hub repository, by name."""
    try:
        found, bad = read_pushed(out)
    except BigqError as error:
        damaged.append(_about(out, error))
        return {}
    if bad:
        damaged.append(f"{STATE_FOLDER}/{PUSHED_NAME}: {bad} lines are damaged; their files are uploaded again")
    return found


def _is_pushed(commit: Commit, pushed: Mapping[str, Pushed]) -> bool:
    """Whether the hub has confirmed a shard."""
    entry = pushed.get(commit.shard.file)
    return entry is not None and entry.confirmed and entry.sha256 == commit.shard.sha256


def _conversion(out: Path, damaged: list[str]) -> ConversionRecord | None:
    """The record of a converted folder."""
    try:
        return read_conversion(out)
    except BigqError as error:
        damaged.append(_about(out, error))
        return None


def _require_job(out: Path) -> None:
    try:
        if (out / STATE_FOLDER).is_dir() or (out.is_dir() and not any(out.iterdir())):
            return
        if (out / STATE_FOLDER).is_dir():  # a job began since the first look
            return
    except OSError as error:
        raise ResourceError(f"{out}: cannot be read: {error.strerror}; check the disk and run the command again") from error
    raise UsageError(f"{out}: holds no job of bigq; name the output folder of bigq quantize or bigq convert")


def _has_job(out: Path, damaged: list[str]) -> bool:
    """Whether the job's settings are known."""
    try:
        return read_job(out) is not None
    except BigqError as error:
        damaged.append(_about(out, error))
        return False


def _holder(state: Path, damaged: list[str]) -> Holder | None:
    try:
        there = os.path.lexists(state / OWNER_NAME)
        holder = Holder.read(state)
    except BigqError as error:
        damaged.append(_about(state.parent, error))
        return None
    if holder is None and there:
        damaged.append(f"{STATE_FOLDER}/{OWNER_NAME}: cannot be read, so the process that last wrote to the folder is unknown")
    return holder


def _commits(out: Path, damaged: list[str], again: str, pushed: Mapping[str, Pushed]) -> list[Commit]:
    """The commits whose shards exist with their recorded size, or are on the hub instead, one per unit.

    again: the text about what happens to the others. pushed: the files that were uploaded.
    """
    try:
        commits, bad = read_commits(out)
    except BigqError as error:
        damaged.append(_about(out, error))
        return []
    if bad:
        damaged.append(f"{STATE_FOLDER}/{JOURNAL_NAME}: {bad} of {len(commits) + bad} lines are damaged; {again}")
    found: dict[str, Commit] = {}
    for commit in commits:
        try:
            size = os.stat(out / commit.shard.file).st_size
        except (OSError, ValueError, TypeError):
            if _is_pushed(commit, pushed) and pushed[commit.shard.file].dropped:
                found[commit.unit] = commit
                continue
            damaged.append(f"{commit.shard.file}: is missing; {again}")
            continue
        if size == commit.shard.size:
            found[commit.unit] = commit
        else:
            damaged.append(f"{commit.shard.file}: has {size} bytes instead of {commit.shard.size}; {again}")
    return list(found.values())


def _warnings(state: Path, damaged: list[str]) -> tuple[str, ...]:
    """The warnings of the job's last run."""
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


def _state(out: Path, holder: Holder | None, damaged: list[str], *, begun: bool, uploaded: bool) -> str:
    """begun: whether the folder held records of a job. uploaded: whether nothing is left of what a run began to upload.

    A later run may have been told not to upload.
    """
    uploaded = uploaded or (holder is not None and holder.outcome == "finished")
    if holder is not None and holder.alive:
        return "running"
    loadable = (out / "config.json").exists()  # written last but for a GGUF file, removed first when reopened
    if loadable and uploaded and not lacks_gguf(out):
        return "finished"
    if is_conversion(out):
        damaged.append(f"config.json: is missing; {CONVERT_AGAIN}")
        return "failed"
    if holder is None:
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
    """Seconds since a file was written, by the clock of its file system, if a temporary file can be made there."""
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


# A heartbeat may hold anything.


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _seconds(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value < 1e9 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
