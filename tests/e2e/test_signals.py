"""Asked to stop, a job finishes its step, saves what it got to and exits 75; and goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import KEPT_FROM_CHILDREN, ROOT
from models import make_checkpoint, random_ids, save_ids

import bigq
from bigq.config import JobConfig
from bigq.scheme import QuantScheme

BLOCKS = 4


class Case:
    """A small job, and how it is run as a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.model = make_checkpoint(folder / "m", "llama", num_hidden_layers=BLOCKS)
        self.ids = save_ids(folder / "ids.safetensors", random_ids())
        whole = folder / "whole"
        bigq.quantize(str(self.model), whole, self.config())
        self.hashes = hashes(whole)

    def config(self) -> JobConfig:
        ids, scheme = str(self.ids), QuantScheme(group_size=32)
        return JobConfig(scheme=scheme, calibration=ids, samples=8, seqlen=24, batch=3, device="cpu", quiet=True)

    def start(self, out: Path, fault: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bigq", "quantize", str(self.model), str(out), "--calibration", str(self.ids), "--samples", "8"]
        command += ["--seqlen", "24", "--batch", "3", "--group-size", "32", "--device", "cpu", "--quiet", *more]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(KEPT_FROM_CHILDREN)}
        env = kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "BIGQ_FAULT": fault}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def units(out: Path) -> list[str]:
    path = out / ".bigq" / "journal.jsonl"
    return [json.loads(line)["unit"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it never came so far"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("signals"))


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGINT, signal.SIGUSR1))],
    ids=lambda number: signal.Signals(number).name,
)
def test_asked_to_stop_in_the_middle_of_a_block(number: signal.Signals, case: Case, tmp_path: Path) -> None:
    """The block under way is given up or finished, whichever the grace allows; what entered it or follows from it is saved."""
    out = tmp_path / "out"
    with case.start(out, "linear.solved:17:sleep=1.5") as process:  # block 2 of 0 … 3
        wait_for(lambda: units(out)[-1:] == ["block-1"], process)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    lines = [line for line in stderr.splitlines() if line]
    assert stdout == "" and len(lines) == 2 and signal.Signals(number).name in lines[0]
    assert lines[1].startswith("bigq: error: ") and "run the same command again" in lines[1]
    assert not (out / "config.json").exists()
    saved = [path.name for path in (out / ".bigq").glob("activations-*")]
    assert saved in (["activations-00002.safetensors"], ["activations-00003.safetensors"])
    assert json.loads((out / ".bigq" / "owner.json").read_text())["outcome"] == "stopped"
    report = bigq.quantize(str(case.model), out, case.config())
    assert report.resumed_blocks >= 2
    assert hashes(out) == case.hashes


def test_a_step_that_outlasts_the_grace_is_given_up(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with case.start(out, "block.solved:2:sleep=300", "--grace", "1") as process:
        wait_for(lambda: units(out)[-1:] == ["block-0"], process)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75 and time.monotonic() - asked < 8
    assert "1 s after SIGTERM" in stderr and "Traceback" not in stderr
    assert units(out) == ["rest-0", "block-0"]
    bigq.quantize(str(case.model), out, case.config())
    assert hashes(out) == case.hashes


def test_a_second_interrupt_ends_it_at_once(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with case.start(out, "block.solved:2:sleep=300") as process:
        wait_for(lambda: units(out)[-1:] == ["block-0"], process)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - asked < 5
    assert "interrupted; only the current step is lost" in stderr and "Traceback" not in stderr
    bigq.quantize(str(case.model), out, case.config())
    assert hashes(out) == case.hashes


def test_asked_to_stop_before_anything_began(case: Case, tmp_path: Path) -> None:
    """While the program is still importing, which takes seconds."""
    out = tmp_path / "out"
    with case.start(out, "lock.taken:1:sleep=1") as process:
        wait_for(lambda: b"libtorch" in Path(f"/proc/{process.pid}/maps").read_bytes(), process)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in stderr
    assert not out.exists()
