"""Whole jobs on models of odd widths: smaller groups, Linears that are left out, and jobs that need --allow-partial."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import make_checkpoint, random_ids, reference_model, save_ids, stored_tensors, streamed_logits
from moe_families import moe_model

import bigq
from bigq.cli.main import main
from bigq.inspect.verify import verify
from bigq.model.pager import Pager

#: 96 inputs, in groups of 64.
ODD = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 128, "num_hidden_layers": 2}
SAMPLES = ["--samples", "8", "--seqlen", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("odd") / "m", "llama", **ODD)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ids(tmp_path_factory.mktemp("odd-ids") / "ids.safetensors", random_ids(8, 16))


def quantized(source: Path, out: Path, ids: Path, *flags: str) -> int:
    return main(["quantize", str(source), str(out), "--calibration", str(ids), *SAMPLES, *flags])


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_smaller_groups(format: str, odd: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The job says it once; the output is the one of a job that was given the group sizes."""
    flags = ["--group-size", "64", "--format", format]
    assert quantized(odd, tmp_path / "out", ids, *flags) == 0
    said = capsys.readouterr().err
    assert said.count("have 96 inputs, which group size 64 does not divide") == 1
    assert verify(tmp_path / "out") == []
    rules = ["--rule", ".*(q|k|v|o|gate|up)_proj:group_size=32"] if format == "compressed-tensors" else ["--group-size", "32"]
    assert quantized(odd, tmp_path / "given", ids, *flags, *rules, "--quiet") == 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "given" / path.name).read_bytes(), path.name
    pager = Pager(tmp_path / "out", device=torch.device("cpu"), dtype="float32")
    assert len(pager.packed) == 14
    model = reference_model(odd)
    with torch.no_grad():
        logits, exact = streamed_logits(tmp_path / "out", random_ids(8, 16), 4), model(random_ids(8, 16)).logits
    assert float((logits - exact).norm() / exact.norm()) < 0.5


def test_the_job_is_resumed_with_its_rules(odd: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the options of its command, with some of them, and with none."""
    out, given = tmp_path / "out", ["--group-size", "64", "--format", "compressed-tensors", "--skip", r".*\.1\.mlp\.down_proj$"]
    assert quantized(odd, out, ids, *given, "--quiet") == 0
    settings = json.loads((out / ".bigq/job.json").read_text())["settings"]
    assert [rule["overrides"] for rule in settings["rules"]] == [None, {"group_size": 32}]
    for flags in (given, given[4:], []):
        (out / "config.json").unlink()
        assert quantized(odd, out, ids, *flags, "--quiet") == 0, capsys.readouterr().err
        assert verify(out) == []


def test_a_gate_that_does_not_fit_is_left_out(tmp_path: Path, ids: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In gptq, of 48 outputs. The plan and the job say so, and how much it is."""
    moe_model("qwen3_next", linear_num_value_heads=24, num_hidden_layers=2, layer_types=["linear_attention"] * 2).save_pretrained(
        tmp_path / "m"
    )
    flags = ["--group-size", "32", "--format", "gptq"]
    assert main(["plan", str(tmp_path / "m"), *SAMPLES, *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert ["in_proj_ba and 1 more are 48 × 64" in each for each in told["warnings"]] == [True]
    assert {"name": "linear_attn.in_proj_ba", "elements": 2 * 48 * 64, "why": "does not fit the format"} in told["kept"]["weights"]
    assert quantized(tmp_path / "m", tmp_path / "out", ids, *flags) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "2 Linears are left unquantized" in said and "kept: " in said and "linear_attn.in_proj_ba: does not fit the format" in said
    assert verify(tmp_path / "out") == []
    names = set(stored_tensors(tmp_path / "out"))
    assert "model.layers.0.linear_attn.in_proj_ba.weight" in names and "model.layers.0.linear_attn.in_proj_qkvz.qweight" in names


def test_a_job_that_leaves_most_of_it_out_needs_a_flag(tmp_path: Path, ids: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint(tmp_path / "m", "llama", intermediate_size=200, num_hidden_layers=1)
    flags = ["--group-size", "-1", "--format", "gptq", "--quiet"]
    for command in (["plan", str(source), *SAMPLES, *flags[:-1]], ["quantize", str(source), str(tmp_path / "out"), *SAMPLES, *flags]):
        assert main([*command, "--calibration", str(ids)]) == 2
        assert "mlp.gate_proj, mlp.up_proj and 1 more: does not fit the format (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert quantized(source, tmp_path / "out", ids, *flags, "--allow-partial") == 0
    assert verify(tmp_path / "out") == []
    assert sum(name.endswith(".qweight") for name in stored_tensors(tmp_path / "out")) == 4
    (tmp_path / "out/config.json").unlink()
    assert quantized(source, tmp_path / "out", ids, "--quiet") == 0, "a resumed job keeps the flag"
    # The format that the message names holds all of them.
    report = bigq.quantize(
        str(source),
        tmp_path / "all",
        bigq.JobConfig(
            scheme=bigq.QuantScheme(group_size=-1),
            format="compressed-tensors",
            calibration=str(ids),
            samples=8,
            seqlen=16,
            device="cpu",
            quiet=True,
        ),
    )
    assert len(report.linears) == 7
