"""Which stored matrices become which part of a bank, compared with what transformers itself wrote and reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from moe_families import MOE_FAMILIES, moe_model
from safetensors.torch import load_file
from torch import Tensor, nn

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.model.experts.stored import Part, expert_parts, require_stacking
from bigq.model.skeleton import Merge

#: Families whose checkpoints hold all experts in one tensor.
WHOLE = ("gpt_oss", "granitemoe", "llama4_text")


def saved(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)  # type: ignore[operator]
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_matrix_has_its_place(family: str, tmp_path: Path) -> None:
    """Each is the part of the parameter that it is said to be, and together they are the whole of each bank."""
    model = moe_model(family)
    tensors, state = saved(model, tmp_path), model.state_dict()
    parts = expert_parts(model, tensors)
    assert bool(parts) == (family not in WHOLE)
    covered: dict[str, int] = {}
    for name, part in parts.items():
        expert = state[part.parameter][part.expert]
        rows = expert.shape[0] // part.parts
        assert torch.equal(expert[part.part * rows : (part.part + 1) * rows], tensors[name])
        covered[part.parameter] = covered.get(part.parameter, 0) + tensors[name].numel()
    assert covered == {name: state[name].numel() for name in covered}
    if family not in WHOLE:
        assert set(covered) == {name for name in state if name.endswith(("gate_up_proj", "experts.up_proj", "experts.down_proj"))}


def test_experts_are_in_the_order_of_their_numbers() -> None:
    """10 comes after 9, whatever the order of the names."""
    model = moe_model("deepseek_v3")
    names = [f"model.layers.1.mlp.experts.{e}.{matrix}_proj.weight" for e in range(16) for matrix in ("up", "gate", "down")]
    parts = expert_parts(model, reversed(names))
    assert parts["model.layers.1.mlp.experts.10.up_proj.weight"] == Part("model.layers.1.mlp.experts.gate_up_proj", 10, 1, 2)
    assert parts["model.layers.1.mlp.experts.9.gate_proj.weight"] == Part("model.layers.1.mlp.experts.gate_up_proj", 9, 0, 2)
    assert parts["model.layers.1.mlp.experts.2.down_proj.weight"] == Part("model.layers.1.mlp.experts.down_proj", 2, 0, 1)


@pytest.mark.parametrize("lost", [("3.up",), tuple(f"{e}.gate" for e in range(16))])
def test_a_missing_matrix_is_named(lost: tuple[str, ...], tmp_path: Path) -> None:
    model = moe_model("deepseek_v3")
    names = [name for name in saved(model, tmp_path) if not any(f"experts.{part}_proj" in name for part in lost)]
    with pytest.raises(CheckpointError, match=r"the checkpoint holds 16 tensors like .*, but (15|0) of another matrix of the same experts"):
        expert_parts(model, names)


@pytest.mark.parametrize(
    ("steps", "targets"),
    [
        ((("MergeModulelist", 0), ("Transpose", None)), 1),
        ((("MergeModulelist", 1),), 1),
        ((("Chunk", 0),), 1),
        ((("MergeModulelist", 0),), 2),
    ],
)
def test_other_rules_are_refused(steps: tuple[tuple[str, int | None], ...], targets: int) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"^model\.x: transformers (makes it of several tensors|changes what is stored for it) by "
    ):
        require_stacking(Merge("model.x", 0, 1, steps, ("model.x", "model.y")[:targets]))


def test_plain_tensors_have_no_part(tmp_path: Path) -> None:
    model = moe_model("qwen3_moe")
    tensors: Mapping[str, Tensor] = saved(model, tmp_path)
    parts = expert_parts(model, tensors)
    assert not any("experts." not in name for name in parts) and len(parts) == 2 * 8 * 3
