"""The record of a job in its output folder: what was asked for, and which shards are committed.

    OUT/.bigq/job.json        the request, frozen when the job starts
    OUT/.bigq/journal.jsonl   one line per committed shard, appended and flushed after the shard itself is durable
    OUT/.bigq/batches.json    where the device ran out of memory and the job went on with a smaller batch, if it did
    OUT/.bigq/lock            held by the running job

A job that finds both goes on behind the last committed block.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.errors import BigqError, CheckpointError, ResourceError, UsageError
from bigq.io.atomic import TEMP_SUFFIX, sync_folder, write_bytes, write_json
from bigq.io.index import read_json_object
from bigq.io.writer import ShardRecord, file_sha256
from bigq.sched.batches import Halving

STATE_FOLDER = ".bigq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One committed shard. unit: "rest-0", "block-17", …; linears: the records of what was quantized in it.

    left_out: module names of the block's Linears that stay as they are although no rule says so.
    source: a hash that tells whether the tensors which the shard was made from are still the same.
    batch: calibration rows that went through the block at once when its last Linears were solved; None where none were needed,
        and in journals that were begun before it was recorded.
    """

    unit: str
    shard: ShardRecord
    linears: tuple[Mapping[str, Any], ...]
    left_out: tuple[str, ...] = ()
    source: str = ""
    batch: int | None = None

    def to_line(self) -> bytes:
        value = {
            "unit": self.unit,
            "file": self.shard.file,
            "size": self.shard.size,
            "sha256": self.shard.sha256,
            "tensors": self.shard.tensors,
            "linears": self.linears,
            "left_out": self.left_out,
            "source": self.source,
            "batch": self.batch,
        }
        return (json.dumps(value) + "\n").encode()

    @classmethod
    def from_line(cls, line: bytes) -> Commit | None:
        """None where the line was torn by a crash."""
        try:
            if not line.endswith(b"\n"):
                return None
            value = json.loads(line)
            shard = ShardRecord(file=value["file"], size=value["size"], sha256=value["sha256"], tensors=tuple(value["tensors"]))
            return cls(
                unit=value["unit"],
                shard=shard,
                linears=tuple(value["linears"]),
                left_out=tuple(value["left_out"]),
                source=value["source"],
                batch=value.get("batch"),
            )
        except (ValueError, KeyError, TypeError):
            return None


class Journal:
    """The job of an output folder, locked for this process while open."""

    def __init__(self, out: Path, request: Mapping[str, Any], units: list[str]) -> None:
        """Begin a job in ``out`` or take up the one that is there.

        request: what decides the output's bytes. units: the shards to commit, in order.
        Raises UsageError where the folder belongs to something else, to another request or to a running job.
        """
        self.out = out
        self._state = out / STATE_FOLDER
        self._path = self._state / "journal.jsonl"
        self._begin(request)
        self.commits = self._surviving(units)
        self.halvings = self._known_halvings()

    def _begin(self, request: Mapping[str, Any]) -> None:
        require_ours(self.out)
        job = self._state / "job.json"
        try:
            self._state.mkdir(parents=True, exist_ok=True)
            self._lock = open(self._state / "lock", "w")
        except OSError as error:
            raise ResourceError(f"{self.out}: cannot be used as output folder: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.out}: another bigq job is writing to this folder; wait for it or stop it") from None
        try:
            if job.exists():
                _require_same(self.out, read_json_object(job), json.loads(json.dumps(request)))
            else:
                write_json(job, request)
        except BigqError:
            self.close()
            raise

    def _surviving(self, units: list[str]) -> list[Commit]:
        """The commits that are whole and in order; the journal is cut behind them, leftover temp files go."""
        for leftover in [*self.out.glob("*" + TEMP_SUFFIX), *self._state.glob("*" + TEMP_SUFFIX)]:
            leftover.unlink()
        commits: list[Commit] = []
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        for unit, line in zip(units, lines, strict=False):
            commit = Commit.from_line(line)
            if commit is None or commit.unit != unit or not self._intact(commit.shard):
                break
            commits.append(commit)
        if len(commits) < len(lines):
            write_bytes(self._path, b"".join(c.to_line() for c in commits))
        return commits

    def _intact(self, shard: ShardRecord) -> bool:
        path = self.out / shard.file
        return path.is_file() and path.stat().st_size == shard.size and file_sha256(path) == shard.sha256

    def commit(self, commit: Commit) -> None:
        """Append a commit durably; its shard is already on disk."""
        try:
            with open(self._path, "ab") as file:
                file.write(commit.to_line())
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self._state)
        except OSError as error:
            raise ResourceError(f"cannot write {self._path}: {error.strerror}; free some space and run the command again") from error
        self.commits.append(commit)

    def _known_halvings(self) -> list[Halving]:
        path = self._state / "batches.json"
        if not path.exists():
            return []
        try:
            return [Halving(*map(int, numbers)) for numbers in read_json_object(path)["halvings"]]
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise CheckpointError(f"{path}: is damaged; begin the job again in an empty folder") from error

    def halve(self, halving: Halving) -> None:
        """Record durably that the job goes on with a smaller batch from some place on.

        Nothing that comes of it is committed before: a job that is taken up again halves where this one did.
        """
        self.halvings.append(halving)
        write_json(self._state / "batches.json", {"halvings": [h.to_json() for h in self.halvings]})

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._lock.close()


def remembered_batch(out: Path) -> int | None:
    """The batch of the job that the folder holds; None where it holds none, or none that can be read."""
    try:
        batch = read_json_object(out / STATE_FOLDER / "job.json")["settings"]["batch"]
    except (BigqError, KeyError, TypeError):
        return None
    return batch if isinstance(batch, int) and batch > 0 else None


def require_ours(out: Path) -> None:
    """Raise UsageError where ``out`` is neither absent, nor empty, nor the folder of a job."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: OUT is a file; name a folder")
    if out.is_dir() and not (out / STATE_FOLDER).is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: OUT is not empty and holds no job of bigq; choose another folder, or empty it")


def _require_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UsageError naming the first setting in which a job differs from the one that the folder holds."""
    for section in {**before, **now}:
        old, new = before.get(section), now.get(section)
        if isinstance(new, dict) and isinstance(old, dict):
            for key in {**old, **new}:
                if old.get(key) != new.get(key):
                    raise UsageError(
                        f"{out}: holds a job with {section} {key} = {old.get(key)!r}, now it is {new.get(key)!r}; "
                        "run it as it was begun, or choose another folder"
                    )
        elif old != new:
            raise UsageError(f"{out}: holds a job with another {section} ({old!r}, now {new!r}); choose another folder")
