"""Running jobs one after another: crashes, signals, codes. The jobs are small programs, so that each ends as it should at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from bigq.batch.attempts import last_attempt
from bigq.batch.run import Outcome, Runner, Signals, exit_code_of
from bigq.batch.settings import Settings
from bigq.batch.table import BatchJob
from bigq.errors import Stopped

#: In place of bigq: does what the name of the model says.
JOB = """
import json, os, signal, sys, time
fd, words = int(sys.argv[1]), sys.argv[2:]
model, out = words[-2:]
open(out + ".begun", "w").write(str(os.getpid()))
asked = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: asked.append(signal.Signals(number).name))
if model == "stops":
    while not asked:
        time.sleep(0.01)
    time.sleep(0.2)
    open(out + ".asked", "w").write(" ".join(asked))
    sys.exit(75)
if model == "starts":
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    time.sleep(60)
if model == "crashes":
    os.kill(os.getpid(), signal.SIGSEGV)
if model.isdigit():
    os.write(fd, json.dumps("it said " + model).encode())
    sys.exit(int(model))
print("a result")
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Callable[..., list[BatchJob]]:
    def make(*models: str) -> list[BatchJob]:
        return [
            BatchJob(index=i, line=i, model=model, out=str(tmp_path / f"out{i}"), settings=Settings(values={"bits": 3}))
            for i, model in enumerate(models)
        ]

    return make


@pytest.fixture
def signals() -> Iterator[Signals]:
    found = Signals()
    with found.handled():
        yield found


@pytest.fixture
def runner(tmp_path: Path, signals: Signals) -> Runner:
    return Runner(file=tmp_path / "b.yaml", command=[sys.executable, "-c", JOB], signals=signals, say=lambda _: None)


def states(outcomes: list[Outcome]) -> list[tuple[str, int | None, str | None]]:
    return [(each.state, each.exit_code, each.message) for each in outcomes]


def test_a_job_that_fails_does_not_stop_the_others(
    jobs: Callable[..., list[BatchJob]], runner: Runner, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = jobs("well", "3", "crashes", "5", "again", "well")
    outcomes = runner.run(asked, {4: True})
    assert states(outcomes) == [
        ("done", 0, None),
        ("failed", 3, "it said 3"),
        ("failed", 139, "its process was ended by SIGSEGV"),
        ("in use", 5, "it said 5"),
        ("done before", 0, None),
        ("done", 0, None),
    ]
    assert exit_code_of(outcomes, 75) == 3
    assert capfd.readouterr() == ("", "a result\na result\n"), "results of jobs are no result of the batch"
    assert not (tmp_path / "out4.begun").exists()
    kept = [last_attempt(runner.file, job) for job in asked]
    assert [each and (each.exit_code, each.message, each.alive) for each in kept] == [
        (0, None, False), (3, "it said 3", False), (139, "its process was ended by SIGSEGV", False), (5, "it said 5", False), None,
        (0, None, False),
    ]  # fmt: skip


@pytest.mark.parametrize(("number", "passed"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGINT", "SIGTERM")])
def test_signals_are_passed_on(
    number: str, passed: str, jobs: Callable[..., list[BatchJob]], runner: Runner, signals: Signals, tmp_path: Path
) -> None:
    """A first Ctrl-C becomes SIGTERM: where it reached the job too, it must not count as the second one."""

    def ask() -> None:
        while not (tmp_path / "out1.begun").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), getattr(signal, number))

    threading.Thread(target=ask).start()
    outcomes = runner.run(jobs("well", "stops", "well"), {})
    assert [(each.state, each.exit_code) for each in outcomes] == [("done", 0), ("stopped", 75), ("waiting", None)]
    assert (tmp_path / "out1.asked").read_text() == passed and signals.reason == number
    assert exit_code_of(outcomes, 75) == 75 and exit_code_of(outcomes, 99) == 99


def test_a_job_that_does_not_handle_signals_yet_is_stopped_too(jobs: Callable[..., list[BatchJob]], runner: Runner, tmp_path: Path) -> None:
    def ask() -> None:
        while not (tmp_path / "out0.begun").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=ask).start()
    outcomes = runner.run(jobs("starts", "well"), {})
    assert [(each.state, each.exit_code) for each in outcomes] == [("stopped", 75), ("waiting", None)]


def test_asked_to_stop_before_the_first_job(signals: Signals, runner: Runner, jobs: Callable[..., list[BatchJob]]) -> None:
    """While the file is checked, which may wait for the hub."""
    signals.interrupting = True
    with pytest.raises(Stopped, match=r"^SIGUSR1: stopped before the first job; run the same command again$"):
        signal.raise_signal(signal.SIGUSR1)
    signals.interrupting = False
    assert [each.state for each in runner.run(jobs("well"), {})] == ["waiting"]


def test_a_job_that_stops_of_itself_stops_no_other(jobs: Callable[..., list[BatchJob]], runner: Runner) -> None:
    outcomes = runner.run(jobs("75", "3", "well"), {})
    assert [each.state for each in outcomes] == ["stopped", "failed", "done"]
    assert exit_code_of(outcomes, 75) == 75, "what can be resumed comes before what failed"


def test_codes() -> None:
    def code(*states: tuple[str, int | None]) -> int:
        job = BatchJob(index=0, line=0, model="m", out="o", settings=Settings())
        return exit_code_of([Outcome(job=job, state=state, exit_code=code) for state, code in states], 75)

    assert code(("done", 0), ("done before", 0)) == 0
    assert code(("done", 0), ("failed", 4), ("failed", 3)) == 4
    assert code(("in use", 5), ("done", 0)) == 5
    assert code(("failed", 4), ("waiting", None)) == 75
    assert code(("stopped", 130), ("waiting", None)) == 130


def test_no_job_outlives_the_batch(tmp_path: Path) -> None:
    """Killed with SIGKILL, the batch can pass nothing on; its job is asked to stop by the system."""
    program = f"""
import sys
from pathlib import Path
from bigq.batch.run import Runner, Signals
from bigq.batch.settings import Settings
from bigq.batch.table import BatchJob
from bigq.errors import Stopped
job = BatchJob(index=0, line=0, model="stops", out={str(tmp_path / "out")!r}, settings=Settings())
Runner(file=Path({str(tmp_path / "b.yaml")!r}), command=[sys.executable, "-c", {JOB!r}], signals=Signals(), say=print).run([job], {{}})
"""
    begun, asked = tmp_path / "out.begun", tmp_path / "out.asked"
    with subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        until = time.monotonic() + 60
        while not (begun.exists() and begun.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.3)
        process.kill()
    while not asked.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert asked.read_text() == "SIGTERM"


def test_records_that_cannot_be_written_are_one_warning_a_job(
    jobs: Callable[..., list[BatchJob]], runner: Runner, tmp_path: Path, signals: Signals
) -> None:
    (tmp_path / "b.yaml.state").write_text("in the way")
    said: list[str] = []
    runner = Runner(file=runner.file, command=runner.command, signals=signals, say=said.append)
    assert [each.state for each in runner.run(jobs("well"), {})] == ["done"]
    assert any("will not show how this job ended" in each for each in said)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", json.dumps({"out": 3}).encode()])
def test_damaged_records_count_as_missing(damage: bytes, jobs: Callable[..., list[BatchJob]], runner: Runner) -> None:
    (job,) = jobs("3")
    runner.run([job], {})
    (path,) = (runner.file.parent / "b.yaml.state").iterdir()
    path.write_bytes(damage)
    assert last_attempt(runner.file, job) is None
