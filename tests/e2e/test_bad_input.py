"""Whatever is wrong with what bigq is given, it says so in one line, exits with the right code and leaves no loadable output.

Every case goes through the command line's ``main``; a few through a process of their own.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Child
from models import UNSUPPORTED, VOCABULARY, make_checkpoint, random_ids, rewrite, save_ids, shard_of, stored_tensors
from safetensors.torch import save_file

from bigq.cli.main import main

INDEX = "model.safetensors.index.json"
NO_CUDA = pytest.mark.skipif(torch.cuda.device_count() > 7, reason="needs a machine without an eighth GPU")


@dataclass
class Case:
    """Folders of one test, and the command line that goes with them."""

    model: Path
    out: Path
    ids: Path
    capsys: pytest.CaptureFixture[str]

    def arguments(self, *extra: str) -> list[str]:
        plain = ["--calibration", str(self.ids), "--samples", "4", "--seqlen", "16", "--group-size", "32", "--device", "cpu"]
        return ["quantize", str(self.model), str(self.out), *plain, *extra]

    def fails(self, *extra: str, code: int, says: tuple[str, ...]) -> str:
        """Run; check exit code, the one line on stderr and what it names, and that nothing loadable is left."""
        return self.fails_with(self.arguments(*extra), code=code, says=says)

    def fails_with(self, arguments: list[str], *, code: int, says: tuple[str, ...]) -> str:
        self.capsys.readouterr()
        got = main(arguments)
        output = self.capsys.readouterr()
        line = one_error_line(output.err)
        assert got == code, line
        assert output.out == ""
        for part in says:
            assert part in line, line
        assert self.out == self.model or not (self.out / "config.json").exists()
        return line

    def succeeds(self, *extra: str) -> None:
        assert main(self.arguments("--quiet", *extra)) == 0, self.capsys.readouterr().err
        assert (self.out / "config.json").exists()

    def tensor(self, name: str) -> torch.Tensor:
        return stored_tensors(self.model)[name].clone()

    def change_config(self, **values: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def one_error_line(stderr: str) -> str:
    """The error line, which is the only one that says 'error', with no traceback beside it."""
    lines = [line for line in stderr.splitlines() if line.startswith(("bigq: error: ", "bigq quantize: error: "))]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr, stderr
    # A plan is several lines; all but the first are indented.
    progress = ("reading ", "note: ", "block ", "plan: ", "  ")
    rest = [line for line in stderr.splitlines() if line.strip() and line != lines[0] and not line.startswith(progress)]
    assert not rest, stderr
    assert len(lines[0]) > len("bigq: error: ") + 20
    return lines[0]


@pytest.fixture
def case(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Case:
    model = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), model)
    return Case(model, tmp_path / "out", ids_file, capsys)


def test_the_case_itself_is_sound(case: Case) -> None:
    """Without damage the same command works: the failures below come from the damage."""
    case.succeeds()


# MODEL.


def test_all_shards_and_all_tensors_that_are_missing_are_counted(case: Case) -> None:
    case.change_config(num_hidden_layers=4)
    case.fails(code=3, says=("tensor model.layers.3.self_attn.q_proj.weight and 8 more are missing from the checkpoint",))
    shards = sorted(case.model.glob("*.safetensors"))
    for path in shards[1:4]:
        path.unlink()
    case.fails(code=3, says=("(and 2 more shards): missing, but the index names it",))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "t5"}, "model type 't5' is that of an encoder-decoder model; bigq quantizes causal language models only"),
        ({"model_type": "clip"}, "model type 'clip' is that of a model of images and text; bigq quantizes causal language models only"),
        ({"model_type": "vit"}, "model type 'vit' is that of an image model; bigq quantizes causal language models only"),
        ({"model_type": "wav2vec2"}, "model type 'wav2vec2' is that of an audio model; bigq quantizes causal language models only"),
        (
            {"model_type": "distilbert"},
            "model type 'distilbert' is that of an encoder (a masked language model); bigq quantizes causal language models only",
        ),
        ({"model_type": "nonsense"}, "does not know model type 'nonsense'; install a transformers that does, or correct"),
        (
            {"_class_name": "FluxTransformer2DModel"},
            "a part of a diffusion model ('FluxTransformer2DModel'); bigq quantizes causal language models only",
        ),
    ],
)
def test_other_kinds_of_models_are_named_in_one_short_sentence(case: Case, config: dict[str, str], says: str) -> None:
    (case.model / "config.json").write_text(json.dumps(config))
    line = case.fails(code=3, says=(says,))
    assert len(line.replace(str(case.model), "")) < 200, "transformers' list of classes"


def test_model_missing(case: Case) -> None:
    case.model = case.model / "nowhere"
    case.fails(code=3, says=(str(case.model), "no such folder"))


def test_model_is_a_file(case: Case) -> None:
    case.model = case.model / "config.json"
    case.fails(code=3, says=(str(case.model), "is a file"))


def test_model_is_an_empty_folder(case: Case, tmp_path: Path) -> None:
    case.model = tmp_path / "empty"
    case.model.mkdir()
    case.fails(code=3, says=(str(case.model), "config.json"))


def test_pickles_only(case: Case) -> None:
    for path in case.model.glob("*.safetensors*"):
        path.unlink()
    (case.model / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    case.fails(code=3, says=(str(case.model), ".bin", "safetensors"))


def test_no_weights_at_all(case: Case) -> None:
    for path in case.model.glob("*.safetensors*"):
        path.unlink()
    case.fails(code=3, says=(str(case.model), INDEX, "model.safetensors"))


def test_shard_named_by_index_is_missing(case: Case) -> None:
    shard = shard_of(case.model, "model.layers.1.mlp.down_proj.weight")
    shard.unlink()
    case.fails(code=3, says=(str(shard), "missing"))


def test_index_leaves_a_shard_out(case: Case) -> None:
    path = case.model / INDEX
    index = json.loads(path.read_text())
    shard = index["weight_map"]["model.layers.1.mlp.down_proj.weight"]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard}
    path.write_text(json.dumps(index))
    case.fails(code=3, says=("model.layers.1.mlp.down_proj.weight", "missing"))


def test_index_names_a_tensor_that_its_shard_lacks(case: Case) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    shard = rewrite(case.model, name, None)
    case.fails(code=3, says=(name, str(shard)))


def test_tensor_missing_from_index_and_shard(case: Case) -> None:
    name = "model.layers.2.input_layernorm.weight"
    rewrite(case.model, name, None)
    index = json.loads((case.model / INDEX).read_text())
    del index["weight_map"][name]
    (case.model / INDEX).write_text(json.dumps(index))
    case.fails(code=3, says=(str(case.model), name, "missing"))


@pytest.mark.parametrize(
    "text", ["", "{", '{"weight_map": []}', "[1]", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 3}}']
)
def test_index_damaged(case: Case, text: str) -> None:
    (case.model / INDEX).write_text(text)
    case.fails(code=3, says=(INDEX,))


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -4096])
def test_shard_truncated(case: Case, keep: int) -> None:
    shard = shard_of(case.model, "model.layers.1.mlp.down_proj.weight")
    data = shard.read_bytes()
    shard.write_bytes(data[:keep])
    case.fails(code=3, says=(str(shard),))


def test_shard_is_not_safetensors(case: Case) -> None:
    shard = shard_of(case.model, "lm_head.weight")
    shard.write_bytes(b"<!DOCTYPE html><html>404 not found</html>" * 100)
    case.fails(code=3, says=(str(shard),))


def test_shape_disagrees_with_config(case: Case) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    shard = rewrite(case.model, name, torch.zeros(64, 128))
    case.fails(code=3, says=(name, str(shard), "[64, 128]", "[64, 96]"))


def test_config_of_another_size(case: Case) -> None:
    case.change_config(intermediate_size=128)
    case.fails(code=3, says=("mlp", "96", "128", "config.json"))


def test_config_with_more_layers(case: Case) -> None:
    case.change_config(num_hidden_layers=4)
    case.fails(code=3, says=("model.layers.3.", "missing"))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"])
def test_nan_or_inf_in_a_linear(case: Case, name: str, value: float, method: str) -> None:
    weight = case.tensor(name)
    weight[3, 5] = value
    shard = rewrite(case.model, name, weight)
    case.fails("--method", method, code=3, says=(name, str(shard), "NaN or Inf"))


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.2.post_attention_layernorm.weight"]
)
def test_nan_outside_linears(case: Case, name: str) -> None:
    """In the embedding too, even in a row that no calibration token uses."""
    tensor = case.tensor(name)
    tensor.flatten()[0] = float("nan")
    shard = rewrite(case.model, name, tensor)
    case.fails(code=3, says=(name, str(shard), "NaN or Inf"))


def test_weight_too_large_for_fp16_scales(case: Case) -> None:
    name = "model.layers.1.mlp.up_proj"
    weight = case.tensor(f"{name}.weight")
    weight[3, 5] = 1e7
    rewrite(case.model, f"{name}.weight", weight)
    case.fails(code=3, says=(name, "fp16"))


def test_activations_overflow(case: Case) -> None:
    """Finite weights whose products are not: the block is named."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = case.tensor(f"model.layers.0.mlp.{name}.weight")
        rewrite(case.model, f"model.layers.0.mlp.{name}.weight", weight * 3000)
    case.fails("--dtype", "float16", code=3, says=("model.layers.0", "--dtype"))


