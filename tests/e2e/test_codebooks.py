"""Whole jobs in formats whose codes stand for points of a codebook: solved, resumed, checked, read, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_checkpoint, random_ids, reference_model, rewrite, save_ids, stored_tensors, streamed_logits
from moe_families import moe_model
from tinyjob import hashes

import bigq
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import BigqError, UsageError
from bigq.infer.evaluate import EvalConfig
from bigq.infer.load import load_model
from bigq.inspect.history import read_history
from bigq.inspect.verify import verify
from bigq.io.formats import FORMATS
from bigq.job.journal import read_commits
from bigq.kernels.grid_spec import BOOKS
from bigq.model.pager import Pager
from bigq.progress.progress import Progress
from bigq.reports.model_card import model_card
from bigq.scheme import QuantScheme, Rule

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "model.layers.0.self_attn.q_proj"
FLAGS = ["--samples", "8", "--seqlen", "16", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, of which one Linear does not fit: 96 inputs are no whole blocks."""
    return make_checkpoint(tmp_path_factory.mktemp("codebooks") / "m", "llama", num_hidden_layers=2, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ids(tmp_path_factory.mktemp("codebook-ids") / "ids.safetensors", random_ids(8, 16))


def job(ids: Path, **changes: Any) -> JobConfig:
    values: dict[str, Any] = {"format": "bnb-nf4", "calibration": str(ids), "samples": 8, "seqlen": 16, "device": "cpu", "quiet": True}
    return JobConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def done(model: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("codebook-out") / "out"
    bigq.quantize(str(model), out, job(ids))
    return out


def test_rounding_to_nearest_is_that_of_bitsandbytes(model: Path, tmp_path: Path) -> None:
    """Codes by the exact absolute maximum of a block, then the maxima are rounded. By hand; the client compares it with the program."""
    config = JobConfig(format="bnb-nf4", method="rtn", scheme=QuantScheme(scales="minmax"), device="cpu", quiet=True)
    bigq.quantize(str(model), tmp_path / "out", config)
    weight = stored_tensors(model)[f"{NAME}.weight"].float().view(-1, 64)
    absmax = weight.abs().amax(1)
    near = (weight * (1 / absmax)[:, None])[..., None] - torch.tensor(BOOKS["nf4"])
    codes = near.abs().argmin(-1).flatten()
    tensors = stored_tensors(tmp_path / "out")
    packed = tensors[f"{NAME}.weight"].flatten()
    assert torch.equal(torch.stack([packed >> 4, packed & 15], 1).flatten().long(), codes)
    state = json.loads(bytes(tensors[f"{NAME}.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert state["nested_offset"] == float(absmax.mean()) and state["dtype"] == "bfloat16"


def test_a_job_is_sound_and_near_its_source(model: Path, done: Path, ids: Path) -> None:
    assert verify(done) == []
    config = json.loads((done / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"
    assert {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} <= set(config["llm_int8_skip_modules"])
    assert len(Pager(done, device=torch.device("cpu")).packed) == 12
    exact = reference_model(model)(random_ids(8, 16)).logits
    logits = streamed_logits(done, random_ids(8, 16), 4, "float32")
    assert float((logits - exact).norm() / exact.norm()) < 0.3
    result = bigq.evaluate(done, EvalConfig(data=str(ids), seqlen=16, device="cpu", quiet=True), baseline=model)
    assert result.kl is not None and 0 < result.kl < 0.2


@pytest.mark.parametrize("packed", [True, False])
def test_a_loaded_model_computes_the_same(packed: bool, done: Path) -> None:
    loaded = load_model(done, device="cpu", dtype="float32", packed=packed)
    streamed = streamed_logits(done, random_ids(2, 16), 2, "float32")
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=random_ids(2, 16)).logits, streamed, atol=1e-5)


def test_a_job_goes_on_to_the_same_bytes(model: Path, done: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise BigqError("stopped here")

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "block_done", fail)
        with pytest.raises(BigqError, match="stopped here"):
            bigq.quantize(str(model), tmp_path / "out", job(ids))
    assert 0 < len(read_commits(tmp_path / "out")[0]) < 4
    bigq.quantize(str(model), tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(done)


def test_gptq_is_nearer_than_rounding(model: Path, done: Path, ids: Path, tmp_path: Path) -> None:
    bigq.quantize(str(model), tmp_path / "rtn", job(ids, method="rtn", scheme=QuantScheme(scales="minmax")))
    evaluated = EvalConfig(data=str(ids), seqlen=16, device="cpu", quiet=True)
    solved, rounded = (bigq.evaluate(out, evaluated, baseline=model).kl for out in (done, tmp_path / "rtn"))
    assert solved is not None and rounded is not None and solved < 0.7 * rounded


def test_the_card_and_the_report_name_the_reader(done: Path) -> None:
    history = read_history(done)
    assert all(each.stored_bits for each in history.linears) and 4.1 < (history.linear_bits or 0) < 7
    card = model_card(history, "")
    assert "- bitsandbytes\n" in card and "pip install transformers accelerate bitsandbytes" in card


def test_a_changed_byte_is_found(done: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    points = stored_tensors(out)[f"{NAME}.weight.quant_map"].clone()
    points[2] = 0.5
    rewrite(out, f"{NAME}.weight.quant_map", points)
    assert any("holds other points than those of nf4" in each for each in verify(out))


def test_the_output_can_be_quantized_again(done: Path, tmp_path: Path) -> None:
    """Its weights are decoded as they are read."""
    config = JobConfig(format="gptq", method="rtn", scheme=QuantScheme(bits=8, group_size=32), device="cpu", quiet=True)
    bigq.quantize(str(done), tmp_path / "again", config)
    pagers = (Pager(out, device=torch.device("cpu"), dtype="float32") for out in (done, tmp_path / "again"))
    first, second = (pager.dequantized(f"{NAME}.weight") for pager in pagers)
    assert float((first - second).norm() / first.norm()) < 0.01


def test_a_transposed_weight(ids: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "m", "gpt2")
    bigq.quantize(str(source), tmp_path / "out", job(ids))
    assert verify(tmp_path / "out") == []
    exact = reference_model(source)(random_ids(8, 16)).logits
    logits = streamed_logits(tmp_path / "out", random_ids(8, 16), 4, "float32")
    assert float((logits - exact).norm() / exact.norm()) < 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": QuantScheme(bits=3)}, "--bits 3: --format bnb-nf4 holds only --bits 4; leave it out"),
        ({"scheme": QuantScheme(symmetric=False)}, "--asym: --format bnb-nf4 holds only --sym; leave it out"),
        ({"scheme": QuantScheme(group_size=32)}, "--group-size 32: --format bnb-nf4 holds only --group-size 64; use --group-size 64"),
        ({"scheme": QuantScheme(scale_bits=8)}, "--scale-bits 8: --format bnb-nf4 stores scales in a form of its own; leave it out"),
        ({"lm_head": True}, "--lm-head: --format bnb-nf4 holds Linears inside blocks only; leave out --lm-head"),
        ({"rules": (Rule.parse(".*q_proj:bits=8"),)}, "--rule '.*q_proj:bits=8': --format bnb-nf4 holds only --bits 4; leave this out"),
        ({"method": "gptaq", "tune_steps": 4}, "--tune-steps 4: --format bnb-nf4 stores no integers; leave it out"),
        ({"bits_per_weight": 4.5}, "--bits-per-weight 4.5: --format bnb-nf4 holds 4 bits only; leave it out"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(changes: dict[str, Any], message: str, model: Path, ids: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        bigq.quantize(str(model), tmp_path / "out", job(ids, **changes))
    assert str(raised.value).startswith(message)
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").glob("*.safetensors")]


def test_experts_are_refused(ids: Path, tmp_path: Path) -> None:
    moe_model("qwen3_moe", num_hidden_layers=1).save_pretrained(tmp_path / "m")
    with pytest.raises(UsageError, match=r"--format bnb-fp4: its readers take no experts, .*; use --format compressed-tensors"):
        bigq.quantize(str(tmp_path / "m"), tmp_path / "out", job(ids, format="bnb-fp4"))


@pytest.mark.parametrize("to", [*(name for name in FORMATS if name != "bnb-nf4"), "gguf"])
def test_it_is_converted_to_no_other_format(to: str, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(done), str(tmp_path / "new"), "--to", to]) != 0
    said = capsys.readouterr().err
    expected = "holds points of nf4, which GGUF does not; keep the model in its present format" if to == "gguf" else f"but {to} stores"
    if to in FORMATS and FORMATS[to].quantized_inputs:
        expected = f"quantize the original model with --format {to}"
    assert expected in said and not (tmp_path / "new").exists()


def test_integers_are_not_converted_to_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(model), str(tmp_path / "out"), "--method", "rtn", "--group-size", "32", *FLAGS[4:]]) == 0
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "new"), "--to", "bnb-nf4"]) != 0
    assert "have integers, but bnb-nf4 stores codes of nf4" in capsys.readouterr().err
