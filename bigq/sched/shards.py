"""Writing shards and committing them: each unit's shard is durable before its line is in the journal.

temp file → fsync → rename → fsync of the folder → journal line → fsync
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from bigq import faults
from bigq.errors import UsageError
from bigq.io.device_to_host import DeviceToHost
from bigq.io.file_stamps import Stamps
from bigq.io.index import REMOTE_SAMPLE, Checkpoint
from bigq.io.remote.shards import RemoteShards
from bigq.io.writer import OutputTensor, write_shard
from bigq.job.journal import Commit, Journal, modification_time
from bigq.job.owner import Owner
from bigq.machine.ranks import Ranks
from bigq.progress.records import LinearRecord
from bigq.sched.control import Control
from bigq.sched.push import Pusher
from bigq.sched.write_behind import WriteBehind


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """The content of a unit's shard, and its record for the journal.

    tensors: emptied when they are written.
    left_out: module names of Linears that stay unquantized although no rule skips them; skipped: those among them that could not be
    quantized, with the reason. batch: calibration rows per forward; None for units that need no rows.
    """

    tensors: list[OutputTensor]
    records: Sequence[LinearRecord] = ()
    left_out: Sequence[str] = ()
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    batch: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard of the output: its number, its name in the journal, and the names of the checkpoint's tensors that it is made from."""

    number: int
    name: str
    sources: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWriter:
    """Writes the shards of a job that owns its folder.

    owner: None in ranks that write nothing. remote: the source's shards that are on a server. exporter: copies tensors from the GPU to the
    host; None on a CPU. pusher: uploads committed shards; None without ``--push``.
    """

    checkpoint: Checkpoint
    remote: RemoteShards | None
    journal: Journal
    owner: Owner | None
    stamps: Stamps
    behind: WriteBehind
    exporter: DeviceToHost | None
    control: Control
    ranks: Ranks
    pusher: Pusher | None = None

    def committed(self, shard: Shard) -> Commit | None:
        """The shard's commit, from this run or an earlier one; None if it is not committed."""
        return self.journal.commit_of(shard.number)

    def packed(self, tensors: Mapping[str, Tensor]) -> list[OutputTensor]:
        """The tensors of a packed Linear, ready to be written."""
        return [OutputTensor.of(name, tensor, self.exporter) for name, tensor in tensors.items()]

    def stored(self, name: str) -> OutputTensor:
        """An unchanged tensor of the checkpoint, ready to be written."""
        return OutputTensor.copy_of(self.checkpoint[name])

    def hand_over(self, shard: Shard, product: Product, block: int | None = None) -> None:
        """Write and commit a shard in the background (see ``WriteBehind``). block: its number, for the display."""
        faults.point("block.solved")
        self.control.progress.phase("write", block)
        self.control.clock.synchronize()  # resolves the records' seconds, since another thread will write them
        with self.control.clock.phase("write"):
            self.behind.start(lambda: self.commit(shard, product))

    def commit(self, shard: Shard, product: Product) -> None:
        """Write a shard and its line in the journal. Raises ResourceError, CheckpointError."""
        if not self.ranks.writes(shard.number):
            return
        assert self.owner is not None, "who writes owns the folder"
        with self.control.clock.trace.span("commit", shard.name):
            self.owner.check()
            path = self.journal.out / self.journal.shard_name(shard.number)
            written = write_shard(path, product.tensors)
            source = self.checkpoint.sample(list(shard.sources))
            self.stamps.require_unchanged()
            self.owner.check()
            commit = Commit(
                unit=shard.name,
                shard=written,
                modified=modification_time(path),
                linears=tuple(r.to_json() for r in product.records),
                left_out=tuple(product.left_out),
                skipped=product.skipped,
                source=source,
                batch=product.batch,
            )
            if self.journal.differs(commit):
                self.control.progress.say(
                    f"warning: {shard.name} was made again and its bytes differ, because the device, the batch or a version differs; "
                    "later blocks were solved with the old bytes"
                )
            self.journal.commit(commit)
            self.leave(shard)
            if self.pusher is not None:
                self.pusher.add(commit)

    def follow(self, shards: Sequence[Shard]) -> None:
        """Shards that will be made next, in this order. If their sources are on a server, they are fetched ahead."""
        if self.remote is not None:
            self.remote.follow((shard.number, [self.checkpoint[name] for name in shard.sources]) for shard in shards)

    def hold(self, shards: Iterable[Shard]) -> None:
        """These shards, and no others, will be read again once they are committed: they stay in OUT."""
        if self.pusher is not None:
            self.pusher.hold(self.journal.shard_name(shard.number) for shard in shards)

    def release(self, shards: Iterable[Shard]) -> None:
        """Shards that were held are not read again."""
        if self.pusher is not None:
            self.pusher.release(self.journal.shard_name(shard.number) for shard in shards)

    def leave(self, shard: Shard) -> None:
        """A shard's sources are not needed any more."""
        if self.remote is not None:
            self.remote.done(shard.number)

    def require_same_sources(self, shards: Sequence[Shard], source: str) -> None:
        """Raise UsageError if a committed shard was made from weights that differ from the source's.

        Weights that were on a server then and are on a disk now, or the other way round, cannot be compared; a warning says so.
        """
        remote = self.remote is not None
        for shard in shards:
            commit = self.committed(shard)
            if commit is None:
                continue
            if commit.source.startswith(REMOTE_SAMPLE) != remote:
                self.control.progress.warn_once(
                    "source moved",
                    f"the first shards were made from a model {'on a disk' if remote else 'on a server'}: headers and config are the same, "
                    "weights are not compared",
                )
            elif commit.source != self.checkpoint.sample(list(shard.sources)):
                raise UsageError(
                    f"{self.journal.out}: its shard {commit.shard.file} was made from another source than {source} (the weights differ); "
                    "give the model that the job was started with, or choose another folder"
                )

    def wait(self) -> None:
        """Wait until everything that was handed over is committed. Raises the error of that work."""
        self.behind.wait()