# Architectures.


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_architecture(case: Case, family: str, tmp_path: Path) -> None:
    case.model = make_checkpoint(tmp_path / family, family)
    line = case.fails(code=3, says=())
    assert {"zamba2": "share"}.get(family, "support") in line.lower(), line


def test_unknown_model_type(case: Case) -> None:
    case.change_config(model_type="gigantosaurus")
    case.fails(code=3, says=(str(case.model), "gigantosaurus"))


def test_own_code_needs_the_flag(case: Case) -> None:
    case.change_config(model_type="gigantosaurus", auto_map={"AutoConfig": "configuration_x.X"})
    case.fails(code=3, says=(str(case.model), "gigantosaurus", "--trust-remote-code"))


def test_not_a_causal_language_model(case: Case) -> None:
    shutil.rmtree(case.model)
    case.model.mkdir()
    (case.model / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 64}))
    save_file({"x": torch.zeros(1)}, case.model / "model.safetensors")
    case.fails(code=3, says=("causal language model",))


def test_already_quantized_by_bigq(case: Case, tmp_path: Path) -> None:
    """Quantized again, to another width, with a word."""
    case.succeeds()
    case.model, case.out = case.out, tmp_path / "twice"
    assert main(case.arguments("--bits", "3")) == 0
    assert "weights are quantized already (gptq, 4 bits)" in case.capsys.readouterr().err
    said = json.loads((case.out / "config.json").read_text())["quantization_config"]
    assert said["bits"] == 3


