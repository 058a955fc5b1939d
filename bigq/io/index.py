"""The tensors of a checkpoint folder: file, dtype, shape and byte range of each, validated before any data is read.

The safetensors header is parsed here, not by the safetensors package, because byte ranges are needed: weights are read into
buffers, never memory-mapped. Layout of a file: the header's length (8 bytes, little-endian), the header (a JSON object
name → {dtype, shape, data_offsets}), the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bigq.errors import CheckpointError
from bigq.io.byte_file import RemoteFile
from bigq.io.json_file import MAX_JSON_BYTES, open_regular, parse_object, show_name, show_value
from bigq.io.json_file import read_json_object as read_json_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SAMPLE_BYTES = 64
#: The beginning of the samples of tensors that are on a server.
REMOTE_SAMPLE = "remote-"
#: Names of the shards of a model.
_SHARD = re.compile(r"\w+-\d{5,}-of-\d{5,}\.safetensors")
#: Maximum number of tensors in a checkpoint. The largest published ones have some 200,000. A tensor's entry takes about 600 bytes.
MAX_TENSORS = 1_000_000
MAX_NAME_CHARACTERS = 1024
MAX_DIMENSIONS = 8
#: Sizes and offsets must fit into int64, as in torch.
MAX_SIZE = 2**63 - 1

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


class Decoder(Protocol):
    """Makes a weight of the tensors that it is stored as. Decoders that do the same are equal and have the same hash.

    by_rows: whether each row of the weight is made of the same row of the first tensor, and of all others.
    """

    @property
    def by_rows(self) -> bool: ...

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``, on the device of its parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor of a checkpoint, stored row-major in bytes ``[start, stop)`` of ``file``.

    coding: for a weight that is stored as numbers and scales, how it is made of them; then ``parts`` are the stored tensors, dtype and
    shape those of the weight, and the bytes those of the first part.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path | RemoteFile
    start: int
    stop: int
    coding: Decoder | None = None
    parts: tuple[TensorInfo, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory."""
        return self.stop - self.start if self.coding is None else math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The stored tensors that it consists of."""
        return (self,) if self.coding is None else tuple(stored for part in self.parts for stored in part.stored)

    @property
    def stored_bytes(self) -> int:
        """Bytes in files."""
        return sum(part.stop - part.start for part in self.stored)


class RemoteHeaders(Protocol):
    """The headers of shards that are on a server."""

    def header(self, shard: str) -> tuple[dict[str, TensorInfo], bytes]:
        """As ``read_header``. shard: its file name."""


class Checkpoint:
    """The tensors of a folder of safetensors shards, by name. fingerprint: a hash over the index and the headers."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], fingerprint: str) -> None:
        self.folder = folder
        self.tensors = tensors
        self.fingerprint = fingerprint

    @classmethod
    def open(cls, folder: Path, remote: RemoteHeaders | None = None) -> Checkpoint:
        """Read the index and every shard's header. remote: has the shards where the folder does not. Raises CheckpointError."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; give MODEL as a folder or a hub id")
        single = folder / SINGLE_NAME
        if (folder / INDEX_NAME).exists():
            return cls._open_indexed(folder, remote)
        if remote is None and not single.exists():
            raise CheckpointError(_missing_checkpoint(folder))
        tensors, header = read_header(single) if remote is None else remote.header(SINGLE_NAME)
        return cls(folder, tensors, hashlib.sha256(header).hexdigest())

    @classmethod
    def _open_indexed(cls, folder: Path, remote: RemoteHeaders | None) -> Checkpoint:
        weight_map = read_weight_map(folder / INDEX_NAME)
        if remote is None:
            _require_one_model(folder, weight_map)
        digest = hashlib.sha256(json.dumps(weight_map, sort_keys=True).encode())
        shards: dict[str, dict[str, TensorInfo]] = {}
        home: dict[str, str] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, shard in weight_map.items():
            if shard not in shards:
                path = folder / shard
                if remote is None and not os.path.exists(path):
                    gone = [each for each in dict.fromkeys(weight_map.values()) if not os.path.exists(folder / each)]
                    more = f" (and {len(gone) - 1} more shards)" if len(gone) > 1 else ""
                    raise CheckpointError(f"{path}{more}: missing, but the index names it; fetch it again")
                shards[shard], header = read_header(path) if remote is None else remote.header(shard)
                digest.update(header)
                for held in shards[shard]:
                    if home.setdefault(held, shard) != shard:
                        raise CheckpointError(f"{path}: tensor {held} is also in {home[held]}; fetch the model again")
                if len(home) > MAX_TENSORS:
                    raise CheckpointError(f"{folder}: has more than {MAX_TENSORS} tensors, the maximum that bigq reads")
            if name not in shards[shard]:
                raise CheckpointError(
                    f"{folder / shard}: tensor {show_name(name)} is missing, but the index names it; fetch the shard again"
                )
            tensors[name] = shards[shard][name]
        return cls(folder, tensors, digest.hexdigest())

    def sample(self, names: Iterable[str]) -> str:
        """A hash over a few bytes of each named tensor. It distinguishes models of one architecture, but does not detect every change.

        Of tensors on a server, their files' versions are taken, and ``REMOTE_SAMPLE`` comes first. Raises CheckpointError.
        """
        digest, remote = hashlib.sha256(), False
        for info in (part for name in names for part in self[name].stored):
            if isinstance(info.file, RemoteFile):
                remote = True
                digest.update(json.dumps([info.file.name, info.file.size, info.file.version, info.start, info.stop]).encode())
                continue
            try:
                with open(info.file, "rb") as file:
                    for position in (info.start, (info.start + info.stop) // 2, info.stop - SAMPLE_BYTES):
                        file.seek(max(position, info.start))
                        digest.update(file.read(min(SAMPLE_BYTES, info.nbytes)))
            except OSError as error:
                raise CheckpointError(f"{info.file}: cannot be read: {error.strerror}; check that the file still exists") from error
        return (REMOTE_SAMPLE if remote else "") + digest.hexdigest()

    @property
    def files(self) -> set[Path]:
        """The files on this machine that hold its tensors."""
        return {part.file for info in self.tensors.values() for part in info.stored if isinstance(part.file, Path)}

    @property
    def stored_bytes(self) -> int:
        """Bytes of its tensors in files."""
        return sum(part.stop - part.start for part in {part for info in self.tensors.values() for part in info.stored})

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing; fetch the model again") from None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)


def read_weight_map(path: Path) -> dict[str, str]:
    """The index at ``path``: tensor name → the file name of its shard, in the index's order. Raises CheckpointError."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map; fetch the index again")
    shards: set[str] = set()
    for name, shard in weight_map.items():
        if isinstance(shard, str) and shard in shards:
            continue
        if not _is_file_name(shard):
            raise CheckpointError(
                f"{path}: the shard of {show_name(name)} is {show_value(shard)}, which is not a file name; fetch the index again"
            )
        shards.add(shard)
    return weight_map


