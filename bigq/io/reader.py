"""Reading tensors, rows of tensors, or raw bytes into buffers, without memory-mapping.

Access to a mapped page of a network file can raise SIGBUS, which cannot be handled, and a single view keeps the mapping of a whole
shard alive. A failed ``preadv`` is an ordinary error that can be reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bigq.errors import CheckpointError, NumericsError, ResourceError
from bigq.io.byte_file import ByteFile, open_bytes
from bigq.io.index import TensorInfo
from bigq.kernels.finiteness import is_finite

CHUNK_BYTES = 16 * 2**20


def read_tensor(info: TensorInfo, *, keep_cached: bool = True) -> Tensor:
    """A whole tensor in host memory. Raises CheckpointError; NumericsError if fp16 or wider numbers contain NaN or Inf.

    keep_cached: whether its pages may stay in the page cache.
    """
    if info.coding is not None:
        return decoded(info, [read_tensor(part, keep_cached=keep_cached) for part in info.parts])
    tensor = torch.empty(info.shape, dtype=info.dtype)
    with tensor_file(info) as file:
        fill(file, info, tensor, info.start)
        if not keep_cached:
            file.drop_cached(info.start, info.stop)
    require_finite(tensor, info)
    return tensor


def decoded(info: TensorInfo, parts: Sequence[Tensor]) -> Tensor:
    """A weight that is stored as numbers and scales, made of these. Raises NumericsError, naming it, if it contains NaN or Inf."""
    assert info.coding is not None
    weight = info.coding.decode(parts, info.dtype)
    if not is_finite(weight):
        raise nonfinite_error(info)
    return weight


def read_range(info: TensorInfo, memory: Tensor, position: int) -> None:
    """Fill host memory with bytes of a tensor, starting at byte ``position`` of its file. Raises CheckpointError, ResourceError."""
    with tensor_file(info) as file:
        fill(file, info, memory, position)


def read_rows(info: TensorInfo, rows: Tensor) -> Tensor:
    """Rows of a matrix [R, d]. rows: int64 [k], ascending. Returns [k, d]. Adjacent rows are read at once."""
    limit = info.shape[0]
    if rows.numel() and not 0 <= int(rows[0]) <= int(rows[-1]) < limit:
        raise CheckpointError(f"{info.file}: tensor {info.name} has {limit} rows, but row {int(rows[-1])} is needed; fetch the model again")
    if info.coding is not None:
        if not info.coding.by_rows:
            return read_tensor(info)[rows]
        first, *others = info.parts
        return decoded(info, [read_rows(first, rows), *map(read_tensor, others)])
    out = torch.empty(len(rows), *info.shape[1:], dtype=info.dtype)
    row_bytes = info.nbytes // max(limit, 1)
    breaks = (rows.diff() != 1).nonzero().flatten().add(1).tolist()
    with tensor_file(info) as file:
        for lo, hi in zip([0, *breaks], [*breaks, len(rows)], strict=True):
            if lo < hi:
                fill(file, info, out[lo:hi], info.start + int(rows[lo]) * row_bytes)
    require_finite(out, info)
    return out


def iter_chunks(info: TensorInfo) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces, each checked for NaN and Inf. A piece is valid until the next.

    Pieces are of ``CHUNK_BYTES``; of a weight that is decoded, a matrix each, or as many rows where each is made of one row.
    """
    if info.coding is not None and info.coding.by_rows:
        step = max(1, CHUNK_BYTES // (info.dtype.itemsize * math.prod(info.shape[1:])))
        for lo in range(0, info.shape[0], step):
            yield as_bytes(read_rows(info, torch.arange(lo, min(lo + step, info.shape[0]))))
        return
    if info.coding is not None:
        for matrix in slices(info) if len(info.shape) > 2 else (info,):
            yield as_bytes(read_tensor(matrix))
        return
    buffer = torch.empty(min(CHUNK_BYTES, info.nbytes), dtype=torch.uint8)
    with tensor_file(info) as file:
        for position in range(info.start, info.stop, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, info.stop - position)]
            fill(file, info, piece, position)
            require_finite(piece.view(info.dtype), info)
            yield as_bytes(piece)


def require_finite(tensor: Tensor, info: TensorInfo) -> None:
    """Raise NumericsError, naming ``info``, if floating-point numbers of 16 or more bits contain NaN or Inf."""
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not is_finite(tensor):
        raise nonfinite_error(info)


def nonfinite_error(info: TensorInfo) -> NumericsError:
    """The error for a tensor of the checkpoint that contains NaN or Inf."""
    return NumericsError(f"{info.file}: tensor {info.name} contains NaN or Inf; the checkpoint is damaged, fetch it again")


def slices(info: TensorInfo) -> tuple[TensorInfo, ...]:
    """The parts of a stored tensor along its first dimension, each as if it were a tensor of its own. Their names are numbered."""
    step = (info.stop - info.start) // info.shape[0]
    inner = [slices(part) for part in info.parts]
    return tuple(
        dataclasses.replace(
            info,
            name=f"{info.name}[{i}]",
            shape=info.shape[1:],
            start=info.start + i * step,
            stop=info.start + (i + 1) * step,
            parts=tuple(part[i] for part in inner),
        )
        for i in range(info.shape[0])
    )


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor, shared and writable. It keeps the tensor alive.

    A ctypes array is avoided: it creates a type per size, which stays in a reference cycle until garbage collection.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def open_file(info: TensorInfo) -> ByteFile:
    """Open a tensor's file. Raises CheckpointError if it is missing or not readable, else ResourceError."""
    try:
        return open_bytes(info.file)
    except OSError as error:
        kind = CheckpointError if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)) else ResourceError
        raise kind(
            f"{info.file}: cannot be opened to read tensor {info.name}: {error.strerror}; check that it exists and is readable"
        ) from error


@contextlib.contextmanager
def tensor_file(info: TensorInfo) -> Iterator[ByteFile]:
    """A tensor's file, closed at the end of the block. Raises as ``open_file`` does."""
    file = open_file(info)
    try:
        yield file
    finally:
        file.close()


def fill(file: ByteFile, info: TensorInfo, memory: Tensor, position: int, stopped: Callable[[], bool] = lambda: False) -> None:
    """Fill ``memory`` with bytes of a tensor, starting at byte ``position`` of its file.

    stopped: called before each read; once it returns True, the rest is not read. Raises CheckpointError if the file is too short,
    ResourceError if the disk or the server fails.
    """
    view = as_bytes(memory)
    done = 0
    while done < len(view) and not stopped():
        try:
            got = file.read_into(view[done : done + CHUNK_BYTES], position + done, stopped)
        except OSError as error:
            raise ResourceError(
                f"{info.file}: reading at byte {position + done} (tensor {info.name}) failed: {error.strerror}; "
                "check the disk, then run the same command again"
            ) from error
        if got == 0 and not stopped():
            raise CheckpointError(
                f"{info.file}: ends at byte {position + done}, before the end of tensor {info.name} in its header; fetch it again"
            )
        done += got
