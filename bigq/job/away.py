"""Committed shards that are in a hub repository instead of OUT: whether it still has them, and their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bigq.io.index import TensorInfo, read_header
from bigq.io.remote.http import HubFolder
from bigq.io.remote.push import Held, HubRepository, Local
from bigq.io.remote.ranged import Patience
from bigq.io.remote.shards import QUICK, RemoteShards
from bigq.io.shard_record import ShardRecord
from bigq.job.pushed import Pushed, read_pushed


class Away:
    """What the record of a job says is in a repository, and what that holds.

    entries: by file. held: what the repository holds of the confirmed ones. patience: of requests for tensors.
    """

    def __init__(self, entries: Mapping[str, Pushed], held: Mapping[str, Held], patience: Patience = QUICK) -> None:
        self._entries = dict(entries)
        self._held = held
        self._patience = patience
        self._folders: dict[tuple[str, str], RemoteShards] = {}

    @property
    def files(self) -> set[str]:
        """The shards that may be gone from OUT."""
        return {each.file for each in self._entries.values() if each.dropped}

    def took(self, entry: Pushed) -> None:
        """The repository has confirmed a file."""
        self._entries[entry.file] = entry

    def has(self, file: Local, repository: str) -> bool:
        """Whether a repository has confirmed a file, and still has it. Raises ResourceError."""
        entry = self._entries.get(file.name)
        if entry is None or not entry.confirmed or entry.repository != repository:
            return False
        return (entry.size, entry.sha256) == (file.size, file.sha256) and file.is_held(self._held.get(file.name))

    def problem(self, shard: ShardRecord) -> str | None:
        """What is wrong with a shard that is not in OUT; None if the repository has it."""
        entry = self._entries.get(shard.file)
        if entry is None or not entry.dropped or (entry.size, entry.sha256) != (shard.size, shard.sha256):
            return "is missing"
        held = self._held.get(shard.file)
        if held is None:
            return f"is not in {entry.repository} on the hub any more"
        same = (held.size, held.sha256) == (shard.size, shard.sha256)
        return None if same else f"has other bytes in {entry.repository} on the hub"

    def header(self, out: Path, file: str) -> tuple[dict[str, TensorInfo], bytes]:
        """The tensors of a shard and the bytes of its header, from OUT if it is there. Raises CheckpointError, ResourceError."""
        entry = self._entries.get(file)
        if entry is None or not entry.dropped or (out / file).exists():
            return read_header(out / file)
        return self._folder(entry).header(file)

    def remote(self, out: Path) -> RemoteShards | None:
        """All shards of OUT for readers of checkpoints, wherever they are; None if all are in OUT."""
        return _Both(self, out) if any(not (out / file).exists() for file in self.files) else None

    def _folder(self, entry: Pushed) -> RemoteShards:
        """At the commit in which the hub confirmed the shard: its files never change."""
        key = entry.repository, entry.revision
        if key not in self._folders:
            self._folders[key] = RemoteShards(HubFolder(*key), self._patience)
        return self._folders[key]


class _Both(RemoteShards):
    """Shards of which some are in OUT and some on the hub."""

    def __init__(self, away: Away, out: Path) -> None:
        self._away, self._out = away, out

    def header(self, shard: str) -> tuple[dict[str, TensorInfo], bytes]:
        return self._away.header(self._out, shard)


def look_up(entries: Mapping[str, Pushed], repository: HubRepository) -> dict[str, Held]:
    """What a repository's newest commit holds of the files that it has confirmed. One request, for many files a few."""
    confirmed = [each.file for each in entries.values() if each.confirmed and each.repository == repository.name]
    return repository.held(confirmed, repository.head()) if confirmed else {}


def read_away(out: Path, patience: Patience = QUICK) -> Away:
    """Of the job in OUT. The hub is asked if shards may be gone. Raises ResourceError, CheckpointError."""
    entries, _ = read_pushed(out)
    held: dict[str, Held] = {}
    for name in sorted({each.repository for each in entries.values() if each.dropped}):
        held.update(look_up(entries, HubRepository(name, patience)))
    return Away(entries, held, patience)
