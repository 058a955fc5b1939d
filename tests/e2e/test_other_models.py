"""Folders that hold something else than the model of their config.json: the message says what, and its advice works."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bigq
from bigq.cli.main import main
from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.sched.plan.inputs import plan
from tests.e2e.test_extras import job
from tests.models import make_checkpoint, stored_tensors

PAGE = Path(__file__).resolve().parents[2] / "docs" / "what-happens-when.md"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B", "r": 8}


def single(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict, **overrides: Any) -> Path:
    """A checkpoint in one file, whose tensors were changed."""
    make_checkpoint(folder, "llama", shard="1GB", **overrides)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def renamed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def refused(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which every command that opens a model refuses it."""
    text = out.parent / "text.txt"
    text.write_text("w5 w6 w7 " * 40)
    commands = {
        "quantize": ["quantize", str(model), str(out), "--method", "rtn", "--group-size", "32"],
        "plan": ["plan", str(model), "--method", "rtn", "--group-size", "32"],
        "eval": ["eval", str(model), "--data", str(text)],
        "generate": ["generate", str(model), "--prompt", "w5"],
    }
    lines = {}
    for name, arguments in commands.items():
        assert main([*arguments, "--device", "cpu"]) == 3, name
        said = capsys.readouterr().err.strip().splitlines()
        lines[name] = next(line for line in said if "error: " in line).partition("error: ")[2]
    assert not out.exists()
    assert len(set(lines.values())) == 1, lines
    return lines["plan"]


# Adapters.


def test_an_adapter_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(8, 64)}, folder / "adapter_model.safetensors")
    said = refused(folder, tmp_path / "out", capsys)
    assert f"{folder}: is a LORA adapter of the model meta-llama/Llama-3.2-1B, not a model; merge it" in said
    assert "merge_and_unload().save_pretrained(" in said


def test_an_adapter_without_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file({"x.lora_A.weight": torch.ones(8, 64)}, folder / "adapter_model.safetensors")
    assert f"{folder}: is an adapter, not a model; merge it" in refused(folder, tmp_path / "out", capsys)


def test_an_adapter_that_cannot_be_merged(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "gpt2"}))
    with pytest.raises(UnsupportedModelError, match="it cannot be merged; give the base model gpt2"):
        plan(str(tmp_path), tmp_path / "out", job())


