"""A share of the stress: jobs killed at named steps and at random instants end in the bytes that they end in without kills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, Child

#: Of killing, after the uninterrupted runs that are compared with.
SECONDS = 90


@pytest.mark.slow
def test_killed_at_every_step_and_at_random(child: Child, tmp_path: Path) -> None:
    result = tmp_path / "stress.json"
    done = child(ROOT / "scripts/stress.py", "--work", tmp_path / "work", "--seconds", str(SECONDS), "--json", result, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    total = json.loads(result.read_text())["total"]
    assert total["wrong"] == [] and total["kills"] >= 10 and total["outputs_compared"] >= 8
    assert len(total["kills_by"]) > 3
