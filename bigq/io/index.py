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

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
SAMPLE_BYTES = 64

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
        index_path = folder / INDEX_NAME
        weight_map = read_json_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path}: has no weight_map; fetch the index again")
        digest = hashlib.sha256(json.dumps(weight_map, sort_keys=True).encode())
        shards: dict[str, dict[str, TensorInfo]] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(f"{index_path}: {name} is said to lie in {shard!r}, which is not a file name in this folder")
            if shard not in shards:
                path = folder / shard
                if not os.path.exists(path):
                    raise CheckpointError(f"{path}: this shard is named by the index but missing; fetch it again")
                shards[shard], header = read_header(path)
                digest.update(header)
            if name not in shards[shard]:
                raise CheckpointError(f"{folder / shard}: tensor {name} is named by the index but not in the shard; fetch it again")
            tensors[name] = shards[shard][name]
        return cls(folder, tensors, digest.hexdigest())

    def sample(self, names: Iterable[str]) -> str:
        """A hash over a few bytes of each of some tensors: it tells models of one architecture apart, not single weights."""
        digest = hashlib.sha256()
        for name in names:
            info = self[name]
            with open(info.file, "rb") as file:
                for position in (info.start, (info.start + info.stop) // 2, info.stop - SAMPLE_BYTES):
                    file.seek(max(position, info.start))
                    digest.update(file.read(min(SAMPLE_BYTES, info.nbytes)))
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


def read_header(path: Path) -> tuple[dict[str, TensorInfo], bytes]:
    """Parse and check one shard's header. Returns the tensors and the header's bytes. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: too short to be a safetensors file; fetch it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: header of {length} bytes in a file of {size}; it is damaged or not safetensors")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    entries = _parse_json(path, header)
    data_start = 8 + length
    tensors = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            tensors[name] = _tensor_info(path, name, entry, data_start, size)
    _check_layout(path, tensors, data_start, size)
    return tensors, header


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object. Raises CheckpointError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return _parse_json(path, data)


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CheckpointError(f"{path}: a name occurs twice in its JSON")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its JSON cannot be read ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: its JSON is not an object")
    return value


def _tensor_info(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name}: {what}")

    if not isinstance(entry, dict):
        raise bad("its header entry is not an object")
    kind = entry.get("dtype")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise bad(f"dtype {kind!r} is not one that bigq reads")
    dtype = DTYPES[kind]
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not all(type(s) is int and s >= 0 for s in shape):
        raise bad(f"shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        raise bad(f"data_offsets {offsets!r} are not two offsets")
    start, stop = data_start + offsets[0], data_start + offsets[1]
    if stop > size:
        raise bad(f"ends at byte {stop} of a file of {size} bytes; the file is truncated, fetch it again")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise bad(f"{stop - start} bytes do not hold shape {shape} of {kind}")
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), file=path, start=start, stop=stop)


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
