"""The session of checks and measurements on a GPU: its steps on a CPU, and what becomes of a step that fails or hangs."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Child

sys.path.append(str(ROOT / "scripts"))

import gpu_session
from gpu_steps import runner
from gpu_steps.benchmarks import ORDER
from gpu_steps.gpu_tests import marked_files, missing_imports
from gpu_steps.runner import Session, Step, as_markdown
from gpu_steps.setting import NOT_POSSIBLE, Findings, Setting

SCRIPT = ROOT / "scripts/gpu_session.py"
IMPOSSIBLE = json.dumps({"found": {"not possible": "no tool"}})
SLEEP = "import time; time.sleep(600)"
#: Programs of steps; WORK is the folder of their findings.
PROGRAMS = {
    "good": "pass",
    "bad": "raise ValueError('out of order')",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "hanging": "import faulthandler, time; faulthandler.enable(); open('WORK/hanging.json', 'w').write('{}'); time.sleep(600)",
    "impossible": f"open('WORK/impossible.json', 'w').write('{IMPOSSIBLE}'); raise SystemExit({NOT_POSSIBLE})",
    "slow": "import time; open('WORK/slow.json', 'w').write('{\"failures\": [], \"found\": {\"rate\": 2}}'); time.sleep(1.5)",
    "parent": f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', '{SLEEP}']); open('WORK/pid', 'w').write(str(c.pid))",
}


def session(tmp_path: Path, steps: list[Step], limit: float = 60) -> dict[str, Any]:
    work, out = tmp_path / "work", tmp_path / "out"
    for folder in (work, out):
        folder.mkdir()

    def command(step: Step) -> list[str]:
        return [sys.executable, "-c", PROGRAMS[step.name.partition(" ")[0]].replace("WORK", str(work))]

    one = Session(out, work, limit, command, os.environ, {"command": "x", "smoke": True, "revision": "r"})
    code = one.run(steps)
    result: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert result["steps"] == one.result["steps"]
    assert code == (0 if all(step["status"] == "passed" for step in result["steps"].values()) else 1)
    return result


@pytest.mark.parametrize("together", [True, False])
def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path: Path, together: bool) -> None:
    names = ("bad", "killed", "hanging", "impossible", "good")
    begun = time.monotonic()
    result = session(tmp_path, [Step(name=name, seconds=3 if name == "hanging" else 30, together=together) for name in names])
    steps = result["steps"]
    assert {name: steps[name]["status"] for name in names} == {
        "bad": "failed",
        "killed": "failed",
        "hanging": "cut off",
        "impossible": "not run",
        "good": "passed",
    }
    assert "ValueError: out of order" in steps["bad"]["log_tail"][-1] and steps["impossible"]["reason"] == "no tool"
    assert any("time.sleep" in line or "<string>" in line for line in steps["hanging"]["log_tail"]), "its log does not show where it hung"
    assert time.monotonic() - begun < 30
    text = (tmp_path / "out/results.md").read_text()
    assert "| hanging | cut off |" in text and "smoke run" in text
    with gzip.open(tmp_path / "out/logs.txt.gz", "rt") as logs:
        assert "===== bad" in logs.read()


def test_the_limit_of_the_session_cuts_the_last_steps(tmp_path: Path) -> None:
    """Of 16 seconds, 10 are kept back."""
    steps = session(tmp_path, [Step(name="hanging", seconds=30), Step(name="good", seconds=30)], limit=16)["steps"]
    assert steps["hanging"]["status"] == "not run" and steps["good"]["reason"] == "no time left"
    (tmp_path / "again").mkdir()
    steps = session(tmp_path / "again", [Step(name="hanging", seconds=3), Step(name="hanging again", seconds=3)], limit=16)["steps"]
    assert steps["hanging"]["status"] == "cut off" and steps["hanging again"]["status"] in ("cut off", "not run")


def test_processes_that_a_step_leaves_running_are_ended(tmp_path: Path) -> None:
    assert session(tmp_path, [Step(name="parent", seconds=30)])["steps"]["parent"]["status"] == "passed"
    state = Path("/proc") / (tmp_path / "work/pid").read_text() / "stat"
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the process still runs"
        time.sleep(0.05)


SESSION = """
import os, sys
sys.path[:0] = ["SCRIPTS"]
from pathlib import Path
from gpu_steps.runner import Session, Step
names = ("quick", "parent")
program = {"quick": "pass", "parent": PARENT}
line = lambda step: [sys.executable, "-c", program[step.name]]
session = Session(Path("OUT"), Path("WORK"), 60, line, os.environ, {}, temporary=True)
session.run([Step(name=name, seconds=30) for name in names])
"""
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{SLEEP}', 'TAG']); {SLEEP}"


@pytest.mark.parametrize("after", [0.1, 0.5, 1.5])
def test_a_killed_session_leaves_valid_results_and_no_processes(tmp_path: Path, after: float) -> None:
    """SIGKILL, at several moments after the results first appear."""
    out, work, tag = tmp_path / "out", tmp_path / "work", f"tag-{os.getpid()}-{after}"
    out.mkdir(), work.mkdir()
    words = {"SCRIPTS": ROOT / "scripts", "OUT": out, "WORK": work, "PARENT": repr(PARENT.replace("TAG", tag))}
    program = SESSION
    for word, value in words.items():
        program = program.replace(f'"{word}"' if word != "PARENT" else word, repr(str(value)) if word != "PARENT" else str(value))
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    wait_for(lambda: (out / "results.json").exists(), "no results")
    time.sleep(after)
    child.kill()
    child.wait()
    assert json.loads((out / "results.json").read_text())["steps"].keys() <= {"quick", "parent"}
    wait_for(lambda: not running_with(tag), "processes are left")
    wait_for(lambda: not work.exists(), "the work folder is left")


def wait_for(holds: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def running_with(tag: str) -> list[str]:
    """Command lines of processes that hold a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().decode(errors="replace"))
    return [line for line in found if tag in line]


