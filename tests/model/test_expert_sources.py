"""Single experts read from checkpoints: the bytes of the model's own parameters, and errors for what does not fit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from moe_families import MOE_FAMILIES, moe_model
from torch import nn

from bigq.errors import CheckpointError
from bigq.io.index import Checkpoint, TensorInfo
from bigq.io.reader import read_tensor
from bigq.io.sources.base import Source
from bigq.io.sources.plain import PlainSource
from bigq.model.experts.source import expert_sources, slices
from bigq.model.skeleton import map_names


def saved(model: nn.Module, folder: Path) -> dict[str, TensorInfo]:
    model.save_pretrained(folder)  # type: ignore[operator]
    return dict(Checkpoint.open(folder).tensors)


def plain(tensors: dict[str, TensorInfo]) -> dict[str, Source]:
    return {name: PlainSource(info) for name, info in tensors.items()}


def whole(model: nn.Module, tensors: dict[str, TensorInfo]) -> dict[str, str]:
    """The tensors that are whole parameters."""
    return map_names(model, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_expert_is_read_by_itself(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = moe_model(family, dtype)
    tensors = saved(model, tmp_path)
    found = expert_sources(model, plain(tensors), whole(model, tensors))
    banks = {name: p for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name}
    assert banks and set(banks) == set(found)
    for name, parameter in banks.items():
        assert len(found[name]) == len(parameter)
        for expert, source in zip(parameter, found[name], strict=True):
            assert torch.equal(source.value(read_tensor, torch.device("cpu"), dtype), expert)
            assert sum(info.nbytes for info in source.tensors) == expert.numel() * expert.element_size()


def test_slices_are_the_bytes_of_a_tensor(tmp_path: Path) -> None:
    tensors = saved(moe_model("gpt_oss"), tmp_path)
    info = tensors["model.layers.0.mlp.experts.down_proj"]
    parts = slices(info)
    assert (parts[0].start, parts[-1].stop) == (info.start, info.stop)
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    assert torch.equal(torch.stack([read_tensor(part) for part in parts]), read_tensor(info))


def test_a_checkpoint_with_another_number_of_experts(tmp_path: Path) -> None:
    tensors = saved(moe_model("qwen3_moe", num_experts=8), tmp_path)
    model = moe_model("qwen3_moe", num_experts=4)
    with pytest.raises(CheckpointError, match=r"the checkpoint holds 8 experts for model\.layers\.0\.mlp\..*, but config\.json says 4"):
        expert_sources(model, plain(tensors), {})


def test_experts_of_another_size(tmp_path: Path) -> None:
    tensors = saved(moe_model("qwen3_moe", moe_intermediate_size=48), tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor .*experts\.0\..* has shape \[.*48.*\], but config\.json says \[.*32.*\]"):
        expert_sources(moe_model("qwen3_moe"), plain(tensors), {})