@pytest.mark.parametrize("method", ["eetq", "bitsandbytes", "hqq"])
def test_already_quantized_by_another_method(case: Case, method: str) -> None:
    case.change_config(quantization_config={"quant_method": method, "bits": 4})
    case.fails(code=3, says=(str(case.model), "already quantized", method))


def test_fp8_weights(case: Case) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(case.model, name, case.tensor(name).to(torch.float8_e4m3fn))
    case.fails(code=3, says=(name, "float8"))


# config.json.


def test_config_missing(case: Case) -> None:
    (case.model / "config.json").unlink()
    advice = "MODEL must be a folder with config.json and safetensors shards, or a hub id"
    case.fails(code=3, says=(str(case.model / "config.json"), "missing", advice))


@pytest.mark.parametrize("text", ["", "{", "not json", "[]", "null", "\xff\xfe", '{"model_type": 3}', "{}", '{"a": 1, "a": 2}'])
def test_config_garbage(case: Case, text: str) -> None:
    (case.model / "config.json").write_bytes(text.encode("latin-1"))
    case.fails(code=3, says=(str(case.model / "config.json"),))


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "many"},
        {"num_hidden_layers": "three"},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"hidden_size": -64},
        {"vocab_size": None},
        {"hidden_act": "no_such_function"},
        {"rope_parameters": "none"},
        {"dtype": "complex64"},
        {"dtype": "float12"},
    ],
    ids=str,
)
def test_config_with_wrong_values(case: Case, values: Mapping[str, Any]) -> None:
    case.change_config(**values)
    case.fails(code=3, says=())


