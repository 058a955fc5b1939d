"""Headers and indexes of checkpoints: valid ones, and every way in which they can be damaged."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from bigq.errors import CheckpointError
from bigq.io.index import Checkpoint, read_header, read_json_object
from bigq.io.writer import OutputTensor, write_shard

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, torch.Tensor]:
    return {
        "embed.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3),
        "norm.weight": torch.ones(5, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "nothing": torch.empty(0, 7, dtype=torch.float16),
    }


def shard(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int = 0, stop: int = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, stop]}


def write_sharded(folder: Path) -> None:
    """Two shards and an index."""
    save_file({"a": torch.arange(4.0), "b": torch.zeros(2, 2)}, folder / "one.safetensors")
    save_file({"c": torch.arange(3)}, folder / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_single_file_is_read_with_its_byte_ranges(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / SINGLE, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    raw = (tmp_path / SINGLE).read_bytes()
    assert set(checkpoint) == set(tensors()) and "embed.weight" in checkpoint and "other" not in checkpoint
    for name, tensor in tensors().items():
        info = checkpoint[name]
        assert (info.name, info.dtype, info.shape, info.file) == (name, tensor.dtype, tuple(tensor.shape), tmp_path / SINGLE)
        assert info.nbytes == tensor.nbytes
        assert raw[info.start : info.stop] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert {name: checkpoint[name].file.name for name in checkpoint} == {
        "a": "one.safetensors",
        "b": "one.safetensors",
        "c": "two.safetensors",
    }
    info = checkpoint["c"]
    assert info.file.read_bytes()[info.start : info.stop] == struct.pack("<3q", 0, 1, 2)


def test_fingerprints_of_different_checkpoints_differ(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "same", "renamed", "reshaped")]
    contents = [{"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 3)}, {"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}]
    for folder, content in zip(folders, contents, strict=True):
        folder.mkdir()
        save_file(content, folder / SINGLE)
    one, same, *others = (Checkpoint.open(folder).fingerprint for folder in folders)
    assert one == same and len({one, *others}) == 3


def test_fingerprint_of_an_indexed_checkpoint_covers_index_and_headers(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    seen = [Checkpoint.open(tmp_path).fingerprint]
    assert Checkpoint.open(tmp_path).fingerprint == seen[0]
    save_file({"c": torch.arange(4)}, tmp_path / "two.safetensors")
    seen.append(Checkpoint.open(tmp_path).fingerprint)
    write_index(tmp_path, {"a": "one.safetensors", "c": "two.safetensors"})
    seen.append(Checkpoint.open(tmp_path).fingerprint)
    assert len(set(seen)) == 3


def test_the_error_for_a_missing_tensor_names_it_and_the_folder(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: tensor lm_head.weight is missing"):
        Checkpoint.open(tmp_path)["lm_head.weight"]


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too short"),
    "too short": (b"\x08\0\0", "too short"),
    "nothing but a length": (struct.pack("<Q", 0), "JSON"),
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", "header of 1000 bytes in a file of 10"),
    "absurd header length": (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
    "not safetensors at all": (b"PK\x03\x04" + b"x" * 100, "header of"),
    "bad JSON": (shard(b'{"w": '), "invalid JSON"),
    "invalid UTF-8": (shard(b'{"\xff\xfe": 1}'), "invalid JSON"),
    "UTF-16": (shard("{}".encode("utf-16")), "invalid JSON"),
    "nested too deeply": (shard(b"[" * 200_000), "invalid JSON"),
    "number of too many digits": (shard(b'{"w": ' + b"9" * 5000 + b"}"), "invalid JSON"),
    "a list": (shard([1, 2]), "not an object"),
    "duplicate tensor": (shard(b'{"w": {}, "w": {}}'), "occurs twice"),
    "duplicate key": (shard(b'{"w": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"x" * 8), "occurs twice"),
    "entry is no object": (shard({"w": [0, 8]}), "tensor w: its header entry is not an object"),
    "entry is empty": (shard({"w": {}}), "tensor w: dtype"),
    "unknown dtype": (shard({"w": entry(dtype="F4")}, b"x" * 8), "tensor w: dtype 'F4'"),
    "dtype null": (shard({"w": entry(dtype=None)}, b"x" * 8), "tensor w: dtype None"),
    "dtype list": (shard({"w": entry(dtype=["F32"])}, b"x" * 8), "tensor w: dtype"),
    "dtype object": (shard({"w": entry(dtype={"F32": 1})}, b"x" * 8), "tensor w: dtype"),
    "negative shape": (shard({"w": entry(shape=[-2])}, b"x" * 8), r"tensor w: shape \[-2\]"),
    "two negative sizes": (shard({"w": entry(shape=[-1, -2])}, b"x" * 8), r"tensor w: shape \[-1, -2\]"),
    "float shape": (shard({"w": entry(shape=[2.0])}, b"x" * 8), r"tensor w: shape \[2.0\]"),
    "boolean shape": (shard({"w": entry(0, 4, shape=[True])}, b"x" * 4), r"tensor w: shape \[True\]"),
    "shape is a number": (shard({"w": entry(shape=2)}, b"x" * 8), "tensor w: shape 2"),
    "shape too small": (shard({"w": entry(shape=[1])}, b"x" * 8), "tensor w: has 8 bytes, which does not match shape"),
    "shape too large": (shard({"w": entry(shape=[2**40, 2**40])}, b"x" * 8), "tensor w: has 8 bytes, which does not match shape"),
    "negative offset": (shard({"w": entry(-8, 0)}, b"x" * 8), "tensor w: data_offsets"),
    "float offset": (shard({"w": {**entry(), "data_offsets": [0.0, 8.0]}}, b"x" * 8), "tensor w: data_offsets"),
    "three offsets": (shard({"w": {**entry(), "data_offsets": [0, 4, 8]}}, b"x" * 8), "tensor w: data_offsets"),
    "offsets swapped": (shard({"w": entry(8, 0)}, b"x" * 8), "tensor w: has -8 bytes, which does not match shape"),
    "truncated": (shard({"w": entry()}, b"x" * 7), "tensor w: ends at byte .* truncated"),
    "overlap": (shard({"v": entry(), "w": entry(4, 12)}, b"x" * 12), "tensor w overlaps"),
    "twice the same bytes": (shard({"v": entry(), "w": entry()}, b"x" * 8), "tensor [vw] overlaps"),
    "gap at the start": (shard({"w": entry(4, 12)}, b"x" * 12), "tensor w has a gap"),
    "gap between": (shard({"v": entry(), "w": entry(12, 20)}, b"x" * 20), "tensor w has a gap"),
    "trailing bytes": (shard({"w": entry()}, b"x" * 9), "1 bytes after the last tensor"),
    "no tensors but bytes": (shard({}, b"x" * 3), "3 bytes after the last tensor"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    data, message = DAMAGED[kind]
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / SINGLE}: ")


def test_the_file_that_the_damaged_ones_are_made_from_is_valid(tmp_path: Path) -> None:
    """Otherwise they might be refused for another reason than their damage."""
    (tmp_path / SINGLE).write_bytes(shard({"v": entry(), "w": entry(8, 16)}, bytes(16)))
    assert set(Checkpoint.open(tmp_path)) == {"v", "w"}


def test_a_real_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = save(tensors())
    path = tmp_path / SINGLE
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=SINGLE):
            Checkpoint.open(tmp_path)


def _remove_shard(folder: Path) -> None:
    (folder / "two.safetensors").unlink()


def _damage_shard(folder: Path) -> None:
    path = folder / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


BROKEN_INDEX: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (_remove_shard, "two.safetensors: missing, but the index names it"),
    "shard damaged": (_damage_shard, "two.safetensors: tensor c: .*truncated"),
    "shard is a folder": (lambda f: (_remove_shard(f), (f / "two.safetensors").mkdir()), "two.safetensors: cannot be read"),
    "tensor not in its shard": (
        lambda f: write_index(f, {"a": "one.safetensors", "c": "one.safetensors"}),
        "one.safetensors: tensor c is missing, but the index names it",
    ),
    "no weight_map": (lambda f: (f / INDEX).write_text('{"metadata": {}}'), f"{INDEX}: has no weight_map"),
    "empty weight_map": (lambda f: write_index(f, {}), f"{INDEX}: has no weight_map"),
    "weight_map is a list": (lambda f: write_index(f, ["a"]), f"{INDEX}: has no weight_map"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), rf"{INDEX}: invalid JSON \(not an object\)"),
    "index is cut": (lambda f: (f / INDEX).write_text('{"weight_map": {"a"'), f"{INDEX}: invalid JSON"),
    "index is not text": (lambda f: (f / INDEX).write_bytes(b"\x80\x81"), f"{INDEX}: invalid JSON"),
    "name twice": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'), f"{INDEX}: .*a name occurs twice"),
    "parent folder": (lambda f: write_index(f, {"a": "../one.safetensors"}), f"{INDEX}: the shard of a is '../one.safetensors'"),
    "folder below": (lambda f: write_index(f, {"a": "sub/one.safetensors"}), f"{INDEX}: the shard of a is"),
    "absolute path": (lambda f: write_index(f, {"a": str(f / "one.safetensors")}), f"{INDEX}: the shard of a is '/"),
    "dot dot": (lambda f: write_index(f, {"a": ".."}), "cannot be read|the shard of a is"),
    "empty shard name": (lambda f: write_index(f, {"a": ""}), "cannot be read|the shard of a is"),
    "shard is a number": (lambda f: write_index(f, {"a": 1}), f"{INDEX}: the shard of a is 1"),
    "shard name with NUL": (lambda f: write_index(f, {"a": "x\0y"}), "missing|the shard of a is"),
    "shard name too long": (lambda f: write_index(f, {"a": "x" * 5000}), "missing|cannot be read|the shard of a is"),
}


@pytest.mark.parametrize("kind", BROKEN_INDEX)
def test_a_broken_index_is_refused(kind: str, tmp_path: Path) -> None:
    write_sharded(tmp_path)
    change, message = BROKEN_INDEX[kind]
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"pickle.*convert them to safetensors") as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: contains no {INDEX} or {SINGLE}"):
        Checkpoint.open(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone: no such folder"):
        Checkpoint.open(tmp_path / "gone")


def test_a_missing_json_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        read_json_object(tmp_path / "config.json")


def opens_or_is_refused(path: Path, data: bytes) -> None:
    """An accepted file must be consistent. Any other must raise a CheckpointError that names the file."""
    path.write_bytes(data)
    said: str | None = None
    try:
        infos, _ = read_header(path)
    except CheckpointError as error:
        said = str(error)
    if said is not None:
        assert str(path) in said
        return
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for info in sorted(infos.values(), key=lambda i: (i.start, i.stop)):
        assert info.start == end and info.nbytes == torch.Size(info.shape).numel() * info.dtype.itemsize
        end = info.stop
    assert end == len(data)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / SINGLE


quick = settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@quick
@given(st.data())
def test_mutated_header_bytes_raise_nothing_but_a_checkpoint_error(scratch: Path, data: st.DataObject) -> None:
    good = bytearray(save(tensors()))
    header_end = 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_end - 1))
        replacement = data.draw(
            st.one_of(st.binary(min_size=1, max_size=3), st.sampled_from([b"[]", b"{}", b"-1", b'"', b"1e9", b",,", b"\\u"]))
        )
        good[at : at + len(replacement)] = replacement
    opens_or_is_refused(scratch, bytes(good))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["F32", "U8", "BOOL"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(field=st.sampled_from(["dtype", "shape", "data_offsets"]), value=json_values)
def test_any_json_value_in_a_header_field_raises_nothing_but_a_checkpoint_error(scratch: Path, field: str, value: Any) -> None:
    opens_or_is_refused(scratch, shard({"v": entry(), "w": {**entry(8, 16), field: value}}, bytes(16)))


@settings(quick, max_examples=150)
@given(header=json_values, data=st.binary(max_size=8))
def test_any_json_header_raises_nothing_but_a_checkpoint_error(scratch: Path, header: Any, data: bytes) -> None:
    opens_or_is_refused(scratch, shard(header, data))


@settings(quick, max_examples=150)
@given(weight_map=json_values | st.dictionaries(st.sampled_from(["a", "z"]), json_values | st.just("one.safetensors"), min_size=1))
def test_any_weight_map_raises_nothing_but_a_checkpoint_error(scratch: Path, weight_map: Any) -> None:
    folder = scratch.parent / "indexed"
    if not folder.exists():
        folder.mkdir()
        write_sharded(folder)
    write_index(folder, weight_map)
    said: str | None = None
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError as error:
        said = str(error)
    if said is not None:
        assert str(folder) in said
        return
    assert weight_map == {"a": "one.safetensors"} and set(checkpoint) == {"a"}


LONG = "x" * 5000
HOSTILE: dict[str, tuple[bytes, str]] = {
    "too many dimensions": (shard({"w": entry(shape=[1] * 8 + [2])}, b"x" * 8), "tensor w: shape .* at most 8 dimensions"),
    "millions of dimensions": (shard({"w": entry(shape=[2**62] * 1_000_000)}, b"x" * 8), "tensor w: shape .* at most 8 dimensions"),
    "size beyond 64 bits": (shard({"w": entry(shape=[2**63, 0])}), r"tensor w: shape \[9223372036854775808, 0\]"),
    "product beyond 64 bits": (shard({"w": entry(shape=[2**62] * 8)}, b"x" * 8), "tensor w: has 8 bytes, which does not match shape"),
    "offsets beyond 64 bits": (shard({"w": entry(2**63, 2**63 + 8)}, b"x" * 8), "tensor w: data_offsets"),
    "offsets of thousands of digits": (shard({"w": entry(10**4000, 10**4000)}, b"x" * 8), "tensor w: data_offsets"),
    "boolean offset": (shard({"w": {**entry(), "data_offsets": [False, 8]}}, b"x" * 8), "tensor w: data_offsets"),
    "NaN": (shard(b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, Infinity]}}', b"x" * 8), r"tensor w: shape \[nan\]"),
    "empty tensor at an odd place": (shard({"v": entry(4, 4, shape=[0]), "w": entry()}, b"x" * 8), "tensor v overlaps"),
    "empty tensor beyond the end": (shard({"v": entry(9, 9, shape=[0]), "w": entry()}, b"x" * 8), "tensor v: ends at byte"),
    "name of control characters": (shard({"a\nb\x1b[2J": entry()}, b"x" * 8), "its name has unprintable or more than"),
    "name with NUL": (shard({"a\0b": entry()}, b"x" * 8), "its name has unprintable or more than"),
    "half a surrogate pair": (shard({"\ud800": entry()}, b"x" * 8), "its name has unprintable or more than"),
    "text turned round": (shard({"a\u202eb": entry()}, b"x" * 8), "its name has unprintable or more than"),
    "endless name": (shard({LONG: entry()}, b"x" * 8), "its name has unprintable or more than"),
    "endless dtype": (shard({"w": entry(dtype=LONG)}, b"x" * 8), "tensor w: dtype"),
    "dtype of control characters": (shard({"w": entry(dtype="\x1b\n")}, b"x" * 8), "tensor w: dtype"),
    "metadata is a list": (shard({"__metadata__": [1], "w": entry()}, b"x" * 8), r"__metadata__ is \[1\]"),
    "metadata of numbers": (shard({"__metadata__": {"a": 1}, "w": entry()}, b"x" * 8), "__metadata__ is {'a': 1}"),
    "metadata is a tensor": (shard({"__metadata__": entry()}, b"x" * 8), "__metadata__ is"),
    "values without end": (shard(b'{"w": [' + b"0," * 4_000_000 + b"0]}"), "more than 4000000 values"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_refused_in_one_short_line(kind: str, tmp_path: Path) -> None:
    data, message = HOSTILE[kind]
    (tmp_path / SINGLE).write_bytes(data)
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert time.perf_counter() - started < 5
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / SINGLE}: ") and said.isprintable() and len(said) < 800


def test_unusual_but_valid_headers_are_read(tmp_path: Path) -> None:
    """Names with separators and other scripts, many dimensions, sizes of 0, metadata, unknown keys."""
    header = {
        "__metadata__": {"format": "pt", "": ""},
        "../a/b\\c:0": entry(),
        "тензор 💥": entry(8, 12, shape=[1] * 8, dtype="F32"),
        "none": entry(12, 12, shape=[0, 2**62, 2**62]),
        "": {**entry(12, 12, shape=[0]), "extra": [[{}]]},
    }
    (tmp_path / SINGLE).write_bytes(shard(header, bytes(12)))
    infos = Checkpoint.open(tmp_path).tensors
    assert set(infos) == set(header) - {"__metadata__"}
    assert infos["none"].shape == (0, 2**62, 2**62) and infos["тензор 💥"].shape == (1,) * 8


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"c": torch.arange(3), "a": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"two\.safetensors: tensor a is also in one\.safetensors"):
        Checkpoint.open(tmp_path)


def test_tensors_that_the_index_does_not_name_are_ignored(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors"})
    assert set(Checkpoint.open(tmp_path)) == {"a"}


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "a\0b", "\x1b[2J", LONG, ".", "..", "", "a/b", "/", None, [], {}, 3, True])
def test_errors_about_names_in_an_index_are_one_short_line(name: Any, tmp_path: Path) -> None:
    write_sharded(tmp_path)
    for weight_map in ({"a": name}, {"a": "one.safetensors", str(name): name}, {str(name): "one.safetensors"}):
        write_index(tmp_path, weight_map)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(tmp_path)
        assert str(caught.value).startswith(str(tmp_path)) and str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_sampling_a_shard_that_was_deleted_is_an_error(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors: cannot be read"):
        checkpoint.sample(checkpoint)


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sharded(tmp_path)
    monkeypatch.setattr("bigq.io.index.MAX_TENSORS", 2)
    with pytest.raises(CheckpointError, match="more than 2 tensors"):
        Checkpoint.open(tmp_path)
    save_file({name: torch.zeros(1) for name in "abc"}, tmp_path / "three.safetensors")
    with pytest.raises(CheckpointError, match="more than 2 tensors"):
        read_header(tmp_path / "three.safetensors")


def test_json_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte; a file nested so deeply that Python parses it, but cannot write it."""
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="has 1099511627776 bytes; bigq reads JSON files of at most"):
        read_json_object(path)
    path.write_bytes(b'{"a":' * 64 + b"1" + b"}" * 64)
    assert read_json_object(path)
    path.write_bytes(b'{"a":' * 65 + b"1" + b"}" * 65)
    with pytest.raises(CheckpointError, match="nested more than 64 levels"):
        read_json_object(path)


