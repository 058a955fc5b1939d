"""Writing safetensors shards piece by piece: the header first, then each tensor's bytes, hashed on the way."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bigq import faults
from bigq.io.atomic import atomic_file
from bigq.io.device_to_host import Outgoing
from bigq.io.index import DTYPE_NAMES, TensorInfo
from bigq.io.reader import as_bytes, iter_chunks
from bigq.io.shard_record import ShardRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """A tensor to be written; ``chunks`` yields its bytes when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[memoryview]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: Tensor, outgoing: Outgoing | None = None) -> OutputTensor:
        """A tensor that is in memory; one on a GPU leaves it through ``outgoing``."""
        tensor = tensor.contiguous()
        if outgoing is None or not tensor.numel():
            return cls(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), chunks=lambda: [as_bytes(tensor.cpu())])
        computed = outgoing.mark()
        return cls(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), chunks=lambda: outgoing.chunks(tensor, computed))

    @classmethod
    def copy_of(cls, info: TensorInfo) -> OutputTensor:
        """A tensor of the source, copied from shard to shard without being held whole."""
        return cls(name=info.name, dtype=info.dtype, shape=info.shape, chunks=lambda: iter_chunks(info))


def write_shard(path: Path, tensors: Sequence[OutputTensor]) -> ShardRecord:
    """Write a shard atomically and durably. Raises ResourceError where the disk refuses."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        header[t.name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    with atomic_file(path) as file:
        for piece in _pieces(text, tensors):
            faults.point("shard.piece")
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        assert size == 8 + len(text) + offset, f"{path}: wrote {size} bytes instead of {8 + len(text) + offset}"
    return ShardRecord(file=path.name, size=size, sha256=digest.hexdigest(), tensors=tuple(t.name for t in tensors))


def _pieces(header: bytes, tensors: Sequence[OutputTensor]) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(header)) + header
    for t in tensors:
        yield from t.chunks()
