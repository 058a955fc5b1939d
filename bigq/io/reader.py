"""Reading tensors, rows of them, or their raw bytes into memory of our own (never mapped pages).

A mapped page of a network file can raise SIGBUS, which nothing can catch, and one live view keeps a whole shard's
mapping alive; a short ``preadv`` is an ordinary error that can be told to the user.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bigq.errors import CheckpointError, NumericsError, ResourceError
from bigq.io.index import TensorInfo
from bigq.kernels.finiteness import is_finite

CHUNK_BYTES = 16 * 2**20
#: The page cache holds files in folios of up to this size (ext4, xfs on x86-64), and drops only whole ones.
FOLIO_BYTES = 2 * 2**20


def read_tensor(info: TensorInfo, *, check_finite: bool = True, keep_cached: bool = True) -> Tensor:
    """One whole tensor, in host memory. Raises CheckpointError; NumericsError where fp16 or wider numbers hold NaN or Inf.

    keep_cached: whether its pages may stay in the page cache.
    """
    tensor = torch.empty(info.shape, dtype=info.dtype)
    with opened(info) as fd:
        fill(fd, info, tensor, info.start)
        if not keep_cached:
            drop_cached(fd, info.start, info.stop)
    if check_finite:
        require_finite(tensor, info)
    return tensor


def read_range(info: TensorInfo, memory: Tensor, position: int) -> None:
    """Fill host memory with a tensor's bytes from byte ``position`` of its file on. Raises CheckpointError, ResourceError."""
    with opened(info) as fd:
        fill(fd, info, memory, position)


def read_rows(info: TensorInfo, rows: Tensor) -> Tensor:
    """Some rows of a matrix [R, d]: int64 ``rows`` [k], ascending → [k, d]. Neighbours are read together."""
    limit = info.shape[0]
    if rows.numel() and not 0 <= int(rows[0]) <= int(rows[-1]) < limit:
        raise CheckpointError(f"{info.file}: tensor {info.name} has {limit} rows; row {int(rows[-1])} was asked for")
    out = torch.empty(len(rows), *info.shape[1:], dtype=info.dtype)
    row_bytes = info.nbytes // max(limit, 1)
    breaks = (rows.diff() != 1).nonzero().flatten().add(1).tolist()
    with opened(info) as fd:
        for lo, hi in zip([0, *breaks], [*breaks, len(rows)], strict=True):
            if lo < hi:
                fill(fd, info, out[lo:hi], info.start + int(rows[lo]) * row_bytes)
    require_finite(out, info)
    return out


def iter_chunks(info: TensorInfo) -> Iterator[memoryview]:
    """A tensor's bytes in bounded pieces, checked for NaN and Inf on the way. Each piece is valid until the next."""
    buffer = torch.empty(min(CHUNK_BYTES, info.nbytes), dtype=torch.uint8)
    with opened(info) as fd:
        for position in range(info.start, info.stop, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, info.stop - position)]
            fill(fd, info, piece, position)
            require_finite(piece.view(info.dtype), info)
            yield as_bytes(piece)


def require_finite(tensor: Tensor, info: TensorInfo) -> None:
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not is_finite(tensor):
        raise not_finite(info)


def not_finite(info: TensorInfo) -> NumericsError:
    return NumericsError(f"{info.file}: tensor {info.name} contains NaN or Inf; the checkpoint is damaged, fetch it again")


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor, shared and writable; it keeps the tensor alive.

    Not through a ctypes array: its type is made anew for every size and lives in a cycle until the collector comes.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def open_file(info: TensorInfo) -> int:
    """A file descriptor to read a tensor with. Raises CheckpointError where it is not there or not readable, else ResourceError."""
    try:
        return os.open(info.file, os.O_RDONLY)
    except OSError as error:
        kind = CheckpointError if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)) else ResourceError
        raise kind(
            f"{info.file}: cannot be opened to read tensor {info.name}: {error.strerror}; is it still there, and readable?"
        ) from error


@contextlib.contextmanager
def opened(info: TensorInfo) -> Iterator[int]:
    fd = open_file(info)
    try:
        yield fd
    finally:
        os.close(fd)


def fill(fd: int, info: TensorInfo, memory: Tensor, position: int, stopped: Callable[[], bool] = lambda: False) -> None:
    """Read exactly the bytes of ``memory``, part of a tensor, from byte ``position`` of its file on.

    stopped: asked between reads; what is left is not read once it is true. Raises CheckpointError, ResourceError where the disk fails.
    """
    view = as_bytes(memory)
    done = 0
    while done < len(view) and not stopped():
        try:
            got = os.preadv(fd, [view[done : done + CHUNK_BYTES]], position + done)
        except OSError as error:
            raise ResourceError(
                f"{info.file}: reading at byte {position + done} (tensor {info.name}) failed: {error.strerror}; "
                "check the disk, then run the same command again"
            ) from error
        if got == 0:
            raise CheckpointError(
                f"{info.file}: ends at byte {position + done}, sooner than its header says (tensor {info.name}); fetch it again"
            )
        done += got


def drop_cached(fd: int, start: int, stop: int) -> None:
    """Let the system forget its copy of bytes [start, stop) of a file, where it can.

    From the beginning of their folio on: a folio that two ranges share is dropped with neither by itself. Of 1 GiB read in
    ranges of 5 MB on ext4, 416 MiB stayed with exact ranges, 395 with ranges rounded out to pages, 4 like this.
    """
    if hasattr(os, "posix_fadvise"):
        begin = start // FOLIO_BYTES * FOLIO_BYTES
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, begin, stop - begin, os.POSIX_FADV_DONTNEED)
