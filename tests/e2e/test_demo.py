"""The demo on the shipped model: the table, and that GPTQ is worth it there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigq.cli.demo import MODEL
from bigq.cli.main import main


@pytest.mark.long
def test_demo_shows_gptq_far_below_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--device", "cpu", "--json"]) == 0
    rows = {(r["method"], r["bits"]): r for r in json.loads(capsys.readouterr().out)["rows"]}
    assert set(rows) == {("original", 16), *((m, b) for m in ("rtn", "gptq") for b in (4, 3, 2))}
    for bits in (4, 3, 2):
        rtn, gptq = rows["rtn", bits], rows["gptq", bits]
        assert gptq["kl"] * 5 <= rtn["kl"], f"{bits} bits: KL {gptq['kl']:.5f} against {rtn['kl']:.5f}"
        assert gptq["perplexity"] < rtn["perplexity"]
        assert gptq["bytes"] < rows["original", 16]["bytes"] * (bits + 1.2) / 16
    original = rows["original", 16]["perplexity"]
    assert rows["rtn", 2]["perplexity"] > 2 * original, "the shipped model is too tolerant to show anything"
    assert rows["gptq", 2]["perplexity"] < 1.1 * original
    assert (tmp_path / "demo" / "gptq-2bit" / "config.json").exists()


def test_demo_leaves_a_foreign_folder_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_shipped_files_are_small_and_several_shards() -> None:
    files = [p for p in MODEL.parent.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 10_000_000
    assert len(list(MODEL.glob("*.safetensors"))) > 1
