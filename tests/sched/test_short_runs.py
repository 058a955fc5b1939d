"""Jobs whose slots are too short for a unit: the third run in a row ends with an error, and any run may take longer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import KEPT_FROM_CHILDREN, ROOT

sys.path.append(str(ROOT / "tests" / "e2e"))

from tinyjob import TinyJob, at_points, committed, hashes, make_job

from bigq.errors import ResourceError, Stopped
from bigq.inspect.status import status
from bigq.job.journal import Journal
from bigq.job.stop import GraceEstimate, Stop
from bigq.sched.run import quantize
from bigq.sched.short_runs import short_runs


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    return make_job(tmp_path_factory.mktemp("short"))


def run(job: TinyJob, out: Path, at: tuple[str, int] | None = ("block.loaded", 1), reason: str = "SIGTERM") -> str:
    """A run that is asked to stop at a fault point: how it ended."""
    stop = Stop(60.0)
    with at_points({} if at is None else {at: lambda: stop.request(reason)}), pytest.MonkeyPatch.context() as patch:
        # These units take a fraction of the grace period, so most would be finished.
        patch.setattr(GraceEstimate, "SAFETY", float("-inf"))
        try:
            quantize(str(job.source), out, job.config(quiet=True, activations="host", checkpoint_every=None), stop)
        except (Stopped, ResourceError) as error:
            return f"{error.exit_code} {error}"
    return "done"


def test_the_third_run_in_a_row_that_finishes_nothing_ends_with_an_error(job: TinyJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(job, out).startswith("75 "), "it copied tensors"
    assert committed(out) == ["rest-0"]
    assert [run(job, out)[:3] for _ in range(2)] == ["75 ", "75 "]
    said = run(job, out)
    assert re.fullmatch(
        rf"4 {out}: the last 3 runs ended before they finished a unit; the job needs runs of more than [\d.]+ s, in which block 1 of 2 was "
        r"not finished: run the same command in a longer slot",
        said,
    )
    assert status(out).state == "failed" and status(out).said == said[2:] and status(out).resumable
    # Nobody but a person starts it now, so the count begins again; and with enough time it completes.
    assert [run(job, out)[:2] for _ in range(3)] == ["75", "75", "4 "]
    assert run(job, out, None) == "done"
    assert hashes(out) == job.expected


def test_a_finished_unit_begins_the_count_again_and_says_how_long_units_take(job: TinyJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert [run(job, out)[:2] for _ in range(3)] == ["75"] * 3
    assert run(job, out, ("block.loaded", 2)).startswith("75 ") and committed(out) == ["rest-0", "block-0"]
    # Now block 1 is replayed first, and then block 2 does not come to its end.
    assert [run(job, out, ("block.loaded", 2))[:2] for _ in range(2)] == ["75"] * 2
    parts = r"\S+ s before block 2 of 2, \S+ s for it as for the longest so far, 60.0 s to stop"
    found = re.search(rf"needs runs of at least ([\d.]+) \S+ \({parts}\)", run(job, out, ("block.loaded", 2)))
    assert found and float(found[1]) > 60


def test_ctrl_c_and_errors_do_not_count(job: TinyJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for reason, code in (("SIGTERM", "75"), ("SIGTERM", "75"), ("SIGINT", "75"), ("SIGTERM", "75"), ("SIGUSR1", "75"), ("SIGTERM", "4 ")):
        assert run(job, out, reason=reason)[:2] == code, reason


def test_killed_runs_count(job: TinyJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert run(job, out)[:2] == "75"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record_end", lambda *_: None)
        assert [run(job, out)[:2] for _ in range(2)] == ["75"] * 2
        assert not status(out).warnings
        assert run(job, out)[:2] == "4 " and run(job, out)[:2] == "4 "
    assert any("the last 3 runs ended before they finished a unit; " in warning for warning in status(out).warnings)
    assert run(job, out)[:2] == "4 "


def test_saved_activations_are_progress(job: TinyJob, tmp_path: Path) -> None:
    """Each run replays a finished block more, and saves what comes out of it."""
    run_: dict[str, Any] = {"at": "", "reached": [2, 0, 0, 0]}
    stopped = {"outcome": "stopped", "asked_by": "SIGTERM"}
    runs = [{**run_, "ended": {**stopped, "reached": [2, 0, 0, 0]}}, {**run_, "ended": {**stopped, "reached": [2, 3, 0, 0]}}]
    assert short_runs(runs, [2, 3, 0, 0]) == []
    assert short_runs(runs[:1], [2, 0, 0, 0]) == runs[:1]
    assert short_runs([run_, *runs[:1]], [2, 0, 0, 0]) == [runs[0], run_], "a run without an end was killed"
    assert short_runs([run_], [3, 0, 0, 0]) == []


@pytest.mark.parametrize("damage", [None, 3, [], ["x"] * 4, [1, 2, 3], {"a": 1}])
def test_records_of_other_versions_count_for_nothing(damage: Any) -> None:
    ended = {"outcome": "stopped", "asked_by": "SIGTERM"}
    assert short_runs([{"reached": damage, "ended": {**ended, "reached": [0] * 4}}], [0] * 4) == []
    assert short_runs([{"reached": [0] * 4, "ended": {**ended, "reached": damage}}], [0] * 4) == []
    assert short_runs([{"reached": [0] * 4, "ended": damage or "x"}], [0] * 4) == []


def start(job: TinyJob, out: Path, *more: str, fault: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bigq", "quantize", str(job.source), str(out), "--calibration", str(job.ids), "--samples", "8"]
    command += ["--seqlen", "16", "--batch", "3", "--group-size", "32", "--device", "cpu", "--disk", "1TiB", *more]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(KEPT_FROM_CHILDREN)}
    env = kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "BIGQ_FAULT": fault}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outlasting(job: TinyJob, out: Path) -> tuple[int, dict[str, Any]]:
    """A run that is asked to stop in a step of five minutes: its exit code and its last event."""
    with start(job, out, "--json", "--grace", "0.5", "--exit-code-on-stop", "99", fault="block.solved:1:sleep=300") as process:
        assert process.stderr is not None
        while "solve" not in str((json.loads(process.stderr.readline())).get("phase")):
            assert process.poll() is None, process.communicate()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    return process.returncode, json.loads(stderr.splitlines()[-1])


def test_a_run_that_outlasts_its_grace_is_judged_too(job: TinyJob, tmp_path: Path) -> None:
    """The process ends in the middle of a step: with the code that was asked for, or with 4 once it was the third."""
    out = tmp_path / "out"
    assert run(job, out)[:2] == "75"
    code, last = outlasting(job, out)
    assert (code, last["exit_code"], last["kind"]) == (99, 99, "Stopped")
    assert run(job, out)[:2] == "75"
    code, last = outlasting(job, out)
    assert (code, last["exit_code"], last["kind"]) == (4, 4, "ResourceError")
    assert "the last 3 runs ended before they finished a unit" in last["message"]
    assert status(out).state == "failed" and status(out).said == last["message"]
    assert run(job, out)[:2] == "75", "the count began again"
