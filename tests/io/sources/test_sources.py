"""The seam of sources: how stored tensors become weights, and a way of storing of the test's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import random_ids, reference_model, streamed_logits
from torch import Tensor

import bigq
from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.index import Checkpoint, TensorInfo
from bigq.io.reader import read_tensor
from bigq.io.sources.base import Read, Source
from bigq.io.sources.plain import PlainSource
from bigq.model.pager import Pager

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
    )
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
    def tensors(self) -> Sequence[TensorInfo]:
        return (self.info,)

    def check(self, shape: tuple[int, ...]) -> None:
        assert self.info.shape == shape

    def value(self, read: Read, device: torch.device, dtype: torch.dtype) -> Tensor:
        return -read(self.info).to(device=device, dtype=dtype)


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
