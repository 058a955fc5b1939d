"""Whole jobs in formats that store 8-bit and 4-bit floats: solved, resumed, checked, and read with the inputs that readers use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_checkpoint, random_ids, reference_model, rewrite, save_ids, stored_tensors, streamed_logits
from moe_families import moe_model
from tinyjob import hashes
from torch import nn
from torch.overrides import TorchFunctionMode

import bigq
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import BigqError, NumericsError
from bigq.infer.evaluate import EvalConfig
from bigq.infer.load import load_model
from bigq.inspect.history import read_history
from bigq.inspect.verify import verify
from bigq.job.journal import read_commits
from bigq.model.pager import Pager
from bigq.progress.progress import Progress
from bigq.reports.model_card import model_card
from bigq.scheme import QuantScheme, Rule

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = ("fp8", "nvfp4", "mxfp4")
each_format = pytest.mark.parametrize("form", FORMATS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("floats") / "m", "llama", num_hidden_layers=2, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ids(tmp_path_factory.mktemp("float-ids") / "ids.safetensors", random_ids(8, 16))


def job(ids: Path, form: str, **changes: Any) -> JobConfig:
    values: dict[str, Any] = {"format": form, "calibration": str(ids), "samples": 8, "seqlen": 16, "device": "cpu", "quiet": True}
    return JobConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def done(model: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    outs = {form: tmp_path_factory.mktemp("float-out") / form for form in FORMATS}
    for form, out in outs.items():
        bigq.quantize(str(model), out, job(ids, form))
    return outs


@each_format
def test_a_job_is_sound_and_near_its_source(form: str, model: Path, done: dict[str, Path], ids: Path) -> None:
    out = done[form]
    assert verify(out) == [] and len(Pager(out, device=torch.device("cpu")).packed) == 14
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert config["quant_method"] == "compressed-tensors" and group["weights"]["type"] == "float"
    exact = reference_model(model)(random_ids(8, 16)).logits
    logits = streamed_logits(out, random_ids(8, 16), 4, "float32")
    assert float((logits - exact).norm() / exact.norm()) < (0.2 if form == "fp8" else 0.3)
    evaluated = EvalConfig(data=str(ids), seqlen=16, device="cpu", quiet=True)
    result = bigq.evaluate(out, evaluated, baseline=model)
    assert result.kl is not None and 0 < result.kl < 0.2
    card = model_card(read_history(out), "")
    assert "pip install transformers compressed-tensors" in card


@each_format
def test_a_loaded_model_computes_the_same(form: str, done: dict[str, Path]) -> None:
    streamed = streamed_logits(done[form], random_ids(2, 16), 2, "float32")
    for packed in (None,) if form == "fp8" else (True, False):
        loaded = load_model(done[form], device="cpu", dtype="float32", packed=packed)
        with torch.no_grad():
            assert torch.allclose(loaded(input_ids=random_ids(2, 16)).logits, streamed, atol=1e-5)


@each_format
def test_a_job_goes_on_to_the_same_bytes(
    form: str, model: Path, done: dict[str, Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise BigqError("stopped here")

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "block_done", fail)
        with pytest.raises(BigqError, match="stopped here"):
            bigq.quantize(str(model), tmp_path / "out", job(ids, form))
    assert 0 < len(read_commits(tmp_path / "out")[0]) < 4
    bigq.quantize(str(model), tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(done[form])


@each_format
def test_gptq_is_nearer_than_rounding(form: str, model: Path, done: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    """By the weights' loss; in fp8, most of the difference of logits is of inputs that are rounded."""
    rounded = bigq.quantize(str(model), tmp_path / "rtn", job(ids, form, method="rtn", scheme=QuantScheme(scales="minmax")))
    assert len(rounded.linears) == 14 and verify(tmp_path / "rtn") == []
    exact = reference_model(model)(random_ids(8, 16)).logits
    solved, nearest = (streamed_logits(out, random_ids(8, 16), 4, "float32") - exact for out in (done[form], tmp_path / "rtn"))
    assert float(solved.norm()) < (1.1 if form == "fp8" else 0.9) * float(nearest.norm())


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_experts(form: str, ids: Path, tmp_path: Path) -> None:
    moe_model("qwen3_moe", num_hidden_layers=1).save_pretrained(tmp_path / "m")
    bigq.quantize(str(tmp_path / "m"), tmp_path / "out", job(ids, form))
    assert verify(tmp_path / "out") == []
    exact = reference_model(tmp_path / "m")(random_ids(8, 16)).logits
    logits = streamed_logits(tmp_path / "out", random_ids(8, 16), 4, "float32")
    assert float((logits - exact).norm() / exact.norm()) < 0.3


