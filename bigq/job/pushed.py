"""Which files of a job a hub repository holds: the record OUT/.bigq/pushed.jsonl. The journal says what they must be.

A line is appended before a file is uploaded, and another one when the hub has confirmed it; of each file the last line counts. A local
shard is removed only once the line is durable that says so. Lines carry checksums; one that a crash tore counts as absent. Imports no
torch, so that it is read quickly.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bigq.errors import ResourceError, UsageError
from bigq.io.atomic import sync_folder, write_bytes
from bigq.io.checksum import read_record_bytes, seal, unseal
from bigq.io.folders import STATE_FOLDER

PUSHED_NAME = "pushed.jsonl"
#: Files that a repository may hold before a job: the hub makes the one, people the other.
NOT_FOREIGN = (".gitattributes", "README.md")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """A file of a job in a hub repository. file: its path in both places. size, sha256: as in OUT.

    confirmed: whether the hub has said that ``revision``, a commit, holds these bytes. dropped: whether the local file may be gone.
    """

    file: str
    size: int
    sha256: str
    repository: str
    revision: str = ""
    confirmed: bool = False
    dropped: bool = False

    def to_line(self) -> bytes:
        return seal(dataclasses.asdict(self), line=True)

    @classmethod
    def from_line(cls, line: bytes) -> Pushed | None:
        """None for a line that a crash tore or that was changed later."""
        value = unseal(line, line=True)
        if value is None or value.keys() != _KINDS.keys() or any(type(value[name]) is not kind for name, kind in _KINDS.items()):
            return None
        return cls(**value)


_KINDS: Mapping[str, type] = {
    "file": str,
    "size": int,
    "sha256": str,
    "repository": str,
    "revision": str,
    "confirmed": bool,
    "dropped": bool,
}


def read_pushed(out: Path) -> tuple[dict[str, Pushed], int]:
    """The last line of each file, and how many lines are damaged. Repairs nothing. Raises ResourceError, CheckpointError."""
    lines = (read_record_bytes(out / STATE_FOLDER / PUSHED_NAME) or b"").splitlines(keepends=True)
    found = [Pushed.from_line(line) for line in lines]
    return {each.file: each for each in found if each is not None}, sum(each is None for each in found)


class PushRecord:
    """The record of a job whose folder the caller owns. Raises ResourceError, CheckpointError."""

    def __init__(self, out: Path) -> None:
        self._path = out / STATE_FOLDER / PUSHED_NAME
        self.entries, damaged = read_pushed(out)
        if damaged:
            write_bytes(self._path, b"".join(each.to_line() for each in self.entries.values()))

    def add(self, entries: Iterable[Pushed]) -> None:
        """Append lines durably. Raises ResourceError; then the record is unchanged."""
        added = list(entries)
        try:
            with open(self._path, "ab", buffering=0) as file:
                end = file.tell()
                try:
                    data = b"".join(each.to_line() for each in added)
                    while data:
                        data = data[file.write(data) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), end)
                    raise
            sync_folder(self._path.parent)
        except OSError as error:
            raise ResourceError(
                f"{self._path}: cannot be written: {error.strerror}; free some space, then run the same command again"
            ) from error
        self.entries.update({each.file: each for each in added})


def repository_of(out: Path, entries: Mapping[str, Pushed], wanted: str | None) -> str | None:
    """The repository that a run of the job in OUT needs: the one asked for, or else the one that alone holds shards of the job; or None.

    Raises UsageError where shards are in one only and another one is asked for.
    """
    only = next((each.repository for each in entries.values() if each.dropped), None)
    if only is not None and wanted is not None and wanted != only:
        raise UsageError(f"--push {wanted}: shards of the job in {out} are in {only} only; give --push {only}, or choose another folder")
    return wanted or only


def refuse_source(repository: str | None, model: str) -> None:
    """Raise UsageError if MODEL is read from the repository that the job is uploaded to. model: as given."""
    if repository is not None and model.partition("@")[0] == repository and not Path(model).exists():
        raise UsageError(f"--push {repository}: is the repository that MODEL is read from; name another one")


def foreign_files(names: Iterable[str], entries: Mapping[str, Pushed], repository: str) -> list[str]:
    """Files of a repository that neither the hub makes nor the job has uploaded."""
    own = {each.file for each in entries.values() if each.repository == repository}
    return sorted(name for name in names if name not in own and name not in NOT_FOREIGN)