@pytest.mark.parametrize("name", [SINGLE, INDEX, "config.json"])
def test_opening_a_pipe_does_not_block(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: .*not a regular file"):
        read_json_object(tmp_path / name) if name.endswith("json") else read_header(tmp_path / name)


def test_reading_a_header_takes_memory_in_proportion(tmp_path: Path) -> None:
    """Twenty thousand tensors."""
    names = {f"model.layers.{i}.weight": entry(8 * i, 8 * i + 8) for i in range(20_000)}
    (tmp_path / SINGLE).write_bytes(shard(names, bytes(160_000)))
    tracemalloc.start()
    try:
        tensors, header = read_header(tmp_path / SINGLE)
        assert len(tensors) == 20_000 and tracemalloc.get_traced_memory()[1] < 20 * len(header)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["uint16", "uint32", "uint64", "complex64", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e5m2", "bool"]
)
def test_dtypes_of_the_library(name: str, tmp_path: Path) -> None:
    """A model may carry a tensor of any of them beside its weights, which is copied byte by byte."""
    dtype = getattr(torch, name)
    stored = torch.arange(64, dtype=torch.uint8).remainder(2).view(8, 8).view(dtype)
    save_file({"x": stored}, tmp_path / SINGLE)
    info = Checkpoint.open(tmp_path)["x"]
    assert info.dtype == dtype and info.shape == tuple(stored.shape)
    write_shard(tmp_path / "copy.safetensors", [OutputTensor.copy_of(info)])
    assert torch.equal(load_file(tmp_path / "copy.safetensors")["x"].view(torch.uint8), stored.view(torch.uint8))


def test_metadata_of_null(tmp_path: Path) -> None:
    """The safetensors library reads it as none, so such files exist."""
    (tmp_path / SINGLE).write_bytes(shard({"__metadata__": None, "w": entry()}, b"x" * 8))
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert file.metadata() is None
    assert list(Checkpoint.open(tmp_path)) == ["w"]