# Calibration.


def test_calibration_too_short(case: Case) -> None:
    """16 rows are there: 24 of 16 tokens need 128 tokens more."""
    case.fails("--samples", "24", code=3, says=(str(case.ids), "128 tokens are missing", "--samples 16"))


def test_calibration_rows_too_short(case: Case) -> None:
    case.fails("--seqlen", "48", code=3, says=(str(case.ids), "40", "48"))


def test_sequence_longer_than_positions(case: Case) -> None:
    case.fails("--seqlen", "129", code=2, says=("--seqlen 129", "128"))


def test_calibration_missing(case: Case, tmp_path: Path) -> None:
    case.ids = tmp_path / "absent.txt"
    case.fails(code=3, says=("--calibration", str(case.ids), "no such file"))


def test_calibration_without_input_ids(case: Case, tmp_path: Path) -> None:
    case.ids = tmp_path / "other.safetensors"
    save_file({"tokens": random_ids()}, case.ids)
    case.fails(code=3, says=(str(case.ids), "input_ids"))


def test_calibration_of_floats(case: Case, tmp_path: Path) -> None:
    case.ids = save_ids(tmp_path / "floats.safetensors", random_ids().float())
    case.fails(code=3, says=(str(case.ids), "input_ids"))


@pytest.mark.parametrize("bad", [VOCABULARY, 10**9, -1])
def test_token_ids_beyond_the_vocabulary(case: Case, tmp_path: Path, bad: int) -> None:
    ids = random_ids()
    ids[1, 3] = bad
    case.ids = save_ids(tmp_path / "ids.safetensors", ids)
    case.fails(code=3, says=(str(bad), str(VOCABULARY), "vocabulary"))


def test_text_without_tokenizer(case: Case, tmp_path: Path) -> None:
    case.ids = tmp_path / "text.txt"
    case.ids.write_text("some words\n" * 1000)
    case.fails(code=3, says=(str(case.model), "tokenizer"))


# Settings.


def test_group_size_does_not_divide(case: Case) -> None:
    case.fails("--group-size", "40", code=2, says=("model.layers.0.mlp.down_proj", "96", "40", "--group-size"))


@pytest.mark.parametrize("size", ["0", "7", "12", "-2", "-128"])
def test_group_size_impossible(case: Case, size: str) -> None:
    case.fails(f"--group-size={size}", code=2, says=(f"--group-size {size}",))


def test_linear_of_odd_size(case: Case, tmp_path: Path) -> None:
    case.model = make_checkpoint(tmp_path / "odd", "llama", intermediate_size=80)
    case.fails(code=2, says=("model.layers.0.mlp.", "80", "32", "--allow-partial"))
    assert not case.out.exists()
    case.succeeds("--skip", r".*\.mlp\.")


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ("nonsense", "nonsense"),
        (".*:", ".*:"),
        (":bits=4", ":bits=4"),
        (".*:bits", "bits"),
        (".*:bits=four", "four"),
        (".*:bits=5", "bits=5"),
        (".*:color=red", "color"),
        (".*:sym=maybe", "maybe"),
        (".*:damping=2", "damping=2"),
        (".*:group_size=12", "group_size=12"),
        ("(unclosed:bits=4", "(unclosed"),
    ],
)
def test_bad_rule(case: Case, rule: str, named: str) -> None:
    case.fails("--rule", rule, code=2, says=(named,))