def read_header(path: Path) -> tuple[dict[str, TensorInfo], bytes]:
    """Parse and validate a shard's header. Returns its tensors and the bytes of the header. Raises CheckpointError."""
    try:
        file, size = open_regular(path)
        with file:
            header = file.read(header_length(path, file.read(8), size))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_header(path, header, size), header


def header_length(file: Path | RemoteFile, prefix: bytes, size: int) -> int:
    """The bytes of a shard's header. prefix: the file's first 8 bytes, or fewer of a smaller file. Raises CheckpointError."""
    if len(prefix) < 8:
        raise CheckpointError(f"{file}: too short for a safetensors file; fetch it again")
    if prefix == b"version ":
        raise CheckpointError(f"{file}: is a pointer of Git LFS, not the file itself; run git lfs pull in the model's folder")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_JSON_BYTES, size - 8):
        raise CheckpointError(f"{file}: header of {length} bytes in a file of {size}; damaged or not safetensors, fetch it again")
    return int(length)


def parse_header(path: Path | RemoteFile, header: bytes, size: int) -> dict[str, TensorInfo]:
    """The tensors of a shard. header: its JSON text. size: of the file in bytes. Raises CheckpointError."""
    entries = parse_object(path, header)
    _check_metadata(path, entries.pop("__metadata__", None))
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{path}: has more than {MAX_TENSORS} tensors, the maximum that bigq reads")
    data_start = 8 + len(header)
    tensors = {name: header_entry(path, name, entry, data_start, size) for name, entry in entries.items()}
    _check_layout(path, tensors, data_start, size)
    return tensors


