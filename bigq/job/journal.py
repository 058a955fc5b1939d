"""The record of a job in its output folder: what was asked for, and which shards are committed.

    OUT/.bigq/job.json        the request, frozen when the job starts
    OUT/.bigq/runs.jsonl      one line per run of the job: versions, machine, and whatever was unusual; when it ends, how it went
    OUT/.bigq/journal.jsonl   one line per committed shard, appended and flushed after the shard itself is durable
    OUT/.bigq/batches.json    where the device ran out of memory and the job went on with a smaller batch, if it did
    OUT/.bigq/lock, owner.json, activations-….safetensors, checkpoints.json: see ``owner`` and ``checkpoint``

A job that finds these goes on with whatever shard is not committed. Each record carries a checksum: a line that a crash tore or that
was changed later is as good as absent, so its shard is made again; a request that was changed is refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from bigq import faults
from bigq.errors import CheckpointError, ResourceError, UsageError
from bigq.io.atomic import TEMP_SUFFIX, remedy, sync_folder, write_bytes
from bigq.io.checksum import load_record, read_record_bytes, save_record, seal, unseal, valid_lines
from bigq.io.folders import STATE_FOLDER
from bigq.io.shard_record import ShardRecord, file_sha256
from bigq.job.batches import Halving

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
    """One committed shard. unit: "rest-0", "block-17", …; linears: the records of what was quantized in it.

    modified: its file's time of modification, in ns; while that and the size are the same, the shard is not read again to see
        whether it is whole.
    left_out: module names of the block's Linears that stay as they are although no rule says so. skipped: those among them that
        could not be quantized, with the reason.
    source: a hash that tells whether the tensors which the shard was made from are still the same.
    batch: calibration rows that went through the block at once when its last Linears were solved; None where none were needed.
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
        """None where the line was torn by a crash, or is not as it was written."""
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
    """Whether a line holds what lines hold."""
    return (
        value.keys() == _KINDS.keys()
        and all(type(value[name]) in kinds for name, kinds in _KINDS.items())
        and all(isinstance(name, str) for name in [*value["tensors"], *value["left_out"], *value["skipped"].values()])
        and all(isinstance(record, dict) for record in value["linears"])
    )