def test_bad_regex_in_skip(case: Case) -> None:
    case.fails("--skip", "*.down_proj", code=2, says=("*.down_proj", "regular expression"))


@pytest.mark.parametrize("flag", ["--samples", "--seqlen", "--batch"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_counts_below_one(case: Case, flag: str, value: str) -> None:
    case.fails(f"{flag}={value}", code=2, says=(flag, value))


@pytest.mark.parametrize("value", ["0", "1", "-0.5", "nan"])
def test_damping_out_of_range(case: Case, value: str) -> None:
    case.fails(f"--damping={value}", code=2, says=("damping",))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bits", "5"],
        ["--format", "exl2"],
        ["--method", "magic"],
        ["--dtype", "int8"],
        ["--samples", "many"],
        ["--no-such-flag"],
    ],
    ids=" ".join,
)
def test_arguments_that_do_not_parse(case: Case, arguments: list[str]) -> None:
    assert main(case.arguments(*arguments)) == 2
    stderr = case.capsys.readouterr().err
    assert arguments[0] in stderr and "Traceback" not in stderr and stderr.count("\n") == 1
    assert not case.out.exists()


# OUT.


def test_out_holds_something_else(case: Case) -> None:
    case.out.mkdir()
    (case.out / "thesis.txt").write_text("precious")
    case.fails(code=2, says=(str(case.out), "not empty"))
    assert [p.name for p in case.out.iterdir()] == ["thesis.txt"]


def test_out_is_a_file(case: Case) -> None:
    case.out.write_text("precious")
    case.fails(code=2, says=(str(case.out), "is a file"))
    assert case.out.read_text() == "precious"


def test_out_is_model(case: Case) -> None:
    before = sorted(p.name for p in case.model.iterdir())
    case.out = case.model
    case.fails(code=2, says=(str(case.out), "MODEL"))
    assert sorted(p.name for p in case.model.iterdir()) == before


def test_out_inside_model(case: Case) -> None:
    case.out = case.model / "quantized"
    case.fails(code=2, says=(str(case.out), "MODEL"))
    assert not case.out.exists()


def test_model_inside_out(case: Case) -> None:
    case.out = case.model.parent
    case.fails(code=2, says=(str(case.out), "MODEL"))


def test_out_reaches_model_through_a_link(case: Case, tmp_path: Path) -> None:
    case.out = tmp_path / "link"
    case.out.symlink_to(case.model)
    line = one_error_line_of(case)
    assert str(case.out) in line
    assert "quantization_config" not in json.loads((case.model / "config.json").read_text())


def one_error_line_of(case: Case) -> str:
    assert main(case.arguments()) == 2
    return one_error_line(case.capsys.readouterr().err)


# Devices.


@NO_CUDA
def test_device_that_is_not_there(case: Case) -> None:
    case.fails("--device", "cuda:7", code=4, says=("--device cuda:7", "cpu"))
    assert not case.out.exists()


@pytest.mark.parametrize("device", ["toaster", "cuda:x", "mps", "meta"])
def test_device_that_is_none(case: Case, device: str) -> None:
    case.fails("--device", device, code=2, says=(f"--device {device}",))
    assert not case.out.exists()


# bigq eval.


def evaluation(case: Case, *extra: str) -> list[str]:
    return ["eval", str(case.model), "--data", str(case.ids), "--seqlen", "16", "--device", "cpu", *extra]


def test_eval_of_an_unfinished_output(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigq.sched import run

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "finish_folder", interrupted)
        assert main(case.arguments("--quiet")) == 130
    case.model = case.out
    case.fails_with(evaluation(case), code=3, says=(str(case.out / "config.json"), "missing"))


def test_eval_data_missing(case: Case, tmp_path: Path) -> None:
    case.ids = tmp_path / "absent"
    case.fails_with(evaluation(case), code=3, says=("--data", str(case.ids)))


