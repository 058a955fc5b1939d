"""The seam of sources: how stored tensors become weights, and a way of storing of the test's own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import random_ids, reference_model, stored_tensors, streamed_logits
from safetensors.torch import load_file, save_file
from torch import Tensor

import bigq
from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.inspect.verify import verify
from bigq.io.index import Checkpoint, TensorInfo
from bigq.io.reader import read_tensor
from bigq.io.sources.base import Read, Source
from bigq.io.sources.plain import PlainSource
from bigq.model.pager import Pager
from bigq.scheme import Rule

CPU = torch.device("cpu")
NAME = "model.layers.1.mlp.down_proj.weight"


def test_a_plain_weight_is_read_and_converted(checkpoint: Callable[[str], Path]) -> None:
    info = Checkpoint.open(checkpoint("llama"))[NAME]
    source = PlainSource(info)
    source.check(info.shape)
    assert list(source.tensors) == [info]
    value = source.value(read_tensor, CPU, torch.bfloat16)
    assert value.dtype == torch.bfloat16 and torch.equal(value, read_tensor(info).bfloat16())


def test_a_plain_weight_of_another_shape_or_type_is_refused(checkpoint: Callable[[str], Path]) -> None:
    info = Checkpoint.open(checkpoint("llama"))[NAME]
    with pytest.raises(CheckpointError, match=r"down_proj\.weight has shape \[64, 96\], but config\.json says \[96, 64\]"):
        PlainSource(info).check((96, 64))
    for dtype in (torch.float8_e4m3fn, torch.int32):
        with pytest.raises(UnsupportedModelError, match="bigq reads fp32, fp16 and bf16"):
            PlainSource(dataclasses.replace(info, dtype=dtype)).check(info.shape)


def test_a_packed_weight_is_what_the_solver_left(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    config = bigq.JobConfig(
        scheme=bigq.QuantScheme(group_size=32), calibration=str(ids_file), samples=8, seqlen=24, device="cpu", quiet=True
    ).with_quality("fast")
    bigq.quantize(str(checkpoint("llama")), tmp_path / "out", config)
    pager = Pager(tmp_path / "out", device=CPU)
    source = pager.packed_source(NAME)
    assert [info.name.rpartition(".")[2] for info in source.tensors] == list(source.format.suffixes(True))
    source.check((64, 96))
    with pytest.raises(CheckpointError, match="the two belong to different models"):
        source.check((96, 64))
    original = read_tensor(Checkpoint.open(checkpoint("llama"))[NAME])
    assert 0 < float((source.value(read_tensor, CPU, torch.float32) - original).abs().max()) < 0.1


@dataclass(frozen=True, slots=True)
class Negated:
    """A way of storing of the test's own: with the other sign."""

    info: TensorInfo

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def dtype(self) -> torch.dtype:
        return self.info.dtype

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def tensors(self) -> Sequence[TensorInfo]:
        return (self.info,)

    def check(self, shape: tuple[int, ...]) -> None:
        assert self.info.shape == shape

    def value(self, read: Read, device: torch.device, dtype: torch.dtype) -> Tensor:
        return -read(self.info).to(device=device, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A way of storing of the test's own: int8 beside a scale per output, [m, n] and [m, 1]."""

    ints: TensorInfo
    scale: TensorInfo

    @property
    def name(self) -> str:
        return self.ints.name

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def tensors(self) -> Sequence[TensorInfo]:
        return (self.ints, self.scale)

    def check(self, shape: tuple[int, ...]) -> None:
        assert self.ints.shape == shape and self.ints.dtype == torch.int8

    def value(self, read: Read, device: torch.device, dtype: torch.dtype) -> Tensor:
        return (read(self.ints).float() * read(self.scale).float()).to(device=device, dtype=dtype)


def int8_checkpoint(source: Path, folder: Path) -> tuple[Path, Path]:
    """(a copy of a checkpoint whose down projections are int8 with scales, the same with the values that these hold)."""
    for name in ("int8", "plain"):
        shutil.copytree(source, folder / name)
    index = json.loads((folder / "int8" / "model.safetensors.index.json").read_text())
    for shard in sorted(source.glob("*.safetensors")):
        ints: dict[str, Tensor] = {}
        plain: dict[str, Tensor] = {}
        for name, tensor in load_file(shard).items():
            ints[name] = plain[name] = tensor
            if name.endswith("down_proj.weight"):
                scale = tensor.abs().amax(1, keepdim=True) / 127
                ints[name] = (tensor / scale).round().to(torch.int8)
                ints[f"{name}_scale"] = scale
                plain[name] = ints[name].float() * scale
                index["weight_map"][f"{name}_scale"] = shard.name
        save_file(ints, folder / "int8" / shard.name, metadata={"format": "pt"})
        save_file(plain, folder / "plain" / shard.name, metadata={"format": "pt"})
    (folder / "int8" / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "int8", folder / "plain"


@pytest.mark.parametrize("skip", [False, True], ids=["quantized", "skipped"])
def test_a_source_of_several_tensors_leaves_no_trace(
    skip: bool, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is that of the same weights stored plainly, tensor by tensor, with the source's Linears quantized or skipped."""
    ints, plain = int8_checkpoint(checkpoint("llama"), tmp_path)
    rules = (Rule(r".*down_proj", None),) if skip else ()
    config = bigq.JobConfig(
        scheme=bigq.QuantScheme(group_size=32), rules=rules, calibration=str(ids_file), samples=8, seqlen=24, device="cpu", quiet=True
    )
    bigq.quantize(str(plain), tmp_path / "plain-out", config)

    def find(self: Pager) -> dict[str, Source]:
        self.packed, self.sources = {}, self._find_plain()
        return {
            name: Scaled(self.sources[name], self.checkpoint[f"{self.sources[name].name}_scale"])
            if name.endswith("down_proj.weight")
            else PlainSource(self.sources[name])
            for name in self._meta
        }

    monkeypatch.setattr(Pager, "_find_sources", find)
    bigq.quantize(str(ints), tmp_path / "out", config)
    monkeypatch.undo()
    expected, got = stored_tensors(tmp_path / "plain-out"), stored_tensors(tmp_path / "out")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert verify(tmp_path / "out") == []


def test_a_new_source_is_one_class_and_one_choice(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose weight is stored negated, streamed: its logits are those of the model with the negated weight."""
    folder = checkpoint("llama")
    model = reference_model(folder)
    with torch.no_grad():
        model.get_parameter(NAME).neg_()
        expected = model(random_ids(2, 16)).logits
    find = Pager._find_sources

    def with_negated(self: Pager) -> dict[str, Source]:
        found = find(self)
        return {**found, NAME: Negated(self.sources[NAME])}

    assert not torch.allclose(streamed_logits(folder, random_ids(2, 16), 2), expected)
    monkeypatch.setattr(Pager, "_find_sources", with_negated)
    assert torch.equal(streamed_logits(folder, random_ids(2, 16), 2), expected)