class RoundedExperts(TorchFunctionMode):
    """Rounds what experts multiply, to int8 or E4M3 with a scale for each token. By hand: the largest magnitude is 127, or 448."""

    def __init__(self, model: nn.Module, form: str) -> None:
        super().__init__()
        self._experts = {p.untyped_storage().data_ptr() for p in model.parameters() if p.ndim == 3}
        self._form, self.seen = form, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and args[1].untyped_storage().data_ptr() in self._experts:
            self.seen += 1
            largest = 127 if self._form == "w8a8-int8" else 448
            scale = args[0].abs().amax(-1, keepdim=True) / largest
            steps = args[0] / scale
            steps = steps.round() if self._form == "w8a8-int8" else steps.to(torch.float8_e4m3fn).float()
            args = (steps * scale, *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["w8a8-int8", "fp8"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_inputs_of_experts_are_rounded_too(form: str, family: str, ids: Path, tmp_path: Path) -> None:
    moe_model(family, num_hidden_layers=2).save_pretrained(tmp_path / "m")
    bigq.quantize(str(tmp_path / "m"), tmp_path / "out", job(ids, form))
    assert verify(tmp_path / "out") == []
    model = load_model(tmp_path / "out", device="cpu", dtype="float32", packed=False)
    model.set_experts_implementation("eager")
    rows = random_ids(4, 16)
    with torch.no_grad(), RoundedExperts(model, form) as mode:
        expected = model(input_ids=rows).logits
    with torch.no_grad():
        unrounded = model(input_ids=rows).logits
    logits = streamed_logits(tmp_path / "out", rows, 4, "float32")
    assert mode.seen > 4
    assert float((logits - expected).norm()) < 0.02 * float((unrounded - expected).norm())
    exact = reference_model(tmp_path / "m")(rows).logits
    assert float((logits - exact).norm() / exact.norm()) < 0.2


@each_format
def test_the_output_can_be_quantized_again(form: str, done: dict[str, Path], tmp_path: Path) -> None:
    """Its weights are decoded as they are read."""
    again = JobConfig(format="gptq", method="rtn", scheme=QuantScheme(bits=8, group_size=32), device="cpu", quiet=True)
    bigq.quantize(str(done[form]), tmp_path / "again", again)
    name = "model.layers.0.self_attn.q_proj.weight"
    first, second = (Pager(out, device=torch.device("cpu"), dtype="float32").dequantized(name) for out in (done[form], tmp_path / "again"))
    assert float((first - second).norm() / first.norm()) < 0.01


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--format", "nvfp4", "--group-size", "128"], "--group-size 128: --format nvfp4 holds only --group-size 16; use --group-size 16"),
        (["--format", "fp8", "--bits", "4"], "--bits 4: --format fp8 holds only --bits 8; use --bits 8"),
        (["--format", "bnb-nf4", "--group-size", "128"], "--group-size 128: --format bnb-nf4 holds only --group-size 64; use"),
    ],
)
def test_a_default_that_is_given_is_refused_too(
    flags: list[str], said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["quantize", str(model), str(tmp_path / "out")], ["plan", str(model)]):
        assert main([*command, "--method", "rtn", "--device", "cpu", *flags]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    followed = [*flags[:-1], said.rpartition(" ")[2] if said.rpartition(" ")[2] != "use" else "64"]
    assert main(["plan", str(model), "--method", "rtn", "--device", "cpu", *followed]) == 0


def test_weights_above_what_scales_hold_name_the_linear(ids: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    weight = stored_tensors(source)[f"{name}.weight"].clone()
    weight[3, 5] = 30.0
    rewrite(source, f"{name}.weight", weight)
    with pytest.raises(NumericsError, match=rf"{name}: its weights need a scale above 1\.75, the largest one of the format; leave this"):
        bigq.quantize(str(source), tmp_path / "out", job(ids, "nvfp4", method="rtn"))
    bigq.quantize(
        str(source),
        tmp_path / "skipped",
        job(ids, "nvfp4", method="rtn", rules=(Rule(f".*{name.rpartition('.')[2]}", None), Rule(".*gate_proj", None))),
    )
    assert verify(tmp_path / "skipped") == []
    bigq.quantize(str(source), tmp_path / "other", job(ids, "mxfp4", method="rtn"))
    assert verify(tmp_path / "other") == []
