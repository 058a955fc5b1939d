"""The hidden states between two blocks, kept on disk so that a job that was killed need not replay all finished blocks.

    OUT/.bigq/activations-00012.safetensors   what enters block 12
    OUT/.bigq/checkpoints.json                which of these files are whole

A new file is written beside the one before and recorded when it is durable; at most two are there at any time. They are a matter of time
only: where none can be used, or the disk has no room for one, blocks are replayed from the first on.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bigq import faults
from bigq.errors import BigqError, CheckpointError, ResourceError
from bigq.io.checksum import load_record, save_record
from bigq.io.index import read_header
from bigq.io.reader import as_bytes, read_range
from bigq.io.shard_record import ShardRecord, file_sha256
from bigq.io.writer import OutputTensor, write_shard
from bigq.job.journal import CHECKPOINTS_NAME
from bigq.sched.rows.store import ActivationStore

#: The hidden states, and where a job follows them, those of the original model.
TENSORS = ("hidden_states", "original_hidden_states")
#: Bytes per second that a checkpoint is expected to be written with, as long as none was.
EXPECTED_RATE = 500e6


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A checkpoint: the hidden states that enter a block, in a file."""

    block: int
    file: str
    size: int
    sha256: str


class Checkpoints:
    """The activation checkpoints of a job.

    every: seconds of replaying that a job which goes on may have to repeat; None keeps no checkpoints.
    say: told what is worth knowing.
    """

    def __init__(self, state: Path, every: float | None, say: Callable[[str], None]) -> None:
        self._state, self._every, self._say = state, every, say
        self._kept = self._read_record()
        self._replay = 0.0
        self._rate = EXPECTED_RATE
        self._remove_others()

    def _read_record(self) -> list[CheckpointFile]:
        try:
            value = load_record(self._state / CHECKPOINTS_NAME, "")
            return [] if value is None else [CheckpointFile(**entry) for entry in value["kept"]]
        except (BigqError, KeyError, TypeError):
            self._say("the record of saved activations is damaged or cannot be read; finished blocks are replayed")
            return []

    def restore(self, first: int, *stores: ActivationStore) -> int | None:
        """Fill the stores with the newest hidden states that enter block ``first`` or one before it; that block, or None.

        Files that are not as they were written are passed over and removed.
        """
        for saved in sorted(self._kept, key=lambda s: -s.block):
            if saved.block <= first:
                path = self._state / saved.file
                try:
                    if path.stat().st_size == saved.size and file_sha256(path) == saved.sha256:
                        self._fill(path, stores)
                        return saved.block
                except (OSError, BigqError) as error:
                    self._say(f"{path.name}: cannot be read ({error})")
                self._say(f"{path.name}: is damaged or does not fit; an earlier one is used, or finished blocks are replayed")
                with contextlib.suppress(OSError, ResourceError):
                    self._record([other for other in self._kept if other is not saved])
        return None

    def _fill(self, path: Path, stores: Sequence[ActivationStore]) -> None:
        header = read_header(path)[0]
        infos = [header.get(name) for name in TENSORS[: len(stores)]]
        for info, store in zip(infos, stores, strict=True):
            if info is None or info.shape != store.shape or info.dtype != store.dtype:
                held = "no such tensor" if info is None else f"{list(info.shape)} {info.dtype}"
                raise CheckpointError(f"holds {held} instead of {list(store.shape)} {store.dtype}")
            row = math.prod(info.shape[1:]) * info.dtype.itemsize
            for lo, hi in store.spans():
                rows = torch.empty(hi - lo, *info.shape[1:], dtype=info.dtype)
                read_range(info, rows, info.start + lo * row)
                store.put(lo, rows.to(store.device))

    def add_replay_time(self, seconds: float) -> None:
        """A block was finished that would take so long to replay."""
        self._replay += seconds

    @property
    def due(self) -> bool:
        """Whether replaying what was finished since the last checkpoint takes longer than it should."""
        return self._every is not None and self._replay >= max(self._every, 1e-9)

    def keeps(self, block: int) -> bool:
        """Whether the hidden states that enter a block are on disk."""
        return any(saved.block == block for saved in self._kept)

    def expected_seconds(self, *stores: ActivationStore) -> float:
        """How long saving is expected to take."""
        return sum(math.prod(store.shape) * store.dtype.itemsize for store in stores) / self._rate

    def save(self, block: int, *stores: ActivationStore) -> None:
        """Keep the hidden states that enter a block, unless they are kept already. A disk without room for them is no error."""
        if self._every is None:
            return
        if any(saved.block == block for saved in self._kept):
            self._replay = 0.0
            return
        started = time.monotonic()
        newest = sorted(self._kept, key=lambda s: s.block)[-1:]
        path = self._state / f"activations-{block:05d}.safetensors"
        try:
            faults.point("checkpoint.begun")
            # Recorded before the file goes: the record never names one that is not there.
            self._record(newest)
            shard = self._write(path, stores)
            faults.point("checkpoint.written")
            self._record([*newest, CheckpointFile(block, shard.file, shard.size, shard.sha256)])
            faults.point("checkpoint.recorded")
        except (OSError, ResourceError) as error:
            self._every = None
            # Whatever the record says now, it names this one; the room that others take is needed for the job itself.
            self._kept = newest
            self._remove_others()
            self._say(f"activations are not saved any more, so a job that is killed replays its finished blocks ({_error_text(error)})")
            return
        self._replay = 0.0
        self._rate = shard.size / max(time.monotonic() - started, 1e-6)

    def _write(self, path: Path, stores: Sequence[ActivationStore]) -> ShardRecord:
        def chunks(store: ActivationStore) -> Iterator[memoryview]:
            for lo, hi in store.spans():
                yield as_bytes(store.rows(lo, hi).to("cpu").contiguous())

        return write_shard(
            path,
            [
                OutputTensor(name=name, dtype=store.dtype, shape=store.shape, chunks=functools.partial(chunks, store))
                for name, store in zip(TENSORS, stores, strict=False)
            ],
        )

    def _record(self, kept: list[CheckpointFile]) -> None:
        if kept != self._kept:
            save_record(self._state / CHECKPOINTS_NAME, {"kept": [asdict(saved) for saved in kept]})
            self._kept = kept
            self._remove_others()

    def _remove_others(self) -> None:
        """Remove the files that are not kept."""
        known = {saved.file for saved in self._kept}
        with contextlib.suppress(OSError):
            for path in self._state.glob("activations-*"):
                if path.name not in known:
                    path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove everything: the job is done."""
        self._kept = []
        with contextlib.suppress(OSError):
            (self._state / CHECKPOINTS_NAME).unlink(missing_ok=True)
            self._remove_others()


def _error_text(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
