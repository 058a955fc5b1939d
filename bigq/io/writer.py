"""Writing safetensors shards in pieces: the header, then the bytes of each tensor. The SHA-256 is computed during writing."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bigq import faults
from bigq.io.atomic import atomic_file
from bigq.io.device_to_host import DeviceToHost
from bigq.io.index import DTYPE_NAMES, TensorInfo
from bigq.io.reader import as_bytes, iter_chunks
from bigq.io.shard_record import ShardRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """A tensor to be written. chunks: called when the tensor is written; yields its bytes in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[memoryview]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: Tensor, to_host: DeviceToHost | None = None) -> OutputTensor:
        """A tensor in memory. to_host: copies a tensor from a GPU while it is written, instead of now."""
        tensor = tensor.contiguous()
        if to_host is None or not tensor.numel():
            return cls(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), chunks=lambda: [as_bytes(tensor.cpu())])
        computed = to_host.mark()
        return cls(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), chunks=lambda: to_host.chunks(tensor, computed))

    @classmethod
    def copy_of(cls, info: TensorInfo) -> OutputTensor:
        """A tensor of the source, copied in pieces, so that it is never in memory as a whole."""
        return cls(name=info.name, dtype=info.dtype, shape=info.shape, chunks=lambda: iter_chunks(info))


def write_shard(path: Path, tensors: list[OutputTensor]) -> ShardRecord:
    """Write a shard atomically and durably. Raises ResourceError if writing fails.

    tensors: emptied while it is written, so that no tensor stays in memory during the sync to disk.
    """
    names = tuple(t.name for t in tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        header[t.name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        size = _write(file, _pieces(text, tensors), digest.update)
        assert size == 8 + len(text) + offset, f"{path}: wrote {size} bytes instead of {8 + len(text) + offset}"
    return ShardRecord(file=path.name, size=size, sha256=digest.hexdigest(), tensors=names)


def _write(file: BinaryIO, pieces: Iterator[bytes | memoryview], digest: Callable[[bytes | memoryview], None]) -> int:
    """Write all pieces and hash them. Returns their bytes. When it returns, no piece is in memory."""
    size = 0
    for piece in pieces:
        faults.point("shard.piece")
        file.write(piece)
        digest(piece)
        size += len(piece)
    return size


def _pieces(header: bytes, tensors: list[OutputTensor]) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(header)) + header
    tensors.reverse()
    while tensors:
        yield from tensors.pop().chunks()
