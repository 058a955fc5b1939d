"""What a checkpoint folder holds: every tensor's file, dtype, shape and byte range, checked before anything is read.

The safetensors header is parsed here rather than by the safetensors package because byte ranges are needed:
block weights are read into buffers of our own, never mapped. Layout: 8 bytes of little-endian header length, a
JSON object name → {dtype, shape, data_offsets}, then the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigq.errors import CheckpointError
from bigq.io.json_file import MAX_JSON_BYTES, open_regular, parse_object, plain, shown
from bigq.io.json_file import read_json_object as read_json_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SAMPLE_BYTES = 64
#: Of a whole checkpoint; the largest published ones have some 200,000. One takes about 600 bytes of memory.
MAX_TENSORS = 1_000_000
MAX_NAME_CHARACTERS = 1024
MAX_DIMENSIONS = 8
#: Sizes and offsets must fit a signed 64-bit number, as in the libraries that tensors are handed to.
MAX_SIZE = 2**63 - 1

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of a checkpoint; bytes ``[start, stop)`` of ``file`` hold it, row-major."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Checkpoint:
    """The tensors of a folder of safetensors shards, by name."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], fingerprint: str) -> None:
        self.folder = folder
        self.tensors = tensors
        self.fingerprint = fingerprint

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the index and every shard's header. Raises CheckpointError."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        if (folder / INDEX_NAME).exists():
            return cls._open_indexed(folder)
        single = folder / SINGLE_NAME
        if not single.exists():
            raise CheckpointError(_nothing_to_read(folder))
        tensors, header = read_header(single)
        return cls(folder, tensors, hashlib.sha256(header).hexdigest())

    @classmethod
    def _open_indexed(cls, folder: Path) -> Checkpoint:
        weight_map = read_weight_map(folder / INDEX_NAME)
        digest = hashlib.sha256(json.dumps(weight_map, sort_keys=True).encode())
        shards: dict[str, dict[str, TensorInfo]] = {}
        home: dict[str, str] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, shard in weight_map.items():
            if shard not in shards:
                path = folder / shard
                if not os.path.exists(path):
                    raise CheckpointError(f"{path}: this shard is named by the index but missing; fetch it again")
                shards[shard], header = read_header(path)
                digest.update(header)
                for held in shards[shard]:
                    if home.setdefault(held, shard) != shard:
                        raise CheckpointError(f"{path}: tensor {held} is in {home[held]} too; which one is meant cannot be told")
                if len(home) > MAX_TENSORS:
                    raise CheckpointError(f"{folder}: holds more than {MAX_TENSORS} tensors, which is more than bigq reads")
            if name not in shards[shard]:
                raise CheckpointError(f"{folder / shard}: tensor {plain(name)} is named by the index but not in the shard; fetch it again")
            tensors[name] = shards[shard][name]
        return cls(folder, tensors, digest.hexdigest())

    def sample(self, names: Iterable[str]) -> str:
        """A hash over a few bytes of each of some tensors: it tells models of one architecture apart, not single weights.

        Raises CheckpointError.
        """
        digest = hashlib.sha256()
        for name in names:
            info = self[name]
            try:
                with open(info.file, "rb") as file:
                    for position in (info.start, (info.start + info.stop) // 2, info.stop - SAMPLE_BYTES):
                        file.seek(max(position, info.start))
                        digest.update(file.read(min(SAMPLE_BYTES, info.nbytes)))
            except OSError as error:
                raise CheckpointError(f"{info.file}: cannot be read: {error.strerror}; is it still there?") from error
        return digest.hexdigest()

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing from the checkpoint") from None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)


def read_weight_map(path: Path) -> dict[str, str]:
    """The index at ``path``: tensor name → the file name of its shard, in the index's order. Raises CheckpointError."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map; fetch the index again")
    for name, shard in weight_map.items():
        if not _is_file_name(shard):
            raise CheckpointError(f"{path}: {plain(name)} is said to lie in {shown(shard)}, which is not a file name in this folder")
    return weight_map


def read_header(path: Path) -> tuple[dict[str, TensorInfo], bytes]:
    """Parse and check one shard's header. Returns the tensors and the header's bytes. Raises CheckpointError."""
    try:
        file, size = open_regular(path)
        with file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: too short to be a safetensors file; fetch it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_JSON_BYTES, size - 8):
                raise CheckpointError(f"{path}: header of {length} bytes in a file of {size}; it is damaged or not safetensors")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    entries = parse_object(path, header)
    _check_metadata(path, entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{path}: holds more than {MAX_TENSORS} tensors, which is more than bigq reads")
    data_start = 8 + length
    tensors = {name: header_entry(path, name, entry, data_start, size) for name, entry in entries.items()}
    _check_layout(path, tensors, data_start, size)
    return tensors, header


def _is_file_name(name: Any) -> bool:
    """Whether a JSON value is the name of a file in a folder, and not a path."""
    return isinstance(name, str) and name.isprintable() and 0 < len(name) < 256 and name not in (".", "..") and Path(name).name == name


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: its __metadata__ is {shown(metadata)}, not names and texts; the file is damaged")


def header_entry(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    """One tensor's entry in the header of a file of ``size`` bytes, checked by itself. Raises CheckpointError."""

    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {plain(name)}: {what}")

    if not name.isprintable() or len(name) > MAX_NAME_CHARACTERS:
        raise bad(f"its name is not one of at most {MAX_NAME_CHARACTERS} printable characters")
    if not isinstance(entry, dict):
        raise bad("its header entry is not an object")
    kind = entry.get("dtype")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise bad(f"dtype {shown(kind)} is not one that bigq reads")
    dtype = DTYPES[kind]
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise bad(f"shape {shown(shape)} is not a list of at most {MAX_DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise bad(f"data_offsets {shown(offsets)} are not two offsets")
    start, stop = data_start + offsets[0], data_start + offsets[1]
    if stop > size:
        raise bad(f"ends at byte {stop} of a file of {size} bytes; the file is truncated, fetch it again")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise bad(f"{stop - start} bytes do not hold shape {shape} of {kind}")
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), file=path, start=start, stop=stop)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """No two tensors share bytes, and no byte of the file is left over."""
    position = data_start
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if info.start != position:
            what = "overlaps another tensor" if info.start < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {info.name} {what}; the file is damaged")
        position = info.stop
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor; the file is damaged")


def _nothing_to_read(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return (
            f"{folder}: holds pickle checkpoints (.bin), which bigq never opens because loading one can run code; "
            "convert it to safetensors first (load it with transformers and call save_pretrained)"
        )
    return f"{folder}: holds no {INDEX_NAME} and no {SINGLE_NAME}; MODEL must be a folder of safetensors shards or a hub id"
