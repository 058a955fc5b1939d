"""Jobs that write a number for the inputs of each Linear, from calibration, and what such a model computes: static scales of 8-bit inputs,
and the global scale of 4-bit ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import linear_module, make_checkpoint, random_ids, reference_model, rewrite, save_ids, stored_tensors, streamed_logits
from moe_families import moe_model
from safetensors.torch import load_file, save_file
from test_convert import refused
from tinyjob import at_points, hashes
from torch import Tensor, nn

import bigq
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import BigqError, CheckpointError, UnsupportedModelError, UsageError
from bigq.infer.load import load_model
from bigq.inspect.history import read_history
from bigq.inspect.verify import verify
from bigq.io.formats.readers_table import ROWS
from bigq.model.pager import Pager
from bigq.reports.model_card import model_card
from bigq.scheme import QuantScheme, Rule

pytestmark = pytest.mark.usefixtures("one_thread")

#: The largest number of an input, by format; of nvfp4-w4a4, that times the largest number of a scale.
LARGEST = {"w8a8-int8": 127.0, "fp8": 448.0, "nvfp4-w4a4": 6 * 448.0}
#: What is stored for inputs.
SUFFIX = {"w8a8-int8": "input_scale", "fp8": "input_scale", "nvfp4-w4a4": "input_global_scale"}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SKIP = Rule(r".*\.1\.self_attn", None)
each_format = pytest.mark.parametrize("form", LARGEST)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a first down_proj whose input is always 0."""
    folder = make_checkpoint(tmp_path_factory.mktemp("static") / "m", "llama", num_hidden_layers=2)
    rewrite(folder, "model.layers.0.mlp.up_proj.weight", torch.zeros(96, 64))
    return folder


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ids(tmp_path_factory.mktemp("static-ids") / "ids.safetensors", random_ids(8, 16))


def job(ids: Path, form: str | None, **changes: Any) -> JobConfig:
    given = {"calibration": str(ids), "format": form, "rules": (SKIP,), "samples": 8, "seqlen": 16, "batch": 3, "device": "cpu", **changes}
    return JobConfig(**{"input_scales": "static" if form != "nvfp4-w4a4" else "dynamic", "lm_head": True, "quiet": True, **given})


