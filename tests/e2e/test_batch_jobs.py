"""Whole batches of the tiny model that ships with bigq: killed, stopped and run again, by one process or by tasks of an array."""

from __future__ import annotations

import html.parser
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import KEPT_FROM_CHILDREN, ROOT, Child

from bigq.batch.overview import overview
from bigq.batch.page import render
from bigq.cli.demo import MODEL
from bigq.cli.main import main
from bigq.inspect.status import status
from bigq.job.owner import Owner

FILE = """
defaults: {calibration: builtin, samples: 4, seqlen: 32, group-size: 32, device: cpu, checkpoint-every: 0}
jobs:
  - {model: MODEL, out: a, bits: 3}
  - {model: MODEL, out: b, method: rtn}
  - {model: MODEL, out: c, vram: 1GiB, ram: 1MiB}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "jobs.yaml"
    path.write_text(FILE.replace("MODEL", str(MODEL)))
    return path


def start(*words: str, fault: str = "", **more: str) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(KEPT_FROM_CHILDREN)}
    env = kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "BIGQ_FAULT": fault} | more
    command = [sys.executable, "-m", "bigq", "batch", *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, dict[str, str], str]:
    """The exit code, the states of the jobs by their folder, and stderr."""
    with process:
        stdout, stderr = process.communicate(timeout=200)
    assert stdout, stderr
    found = json.loads(stdout)
    assert found["exit_code"] == process.returncode
    return process.returncode, {job["out"]: job["state"] for job in found["jobs"]}, stderr


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


@pytest.mark.long
def test_a_batch_that_is_killed_stopped_and_run_again(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Every job is killed after its second block; the last one does not fit and never begins.
    code, states, stderr = ended(start("jobs.yaml", "--json", fault="block.solved:3:kill"))
    assert (code, states) == (137, {"a": "failed", "b": "failed", "c": "failed"}), stderr
    assert [status(file.parent / name).blocks_done for name in ("a", "b")] == [2, 2]
    found = overview(file)
    assert [each.state for each in found.jobs] == ["failed"] * 3
    assert [each.message for each in found.jobs][:2] == ["its process was ended by SIGKILL"] * 2
    assert "the job does not fit" in str(found.jobs[2].message) and found.jobs[2].found is None
    assert [each.fraction for each in found.jobs] == [0.5, 0.5, None]

    # Asked to stop in the first job, it starts no other one.
    with start("jobs.yaml", "--json", "--exit-code-on-stop", "99", fault="block.solved:1:sleep=3") as process:
        until = time.monotonic() + 100
        while not ((now := status(file.parent / "a")).holder and now.state == "running") and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.05)
        assert overview(file).jobs[0].state == "running"
        process.send_signal(signal.SIGUSR1)
        code, states, stderr = ended(process)
    assert (code, states) == (99, {"a": "stopped", "b": "waiting", "c": "waiting"}), stderr
    assert status(file.parent / "a").state == "stopped" and "SIGUSR1" in str(overview(file).jobs[0].message)
    assert [each.state for each in overview(file).jobs] == ["stopped", "failed", "failed"]

    # Run again, it resumes what is unfinished.
    code, states, stderr = ended(start("jobs.yaml", "--json"))
    assert (code, states) == (4, {"a": "done", "b": "done", "c": "failed"}), stderr
    assert "does not fit" in stderr

    # And the bytes are those of one uninterrupted job.
    for name, words in (("a", ["--bits", "3"]), ("b", ["--method", "rtn"])):
        whole = file.parent / f"whole-{name}"
        line = ["--calibration", "builtin", "--samples", "4", "--seqlen", "32", "--group-size", "32", "--device", "cpu", "--quiet"]
        assert main(["quantize", str(MODEL), str(whole), *line, *words]) == 0
        assert shards(whole) == shards(file.parent / name)

    # What is done is not begun again; another model in its place is no such thing.
    began = time.monotonic()
    code, states, _ = ended(start("jobs.yaml", "--json", "--index", "auto", SLURM_ARRAY_TASK_ID="1"))
    assert (code, states) == (0, {"b": "done before"})
    file.write_text(file.read_text().replace("method: rtn", "method: rtn, bits: 2"))
    code, states, stderr = ended(start("jobs.yaml", "--json", "--index", "1"))
    assert (code, states) == (2, {"b": "failed"}) and "was begun with --bits 4" in stderr
    assert time.monotonic() - began < 60

    capsys.readouterr()
    assert main(["status", "jobs.yaml", "--html", "page.html"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "jobs.yaml: 2 done, 1 failed" or lines[0] == "jobs.yaml: 1 done, 2 failed"
    assert "does not fit" in (file.parent / "page.html").read_text()


def test_a_job_in_use_has_its_own_code(file: Path, child: Child) -> None:
    state = file.parent / "b" / ".bigq"
    state.mkdir(parents=True)
    owner = Owner(state, dict, steal=False, say=lambda _: None)
    try:
        found = child("-m", "bigq", "batch", "jobs.yaml", "--index", "1")
    finally:
        owner.release("stopped", {})
    assert found.returncode == 5, found.stderr
    assert "in use" in found.stdout and "another bigq job is writing to this folder" in found.stdout


class Page(html.parser.HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\u202e\x1b[31m"


def hostile_places(folder: Path) -> tuple[Path, str]:
    """A file of jobs whose names, folders and records hold markup; and what is left of them in a text."""
    name = HOSTILE.replace("/", "\u2215")
    out = folder / f"out{name}"
    shutil.copytree(folder / "b", out)
    owner = json.loads((out / ".bigq" / "owner.json").read_text())
    owner.update(outcome="failed", host=HOSTILE, at=HOSTILE, facts={"said": HOSTILE, "phase": HOSTILE, "blocks": 3})
    (out / ".bigq" / "owner.json").write_text(json.dumps(owner))
    path = folder / f"jobs{name}.yaml"
    path.write_text(json.dumps({"jobs": [{"model": f"m{HOSTILE}", "out": str(out)}, {"model": "m", "out": HOSTILE}]}))
    return path, name


def test_nothing_in_names_and_records_becomes_markup(tmp_path: Path, job_folder: Callable[[Path], Path]) -> None:
    job_folder(tmp_path / "b")
    path, _ = hostile_places(tmp_path)
    found = overview(path)
    assert [each.state for each in found.jobs] == ["failed", "waiting"]
    text = render(found)
    plain = render(overview(plain_file(tmp_path)))
    assert "\u202e" not in text and "\x1b" not in text, "nor does anything turn the text around"
    hostile, harmless = Page(text), Page(plain)
    assert hostile.elements == harmless.elements, "the same elements with the same attributes"
    assert hostile.text.count("<script>alert(1)") >= 5
    tags = {tag for tag, _ in hostile.elements}
    assert not tags & {"script", "img", "a", "link", "iframe", "object", "form"}
    assert not any(key.startswith("on") or key in ("href", "src", "style") for _, attrs in hostile.elements for key in attrs)
    policies = [attrs["content"] for tag, attrs in hostile.elements if tag == "meta" and "http-equiv" in attrs]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def plain_file(folder: Path) -> Path:
    """The same without markup."""
    out = Path(shutil.copytree(folder / "b", folder / "plain"))
    owner = json.loads((out / ".bigq" / "owner.json").read_text())
    owner.update(outcome="failed", facts={"said": "x", "blocks": 3})
    (out / ".bigq" / "owner.json").write_text(json.dumps(owner))
    path = folder / "plain.yaml"
    path.write_text(json.dumps({"jobs": [{"model": "m", "out": str(out)}, {"model": "m", "out": str(folder / "none")}]}))
    return path


@pytest.fixture
def job_folder() -> Callable[[Path], Path]:
    """Makes the folder of a job that has only begun."""

    def make(out: Path) -> Path:
        (out / ".bigq").mkdir(parents=True)
        owner = Owner(out / ".bigq", dict, steal=False, say=lambda _: None)
        owner.release("failed", {"said": "x", "blocks": 3})
        return out

    return make


def test_jobs_on_other_machines_and_jobs_that_start(tmp_path: Path, job_folder: Callable[[Path], Path]) -> None:
    from bigq.batch.attempts import Attempt

    path = tmp_path / "jobs.yaml"
    path.write_text(json.dumps({"jobs": [{"model": "m", "out": str(tmp_path / name)} for name in "abcd"]}))
    record = job_folder(tmp_path / "a") / ".bigq" / "owner.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "machine": "elsewhere", "outcome": None}))
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
    os.utime(tmp_path / "b" / ".bigq" / "owner.json", (1e9, 1e9))
    jobs = [each.job for each in overview(path).jobs]
    Attempt.begin(jobs[2], os.getpid()).save(path)
    (tmp_path / "d").write_text("no folder")
    found = overview(path)
    assert [each.state for each in found.jobs] == ["running", "unknown", "starting", "failed"]
    assert "holds no job" in str(found.jobs[3].message)
    Attempt.begin(jobs[2], os.getpid()).end(3, "it is not there").save(path)
    assert [(each.state, each.message) for each in overview(path).jobs][2] == ("failed", "it is not there")
