"""The comparison with other GPTQ programs: its table is what its figures say, and its verdicts are what they mean."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "scripts"))

import quality
from quality import METHODS, SETTINGS, Setting

import bigq

RESULTS = ROOT / "docs/results/quality.json"
ROW = Setting(bits=3, group_size=32, symmetric=True, order="activation")


def record(method: str, kl: float, seed: int = 0, stderr: float = 1e-6) -> dict[str, Any]:
    return {"method": method, **dataclasses.asdict(ROW), "seed": seed, "kl": kl, "kl_stderr": stderr}


def verdict(ours: list[float], theirs: list[float], stderr: float = 1e-6) -> str:
    records = [record("bigq gptq", kl, seed, stderr) for seed, kl in enumerate(ours)]
    records += [record("GPTQModel", kl, seed, stderr) for seed, kl in enumerate(theirs)]
    (row,) = quality.comparisons(records)
    assert row["draws"] == min(len(ours), len(theirs))
    return str(row["verdict"])


def test_a_difference_counts_where_it_is_above_the_noise() -> None:
    assert verdict([0.10, 0.11, 0.12], [0.20, 0.21, 0.22]) == "bigq is better"
    assert verdict([0.20, 0.21, 0.22], [0.10, 0.11, 0.12]) == "bigq is worse"
    assert verdict([0.10, 0.20, 0.10], [0.20, 0.10, 0.10]) == "within noise"
    assert verdict([0.20, 0.21, 0.22], [0.10, 0.11, 0.12], stderr=0.2) == "within noise", "of the held-out tokens"
    assert verdict([0.12], [0.10]) == "bigq is worse"
    assert verdict([0.12], [0.10], stderr=0.021) == "within noise"
    assert verdict([0.105], [0.10]) == "within noise", "one draw says little"
    assert verdict([0.20, 0.0, 0.0], [0.10]) == "bigq is worse", "only draws that both have are compared"


def test_methods_are_compared_with_what_there_is() -> None:
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names)
    assert all(method.twin in names for method in METHODS if method.twin)
    runs = quality.all_runs(quality.SHORT, quality.SEEDS)
    assert len({run.name for run in runs}) == len(runs)
    assert sum(run.method.name == "bigq rtn" for run in runs) == len(SETTINGS) / 2
    for method in METHODS:
        if method.twin is not None:
            assert all(method.settings(setting) is not None for setting in SETTINGS), "a twin is compared everywhere"


@pytest.mark.parametrize("method", [m for m in METHODS if m.tool == "bigq"], ids=lambda m: m.name)
def test_bigq_s_settings_are_those_of_a_job(method: quality.Method) -> None:
    settings = method.settings(dataclasses.replace(ROW, order="natural"))
    assert settings is not None
    scheme = bigq.QuantScheme(**settings.pop("scheme"))
    assert (scheme.bits, scheme.group_size, scheme.symmetric, scheme.mse) == (3, 32, True, ", mse" in method.name)
    assert scheme.mse_power == (float(power) if (power := method.name.partition(", mse ")[2]) else None)
    config = bigq.JobConfig(scheme=scheme, **settings)
    assert config.method in method.name and config.true_sequential != method.name.endswith("per block")


def test_peers_are_told_the_same_setting() -> None:
    by_name = {method.name: method.settings(ROW) or {} for method in METHODS}
    for name in ("GPTQModel", "GPTQModel, mse"):
        told = by_name[name]
        assert (told["bits"], told["group_size"], told["sym"], told["desc_act"], told["static_groups"]) == (3, 32, True, True, True)
        assert told["act_group_aware"] is False
    weights = by_name["llm-compressor"]["weights"]
    assert weights == {"num_bits": 3, "symmetric": True, "strategy": "group", "group_size": 32}
    assert by_name["llm-compressor"]["modifier"] == {"actorder": "static"}


def test_a_run_is_judged_against_the_original_and_recorded_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight calibration rows and two held-out ones, rounded to nearest."""
    monkeypatch.setattr(quality, "SAMPLES", 8)
    monkeypatch.setattr(quality, "HELDOUT_ROWS", 2)
    quality.prepare(tmp_path)
    run = next(run for run in quality.all_runs(["bigq"], [0]) if run.method.name == "bigq rtn" and run.setting.bits == 4)
    quality.make([run], None, tmp_path, keep=False)
    path = tmp_path / "runs" / f"{run.name}.json"
    made = json.loads(path.read_text())
    assert 0 < made["kl"] < 0.2 and made["tokens"] == 2 * 255 and made["method"] == "bigq rtn"
    assert not (tmp_path / "out" / run.name).exists()
    path.write_text(json.dumps(made | {"kl": 7.0}))
    quality.make([run], None, tmp_path, keep=False)
    result = quality.collect(tmp_path)
    assert [r["kl"] for r in result["runs"]] == [7.0] and run.name not in result["runs_missing"]
    assert "7.0000" in quality.table(result)


def test_the_page_is_the_table_of_the_results() -> None:
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert (ROOT / "docs/quality.md").read_text(encoding="utf-8") == quality.page(RESULTS.parent)
    assert result["comparisons"] == quality.comparisons(result["runs"])
