"""Activation checkpoints: the hidden states that enter a block, saved so that a resumed job need not replay all finished blocks.

    OUT/.bigq/activations-00012.safetensors   the inputs of block 12
    OUT/.bigq/checkpoints.json                which of these files are complete

A new file is written before the previous one is removed, and recorded once it is durable. At most two exist at any time. Checkpoints
only save time: without a usable one, or without disk space for one, blocks are replayed from the first on.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bigq import faults
from bigq.errors import BigqError, CheckpointError, ResourceError
from bigq.io.checksum import load_record, save_record
from bigq.io.index import TensorInfo, read_header
from bigq.io.reader import as_bytes, read_range
from bigq.io.shard_record import ShardRecord, file_sha256
from bigq.io.writer import OutputTensor, write_shard
from bigq.job.journal import CHECKPOINTS_NAME
from bigq.sched.rows.store import ActivationStore

#: Tensor names: the hidden states, and with gptaq those of the unquantized model. Extra outputs that blocks hand on to the next are beside
#: them, as "hidden_states.handed_on.0".
TENSORS = ("hidden_states", "original_hidden_states")
#: Expected write rate of the first checkpoint, in bytes per second.
EXPECTED_RATE = 500e6


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """The file of a checkpoint. block: the block that its hidden states enter. size in bytes."""

    block: int
    file: str
    size: int
    sha256: str


class Checkpoints:
    """The activation checkpoints of a job.

    every: the longest replay that a resumed job should have to do, in seconds; None saves no checkpoints.
    say: receives warnings.
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
            self._say(f"{CHECKPOINTS_NAME}: is damaged or cannot be read; finished blocks are replayed")
            return []

    @property
    def blocks(self) -> list[int]:
        """The blocks whose inputs are saved."""
        return [saved.block for saved in self._kept]

    def restore(self, first: int, *stores: ActivationStore, among: Container[int] | None = None) -> int | None:
        """Fill the stores from the newest checkpoint at or before block ``first``. Returns its block, or None.

        among: only checkpoints of these blocks.

        Damaged files are skipped and removed.
        """
        for saved in sorted(self._kept, key=lambda s: -s.block):
            if saved.block <= first and (among is None or saved.block in among):
                path = self._state / saved.file
                try:
                    if path.stat().st_size == saved.size and file_sha256(path) == saved.sha256:
                        self._fill(path, stores)
                        return saved.block
                except (OSError, BigqError) as error:
                    self._say(f"{path.name}: cannot be read ({error})")
                self._say(f"{path.name}: is damaged or of another shape; an earlier checkpoint is used, or finished blocks are replayed")
                with contextlib.suppress(OSError, ResourceError):
                    self._record([other for other in self._kept if other is not saved])
        return None

    def _fill(self, path: Path, stores: Sequence[ActivationStore]) -> None:
        header = read_header(path)[0]
        for name, store in zip(TENSORS, stores, strict=False):
            info = header.get(name)
            if info is None or info.shape != store.shape or info.dtype != store.dtype:
                held = "no such tensor" if info is None else f"{list(info.shape)} {info.dtype}"
                raise CheckpointError(f"holds {held} instead of {list(store.shape)} {store.dtype}")
            beside = {int(key.rpartition(".")[2]): header[key] for key in header if key.startswith(f"{name}.handed_on.")}
            for lo, hi in store.spans():
                store.put(lo, _read_rows(info, lo, hi).to(store.device))
                extras = [_read_rows(extra, lo, hi).to(store.device) for extra in beside.values()]
                store.handed_on.put(lo, list(beside), extras)

    def add_replay_time(self, seconds: float) -> None:
        """Count a finished block that would take ``seconds`` to replay."""
        self._replay += seconds

    @property
    def due(self) -> bool:
        """Whether replaying the blocks finished since the last checkpoint would take ``every`` seconds or more."""
        return self._every is not None and self._replay >= max(self._every, 1e-9)

    @property
    def newest(self) -> int:
        """The last block whose inputs are saved; -1 if there is none."""
        return max((saved.block for saved in self._kept), default=-1)

    def keeps(self, block: int) -> bool:
        """Whether the inputs of a block are saved."""
        return any(saved.block == block for saved in self._kept)

    def expected_seconds(self, *stores: ActivationStore) -> float:
        """The expected time to save the stores, in seconds."""
        return sum(store.nbytes for store in stores) / self._rate

    def save(self, block: int, *stores: ActivationStore) -> None:
        """Save the inputs of a block, unless they are saved already. A full disk is not an error: checkpoints are then switched off."""
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
            # First drop older files from the record, then delete them: the record never names a missing file.
            self._record(newest)
            shard = self._write(path, stores)
            faults.point("checkpoint.written")
            self._record([*newest, CheckpointFile(block, shard.file, shard.size, shard.sha256)])
            faults.point("checkpoint.recorded")
        except (OSError, ResourceError) as error:
            self._every = None
            # On disk the record names this file in any case. Other files go: the job itself needs their space.
            self._kept = newest
            self._remove_others()
            self._say(f"no more activation checkpoints ({_error_text(error)}); a resumed job may have to replay its finished blocks")
            return
        self._replay = 0.0
        self._rate = shard.size / max(time.monotonic() - started, 1e-6)

    def _write(self, path: Path, stores: Sequence[ActivationStore]) -> ShardRecord:
        def chunks(store: ActivationStore, rows: Callable[[int, int], Tensor]) -> Iterator[memoryview]:
            for lo, hi in store.spans():
                yield as_bytes(rows(lo, hi).to("cpu").contiguous())

        tensors = []
        for name, store in zip(TENSORS, stores, strict=False):
            made = functools.partial(chunks, store, store.rows)
            tensors.append(OutputTensor(name=name, dtype=store.dtype, shape=store.shape, chunks=made))
            for index, extra in store.handed_on.held.items():
                shape, made = (store.shape[0], *extra.shape), functools.partial(chunks, store, extra.get)
                tensors.append(OutputTensor(name=f"{name}.handed_on.{index}", dtype=extra.dtype, shape=shape, chunks=made))
        return write_shard(path, tensors)

    def _record(self, kept: list[CheckpointFile]) -> None:
        if kept != self._kept:
            save_record(self._state / CHECKPOINTS_NAME, {"kept": [asdict(saved) for saved in kept]})
            self._kept = kept
            self._remove_others()

    def _remove_others(self) -> None:
        """Delete the files that are not in the record."""
        known = {saved.file for saved in self._kept}
        with contextlib.suppress(OSError):
            for path in self._state.glob("activations-*"):
                if path.name not in known:
                    path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete all checkpoints, when the job is done."""
        self._kept = []
        with contextlib.suppress(OSError):
            (self._state / CHECKPOINTS_NAME).unlink(missing_ok=True)
            self._remove_others()


def _read_rows(info: TensorInfo, lo: int, hi: int) -> Tensor:
    rows = torch.empty(hi - lo, *info.shape[1:], dtype=info.dtype)
    read_range(info, rows, info.start + lo * math.prod(info.shape[1:]) * info.dtype.itemsize)
    return rows


def _error_text(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