def test_eval_data_too_short(case: Case, tmp_path: Path) -> None:
    case.ids = save_ids(tmp_path / "short.safetensors", random_ids(1, 10).flatten())
    case.fails_with(evaluation(case), code=3, says=(str(case.ids), "16 tokens"))


def test_eval_of_single_tokens(case: Case) -> None:
    """Rows of one token predict nothing."""
    case.fails_with([*evaluation(case), "--seqlen", "1"], code=2, says=("--seqlen 1",))


def test_eval_longer_than_positions(case: Case) -> None:
    case.fails_with([*evaluation(case), "--seqlen", "129"], code=2, says=("--seqlen 129", "128"))


def test_eval_baseline_of_another_vocabulary(case: Case, tmp_path: Path) -> None:
    small = make_checkpoint(tmp_path / "small", "llama", vocab_size=64)
    case.fails_with(evaluation(case, "--baseline", str(small)), code=3, says=("vocabulary",))


def test_eval_baseline_missing(case: Case, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    case.fails_with(evaluation(case, "--baseline", absent), code=3, says=(absent, "no such folder"))


def test_eval_of_damaged_codes(case: Case) -> None:
    """A packed tensor that was cut short is found by its shape."""
    case.succeeds()
    name = "model.layers.0.mlp.up_proj.scales"
    rewrite(case.out, name, stored_tensors(case.out)[name][:, :-1].contiguous())
    case.model, case.out = case.out, case.out.parent / "none"
    case.fails_with(evaluation(case), code=3, says=("model.layers.0.mlp.up_proj",))


def test_eval_of_a_missing_packed_tensor(case: Case) -> None:
    case.succeeds()
    name = "model.layers.0.mlp.up_proj.scales"
    rewrite(case.out, name, None)
    index = json.loads((case.out / INDEX).read_text())
    del index["weight_map"][name]
    (case.out / INDEX).write_text(json.dumps(index))
    case.model, case.out = case.out, case.out.parent / "none"
    case.fails_with(evaluation(case), code=3, says=(name, "missing"))


# In a process of its own.


def test_error_of_a_whole_process(case: Case, child: Child) -> None:
    (case.model / "config.json").write_text("{")
    done = child("-m", "bigq", *case.arguments())
    assert done.returncode == 3 and done.stdout == ""
    assert str(case.model / "config.json") in one_error_line(done.stderr)
    assert not (case.out / "config.json").exists()


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_c4_told_to_be_offline(case: Case, child: Child, tmp_path: Path) -> None:
    done = child("-m", "bigq", *case.arguments("--calibration", "c4", "--quiet"), env={"HF_HOME": str(tmp_path / "hf")})
    line = one_error_line(done.stderr)
    assert done.returncode == 4 and done.stdout == ""
    assert "c4" in line and "--calibration FILE" in line and "builtin" in line
    assert not (case.out / "config.json").exists()


def test_c4_without_connection(case: Case, child: Child, tmp_path: Path) -> None:
    """huggingface_hub tries six times and logs it, which --quiet keeps off stderr; its pauses are left out here."""
    program = "import sys, time; time.sleep = lambda s: None; from bigq.cli.main import main; sys.exit(main(sys.argv[1:]))"
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}
    done = child("-c", program, *case.arguments("--calibration", "c4", "--quiet"), env=env)
    line = one_error_line(done.stderr)
    assert done.returncode == 4 and done.stdout == ""
    assert "c4" in line and "--calibration FILE" in line and "builtin" in line
    assert not (case.out / "config.json").exists()


@pytest.mark.parametrize("offline", [True, False], ids=["told to be offline", "no connection"])
def test_hub_id_without_network(case: Case, child: Child, tmp_path: Path, offline: bool) -> None:
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1" if offline else "0", "HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}
    arguments = case.arguments("--quiet")
    arguments[1] = "nobody/nothing"
    done = child("-m", "bigq", *arguments, env=env)
    assert done.returncode == 4 and done.stdout == ""
    assert "nobody/nothing" in one_error_line(done.stderr)
    assert not case.out.exists()