def test_an_adapter_beside_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moving it away, as the message says, is enough."""
    model = single(tmp_path / "m")
    path = model / "adapter_config.json"
    path.write_text(json.dumps(ADAPTER))
    said = refused(model, tmp_path / "out", capsys)
    assert said.startswith(f"{path}: a LORA adapter lies beside the weights") and "merge_and_unload()" in said
    path.unlink()
    bigq.quantize(model, tmp_path / "out", job())


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.default.weight", "lora_magnitude_vector"])
def test_tensors_of_an_adapter_beside_the_weights(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"model.layers.0.self_attn.q_proj.{part}"
    model = single(tmp_path / "m", lambda tensors: {**tensors, name: torch.ones(8, 64)})
    said = refused(model, tmp_path / "out", capsys)
    assert name in said and "merge_and_unload()" in said


def test_a_peft_model_that_was_saved_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"base_model.model.{n.replace('q_proj.weight', 'q_proj.base_layer.weight')}": t for n, t in tensors.items()}

    said = refused(single(tmp_path / "m", wrapped), tmp_path / "out", capsys)
    assert "PEFT" in said and "merge_and_unload()" in said


# Two checkpoints in one folder.


def test_a_single_file_beside_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers reads the single file. Removing either, as the message says, leaves one model."""
    model = make_checkpoint(tmp_path / "m", "llama")
    other = make_checkpoint(tmp_path / "n", "llama", shard="1GB", seed=7)
    (model / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    said = refused(model, tmp_path / "out", capsys)
    assert said.startswith(f"{model / 'model.safetensors'}: lies beside model.safetensors.index.json") and "model-00001-of-" in said
    (model / "model.safetensors.index.json").unlink()
    warnings = plan(str(model), tmp_path / "out", job()).warnings
    assert any("9 shards, such as model-00001-of-00009.safetensors, are not in the index" in warning for warning in warnings)
    bigq.quantize(model, tmp_path / "out", job())
    norm = "model.norm.weight"
    assert torch.equal(stored_tensors(tmp_path / "out")[norm], load_file(model / "model.safetensors")[norm])


def test_an_index_of_the_single_file(tmp_path: Path) -> None:
    model = single(tmp_path / "m")
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert plan(str(model), tmp_path / "out", job()).warnings == ()


def test_weights_under_another_name(tmp_path: Path) -> None:
    model = single(tmp_path / "m")
    (model / "model.safetensors").rename(model / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"contains model\.fp16\.safetensors, but neither .*rename it to model\.safetensors"):
        bigq.quantize(model, tmp_path / "out", job())
    (model / "model.fp16.safetensors").rename(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(UnsupportedModelError, match=r"transformers_weights names 'other\.safetensors'"):
        bigq.quantize(model, tmp_path / "out", job())


def test_shards_without_an_index(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", "llama")
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"contains shards \(model-00001-of-00009\.safetensors\) but no model\.safetensors\.index"):
        bigq.quantize(model, tmp_path / "out", job())


# Names.


@pytest.mark.parametrize(
    ("prefix", "wrapper"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DistributedDataParallel"),
        ("base_model.model.", "PEFT"),
        ("module._orig_mod.", "torch"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_prefixes_of_wrappers(prefix: str, wrapper: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = single(tmp_path / "m", renamed(prefix), tie_word_embeddings=tied)
    said = refused(model, tmp_path / "out", capsys)
    assert f"tensor {prefix}model." in said or f"tensor {prefix}lm_head" in said
    assert f"is what {wrapper}" in said and "fetch" not in said


def test_a_wrapper_within_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block was compiled on its own."""
    model = single(tmp_path / "m", lambda ts: {re.sub(r"(layers\.\d\.)", r"\1_orig_mod.", n): t for n, t in ts.items()})
    said = refused(model, tmp_path / "out", capsys)
    assert "_orig_mod. is what torch.compile adds" in said and "model.layers.0._orig_mod." in said


def test_a_prefix_of_nobody_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(single(tmp_path / "m", renamed("student.")), tmp_path / "out", capsys)
    assert "names of tensors begin with student., as in student.model.embed_tokens.weight" in said


def test_names_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = single(tmp_path / "m", lambda tensors: {f"tok_{i}.w": t for i, t in enumerate(tensors.values())})
    said = refused(model, tmp_path / "out", capsys)
    assert "it has model.embed_tokens.weight, the checkpoint has tok_0.w" in said and "of 30 are missing" in said


def test_a_model_without_a_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = single(tmp_path / "m", lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    said = refused(model, tmp_path / "out", capsys)
    assert "lm_head.weight is missing" in said and "tie_word_embeddings" in said
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    bigq.quantize(model, tmp_path / "out", job())


def test_more_layers_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = single(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    said = refused(model, tmp_path / "out", capsys)
    assert re.search(r"tensor model\.layers\.3\.\S+ and 8 more are missing from the checkpoint", said)


@pytest.mark.parametrize("shard", ["60KB", "1GB"])
def test_the_lines_of_the_docs_rename_a_checkpoint(shard: str, tmp_path: Path) -> None:
    """What messages about prefixes point to works as it stands."""
    model = make_checkpoint(tmp_path / "m", "llama", shard=shard)
    before = stored_tensors(model)
    for path in model.glob("*.safetensors"):
        save_file(renamed("_orig_mod.")(load_file(path)), path, metadata={"format": "pt"})
    index = model / "model.safetensors.index.json"
    if index.exists():
        found = json.loads(index.read_text())
        index.write_text(json.dumps({**found, "weight_map": {f"_orig_mod.{n}": f for n, f in found["weight_map"].items()}}))
    lines = re.search(r"```python\n(.*?PREFIX.*?)```", PAGE.read_text(), re.DOTALL)
    assert lines is not None
    exec(lines[1].replace('"MODEL"', repr(str(model))), {})
    after = stored_tensors(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    bigq.quantize(model, tmp_path / "out", job())


# Quantized by others.


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}, "NVFP4"),
        ({"w_bit": 4, "q_group_size": 128}, "awq, 4 bits"),
        ({"strange": 1}, "names no method; it has strange"),
        ({}, "names no method"),
    ],
)
def test_the_method_is_named(quantization: dict[str, Any], method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = single(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    said = refused(model, tmp_path / "out", capsys)
    assert "already quantized" in said and method in said and "give the original model" in said and "None" not in said


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    ],
)
def test_a_method_that_no_weight_is_stored_by(
    quantization: dict[str, Any], method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such weights would be decoded, but these are the original ones; without the entry they are quantized."""
    model = single(tmp_path / "m")
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": quantization}))
    said = refused(model, tmp_path / "out", capsys)
    assert f"weights are quantized ({method}), but none is stored so" in said and "remove quantization_config" in said
    path.write_text(json.dumps(config))
    bigq.quantize(model, tmp_path / "out", job())


def test_descriptions_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = single(tmp_path / "m")
    modelopt = model / "hf_quant_config.json"
    described = {"quant_algo": "W4A8_AWQ", "kv_cache_quant_algo": None}
    modelopt.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": described}))
    said = refused(model, tmp_path / "out", capsys)
    assert "already quantized (modelopt 'W4A8_AWQ', by its hf_quant_config.json)" in said
    modelopt.write_text(json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}))
    plan(str(model), tmp_path / "out", job())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vision_config": {"quantization_config": {"quant_method": "fp8"}}}))
    assert "already quantized (fp8, by its config.json: vision_config.quantization_config)" in refused(model, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    ("suffix", "method"),
    [
        ("weight_scale_inv", "fp8"),
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("qweight", "gptq or awq"),
        ("weight_packed", "compressed-tensors"),
    ],
)
def test_quantized_tensors_without_a_config(suffix: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    model = single(tmp_path / "m", lambda tensors: {**tensors, name: torch.ones(1)})
    said = refused(model, tmp_path / "out", capsys)
    assert name in said and method in said and "give the original model" in said


def test_gptq_says_so(tmp_path: Path) -> None:
    bigq.quantize(single(tmp_path / "m"), tmp_path / "out", job())
    (warning,) = [text for text in plan(str(tmp_path / "out"), tmp_path / "twice", job()).warnings if "quantized already" in text]
    assert "weights are quantized already (gptq, 4 bits)" in warning and "the loss of another quantization adds to theirs" in warning
    bigq.quantize(tmp_path / "out", tmp_path / "twice", job())