@pytest.fixture(scope="module")
def done(model: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    outs = {form: tmp_path_factory.mktemp("static-out") / form for form in LARGEST}
    for form, out in outs.items():
        bigq.quantize(str(model), out, job(ids, form))
    return outs


def decoded(form: str, source: Path, out: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The source with the stored numbers times scales for weights, and the scales of inputs by the name of the Linear."""
    model, tensors = reference_model(source), stored_tensors(out)
    found = {name.removesuffix(f".{SUFFIX[form]}"): t for name, t in tensors.items() if name.endswith(f".{SUFFIX[form]}")}
    for name in found:
        scales = tensors[f"{name}.weight_scale"].float()
        if form == "nvfp4-w4a4":
            packed = tensors[f"{name}.weight_packed"]
            halves = torch.stack([packed & 15, packed >> 4], -1).flatten(1).int()
            numbers = E2M1[halves & 7] * (1 - 2 * (halves >> 3))
            scales = (scales / tensors[f"{name}.weight_global_scale"]).repeat_interleave(16, 1)
        else:
            numbers = tensors[f"{name}.weight"].float()
        linear_module(model, name).weight.data = numbers * scales
    return model, {name: 1 / number for name, number in found.items()} if form == "nvfp4-w4a4" else found


def hooked(model: nn.Module, names: Iterator[str], change: Callable[[str, Tensor], Tensor | None], ids: Tensor) -> Tensor:
    """Logits, where ``change`` sees the inputs of Linears."""

    def hook(name: str) -> Callable[..., Any]:
        return lambda _, given: None if (changed := change(name, given[0])) is None else (changed,)

    handles = [linear_module(model, name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits


@each_format
def test_scales_are_from_the_largest_calibration_input(form: str, model: Path, done: dict[str, Path]) -> None:
    """Of the quantized model, whose inputs are not rounded in calibration."""
    plain, scales = decoded(form, model, done[form])
    assert len(scales) == 11 and all(scale.dtype == torch.float32 and scale.shape == (1,) for scale in scales.values())
    largest: dict[str, float] = {}

    def see(name: str, x: Tensor) -> None:
        largest[name] = float(x.abs().max())

    hooked(plain, iter(scales), see, random_ids(8, 16))
    assert largest.pop("model.layers.0.mlp.down_proj") == 0 and float(scales.pop("model.layers.0.mlp.down_proj")) == 1
    for name, scale in scales.items():
        assert float(scale) * LARGEST[form] == pytest.approx(largest[name], rel=1e-5), name
    for group in ("self_attn.{}_proj q k v", "mlp.{}_proj gate up"):
        pattern, *parts = group.split()
        assert len({float(scales[f"model.layers.0.{pattern.format(part)}"]) for part in parts}) == 1


def rounded(form: str, x: Tensor, scale: Tensor) -> Tensor:
    if form == "nvfp4-w4a4":
        grouped = x.unflatten(-1, (-1, 16))
        own = (grouped.abs().amax(-1, keepdim=True) / 6 / scale).clamp(max=448).to(torch.float8_e4m3fn).float() * scale
        distance = ((grouped / own).nan_to_num(0).abs()[..., None] - E2M1).abs()
        return (E2M1[distance.argmin(-1)] * grouped.sign() * own).flatten(-2)
    if form == "fp8":
        return torch.clamp(x / scale, -448, 448).to(torch.float8_e4m3fn).float() * scale
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


@each_format
def test_a_model_computes_with_them(form: str, model: Path, done: dict[str, Path]) -> None:
    """Streamed and resident, as if one wrote it down; with other tokens, some inputs are beyond the largest of calibration."""
    plain, scales = decoded(form, model, done[form])
    ids = random_ids(6, 24, seed=5)
    beyond: list[bool] = []

    def change(name: str, x: Tensor) -> Tensor:
        beyond.append(bool((x.abs() / scales[name] > LARGEST[form]).any()))
        return rounded(form, x, scales[name])

    expected = hooked(plain, iter(scales), change, ids)
    assert any(beyond)
    exact = plain(ids).logits
    assert verify(done[form]) == []
    resident = load_model(done[form], device="cpu")
    with torch.no_grad():
        found = (streamed_logits(done[form], ids, 4), resident(ids).logits)
    for logits in found:
        # An input in the middle of two numbers of 4 bits may become the other one.
        most = 0.1 if form == "nvfp4-w4a4" else 1e-3
        assert float((logits - expected).norm()) < most * float((exact - expected).norm())


@each_format
def test_the_config_and_the_card_say_so(form: str, done: dict[str, Path]) -> None:
    said = json.loads((done[form] / "config.json").read_text())["quantization_config"]
    (group,) = said["config_groups"].values()
    kind = {"num_bits": 8, "type": "int" if form == "w8a8-int8" else "float", "strategy": "tensor", "dynamic": False}
    words = ("--input-scales static", "by a scale for each Linear that calibration found")
    if form == "nvfp4-w4a4":
        kind |= {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"}
        words = ("--format nvfp4-w4a4", "in groups of 16, with one number for each Linear")
    assert group["input_activations"] == {**kind, "symmetric": True}
    card = model_card(read_history(done[form]), "")
    assert all(text in card for text in words)


@each_format
def test_a_job_goes_on_to_the_same_bytes(form: str, model: Path, done: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """Wherever it ended."""

    def fail() -> None:
        raise BigqError("stopped here")

    points = [("linear.solved", 1), ("linear.solved", 5), ("block.solved", 1), ("block.replayed", 1), ("linear.solved", 9)]
    for number, point in enumerate([*points, ("journal.opened", 4)]):
        out = tmp_path / str(number)
        config = job(ids, form, checkpoint_every=0.0 if number % 2 else None)
        with at_points({point: fail}), pytest.raises(BigqError, match="stopped here"):
            bigq.quantize(str(model), out, config)
        assert not (out / "config.json").exists()
        bigq.quantize(str(model), out, config)
        assert hashes(out) == hashes(done[form]), point


def test_other_methods_and_settings(model: Path, ids: Path, done: dict[str, Path], tmp_path: Path) -> None:
    """The scales are those of the inputs that each method sees; weights are those of the same job with dynamic ones."""
    for name, changes in (("gptaq", {"method": "gptaq"}), ("all", {"true_sequential": False}), ("fold", {"fold": "smoothquant"})):
        bigq.quantize(str(model), tmp_path / name, job(ids, "w8a8-int8", **changes))
        assert verify(tmp_path / name) == []
    bigq.quantize(str(model), tmp_path / "dynamic", job(ids, "w8a8-int8", input_scales="dynamic"))
    dynamic, static = stored_tensors(tmp_path / "dynamic"), stored_tensors(done["w8a8-int8"])
    assert dynamic.keys() == {name for name in static if not name.endswith(".input_scale")}
    assert all(torch.equal(tensor.view(torch.uint8), static[name].view(torch.uint8)) for name, tensor in dynamic.items())


def test_tokens_that_are_not_finite_have_no_part(model: Path, ids: Path, tmp_path: Path, done: dict[str, Path]) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "m"))
    table = stored_tensors(copy)["model.embed_tokens.weight"]
    bad = int(random_ids(8, 16)[0, -1])
    table[bad, 3] = 1e38
    rewrite(copy, "model.embed_tokens.weight", table)
    bigq.quantize(str(copy), tmp_path / "out", job(ids, "w8a8-int8", on_nonfinite="skip", dtype="float32", lm_head=False))
    scales = [float(t) for name, t in stored_tensors(tmp_path / "out").items() if name.endswith("input_scale")]
    assert len(scales) == 10 and max(scales) < 1e3 and verify(tmp_path / "out") == []


def test_it_may_be_quantized_again(done: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """Its weights are decoded; nothing of inputs is left."""
    bigq.quantize(
        str(done["fp8"]), tmp_path / "out", job(ids, "compressed-tensors", input_scales="dynamic", scheme=QuantScheme(group_size=32))
    )
    assert verify(tmp_path / "out") == [] and not any("input_scale" in name for name in stored_tensors(tmp_path / "out"))


def test_damaged_scales_are_found(done: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.0.mlp.up_proj.input_scale"
    wrong = "is not a positive number"
    cases = ((torch.zeros(1), wrong), (torch.tensor([float("nan")]), wrong), (torch.ones(2), "is not one floating number"))
    for number, (value, said) in enumerate(cases):
        copy = Path(shutil.copytree(done["fp8"], tmp_path / str(number)))
        rewrite(copy, name, value)
        assert any(f"tensor {name}" in problem and said in problem for problem in verify(copy)), value
    with pytest.raises(CheckpointError, match="one floating number"):
        Pager(tmp_path / "2", device=torch.device("cpu"))


def test_what_cannot_have_them_is_refused(model: Path, ids: Path, done: dict[str, Path], tmp_path: Path) -> None:
    needs = "needs calibration, which rtn has not; use --method gptq, or"
    ways = (("fp8", f"--input-scales static: {needs} leave it out"), ("nvfp4-w4a4", f"--format nvfp4-w4a4: {needs} use --format nvfp4"))
    for given, said in ways:
        with pytest.raises(UsageError, match=f"^{said}$"):
            bigq.quantize(str(model), tmp_path / "out", job(ids, given, method="rtn"))
    for form in (None, "compressed-tensors", "nvfp4", "nvfp4-w4a4", "gguf"):
        advice = "use --format w8a8-int8 or --format fp8, or leave it out$"
        said = f"^--input-scales static: --format {form or 'gptq'} has no static scales of inputs; {advice}"
        with pytest.raises(UsageError, match=said):
            bigq.plan(str(model), config=job(ids, form, input_scales="static"))
    with pytest.raises(UsageError, match=r"^--input-scales dynamic: the job in .* was begun with --input-scales static"):
        bigq.quantize(str(model), done["fp8"], job(ids, "fp8", input_scales="dynamic"))
    refused(done["fp8"], tmp_path / "new", "fp8", "is in the fp8 format already")
    refused(done["fp8"], tmp_path / "new", "gptq", "quantize the inputs of Linears too, so another format is another model")
    refused(done["nvfp4-w4a4"], tmp_path / "new", "nvfp4", "readers of nvfp4-w4a4 quantize the inputs of Linears too")


def test_experts(ids: Path, tmp_path: Path) -> None:
    """vLLM refuses static scales of experts; Linears beside unquantized experts have them."""
    moe_model("qwen3_moe", num_hidden_layers=1).save_pretrained(tmp_path / "m")
    for form, said in (("fp8", "--input-scales static: .*; leave it out"), ("nvfp4-w4a4", "--format nvfp4-w4a4: .*; use --format nvfp4")):
        with pytest.raises(UsageError, match=rf"^{said}, or leave experts unquantized with --skip '\.\*\\\.experts'$"):
            bigq.plan(str(tmp_path / "m"), config=job(ids, form, rules=()))
    skipped = job(ids, "fp8", rules=(Rule(r".*\.experts", None),), allow_partial=True)
    bigq.quantize(str(tmp_path / "m"), tmp_path / "out", skipped)
    assert verify(tmp_path / "out") == []
    assert sum(name.endswith(".input_scale") for name in stored_tensors(tmp_path / "out")) == 5
    dynamic = job(ids, "fp8", rules=(), input_scales="dynamic")
    bigq.quantize(str(tmp_path / "m"), tmp_path / "packed", dynamic)
    config = json.loads((tmp_path / "packed/config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= {"strategy": "tensor", "dynamic": False}
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"input_scale is missing"):
        Pager(tmp_path / "packed", device=torch.device("cpu"))
    index = json.loads((tmp_path / "packed/model.safetensors.index.json").read_text())
    for shard in (tmp_path / "packed").glob("*.safetensors"):
        tensors = load_file(shard)
        scales = {name.replace("weight_scale", "input_scale"): torch.ones(1) for name in tensors if name.endswith("weight_scale")}
        save_file(tensors | scales, shard)
        index["weight_map"] |= dict.fromkeys(scales, shard.name)
    (tmp_path / "packed/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match=r"packed: has numbers for the inputs of experts .*, which bigq cannot read"):
        Pager(tmp_path / "packed", device=torch.device("cpu"))


def test_the_plan_says_so(model: Path, ids: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"--format fp8 --input-scales static --calibration {ids} --samples 8 --seqlen 16 --device cpu"
    assert main(["plan", str(model), *options.split()]) == 0
    assert "static scales of inputs" in capsys.readouterr().out


def test_readers_of_static_scales_have_rows() -> None:
    assert {(row.formats, row.static) for row in ROWS if row.reader == "transformers" and row.static is not None} == {
        (("fp8-block",), False),
        (("w8a8-int8",), False),
        (("w8a8-int8",), True),
        (("fp8",), False),
        (("fp8",), True),
    }
