"""Whole jobs on a model some of whose ReLU units never fire on the calibration text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import decode, make_checkpoint, random_ids, rewrite, save_ids, stored_tensors

import bigq
from bigq.config import JobConfig
from bigq.inspect.verify import verify
from bigq.scheme import QuantScheme

BLOCK = "model.decoder.layers.1"
WIDTH = 96
#: Silent units of block 1, by the words of the warning.
SHARES = {96: "all 96 inputs", 32: "32 of 96 inputs"}


def silenced(folder: Path, units: int) -> Path:
    """An OPT checkpoint in which the first ``units`` ReLU units of block 1 never fire."""
    make_checkpoint(folder, "opt")
    bias = stored_tensors(folder)[f"{BLOCK}.fc1.bias"]
    bias[:units] = -1e4
    rewrite(folder, f"{BLOCK}.fc1.bias", bias)
    return folder


def quantized(tmp_path: Path, units: int, **changes: Any) -> tuple[Path, bigq.Report]:
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(8, 24))
    values = {"scheme": QuantScheme(group_size=32), "calibration": str(ids), "samples": 8, "seqlen": 24, "device": "cpu"}
    out = tmp_path / "out"
    return out, bigq.quantize(silenced(tmp_path / "model", units), out, JobConfig(**{**values, **changes}))


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
@pytest.mark.parametrize("units", SHARES)
def test_weights_of_silent_units_are_rounded_and_the_job_warns(
    units: int, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = quantized(tmp_path, units, method=method)
    name = f"{BLOCK}.fc2"
    assert f"warning: {name}: {SHARES[units]} were 0 in every calibration token; " in " ".join(capsys.readouterr().err.split())
    got, weight = decode(stored_tensors(out), name, 4), stored_tensors(tmp_path / "model")[f"{name}.weight"]
    steps = weight / got.scales.float().repeat_interleave(32, 1)
    assert torch.equal(got.codes[:, :units].float(), (steps.round() + 8).clamp(0, 15)[:, :units])
    dead = {record["name"]: record["dead_inputs"] for record in report.linears}
    assert {name: count for name, count in dead.items() if count > 9} == {name: units}  # some units of other blocks are rarely on
    kept = [json.loads(line) for line in (out / ".bigq" / "linears.jsonl").read_text().splitlines()]
    assert {record["name"]: record["dead_inputs"] for record in kept} == dead
    assert "dead:    more than a tenth of the inputs of 1 Linear " in report.summary()
    assert verify(out) == []
    page = bigq.report(out).read_text()
    assert "Dead inputs: 1 Linear" in page and f"{units} of {WIDTH}" in page


def test_there_is_one_warning_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = silenced(tmp_path / "model", 32)
    for block in (0, 2):
        name = f"model.decoder.layers.{block}.fc1.bias"
        rewrite(model, name, stored_tensors(model)[name].index_fill(0, torch.arange(40), -1e4))
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(8, 24))
    config = JobConfig(scheme=QuantScheme(group_size=32), calibration=str(ids), samples=8, seqlen=24, device="cpu")
    report = bigq.quantize(model, tmp_path / "out", config)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("calibration token") == 1 and "warning: model.decoder.layers.0.fc2: " in said
    assert "the inputs of 3 Linears" in " ".join(report.summary().split())


def test_a_tenth_of_the_inputs_is_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = quantized(tmp_path, 9)
    assert "calibration token" not in capsys.readouterr().err and "dead:" not in report.summary()
    assert {record["name"]: record["dead_inputs"] for record in report.linears}[f"{BLOCK}.fc2"] == 9
    assert "Dead inputs" not in bigq.report(out).read_text()