def _is_file_name(name: Any) -> bool:
    """Whether a JSON value is a plain file name and not a path."""
    return isinstance(name, str) and name.isprintable() and 0 < len(name) < 256 and name not in (".", "..") and Path(name).name == name


def _check_metadata(path: Path | RemoteFile, metadata: Any) -> None:
    if metadata is None:  # as the safetensors library reads it
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is {show_value(metadata)}, not an object of strings; fetch the file again")


def header_entry(path: Path | RemoteFile, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    """Parse and validate a tensor's entry in the header of a file of ``size`` bytes. Raises CheckpointError."""

    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {show_name(name)}: {what}")

    if not name.isprintable() or len(name) > MAX_NAME_CHARACTERS:
        raise bad(f"its name has unprintable or more than {MAX_NAME_CHARACTERS} characters")
    if not isinstance(entry, dict):
        raise bad("its header entry is not an object")
    kind = entry.get("dtype")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise bad(f"dtype {show_value(kind)} is not supported; bigq reads {', '.join(DTYPES)}")
    dtype = DTYPES[kind]
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise bad(f"shape {show_value(shape)} is not a list of at most {MAX_DIMENSIONS} dimensions")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise bad(f"data_offsets {show_value(offsets)} are not two offsets")
    start, stop = data_start + offsets[0], data_start + offsets[1]
    if stop > size:
        raise bad(f"ends at byte {stop} of a file of {size} bytes; the file is truncated, fetch it again")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise bad(f"has {stop - start} bytes, which does not match shape {shape} and dtype {kind}")
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), file=path, start=start, stop=stop)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _check_layout(path: Path | RemoteFile, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """Raise CheckpointError if tensors overlap, or do not cover all data of the file."""
    position = data_start
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if info.start != position:
            what = "overlaps another tensor" if info.start < position else "has a gap before it"
            raise CheckpointError(f"{path}: tensor {info.name} {what}; the file is damaged, fetch it again")
        position = info.stop
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor; the file is damaged, fetch it again")


def _require_one_model(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Raise CheckpointError where a single file lies beside the index of other shards: other readers load the file, not the shards."""
    others = [shard for shard in weight_map.values() if shard != SINGLE_NAME]
    if others and (folder / SINGLE_NAME).exists():
        raise CheckpointError(
            f"{folder / SINGLE_NAME}: lies beside {INDEX_NAME}, which names other files ({min(others)}); transformers loads that one, "
            f"bigq the shards: remove {SINGLE_NAME}, or {INDEX_NAME} and its shards, whichever is not your model"
        )


def unread_warnings(folder: Path, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """A warning of files that are named like shards, but hold none of the tensors: no index names them, and no program reads them."""
    read = {part.file.name for info in tensors.values() for part in info.stored}
    unread = sorted(path.name for path in folder.glob("*.safetensors") if _SHARD.fullmatch(path.name) and path.name not in read)
    if not unread:
        return ()
    which = unread[0] if len(unread) == 1 else f"{len(unread)} shards, such as {unread[0]},"
    return (f"{folder}: {which} {'is' if len(unread) == 1 else 'are'} not in the index and not read; are they left from another model?",)


def _missing_checkpoint(folder: Path) -> str:
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if any(_SHARD.fullmatch(name) for name in shards):
        return f"{folder}: contains shards ({shards[0]}) but no {INDEX_NAME}, which says what they hold; fetch the index too"
    if shards:
        return (
            f"{folder}: contains {shards[0]}, but neither {SINGLE_NAME} nor {INDEX_NAME}; "
            f"if it is the whole model, rename it to {SINGLE_NAME}"
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return (
            f"{folder}: contains pickle checkpoints (.bin, .pt), which bigq never loads since they can run code; "
            "convert them to safetensors first (load the model with transformers and call save_pretrained)"
        )
    return f"{folder}: contains no {INDEX_NAME} or {SINGLE_NAME}; MODEL must be a folder of safetensors shards or a hub id"