class Journal:
    """The job of an output folder. The caller owns the folder (see ``owner``)."""

    def __init__(self, out: Path, request: Mapping[str, Any], units: list[str], compare: Callable[..., list[str]]) -> None:
        """Begin a job in ``out`` or take up the one that is there.

        request: what decides the output's bytes, and what it is done with. units: the shards to commit, in order.
        compare: (out, request before, request now) → warnings; raises where the job would be another.
        Raises UsageError, CheckpointError where what is there is damaged, ResourceError.
        """
        self.out = out
        self.units = units
        self._state = out / STATE_FOLDER
        self._path = self._state / JOURNAL_NAME
        #: What was unusual about taking the job up.
        self.notes: list[str] = []
        self._replaced_hashes: dict[str, str] = {}
        self._run: Mapping[str, Any] = {}
        self._begin(request, compare)
        self._committed = self._sound_commits()
        self.halvings = self._read_halvings()

    def _begin(self, request: Mapping[str, Any], compare: Callable[..., list[str]]) -> None:
        before = load_record(self._state / JOB_NAME, _BEGIN_AGAIN)
        if before is not None:
            self.notes += compare(self.out, before, request)
        elif self._path.exists():
            raise CheckpointError(f"{self._state / JOB_NAME}: is missing, so what the job was asked for is unknown; {_BEGIN_AGAIN}")
        else:
            save_record(self._state / JOB_NAME, request)
            faults.point("job.written")

    def _sound_commits(self) -> dict[str, Commit]:
        """The commits that are whole, by unit; the journal keeps no others, leftover temp files go."""
        for leftover in [*self.out.glob("*" + TEMP_SUFFIX), *self._state.glob("*" + TEMP_SUFFIX)]:
            with contextlib.suppress(OSError):  # one that stays is written over, or is told then
                leftover.unlink(missing_ok=True)
        lines = (read_record_bytes(self._path) or b"").splitlines(keepends=True)
        found = [Commit.from_line(line) for line in lines]
        kept: dict[str, Commit] = {}
        for commit in found:
            if commit is not None and commit.unit in self.units and commit.shard.file == self.shard_name(self.units.index(commit.unit)):
                kept[commit.unit] = commit
        # A line that a crash tore has no end. That its shard is made again is nothing unusual.
        if any(commit is None and line.endswith(b"\n") for commit, line in zip(found, lines, strict=True)):
            self.notes.append(f"{self._path.name}: lines of it are damaged; their shards are made again")
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
        """What is wrong with a committed shard. One whose size and time are as they were is not read.

        Raises ResourceError where that cannot be told: a disk that fails for a while must not cost what is committed.
        """
        path = self.out / commit.shard.file
        try:
            there = path.stat(follow_symlinks=False)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            raise ResourceError(
                f"{path}: cannot be looked at: {error.strerror}; check the disk and run the command again, or remove the file so that "
                "it is made again"
            ) from error
        if there.st_size != commit.shard.size:
            return f"has {there.st_size} bytes instead of {commit.shard.size}"
        if there.st_mtime_ns == commit.modified:
            return None
        return None if file_sha256(path) == commit.shard.sha256 else "was changed after it had been written"

    def shard_name(self, number: int) -> str:
        """The file of unit ``number``."""
        return f"model-{number + 1:05d}-of-{len(self.units):05d}.safetensors"

    @property
    def commits(self) -> list[Commit]:
        """What is committed, in the order of units."""
        return [self._committed[unit] for unit in self.units if unit in self._committed]

    @property
    def missing(self) -> list[int]:
        """Numbers of the units that are not committed."""
        return [number for number, unit in enumerate(self.units) if unit not in self._committed]

    def commit_of(self, number: int) -> Commit | None:
        """The commit of unit ``number``, if there is one."""
        return self._committed.get(self.units[number])

    def differs(self, commit: Commit) -> bool:
        """Whether the commit is of a shard that had to be made again and did not come out as it was."""
        return self._replaced_hashes.get(commit.unit, commit.shard.sha256) != commit.shard.sha256

    def commit(self, commit: Commit) -> None:
        """Append a commit durably; its shard is already on disk. Raises ResourceError; then the journal is as it was."""
        line = commit.to_line()
        try:
            # Unbuffered: a buffer that could not be written out would be tried again when the file is closed, after the cut.
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
            raise ResourceError(f"cannot write {self._path}: {error.strerror}; free some space and run the command again") from error
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
        """Record durably that the job goes on with a smaller batch from some place on.

        Nothing that comes of it is committed before: a job that is taken up again halves where this one did.
        """
        self.halvings.append(halving)
        save_record(self._state / BATCHES_NAME, {"halvings": [h.to_json() for h in self.halvings]})
        faults.point("batch.halved")

    def record_run(self, run: Mapping[str, Any]) -> None:
        """Add a line about this run. Raises ResourceError."""
        self._run = run
        path = self._state / RUNS_NAME
        write_bytes(path, b"".join([*valid_lines(path), seal(run, line=True)]))
        faults.point("run.recorded")

    def record_end(self, ended: Mapping[str, Any]) -> None:
        """Complete the line of the run that ``record_run`` told of. Raises ResourceError; then the line is as it was."""
        path, begun = self._state / RUNS_NAME, seal(self._run, line=True)
        others = [line for line in valid_lines(path) if line != begun]
        write_bytes(path, b"".join([*others, seal({**self._run, "ended": ended}, line=True)]))


def _write_all(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def modification_time(path: Path) -> int:
    """In ns. Raises ResourceError."""
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise ResourceError(f"{path}: cannot be looked at: {error.strerror}; check the disk and run the command again") from error


def read_commits(out: Path) -> tuple[list[Commit], int]:
    """The journal's commits as they stand, and how many of its lines are none. For looking on: no shard is read, nothing repaired."""
    lines = (read_record_bytes(out / STATE_FOLDER / JOURNAL_NAME) or b"").splitlines(keepends=True)
    found = [Commit.from_line(line) for line in lines]
    commits = [commit for commit in found if commit is not None]
    return commits, len(found) - len(commits)


def read_job(out: Path) -> dict[str, Any] | None:
    """The frozen request of the job in a folder; None where there is none. Raises CheckpointError where it is damaged."""
    return load_record(out / STATE_FOLDER / JOB_NAME, _BEGIN_AGAIN)


def require_job_folder(out: Path) -> None:
    """Raise UsageError where ``out`` is neither absent, nor empty, nor the folder of a job; ResourceError where it cannot be read."""
    if (out / STATE_FOLDER / CONVERSION_NAME).exists():
        raise UsageError(f"{out}: OUT holds a converted model, in which no job can run; choose another folder")
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out}: OUT is a file; name a folder")
        foreign = out.is_dir() and not (out / STATE_FOLDER).is_dir() and any(out.iterdir())
    except OSError as error:
        raise ResourceError(f"{out}: cannot be used as output folder: {error.strerror}; {remedy(error)}") from error
    if foreign:
        raise UsageError(f"{out}: OUT is not empty and holds no job of bigq; choose another folder, or empty it")
