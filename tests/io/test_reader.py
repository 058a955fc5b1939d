"""Reading tensors and rows, against the safetensors package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigq.errors import CheckpointError, NumericsError
from bigq.io import reader
from bigq.io.index import Checkpoint, TensorInfo
from bigq.io.reader import as_bytes, iter_chunks, read_rows, read_tensor

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
SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (7, 5),
    "vector": (13,),
    "cube": (2, 3, 4),
    "scalar": (),
    "empty": (0, 4),
    "empty tail": (3, 0),
}
INDEX_NAME = "model.safetensors"


def filled(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 50
    return values > 0 if dtype == torch.bool else values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)


def store(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, folder / INDEX_NAME)
    return Checkpoint.open(folder)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def matrix(folder: Path, rows: int = 50) -> tuple[TensorInfo, Tensor]:
    """A stored matrix with a tensor on either side, so that reading beyond it is detected."""
    w = torch.randn(rows, 6, generator=torch.Generator().manual_seed(2))
    return store(folder, {"a": torch.full((9,), 7.0), "w": w, "z": torch.full((9,), -7.0)})["w"], w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_bit_equal_to_what_safetensors_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = store(tmp_path, {name: filled(dtype, shape) for name, shape in SHAPES.items()})
    with safe_open(tmp_path / INDEX_NAME, "pt") as file:
        for name in SHAPES:
            tensor, expected = read_tensor(checkpoint[name]), file.get_tensor(name)
            assert tensor.dtype == expected.dtype == dtype and tensor.shape == expected.shape
            assert raw(tensor) == raw(expected)
            assert b"".join(bytes(piece) for piece in iter_chunks(checkpoint[name])) == raw(expected)


def test_a_tensor_that_was_read_has_its_own_memory(tmp_path: Path) -> None:
    """Writing to it changes neither the file nor a second read."""
    info, w = matrix(tmp_path)
    read_tensor(info).zero_()
    assert torch.equal(read_tensor(info), w)


@pytest.mark.parametrize(
    "rows",
    [[0], [49], [17], [0, 1, 2], [3, 4, 5, 20, 21, 40], [0, 2, 4, 6, 49], list(range(50)), [5, 5, 6, 6, 6], [47, 48, 49], []],
    ids=["first", "last", "single", "run", "runs", "gaps", "all", "repeated", "tail", "none"],
)
def test_rows_equal_those_of_indexing(rows: list[int], tmp_path: Path) -> None:
    info, w = matrix(tmp_path)
    index = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(read_rows(info, index), w[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_rows_of_other_types_and_shapes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: filled(dtype, shape) for name, shape in [("w", (20, 3)), ("cube", (20, 3, 2)), ("vector", (20,))]}
    checkpoint = store(tmp_path, tensors)
    index = torch.tensor([1, 2, 3, 11, 19])
    for name, tensor in tensors.items():
        assert torch.equal(read_rows(checkpoint[name], index), tensor[index])


@pytest.mark.parametrize("rows", [[50], [3, 50], [-1, 3]])
def test_rows_out_of_range_are_refused(rows: list[int], tmp_path: Path) -> None:
    info, _ = matrix(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor w has 50 rows"):
        read_rows(info, torch.tensor(rows))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_with_the_tensors_name(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    w = torch.zeros(6, 5, dtype=dtype)
    w[4, 2] = bad
    info = store(tmp_path, {"layer.w": w})["layer.w"]
    message = r"model\.safetensors: tensor layer\.w contains NaN or Inf"
    with pytest.raises(NumericsError, match=message):
        read_tensor(info)
    with pytest.raises(NumericsError, match=message):
        read_rows(info, torch.tensor([0, 4]))
    with pytest.raises(NumericsError, match=message):
        list(iter_chunks(info))
    assert torch.equal(read_rows(info, torch.tensor([0, 3, 5])), w[[0, 3, 5]]), "other rows are finite"


@pytest.mark.parametrize("missing", [1, 30, 1500])
def test_a_file_that_shrank_after_it_was_opened_is_an_error(missing: int, tmp_path: Path) -> None:
    w = torch.randn(100, 4)
    info = store(tmp_path, {"w": w})["w"]
    os.truncate(info.file, info.stop - missing)
    message = r"model\.safetensors: ends at byte \d+, before the end of tensor"
    with pytest.raises(CheckpointError, match=message):
        read_tensor(info)
    with pytest.raises(CheckpointError, match=message):
        read_rows(info, torch.tensor([0, 99]))
    with pytest.raises(CheckpointError, match=message):
        list(iter_chunks(info))
    assert torch.equal(read_rows(info, torch.tensor([0, 1])), w[:2]), "rows before the end are intact"


def test_a_deleted_file_is_an_error(tmp_path: Path) -> None:
    info, _ = matrix(tmp_path)
    info.file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be opened"):
        read_tensor(info)


@pytest.mark.parametrize("chunk", [8, 64, 1000, 1200, 4096])
def test_a_tensor_larger_than_a_chunk_is_read_in_pieces(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1200 bytes in pieces of ``chunk``: complete, bounded, and all checked, including the last one."""
    info, w = matrix(tmp_path)
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    pieces = [bytes(piece) for piece in iter_chunks(info)]
    assert b"".join(pieces) == raw(w)
    assert [len(p) for p in pieces] == [chunk] * (1200 // chunk) + ([1200 % chunk] if 1200 % chunk else [])
    assert torch.equal(read_tensor(info), w), "reads of bounded size must add up"
    w[-1, -1] = float("nan")
    damaged = store(tmp_path, {"w": w})["w"]
    with pytest.raises(NumericsError, match="tensor w"):
        list(iter_chunks(damaged))


def test_as_bytes_shares_memory() -> None:
    tensor = torch.zeros(3, dtype=torch.int32)
    view = as_bytes(tensor)
    assert len(view) == 12
    view[4] = 5
    assert tensor.tolist() == [0, 5, 0]
    assert len(as_bytes(torch.empty(0, 3))) == 0
