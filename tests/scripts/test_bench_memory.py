"""The benchmark under a memory limit: it passes where the limit is kept, fails where it is not, and goes on when killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Child

sys.path.append(str(ROOT / "scripts"))

from bench_memory import failure, summary
from memory_limit import LIMITERS, make_limiter

SCRIPT = ROOT / "scripts/bench_memory.py"
TINY = ("--shape", "tiny", "--samples", "4", "--seqlen", "64", "--threads", "1")


@pytest.fixture(scope="module", autouse=True)
def _limitable() -> None:
    try:
        make_limiter(10**9).close()
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.mark.parametrize("kind", LIMITERS)
def test_a_limiter_stops_a_program_that_takes_too_much_and_no_other(kind: str) -> None:
    """100 and 400 MB are touched under a limit of 200 MB."""
    for size, passes in ((10**8, True), (4 * 10**8, False)):
        try:
            limiter = make_limiter(2 * 10**8, kind)
        except OSError as error:
            pytest.skip(str(error))
        try:
            process = limiter.start([sys.executable, "-c", f"len(bytearray({size}))"], stderr=subprocess.DEVNULL)
            assert (process.wait(60) == 0) == passes
            assert kind in ("rlimit", "systemd") or limiter.exceeded() != passes  # they see what is sampled
        finally:
            limiter.close()


@pytest.mark.long
def test_a_job_within_the_limit_passes_and_is_verified(child: Child, work: Path, tmp_path: Path) -> None:
    done = child(SCRIPT, "--work", work, "--limit", str(4 * 10**9), "--json", tmp_path / "r.json", *TINY, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["ok"] and result["runs"] == 1 and result["output"]["packed_linears"] == 7 * 6
    assert result["output_bytes"] < result["source_bytes"] < result["vmhwm_bytes"] < result["limit_bytes"] <= 4 * 10**9
    assert result["phases_are_of"] == "all blocks" and {"load", "replay", "hessian", "factor", "solve"} <= set(result["seconds_by_phase"])
    assert sum(result["seconds_by_phase"].values()) < result["wall_s"] and result["cpu_s"] > 0
    assert "output / packed_linears" in done.stdout


def test_a_limit_that_is_too_small_is_told_as_a_failure_and_stays_one(child: Child, work: Path, tmp_path: Path) -> None:
    """150 MB: less than torch alone takes."""
    arguments = (SCRIPT, "--work", work, "--limit", str(150 * 10**6), "--json", tmp_path / "r.json", *TINY)
    done = child(*arguments, timeout=500)
    result = json.loads((tmp_path / "r.json").read_text())
    assert done.returncode == 1 and result["ok"] is False and result["problem"] and result["output"] == {}
    if result["limiter"].startswith("cgroup"):
        assert "killed by the limit" in result["problem"] and result["kills"] >= 1
        again = child(*arguments)
        assert again.returncode == 1 and "--fresh" in json.loads((tmp_path / "r.json").read_text())["problem"]


def test_more_resident_memory_than_the_limit_is_a_failure_even_if_the_system_let_it_pass() -> None:
    """As where shared libraries are charged to whoever had them in memory first."""
    run: dict[str, Any] = {"status": 0, "exceeded": False, "limit_bytes": 100, "vmhwm_bytes": 100}
    assert failure(run, Path("unused")) == ""
    assert "101 resident bytes" in failure(run | {"vmhwm_bytes": 101}, Path("unused"))


@pytest.mark.long
def test_a_killed_benchmark_takes_its_child_along_and_goes_on(child: Child, work: Path, tmp_path: Path) -> None:
    limit = 4 * 10**9 + 4096
    job = work / f"job-tiny-4x64-{limit}"
    arguments = ["--work", str(work), "--limit", str(limit), *TINY]
    first = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], stderr=subprocess.DEVNULL)
    journal = job / "out/.bigq/journal.jsonl"
    deadline = time.monotonic() + 500
    while not journal.exists() or b"block-" not in journal.read_bytes():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (job / "report.json").exists()
    done = child(SCRIPT, *arguments, "--json", tmp_path / "r.json", timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    parts = [json.loads(path.read_text()) for path in sorted(job.glob("run-*.json"))]
    assert result["runs"] == 2 and result["wall_s"] == sum(part["wall_s"] for part in parts)
    assert [part["ended"] for part in parts] == [False, True]
    assert result["phases_are_of"].startswith("the last run, from block ")


def test_peaks_are_the_largest_and_times_the_sums() -> None:
    runs: list[dict[str, Any]] = [
        {"wall_s": 2.0, "cpu_s": 3.0, "limit_bytes": 9, "limiter": "x", "vmhwm_bytes": 7, "kills": 0},
        {"wall_s": 1.0, "cpu_s": 1.5, "limit_bytes": 9, "limiter": "x", "vmhwm_bytes": 5, "kills": 0, "group_peak_bytes": 6},
    ]
    found = summary(runs, None)
    assert (found["wall_s"], found["cpu_s"], found["vmhwm_bytes"], found["group_peak_bytes"], found["kills"]) == (3.0, 4.5, 7, 6, 0)
