"""One pass over a shard, from its first byte to its last: its hash, and whether a reader can use its values.

The shapes of the tensors alone show which Linears are packed and how, so shards of unfinished jobs can be scanned too. Only a piece of
one tensor is in memory at a time.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bigq.errors import DataError
from bigq.io.formats import Format, PackedLinear
from bigq.io.index import TensorInfo, read_header
from bigq.io.reader import as_bytes, fill, tensor_file
from bigq.kernels.finiteness import is_finite

#: Bytes of a tensor that are checked together; unpacking 2-bit zero points takes about 20 times as much.
PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """The result of a pass over a shard.

    tensors: those of its header, in its order. linears: the packed ones, by the prefix of their tensors; where tensors of a Linear do
    not fit each other, it is among the problems instead. zeros: the least and the greatest zero point of each. problems: one line each
    that names the tensor.
    """

    sha256: str
    tensors: Mapping[str, TensorInfo]
    linears: Mapping[str, PackedLinear]
    zeros: Mapping[str, tuple[int, int]]
    problems: tuple[str, ...]


def scan_shard(path: Path, format: Format, read: tuple[Mapping[str, TensorInfo], bytes] | None = None) -> Scan:
    """Scan a shard whose packed Linears are in a format. read: its tensors and header, where it is not at ``path`` but on a server.

    Raises CheckpointError where its header cannot be read, ResourceError where the disk fails.
    """
    tensors, header = read_header(path) if read is None else read
    linears, problems = packed_linears(tensors, format)
    values = _Values(linears, format)
    digest = hashlib.sha256(struct.pack("<Q", len(header)) + header)
    for info in sorted(tensors.values(), key=lambda t: t.start):
        wrong = None
        for start, piece in _pieces(info, values.together(info)):
            digest.update(as_bytes(piece))
            wrong = wrong or values.check(info, piece, start)
        if wrong is not None:
            problems.append(f"tensor {info.name} {wrong}")
    return Scan(sha256=digest.hexdigest(), tensors=tensors, linears=linears, zeros=values.zeros, problems=tuple(problems))


def packed_linears(tensors: Mapping[str, TensorInfo], format: Format) -> tuple[dict[str, PackedLinear], list[str]]:
    """(the packed Linears of a shard by prefix, problems of the others)."""
    linears: dict[str, PackedLinear] = {}
    problems: list[str] = []
    for prefix in format.prefixes(tensors):
        try:
            linears[prefix] = format.geometry(prefix, tensors)
        except DataError as error:
            problems.append(str(error))
    return linears, problems


class _Values:
    """The values that the tensors of a shard may have. zeros: the least and the greatest zero point so far, by prefix."""

    def __init__(self, linears: Mapping[str, PackedLinear], format: Format) -> None:
        self._linears = linears
        self._format = format
        self.zeros: dict[str, tuple[int, int]] = {}

    def _place(self, info: TensorInfo) -> tuple[str, PackedLinear | None, str]:
        """(prefix, the packed Linear that a tensor belongs to, the tensor's suffix)."""
        prefix, suffix = self._format.split(info.name)
        return prefix, self._linears.get(prefix) if suffix in self._format.suffixes(symmetric=False) else None, suffix

    def together(self, info: TensorInfo) -> int:
        """How many elements must be checked together."""
        _, linear, suffix = self._place(info)
        return 1 if linear is None else self._format.values_per_check(suffix, info)

    def check(self, info: TensorInfo, piece: Tensor, start: int) -> str | None:
        """The problem of elements [start, start + len(piece)) of a tensor; None where there is none."""
        prefix, linear, suffix = self._place(info)
        if linear is None:
            return "holds NaN or Inf" if piece.is_floating_point() and piece.itemsize > 1 and not is_finite(piece) else None
        wrong, zeros = self._format.check_values(suffix, linear, piece, start)
        if zeros is not None:
            low, high = self.zeros.get(prefix, zeros)
            self.zeros[prefix] = (min(low, zeros[0]), max(high, zeros[1]))
        return wrong


def _pieces(info: TensorInfo, together: int) -> Iterator[tuple[int, Tensor]]:
    """The pieces of a tensor as (number of the first element, elements); each is valid until the next."""
    unit = together * info.dtype.itemsize
    step = max(PIECE_BYTES // unit, 1) * unit
    buffer = torch.empty(min(step, info.nbytes), dtype=torch.uint8)
    with tensor_file(info) as file:
        for position in range(info.start, info.stop, step):
            piece = buffer[: min(step, info.stop - position)]
            fill(file, info, piece, position)
            yield (position - info.start) // info.dtype.itemsize, piece.view(info.dtype)
