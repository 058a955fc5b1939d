"""The record of a job in its output folder: the request, and the shards that are committed.

    OUT/.bigq/job.json        the request, frozen when the job starts
    OUT/.bigq/runs.jsonl      one line per run: versions, machine and warnings, and how the run ended
    OUT/.bigq/journal.jsonl   one line per committed shard, appended and flushed after the shard is durable
    OUT/.bigq/pushed.jsonl    with --push, which files a hub repository holds: see ``pushed``
    OUT/.bigq/bits.json       with --bits-per-weight, which bits were chosen, see ``bigq.mixed.record``
    OUT/.bigq/batches.json    where the batch was halved because the device ran out of memory, if it was
    OUT/.bigq/lock, owner.json, activations-….safetensors, checkpoints.json: see ``owner`` and ``checkpoint``

A job that finds these files resumes: it writes the shards that are not committed. Each record carries a checksum. A journal line that
a crash tore or that was changed later is ignored, so its shard is made again. A request that was changed is refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bigq import faults
from bigq.errors import CheckpointError, ResourceError, UsageError
from bigq.io.atomic import TEMP_SUFFIX, remedy, sync_folder, write_bytes
from bigq.io.checksum import load_record, read_record_bytes, save_record, seal, unseal, valid_lines
from bigq.io.folders import STATE_FOLDER
from bigq.io.shard_record import ShardRecord, file_sha256
from bigq.job.batches import Halving
from bigq.mixed.record import with_chosen_rules

if TYPE_CHECKING:
    from bigq.job.away import Away

JOB_NAME = "job.json"
JOURNAL_NAME = "journal.jsonl"
RUNS_NAME = "runs.jsonl"
BATCHES_NAME = "batches.json"
CHECKPOINTS_NAME = "checkpoints.json"
#: In place of job.json where ``bigq convert`` made the folder, see ``bigq.job.conversion_record``.
CONVERSION_NAME = "conversion.json"

_BEGIN_AGAIN = "restore it from a copy, or begin the job again in an empty folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One committed shard. unit: "rest-0", "block-17", "head-0"; linears: the records of its quantized Linears.

    modified: the file's modification time in ns. While time and size match, the shard is not hashed again on resume.
    left_out: module names of the block's Linears that stay unquantized although no rule skips them.
    skipped: those of ``left_out`` that could not be quantized, with the reason.
    source: a hash of samples of the source tensors, to detect a changed source.
    batch: calibration rows per forward when the block's last Linears were solved; None for units that need no rows.
    """

    unit: str
    shard: ShardRecord
    linears: tuple[Mapping[str, Any], ...]
    modified: int = 0
    left_out: tuple[str, ...] = ()
    skipped: Mapping[str, str] | None = None
    source: str = ""
    batch: int | None = None

    def to_line(self) -> bytes:
        value = {
            "unit": self.unit,
            "file": self.shard.file,
            "size": self.shard.size,
            "sha256": self.shard.sha256,
            "modified": self.modified,
            "tensors": self.shard.tensors,
            "linears": self.linears,
            "left_out": self.left_out,
            "skipped": self.skipped or {},
            "source": self.source,
            "batch": self.batch,
        }
        return seal(value, line=True)

    @classmethod
    def from_line(cls, line: bytes) -> Commit | None:
        """None for a line that a crash tore or that was changed later."""
        value = unseal(line, line=True)
        if value is None or not _has_kinds(value):
            return None
        return cls(
            unit=value["unit"],
            shard=ShardRecord(file=value["file"], size=value["size"], sha256=value["sha256"], tensors=tuple(value["tensors"])),
            linears=tuple(value["linears"]),
            modified=value["modified"],
            left_out=tuple(value["left_out"]),
            skipped=value["skipped"],
            source=value["source"],
            batch=value["batch"],
        )


_KINDS: Mapping[str, tuple[type, ...]] = {
    "unit": (str,),
    "file": (str,),
    "size": (int,),
    "sha256": (str,),
    "modified": (int,),
    "tensors": (list,),
    "linears": (list,),
    "left_out": (list,),
    "skipped": (dict,),
    "source": (str,),
    "batch": (int, type(None)),
}


def _has_kinds(value: Mapping[str, Any]) -> bool:
    """Whether a line has the fields of a commit, with values of the right types."""
    return (
        value.keys() == _KINDS.keys()
        and all(type(value[name]) in kinds for name, kinds in _KINDS.items())
        and all(isinstance(name, str) for name in [*value["tensors"], *value["left_out"], *value["skipped"].values()])
        and all(isinstance(record, dict) for record in value["linears"])
    )


