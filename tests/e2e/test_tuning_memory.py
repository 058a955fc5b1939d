"""The plan of a job with ``--tune-steps``: its peak, and what it says without running."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import test_memory
from conftest import Child
from models import random_ids, save_ids

from bigq.cli.main import main

PROGRAM = """
import json, sys
import bigq
source, out, ids, rows, seqlen = sys.argv[1:]
config = bigq.JobConfig(
    scheme=bigq.QuantScheme(group_size=128), method="gptaq", tune_steps=6, calibration=ids, samples=int(rows), seqlen=int(seqlen),
    device="cpu", quiet=True)
report = bigq.quantize(source, out, config)
print(json.dumps({"peak": report.host_peak_bytes, "planned": report.planned_host_bytes}))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("hidden", "inner", "rows", "seqlen"),
    [(512, 1408, 48, 256), (2048, 5632, 4, 256)],
    ids=["many tokens", "large"],
)
def test_peak_of_a_tuned_job_is_within_a_tenth_of_the_plan(
    hidden: int, inner: int, rows: int, seqlen: int, child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_memory, "HIDDEN", hidden)
    monkeypatch.setattr(test_memory, "INNER", inner)
    source = test_memory.random_llama(tmp_path / "model", 1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(rows, seqlen))
    done = child("-c", PROGRAM, source, tmp_path / "out", ids, str(rows), str(seqlen), timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["peak"] == pytest.approx(result["planned"], rel=0.1)


def test_plan_counts_the_steps(checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for steps in (0, 10, 20):
        flags = ["--method", "gptaq", "--samples", "16", "--seqlen", "24", "--group-size", "32", "--device", "cpu", "--json"]
        assert main(["plan", str(checkpoint("llama")), *flags, "--tune-steps", str(steps)]) == 0
        found.append({p["phase"]: p for p in json.loads(capsys.readouterr().out)["phases"]})
    assert "tune" not in found[0]
    tens = [phases["tune"]["flops"]["products"] for phases in found[1:]]
    assert tens[0] < tens[1] < 2 * tens[0]
    assert found[1]["tune"]["host_bytes"] > found[1]["replay"]["host_bytes"]