def test_what_a_running_step_has_found_is_in_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SAVE_SECONDS", 0.1)
    saved: list[dict[str, Any]] = []
    replace = runner.replace

    def noted(path: Path, content: bytes) -> None:
        replace(path, content)
        if path.name == "results.json":
            saved.append(json.loads(content))

    monkeypatch.setattr(runner, "replace", noted)
    session(tmp_path, [Step(name="slow", seconds=30)])
    assert saved[0]["steps"] == {} and saved[-1]["steps"]["slow"]["status"] == "passed"
    assert any(one["steps"].get("slow", {}).get("status") == "running" and one["steps"]["slow"]["found"] == {"rate": 2} for one in saved)


def test_a_step_that_lacks_a_package_is_not_possible_and_a_broken_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(step="machine", work=tmp_path, smoke=True)
    for name, code in (("no_such_package", NOT_POSSIBLE), ("bigq.no_such_module", None)):

        def imports(module: str, name: str = name) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(gpu_session.importlib, "import_module", imports)
        monkeypatch.setattr(gpu_session.ctypes, "CDLL", lambda _: types.SimpleNamespace(prctl=lambda *_: None))
        monkeypatch.setattr(gpu_session.faulthandler, "enable", lambda: None)
        if code is None:
            with pytest.raises(ModuleNotFoundError):
                gpu_session.run_step("machine", setting, None)
        else:
            assert gpu_session.run_step("machine", setting, None) == code
            assert json.loads(setting.found("machine").read_text())["found"] == {"not possible": "no_such_package is not installed"}


def test_results_show_failures_first_and_checks_with_their_limits(tmp_path: Path) -> None:
    found = Findings(tmp_path / "step.json")
    found["rate"] = 2.5
    found.check("error", 1e-3, 1e-2)
    found.check("too large", float("nan"), 1e-2)
    found.require("equal", False)
    with found.attempt("case"):
        raise ValueError("broken")
    written = json.loads((tmp_path / "step.json").read_text())
    assert found.failures == written["failures"] == ["too large", "equal", "case: error"]
    text = as_markdown({"steps": {"step": {"status": "failed", "seconds": 1, **written}}})
    rows = [line for line in text.splitlines() if line.startswith("| ")][5:]
    assert rows == [
        "| too large | nan (≤ 0.01) |",
        "| equal | False |",
        "| case: error | ValueError: broken |",
        "| rate | 2.5 |",
        "| error | 0.001 (≤ 0.01) |",
    ]


def test_test_files_that_need_what_is_not_installed_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    modules = ("os.path", "no_such_package.part", "pytest", "conftest")
    lines = [*(f"import {name}" for name in modules), "from another_one import x", "from . import y"]
    file.write_text("\n".join(lines))
    assert missing_imports(file) == ["another_one", "no_such_package"]
    marked = marked_files(ROOT / "tests")
    assert ROOT / "tests/progress/test_clock.py" in marked and ROOT / "tests/kernels/test_grid.py" not in marked


def test_without_a_gpu_it_refuses(child: Child, tmp_path: Path) -> None:
    done = child(SCRIPT, "--out", tmp_path / "out", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "--smoke" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("--only", "machine,speed"), ("--skip", "speed"), ("--only", "machine", "--skip", "machine")])
def test_steps_that_do_not_exist_are_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        gpu_session.parse(["--out", "x", "--smoke", *arguments])
    assert exit.value.code == 2 and ("speed" in capsys.readouterr().err or "--skip" in arguments)


@pytest.mark.long
def test_a_smoke_run_passes_every_step(child: Child, tmp_path: Path) -> None:
    done = child(SCRIPT, "--smoke", "--out", tmp_path, env={"OMP_NUM_THREADS": "1"}, timeout=600)
    result = json.loads((tmp_path / "results.json").read_text())
    steps = result["steps"]
    assert done.returncode == 0, done.stdout + done.stderr + str([step for step in steps.values() if step["status"] != "passed"])
    assert set(steps) == {step.name for step in gpu_session.STEPS}
    found = {name: step["found"] for name, step in steps.items()}
    assert found["machine"]["ceilings"]["bf16_tflops"] > 0 and found["bloom"]["ceilings"] == found["machine"]["ceilings"]
    assert len(found["kernels"]) > 90 and not any(step["failures"] for step in steps.values())
    assert sum(name.endswith("same bytes") for name in found["jobs"]) == 5 and found["jobs"]["generated"]["tokens"] == 4
    for name in ("bloom", "llama"):
        assert found[name]["blocks_done"] == 2 and 0 < found[name]["waiting_share"] < 1 and found[name]["planned"]["host"] > 0
        assert found[name]["kernels_of_one_block"]["total"][1] > 1000 and found[name]["peaks"]["host_resident_bytes"] > 0
    for name, layers in (("deepseek", 2), ("qwen3", 1)):
        assert found[name]["blocks_done"] == layers and found[name]["seconds_by_phase"]["experts: factor"] > 0
        assert len(found[name]["tokens_of_experts"]) == layers and found[name]["kernels_of_some_experts"]["total"][1] > 1000
        assert {"peak of device memory, bytes", "peak of host memory, bytes"} <= set(found[name]["aims"])
    assert "passed" in found["gpu-tests"]["kernel and solver tests: summary"]
    assert set(ORDER) <= set(found["benchmarks"]) and found["large"]["permutation"]
    assert all(any(name.startswith("share of time") for name in found[step]["aims"]) for step in ("bloom", "llama"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.txt.gz", "results.json", "results.md"]