class Journal:
    """The job in an output folder. The caller must own the folder (see ``owner``)."""

    def __init__(
        self, out: Path, request: Mapping[str, Any], units: list[str], compare: Callable[..., list[str]], away: Away | None = None
    ) -> None:
        """Start a job in ``out``, or resume the job in it.

        request: the settings and inputs that decide the output's bytes, plus versions and machine. units: the shards to commit, in order.
        compare: (out, old request, new request) → warnings; raises UsageError where the requests describe different jobs.
        away: shards that are on the hub instead of ``out``; None if there are none.
        Raises UsageError, ResourceError, and CheckpointError where the records are damaged.
        """
        self.out = out
        self.units = units
        self.away = away
        self._state = out / STATE_FOLDER
        self._path = self._state / JOURNAL_NAME
        #: Warnings about resuming the job.
        self.notes: list[str] = []
        self._replaced_hashes: dict[str, str] = {}
        self._run: Mapping[str, Any] = {}
        self._begin(request, compare)
        self._committed = self._sound_commits()
        self.halvings = self._read_halvings()

    def _begin(self, request: Mapping[str, Any], compare: Callable[..., list[str]]) -> None:
        before = load_record(self._state / JOB_NAME, _BEGIN_AGAIN)
        if before is not None:
            self.notes += compare(self.out, with_chosen_rules(self.out, before), request)
        elif self._path.exists():
            raise CheckpointError(f"{self._state / JOB_NAME}: is missing, so the job's request is unknown; {_BEGIN_AGAIN}")
        else:
            save_record(self._state / JOB_NAME, request)
            faults.point("job.written")

    def _sound_commits(self) -> dict[str, Commit]:
        """The valid commits by unit. Invalid lines are removed from the journal, and leftover temporary files are deleted."""
        for leftover in self.out.rglob("*" + TEMP_SUFFIX):
            with contextlib.suppress(OSError):  # one that stays is overwritten later, or reported then
                leftover.unlink(missing_ok=True)
        lines = (read_record_bytes(self._path) or b"").splitlines(keepends=True)
        found = [Commit.from_line(line) for line in lines]
        kept: dict[str, Commit] = {}
        for commit in found:
            if commit is not None and commit.unit in self.units and commit.shard.file == self.shard_name(self.units.index(commit.unit)):
                kept[commit.unit] = commit
        # A line that a crash tore has no newline. It needs no warning: its shard was not committed.
        if any(commit is None and line.endswith(b"\n") for commit, line in zip(found, lines, strict=True)):
            self.notes.append(f"{self._path.name}: some lines are damaged; their shards are made again")
        for unit, commit in list(kept.items()):
            problem = self._problem(commit)
            if problem is not None:
                self.notes.append(f"{commit.shard.file}: {problem}; it is made again")
                self._replaced_hashes[unit] = commit.shard.sha256
                del kept[unit]
        if len(kept) < len(lines):
            write_bytes(self._path, b"".join(c.to_line() for c in kept.values()))
        return kept

    def _problem(self, commit: Commit) -> str | None:
        """What is wrong with a committed shard, or None. A shard with the recorded size and modification time is not hashed.

        Raises ResourceError where the file cannot be checked: a temporary disk error must not discard a committed shard.
        """
        path = self.out / commit.shard.file
        try:
            there = path.stat(follow_symlinks=False)
        except FileNotFoundError:
            return "is missing" if self.away is None else self.away.problem(commit.shard)
        except OSError as error:
            raise ResourceError(
                f"{path}: cannot be read: {error.strerror}; check the disk and run the command again, or remove the file to have "
                "it made again"
            ) from error
        if there.st_size != commit.shard.size:
            return f"has {there.st_size} bytes instead of {commit.shard.size}"
        if there.st_mtime_ns == commit.modified:
            return None
        return None if file_sha256(path) == commit.shard.sha256 else "was changed after it was written"

    def shard_name(self, number: int) -> str:
        """The file name of unit ``number``."""
        return f"model-{number + 1:05d}-of-{len(self.units):05d}.safetensors"

    @property
    def commits(self) -> list[Commit]:
        """The commits in the order of units."""
        return [self._committed[unit] for unit in self.units if unit in self._committed]

    @property
    def missing(self) -> list[int]:
        """Numbers of the units that are not committed."""
        return [number for number, unit in enumerate(self.units) if unit not in self._committed]

    def commit_of(self, number: int) -> Commit | None:
        """The commit of unit ``number``; None where it is not committed."""
        return self._committed.get(self.units[number])

    def differs(self, commit: Commit) -> bool:
        """Whether the commit's shard replaces an earlier one that had other bytes."""
        return self._replaced_hashes.get(commit.unit, commit.shard.sha256) != commit.shard.sha256

    def commit(self, commit: Commit) -> None:
        """Append a commit durably; its shard is already on disk. Raises ResourceError; then the journal is unchanged."""
        line = commit.to_line()
        try:
            # Unbuffered: closing the file would write a failed buffer once more, after the file was truncated.
            with open(self._path, "ab", buffering=0) as file:
                end = file.tell()
                faults.point("journal.opened")
                try:
                    _write_all(file, line[: len(line) // 2])
                    faults.point("journal.half")
                    _write_all(file, line[len(line) // 2 :])
                    faults.point("journal.written")
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), end)
                    raise
            sync_folder(self._state)
            faults.point("journal.synced")
        except OSError as error:
            raise ResourceError(
                f"{self._path}: cannot be written: {error.strerror}; free some space, then run the same command again"
            ) from error
        self._committed[commit.unit] = commit

    def _read_halvings(self) -> list[Halving]:
        path = self._state / BATCHES_NAME
        value = load_record(path, _BEGIN_AGAIN)
        if value is None:
            return []
        try:
            return [Halving(*map(int, numbers)) for numbers in value["halvings"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: is not a list of halvings; {_BEGIN_AGAIN}") from error

    def record_halving(self, halving: Halving) -> None:
        """Record durably where the job continues with a smaller batch.

        Call it before anything that depends on the smaller batch is committed: a resumed job halves at the same place.
        """
        self.halvings.append(halving)
        save_record(self._state / BATCHES_NAME, {"halvings": [h.to_json() for h in self.halvings]})
        faults.point("batch.halved")

    def record_run(self, run: Mapping[str, Any]) -> None:
        """Append a line for this run. Raises ResourceError."""
        self._run = run
        path = self._state / RUNS_NAME
        write_bytes(path, b"".join([*valid_lines(path), seal(run, line=True)]))
        faults.point("run.recorded")

    def record_end(self, ended: Mapping[str, Any]) -> None:
        """Add how the run ended to the line that ``record_run`` wrote. Raises ResourceError; then the line is unchanged."""
        path, begun = self._state / RUNS_NAME, seal(self._run, line=True)
        others = [line for line in valid_lines(path) if line != begun]
        write_bytes(path, b"".join([*others, seal({**self._run, "ended": ended}, line=True)]))


class FollowedJournal(Journal):
    """The journal in a process that shares the job with the owner of the folder: what the owner had committed when the run began.

    It writes nothing.
    """

    def __init__(
        self, out: Path, units: list[str], commits: Iterable[Commit], halvings: Sequence[Halving], away: Away | None = None
    ) -> None:
        self.out, self.units, self.away = out, units, away
        self._state = out / STATE_FOLDER
        self._path = self._state / JOURNAL_NAME
        self.notes = []
        self._replaced_hashes = {}
        self._run = {}
        self._committed = {commit.unit: commit for commit in commits}
        self.halvings = list(halvings)

    def commit(self, commit: Commit) -> NoReturn:
        raise AssertionError(f"{commit.unit}: only the owner of the folder commits")


def _write_all(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def modification_time(path: Path) -> int:
    """A file's modification time in ns. Raises ResourceError."""
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}; check the disk and run the command again") from error


def read_commits(out: Path) -> tuple[list[Commit], int]:
    """The commits in a folder's journal, and how many of its lines are invalid. Reads no shard and repairs nothing."""
    lines = (read_record_bytes(out / STATE_FOLDER / JOURNAL_NAME) or b"").splitlines(keepends=True)
    found = [Commit.from_line(line) for line in lines]
    commits = [commit for commit in found if commit is not None]
    return commits, len(found) - len(commits)


def read_job(out: Path) -> dict[str, Any] | None:
    """The frozen request of the job in a folder, with the rules that were chosen for it; None where there is no job.

    Raises CheckpointError where a record is damaged.
    """
    request = load_record(out / STATE_FOLDER / JOB_NAME, _BEGIN_AGAIN)
    return None if request is None else with_chosen_rules(out, request)


def require_job_folder(out: Path) -> None:
    """Raise UsageError where ``out`` is neither absent, nor empty, nor the folder of a job; ResourceError where it cannot be read."""
    try:
        if (out / STATE_FOLDER / CONVERSION_NAME).exists():
            raise UsageError(f"{out}: OUT holds a converted model, in which no job can run; choose another folder")
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out}: OUT is a file; give a folder")
        foreign = out.is_dir() and not (out / STATE_FOLDER).is_dir() and any(out.iterdir())
    except OSError as error:
        raise ResourceError(f"{out}: cannot be used as output folder: {error.strerror}; {remedy(error)}") from error
    if foreign:
        raise UsageError(f"{out}: OUT is not empty and holds no bigq job; choose another folder, or empty it")
