"""Benchmarks of layers with experts: their shapes, the checkpoint whose experts share bytes, phases and aims."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Child
from safetensors.torch import load_file, save_file

import bigq
from bigq.io.index import INDEX_NAME, Checkpoint
from bigq.io.writer import OutputTensor

sys.path.append(str(ROOT / "scripts"))

import bench_176b
from bench_176b import ensure_inputs
from bench_slice import aliased_checkpoint
from expert_shapes import (
    CORRECTION,
    EXPERT_SHAPES,
    ROUTER,
    ExpertShape,
    aliases,
    block_bytes,
    expert_flops,
    expert_layout,
    expert_tensor,
    matrices,
)
from gpu_steps.aims import as_finding
from gpu_steps.expert_layers import LAYERS, SMOKE_LAYERS, layers_of
from gpu_steps.runner import LONG, PROFILE
from gpu_steps.setting import Setting
from gpu_steps.slices import bench
from shapes import random_tensor, write_config

#: The dense layers that DeepSeek-V3 has before those with experts: attention as in the others, an MLP of 18432, two norms.
DENSE = 3 * (187_107_328 + 3 * 7168 * 18432 + 2 * 7168)
PUBLISHED = {"deepseek-v3": 671_026_419_200 - DENSE, "qwen3-235b": 235_093_634_560}
TINY = replace(EXPERT_SHAPES["tiny-experts"].with_experts(4), distinct=2)


@pytest.mark.parametrize("name", EXPERT_SHAPES)
def test_a_shape_with_experts_has_as_many_parameters_as_the_model_is_published_with(name: str, tmp_path: Path) -> None:
    shape = EXPERT_SHAPES[name]
    write_config(shape, tmp_path, 1)
    layout = expert_layout(shape, tmp_path)
    rest = sum(torch.Size(size).numel() for size in layout.rest.values())
    assert shape.blocks * block_bytes(shape, layout) // 2 + rest == shape.parameters == PUBLISHED.get(name, shape.parameters)
    kinds = Counter(".".join(part for part in key.split(".") if not part.isdigit()) for key in layout.block if ".experts." in key)
    assert kinds == dict.fromkeys((f"mlp.experts.{part}_proj.weight" for part in ("gate", "up", "down")), 32)
    assert expert_flops(shape, layout.block, 1, 8)["replay"] > 0, "the groups name every Linear outside the experts"


def test_experts_that_are_not_on_disk_have_the_bytes_of_others() -> None:
    assert aliases("layers.0.mlp.experts.1.up_proj.weight", 2, 6) == [f"layers.0.mlp.experts.{e}.up_proj.weight" for e in (1, 3, 5)]
    assert aliases("layers.0.mlp.shared_experts.up_proj.weight", 2, 6) == ["layers.0.mlp.shared_experts.up_proj.weight"]
    assert matrices("mlp.experts.gate_up_proj", 3, (8, 5)) == {
        "mlp.experts.3.gate_proj.weight": (4, 5),
        "mlp.experts.3.up_proj.weight": (4, 5),
    }
    assert matrices("mlp.experts.down_proj", 3, (5, 4)) == {"mlp.experts.3.down_proj.weight": (5, 4)}


def values(tensor: OutputTensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(map(bytes, tensor.chunks()))), dtype=torch.bfloat16).reshape(tensor.shape).float()


def test_a_router_prefers_some_experts_and_other_tensors_are_as_in_any_shape() -> None:
    router = values(expert_tensor(f"model.layers.0.{ROUTER}", (64, 4096), 0))
    lengths = router.norm(dim=1) / router.norm(dim=1).mean()
    assert lengths.max() > 1.1 and lengths.min() < 0.9
    bias = values(expert_tensor(f"model.layers.0.{CORRECTION}", (64,), 0))
    assert 0.005 < bias.std() < 0.02 and len(bias.unique()) > 32
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    assert torch.equal(values(expert_tensor(name, (8, 8), 0)), values(random_tensor(name, (8, 8), 0)))


def test_fewer_experts_are_chosen_from_as_far_as_they_reach() -> None:
    few = EXPERT_SHAPES["deepseek-v3"].with_experts(6)
    assert (few.experts, few.chosen, few.config["n_group"], few.config["topk_group"]) == (6, 3, 1, 1)
    many = EXPERT_SHAPES["qwen3-235b"].with_experts(64)
    assert (many.experts, many.chosen) == (64, 8) and "n_group" not in many.config
    assert "every 32 experts share" in many.honesty and few.honesty.startswith("58 layers")


def test_flops_of_experts_are_those_of_products_written_out() -> None:
    """4 experts of 6 × 3, two for each of 5 · 7 tokens; one Linear beside them."""
    config = {**TINY.config, "hidden_size": 6, "moe_intermediate_size": 3, "num_experts_per_tok": 2}
    shape = replace(TINY, config=config, groups=(("o_proj",),), attention=0)
    weights = {"self_attn.o_proj.weight": (6, 2), ROUTER: (4, 6), "mlp.experts.0.gate_proj.weight": (3, 6)}
    found = expert_flops(shape, weights, 5, 7)
    routed = 5 * 7 * 2
    assert found["replay"] == 2 * 35 * 12 and found["hessian"] == 35 * 4
    assert found["experts: forward"] == routed * 2 * (3 * 6 * 2 + 6 * 3) and found["experts: hessian"] == routed * (36 + 9)
    assert found["experts: factor"] == pytest.approx(4 * (216 + 27) / 3) and found["experts: solve"] == 4 * (6 * 36 + 6 * 9)


def test_a_job_on_aliased_experts_is_the_job_on_a_checkpoint_of_equal_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = ensure_inputs(TINY, tmp_path / "shards", 2, 32)
    assert inputs.experts == 4
    real, alias = tmp_path / "real", tmp_path / "alias"
    for folder in (real, alias):
        write_config(TINY, folder, 1)
    block = {name: tensor.clone() for key, tensor in load_file(inputs.block).items() for name in aliases(key, 2, 4)}
    files = {"block.safetensors": block} | {path.name: load_file(path) for path in inputs.rest}
    for name, tensors in files.items():
        save_file(tensors, real / name)
    (real / INDEX_NAME).write_text(json.dumps({"weight_map": {tensor: name for name, held in files.items() for tensor in held}}))
    config = bigq.JobConfig(calibration=str(inputs.ids), samples=2, seqlen=32, device="cpu", quiet=True)
    bigq.quantize(str(real), tmp_path / "a", config)

    checkpoint = aliased_checkpoint(alias, inputs.rest, inputs.block, inputs.layout.blocks_path, 1, 4)
    monkeypatch.setattr(Checkpoint, "open", classmethod(lambda cls, folder, remote=None: checkpoint))
    bigq.quantize(str(alias), tmp_path / "b", config)
    one, other = ({k: v for path in (tmp_path / x).glob("*.safetensors") for k, v in load_file(path).items()} for x in "ab")
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    codes = [one[f"model.layers.0.mlp.experts.{e}.gate_proj.weight_packed"] for e in (0, 2)]
    assert not torch.equal(*codes), "equal experts have tokens of their own, and so codes of their own"


@pytest.mark.long
def test_a_slice_with_experts_is_timed_by_phase(child: Child, tmp_path: Path) -> None:
    arguments = ["--shape", "tiny-experts", "--experts", "8", "--blocks", "2", "--device", "cpu", "--samples", "4", "--seqlen", "64"]
    arguments += ["--profile-experts", "3", "2", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    done = child(ROOT / "scripts/bench_176b.py", *arguments, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out/bench_tiny-experts.json").read_text())
    result, (lines,) = written["result"], [one["lines"] for one in written["slices"]]
    assert [line["unit"] for line in lines][:5] == ["rest-0", "experts-0-0", "block-0", "experts-1-0", "block-1"]
    phases = result["seconds_by_phase"]
    own = ("forward", "gather", "scatter", "hessian", "factor", "solve", "pack", "replay")
    assert all(phases[f"experts: {name}"] > 0 for name in own) and phases["up to the router"] > 0 and phases["hessian"] > 0
    assert sum(phases.values()) == pytest.approx(result["minutes"] * 60)
    assert result["waiting_share"] * 60 * result["minutes"] == pytest.approx(phases["load"] + phases["write"])
    assert all(result["rates"][f"experts: {name}"]["tflops"] > 0 for name in ("forward", "hessian", "factor", "solve"))
    assert result["peak_over_plan"] == {"host": pytest.approx(result["peaks"]["host_resident_bytes"] / result["planned"]["host"])}
    tokens = result["tokens_of_experts"]
    assert len(tokens) == 2 and all(one["experts"] == 8 and one["fewest"] < 128 < one["most"] for one in tokens)
    assert "--experts 8 --profile-experts 3 2 --work DIR" in written["command"] and str(tmp_path) not in json.dumps(written)
    assert json.loads((tmp_path / "out/bench_tiny-experts.profile.json").read_text())["total"][1] > 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "bloom-176b", "--experts", "8"), "has no experts"),
        (("--shape", "tiny-experts", "--profile-experts", "1", "2", "--profile-block", "0"), "leave one out"),
        (("--shape", "tiny-experts", "--profile-experts", "0", "2"), "at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        bench_176b.parse([*arguments, "--device", "cpu", "--work", "x", "--out", "y"])
    assert exit.value.code == 2 and words in capsys.readouterr().err


def test_a_layer_of_the_session_is_a_real_one_and_its_aims_are_of_time_and_memory(tmp_path: Path) -> None:
    setting = Setting(step="deepseek", work=tmp_path, smoke=False)
    for name, layers in LAYERS.items():
        shape = EXPERT_SHAPES[layers.shape]
        assert isinstance(shape, ExpertShape) and layers.experts is None and layers.model_blocks == shape.blocks
        assert sum(layers.profiled_experts) <= shape.experts, "a profile ends within the first layer"
        assert layers.blocks > 2, "the median needs a layer after the one that compiles kernels"
        assert SMOKE_LAYERS[name].profiled == layers.profiled == "kernels_of_some_experts"
    words = bench(setting, layers_of(setting, "deepseek"))
    assert words[words.index("--shape") + 1] == "deepseek-v3" and "--experts" not in words
    result = {"peaks": {"device_bytes": 25 * 10**9, "host_resident_bytes": 10**10}}
    rows = as_finding(LAYERS["deepseek"].more_aims(result, 11.0))
    assert [row["met"] for row in rows.values()] == [False, True, True]
    assert len(LAYERS["deepseek"].more_aims(result, None)) == 2
    blocks = {mode: layers_of(replace(setting, mode=mode), "deepseek").blocks for mode in ("", LONG, PROFILE)}
    assert blocks == {"": 3, LONG: 6, PROFILE: 3}
