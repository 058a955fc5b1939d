"""Writing shards and committing them: each unit's shard is durable before its line is in the journal.

temp file → fsync → rename → fsync of the folder → journal line → fsync
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from bigq import faults
from bigq.errors import UsageError
from bigq.io.device_to_host import DeviceToHost
from bigq.io.file_stamps import Stamps
from bigq.io.index import Checkpoint
from bigq.io.writer import OutputTensor, write_shard
from bigq.job.journal import Commit, Journal, modification_time
from bigq.job.owner import Owner
from bigq.machine.ranks import Ranks
from bigq.progress.records import LinearRecord
from bigq.sched.control import Control
from bigq.sched.write_behind import WriteBehind


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What a unit's shard holds, and what the journal says of it.

    left_out: module names of Linears that stay unquantized although no rule says so; skipped: those among them that could not be
    quantized, with the reason. batch: calibration rows that went through the block at once; None where none were needed.
    """

    tensors: Sequence[OutputTensor]
    records: Sequence[LinearRecord] = ()
    left_out: Sequence[str] = ()
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    batch: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard of the output: its number and name in the journal, and the checkpoint's tensors that it is made from."""

    number: int
    name: str
    sources: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWriter:
    """Writes the shards of a job that owns its folder. exporter: brings a GPU's tensors to the host; None on a CPU."""

    checkpoint: Checkpoint
    journal: Journal
    owner: Owner
    stamps: Stamps
    behind: WriteBehind
    exporter: DeviceToHost | None
    control: Control
    ranks: Ranks

    def committed(self, shard: Shard) -> Commit | None:
        """The shard's commit, by this run or an earlier one."""
        return self.journal.commit_of(shard.number)

    def packed(self, tensors: Mapping[str, Tensor]) -> list[OutputTensor]:
        """Tensors of a packed Linear as they are to be written."""
        return [OutputTensor.of(name, tensor, self.exporter) for name, tensor in tensors.items()]

    def stored(self, name: str) -> OutputTensor:
        """A tensor of the checkpoint, unchanged."""
        return OutputTensor.copy_of(self.checkpoint[name])

    def hand_over(self, shard: Shard, product: Product, block: int | None = None) -> None:
        """Write and commit in the background (see ``WriteBehind``). block: its number, for the display."""
        faults.point("block.solved")
        self.control.progress.phase("write", block)
        self.control.clock.synchronize()  # the records' seconds become numbers before another thread writes them
        with self.control.clock.phase("write"):
            self.behind.start(lambda: self.commit(shard, product))

    def commit(self, shard: Shard, product: Product) -> None:
        """Write a shard and its line in the journal. Raises ResourceError, CheckpointError."""
        if not self.ranks.writes(shard.number):
            return
        with self.control.clock.trace.span("commit", shard.name):
            self.owner.check()
            path = self.journal.out / self.journal.shard_name(shard.number)
            written = write_shard(path, list(product.tensors))
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
                    "later blocks were solved on the former bytes"
                )
            self.journal.commit(commit)

    def require_same_sources(self, shards: Sequence[Shard], source: str) -> None:
        """Raise UsageError where a committed shard was made from other weights than the source holds now."""
        for shard in shards:
            commit = self.committed(shard)
            if commit is not None and commit.source != self.checkpoint.sample(list(shard.sources)):
                raise UsageError(
                    f"{self.journal.out}: its shard {commit.shard.file} was made from another source than {source} (the weights differ); "
                    "give the model that the job was started with, or choose another folder"
                )

    def wait(self) -> None:
        """Until everything that was handed over is committed. Raises what went wrong there."""
        self.behind.wait()
