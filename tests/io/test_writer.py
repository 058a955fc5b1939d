"""Written shards, against the safetensors package. A failure leaves no file."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bigq.errors import NumericsError, ResourceError
from bigq.io import reader
from bigq.io.atomic import write_json
from bigq.io.index import Checkpoint
from bigq.io.reader import as_bytes
from bigq.io.shard_record import file_sha256
from bigq.io.writer import OutputTensor, write_shard

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def tensors() -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(0)
    every = {str(d).removeprefix("torch."): (torch.rand(3, 5, generator=gen) * 90).to(d) for d in DTYPES}
    return {**every, "scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "transposed": torch.arange(12.0).reshape(3, 4).T}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def outputs() -> list[OutputTensor]:
    return [OutputTensor.of(name, tensor) for name, tensor in tensors().items()]


def test_safetensors_loads_what_was_written(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", outputs())
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors())
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert raw(loaded[name]) == raw(tensor), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_record_describes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    record = write_shard(path, outputs())
    data = path.read_bytes()
    assert (record.file, record.size, record.tensors) == ("x.safetensors", len(data), tuple(tensors()))
    assert record.sha256 == hashlib.sha256(data).hexdigest() == file_sha256(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]


def test_data_is_aligned_and_in_the_order_given(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", outputs())
    data = (tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert list(header) == ["__metadata__", *tensors()]


def test_writing_is_deterministic(tmp_path: Path) -> None:
    one, two = (write_shard(tmp_path / name, outputs()) for name in ("one", "two"))
    assert one.sha256 == two.sha256
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_large_file_is_hashed_whole(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096 * 3 + b"tail"
    (tmp_path / "x").write_bytes(data)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("chunk", [8, 104, 16 * 2**20])
def test_a_copy_of_a_source_tensor_is_exact(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"w": torch.randn(30, 7), "b": torch.randn(11).bfloat16(), "scalar": torch.tensor(3)}
    (tmp_path / "source").mkdir()
    save_file(source, tmp_path / "source" / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "source")
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    write_shard(tmp_path / "copy", [OutputTensor.copy_of(checkpoint[name]) for name in source])
    copied = load_file(tmp_path / "copy")
    assert all(torch.equal(copied[name], tensor) for name, tensor in source.items()) and set(copied) == set(source)


def test_copying_nan_is_an_error(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, float("nan")])}, tmp_path / "model.safetensors")
    info = Checkpoint.open(tmp_path)["w"]
    with pytest.raises(NumericsError, match="tensor w"):
        write_shard(tmp_path / "copy", [OutputTensor.copy_of(info)])
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def failing(error: BaseException) -> OutputTensor:
    def chunks() -> Iterator[memoryview]:
        yield as_bytes(torch.zeros(2))
        raise error

    return OutputTensor(name="bad", dtype=torch.float32, shape=(4,), chunks=chunks)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_a_failure_halfway_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    expected = ResourceError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_shard(tmp_path / "x.safetensors", [OutputTensor.of("a", torch.ones(3)), failing(error)])
    assert list(tmp_path.iterdir()) == []


def test_a_failure_halfway_leaves_an_older_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"older")
    with pytest.raises(ValueError, match="no"):
        write_shard(path, [failing(ValueError("no"))])
    assert path.read_bytes() == b"older" and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("count", [3, 5])
def test_a_tensor_of_fewer_or_more_bytes_than_its_shape_leaves_nothing(count: int, tmp_path: Path) -> None:
    wrong = OutputTensor(name="w", dtype=torch.float32, shape=(4,), chunks=lambda: [as_bytes(torch.ones(count)).tobytes()])  # type: ignore[list-item]
    with pytest.raises(AssertionError, match="instead of"):
        write_shard(tmp_path / "x.safetensors", [wrong])
    assert list(tmp_path.iterdir()) == []


def test_a_write_error_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"gone/x\.safetensors: cannot be written: No such file"):
        write_shard(tmp_path / "gone" / "x.safetensors", outputs())


def test_a_shard_of_no_tensors_is_valid(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", [])
    assert load_file(tmp_path / "x.safetensors") == {}


def test_json_is_written_whole_and_in_order(tmp_path: Path) -> None:
    write_json(tmp_path / "c.json", {"b": 1, "a": [1, {"ü": None}]})
    text = (tmp_path / "c.json").read_text()
    assert json.loads(text) == {"b": 1, "a": [1, {"ü": None}]} and text.index('"b"') < text.index('"a"') and text.endswith("\n")
    with pytest.raises(TypeError):
        write_json(tmp_path / "c.json", {"x": object()})
    assert (tmp_path / "c.json").read_text() == text and len(list(tmp_path.iterdir())) == 1
