"""Reading tensors, rows of them, or their raw bytes into memory of our own (never mapped pages).

A mapped page of a network file can raise SIGBUS, which nothing can catch, and one live view keeps a whole shard's
mapping alive; a short ``preadv`` is an ordinary error that can be told to the user.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bigq.errors import CheckpointError, NumericsError
from bigq.io.index import TensorInfo
from bigq.kernels.finite import finite

CHUNK_BYTES = 16 * 2**20


def read_tensor(info: TensorInfo, *, check_finite: bool = True) -> Tensor:
    """One whole tensor, in host memory. Raises CheckpointError; NumericsError where fp16 or wider numbers hold NaN or Inf."""
    tensor = torch.empty(info.shape, dtype=info.dtype)
    with _Descriptor(info.file) as fd:
        _fill(fd, info.file, tensor, info.start)
    if check_finite:
        require_finite(tensor, info)
    return tensor


def read_rows(info: TensorInfo, rows: Tensor) -> Tensor:
    """Some rows of a matrix [R, d]: int64 ``rows`` [k], ascending → [k, d]. Neighbours are read together."""
    limit = info.shape[0]
    if rows.numel() and not 0 <= int(rows[0]) <= int(rows[-1]) < limit:
        raise CheckpointError(f"{info.file}: tensor {info.name} has {limit} rows; row {int(rows[-1])} was asked for")
    out = torch.empty(len(rows), *info.shape[1:], dtype=info.dtype)
    row_bytes = info.nbytes // max(limit, 1)
    breaks = (rows.diff() != 1).nonzero().flatten().add(1).tolist()
    with _Descriptor(info.file) as fd:
        for lo, hi in zip([0, *breaks], [*breaks, len(rows)], strict=True):
            if lo < hi:
                _fill(fd, info.file, out[lo:hi], info.start + int(rows[lo]) * row_bytes)
    require_finite(out, info)
    return out


def iter_chunks(info: TensorInfo) -> Iterator[memoryview]:
    """A tensor's bytes in bounded pieces, checked for NaN and Inf on the way. Each piece is valid until the next."""
    buffer = torch.empty(min(CHUNK_BYTES, info.nbytes), dtype=torch.uint8)
    with _Descriptor(info.file) as fd:
        for position in range(info.start, info.stop, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, info.stop - position)]
            _fill(fd, info.file, piece, position)
            require_finite(piece.view(info.dtype), info)
            yield as_bytes(piece)


def require_finite(tensor: Tensor, info: TensorInfo) -> None:
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not finite(tensor):
        raise NumericsError(f"{info.file}: tensor {info.name} contains NaN or Inf; the checkpoint is damaged, fetch it again")


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor, shared and writable; it keeps the tensor alive.

    Not through a ctypes array: its type is made anew for every size and lives in a cycle until the collector comes.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class _Descriptor:
    """An open file descriptor for reading, with errors told in our terms."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        try:
            self._fd = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be opened: {error.strerror}") from error
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _fill(fd: int, path: Path, tensor: Tensor, position: int) -> None:
    """Read exactly the tensor's bytes from ``position`` on."""
    view = as_bytes(tensor)
    done = 0
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done : done + CHUNK_BYTES]], position + done)
        except OSError as error:
            raise CheckpointError(f"{path}: reading at byte {position + done} failed: {error.strerror}") from error
        if got == 0:
            raise CheckpointError(f"{path}: ends at byte {position + done}, sooner than its header says; fetch it again")
        done += got
