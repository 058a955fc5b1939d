"""The disk that a job with ``--push-drop`` needs: a few shards of its output, not all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import make_checkpoint

from bigq.config import JobConfig
from bigq.io.remote.push import WAITING_BYTES, WAITING_SHARDS
from bigq.sched.plan import cost
from bigq.sched.plan.cost import Cost, Phase, kept_output
from bigq.sched.plan.inputs import plan
from bigq.sched.plan.planner import Plan
from bigq.scheme import QuantScheme

GIB = 2**30


@pytest.mark.parametrize(
    ("output", "largest", "kept"),
    [
        (100 * GIB, GIB // 2, WAITING_BYTES + GIB),
        (100 * GIB, 3 * GIB, (WAITING_SHARDS + 2) * 3 * GIB),
        (GIB, GIB // 2, GIB),
        (5 * GIB, 3 * GIB, 5 * GIB),
    ],
)
def test_what_is_kept_at_a_time(output: int, largest: int, kept: int) -> None:
    assert kept_output(output, largest) == kept


def test_disk_of_a_job() -> None:
    phase = Phase("copy", 0, 0, {})
    assert Cost(phases=(phase,), output=100, scratch=7, read=0).on_disk == 107
    assert Cost(phases=(phase,), output=100, scratch=7, read=0, kept=30).on_disk == 37


def test_a_plan_of_a_job_that_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written stays the same; what must be free is less, and a budget between the two is enough."""
    source = make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=12)
    monkeypatch.setattr(cost, "WAITING_BYTES", 0)
    monkeypatch.setattr(cost, "WAITING_SHARDS", 0)

    def planned(**changes: Any) -> Plan:
        config = JobConfig(scheme=QuantScheme(group_size=32), method="rtn", device="cpu", lm_head=True, **changes)
        return plan(str(source), tmp_path / "out", config)

    whole, dropping = planned(), planned(push="owner/name", push_drop=True)
    assert whole.cost.output == dropping.cost.output and whole.disk == whole.cost.output
    assert 0 < dropping.disk < whole.disk
    assert planned(disk=dropping.disk, push="owner/name", push_drop=True).shortages == ()
    assert planned(disk=dropping.disk).shortages != ()
    assert planned(push="owner/name").disk == whole.disk
