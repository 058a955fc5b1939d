"""Checkpoints that hold more than the model: what is left out, what is copied, and that no reader takes it for packed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import bigq
from bigq.cli.main import main
from bigq.errors import CalibrationError, CheckpointError, UnsupportedModelError
from bigq.sched.plan.inputs import plan
from tests.models import logits_of, make_checkpoint, random_ids, reference_model, rewrite, save_ids, stored_tensors, streamed_logits

#: A layer behind the last block with a projection of its own, as DeepSeek and GLM store their MTP layers.
NEXT = {
    "model.layers.3.eh_proj.weight": torch.ones(64, 128),
    "model.layers.3.enorm.weight": torch.ones(64),
    "model.layers.3.self_attn.q_proj.weight": torch.ones(64, 64),
}
MTP = {"mtp.fc.weight": torch.ones(64, 128), "mtp.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 64, 64)}
TOWER = {"vision_tower.blocks.0.attn.qkv.weight": torch.ones(96, 32), "vision_tower.patch.proj.weight": torch.ones(32, 3, 2, 2)}
ROTARY = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
LEFT_OVER = {"model.layers.3.self_attn.q_proj.weight": torch.ones(64, 64), "model.layers.3.self_attn.rotary_emb.inv_freq": torch.ones(8)}
HEAD = {"score.weight": torch.ones(2, 64)}
VISION = {"vision_config": {"hidden_size": 32, "model_type": "siglip_vision_model"}}


def with_extras(folder: Path, extras: Mapping[str, Tensor], config: Mapping[str, Any], family: str = "llama") -> Path:
    """A tiny checkpoint with further tensors and settings."""
    make_checkpoint(folder, family)
    save_file(dict(extras), folder / "extras.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].update(dict.fromkeys(extras, "extras.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    return folder


def job(format: str = "gptq", **settings: Any) -> bigq.JobConfig:
    return bigq.JobConfig(scheme=bigq.QuantScheme(group_size=32), method="rtn", device="cpu", quiet=True, format=format, **settings)


def written(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return config


def excludes(config: Mapping[str, Any], name: str) -> bool:
    """Whether readers leave a module unquantized: by ``dynamic`` (first match) or by ``ignore``."""
    if config["quant_method"] == "gptq":
        found = next((rule[:2] for rule in config["dynamic"] if re.match(rule[2:], name)), None)
        return found == "-:" and not any(one in name for one in config["modules_in_block_to_quantize"][0])
    return any(re.match(one[3:], name) if one.startswith("re:") else one == name for one in config["ignore"])


def test_the_plan_refuses_the_shapes_and_dtypes_that_the_job_refuses(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "m", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 160}))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \[128, 64\], but config.json says \[160, 64\]"):
        plan(str(source), tmp_path / "o", job())
    (source / "config.json").write_text(json.dumps(config))
    rewrite(source, "model.layers.1.mlp.up_proj.weight", torch.ones(96, 64, dtype=torch.int8))
    with pytest.raises(UnsupportedModelError, match=r"model.layers.1.mlp.up_proj.weight is torch.int8"):
        plan(str(source), tmp_path / "o", job())


@pytest.mark.parametrize("changed", [0.0, 1.0])
def test_a_tied_head_with_other_values_is_used_and_named(changed: float, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "m", "llama", tie_word_embeddings=True)
    stored = stored_tensors(source)
    for path in source.glob("*.safetensors*"):
        path.unlink()
    head = stored["model.embed_tokens.weight"] + changed
    save_file({**stored, "lm_head.weight": head}, source / "model.safetensors", metadata={"format": "pt"})
    warned = plan(str(source), tmp_path / "o", job()).warnings
    assert ["tie_word_embeddings" in warning for warning in warned] == ([True] if changed else [])
    bigq.quantize(source, tmp_path / "out", job())
    assert torch.equal(stored_tensors(tmp_path / "out")["lm_head.weight"], head)
    ids = random_ids(2)
    assert torch.equal(streamed_logits(source, ids, 2), logits_of(reference_model(source), ids, 2))
    if changed:  # the advice: the same model, and no warning
        untied = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
        (source / "config.json").write_text(json.dumps(untied))
        assert not plan(str(source), tmp_path / "o", job()).warnings
        assert torch.equal(streamed_logits(source, ids, 2), logits_of(reference_model(source), ids, 2))


def test_the_plan_refuses_token_ids_of_another_model(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "m", "llama")
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(8, 24) + 100)
    config = dataclasses.replace(job(), method="gptq", calibration=str(ids), samples=8, seqlen=24)
    with pytest.raises(CalibrationError, match=r"token ids reach from .* but the model's vocabulary has 128"):
        plan(str(source), tmp_path / "o", config)


@pytest.mark.parametrize(
    ("extras", "config", "kept", "gone"),
    [
        (NEXT, {"num_nextn_predict_layers": 1}, NEXT, {}),
        (NEXT, {}, {}, NEXT),
        (LEFT_OVER, {}, {}, LEFT_OVER),
        (LEFT_OVER, {"num_nextn_predict_layers": 1}, {}, LEFT_OVER),
        (MTP, {}, MTP, {}),
        (ROTARY, {}, ROTARY, {}),
        (HEAD, {}, {}, HEAD),
        (TOWER, {}, {}, TOWER),
        (TOWER | HEAD, VISION, TOWER, HEAD),
    ],
    ids=["nextn", "nextn unannounced", "left over", "left over, nextn", "mtp", "rotary", "head", "stray", "tower"],
)
def test_what_is_kept_and_what_is_left_out(
    extras: Mapping[str, Tensor], config: Mapping[str, Any], kept: Mapping[str, Tensor], gone: Mapping[str, Tensor], tmp_path: Path
) -> None:
    source = with_extras(tmp_path / "m", extras, config)
    plain = {name for name in stored_tensors(source) if name not in extras and "proj" not in name}
    bigq.quantize(source, tmp_path / "out", job())
    after = stored_tensors(tmp_path / "out")
    assert set(kept) <= set(after) and all(torch.equal(after[name], extras[name]) for name in kept)
    assert not set(gone) & set(after) and plain <= set(after)
    assert bigq.verify(tmp_path / "out") == []
    (warning,) = plan(str(source), tmp_path / "o", job()).warnings
    assert (str(len(extras)) if len(extras) > 1 else "tensor ") in warning and next(iter(gone or kept)) in warning
    assert ("left out" in warning) == bool(gone) and ("copied" in warning) == bool(kept)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_no_plain_matrix_counts_as_packed(format: str, tmp_path: Path) -> None:
    """Readers look modules up by their own names: fused ones (vLLM's qkv_proj, experts) too."""
    source = with_extras(tmp_path / "m", NEXT | MTP | TOWER, {"num_nextn_predict_layers": 1} | VISION)
    rule = bigq.Rule(r".*proj", {"bits": 8})
    bigq.quantize(source, tmp_path / "out", job(format, rules=(rule,)))
    config = written(tmp_path / "out")
    names = ["model.layers.3.eh_proj", "model.layers.3.self_attn.q_proj", "mtp.fc", "vision_tower.blocks.0.attn.qkv"]
    fused = ["model.layers.3.self_attn.qkv_proj", "mtp.layers.0.mlp.experts"]
    assert all(excludes(config, name) for name in names + fused)
    assert not any(excludes(config, f"model.layers.{i}.self_attn.q_proj") for i in range(3))
    if format == "compressed-tensors":
        assert set(names) <= set(config["ignore"])
    else:
        packed = {name.removesuffix(".qweight") for name in stored_tensors(tmp_path / "out") if name.endswith(".qweight")}
        assert set(config["modules_in_block_to_quantize"][0]) == packed and len(packed) == 21
    assert bigq.verify(tmp_path / "out") == []


@pytest.mark.parametrize(("format", "to"), [("gptq", "compressed-tensors"), ("compressed-tensors", "gptq"), ("gptq", "gptq_v2")])
def test_converted_folders_exclude_the_same(format: str, to: str, tmp_path: Path) -> None:
    source = with_extras(tmp_path / "m", NEXT | MTP, {"num_nextn_predict_layers": 1})
    bigq.quantize(source, tmp_path / "out", job(format))
    bigq.convert(tmp_path / "out", tmp_path / "other", to)
    config = written(tmp_path / "other")
    assert all(excludes(config, name) for name in ("mtp.fc", "model.layers.3.eh_proj", "model.layers.3.self_attn.qkv_proj"))
    assert not excludes(config, "model.layers.0.self_attn.q_proj")
    assert set(NEXT | MTP) <= set(stored_tensors(tmp_path / "other")) and bigq.verify(tmp_path / "other") == []


def test_linears_outside_the_blocks_are_excluded(tmp_path: Path) -> None:
    """OPT's projections, which vLLM would otherwise build as packed Linears."""
    bigq.quantize(make_checkpoint(tmp_path / "m", "opt"), tmp_path / "out", job())
    config = written(tmp_path / "out")
    assert all(excludes(config, f"model.decoder.project_{side}") for side in ("in", "out"))
    assert not config["lm_head"] and not excludes(config, "model.decoder.layers.0.fc1")


def test_fewer_layers_give_the_model_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lowered num_hidden_layers: the rest of the layers is neither computed with nor written, and that is said and recorded."""
    source = make_checkpoint(tmp_path / "m", "llama")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(streamed_logits(source, ids, 1), reference_model(source)(ids).logits)
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--method", "rtn", "--group-size", "32", "--device", "cpu"]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "9 tensors of the checkpoint, such as model.layers.2." in said and "left out" in said
    run = json.loads((tmp_path / "out" / ".bigq" / "runs.jsonl").read_text().splitlines()[0])
    assert any("has no place for 9 tensors" in note for note in json.loads(json.dumps(run))["notes"])
    assert not any(name.startswith("model.layers.2.") for name in stored_tensors(tmp_path / "out"))
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["plan", str(source), "--method", "rtn", "--group-size", "32", "--device", "cpu"]) == 0
    assert "warning:" in capsys.readouterr().out


def test_a_job_resumes_without_what_it_leaves_out(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = with_extras(tmp_path / "m", HEAD | MTP, {})
    bigq.quantize(source, tmp_path / "out", job())
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    (tmp_path / "out" / "model-00001-of-00004.safetensors").unlink()
    bigq.quantize(source, tmp_path / "out", job())
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")} == before
    assert bigq.verify(tmp_path / "out") == []
