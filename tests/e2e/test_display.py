"""What commands tell while they run, and where: results on stdout and nothing else there, the rest on stderr in the form asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from models import SEQLEN
from screen import Terminal

from bigq import faults
from bigq.cli.main import main


@pytest.fixture
def command(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> list[str]:
    """A job of three blocks that ends in a second or two."""
    flags = ["--samples", "8", "--seqlen", "24", "--group-size", "32", "--device", "cpu", "--checkpoint-every", "0"]
    return ["quantize", str(checkpoint("llama")), str(tmp_path / "out"), "--calibration", str(ids_file), *flags]


@pytest.fixture(autouse=True)
def _no_faults() -> Iterator[None]:
    yield
    faults.disarm()


def run(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the process, whoever wrote there."""
    capfd.readouterr()
    code = main(arguments)
    return code, *capfd.readouterr()


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json(command: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Events on stderr in the order in which things happen, the whole report on stdout; then the job is taken up, with nothing to do."""
    code, out, err = run([*command, "--json"], capfd)
    assert code == 0 and out.count("\n") == 1
    report, (reading, *events) = json.loads(out), events_of(err)
    assert reading["event"] == "reading" and reading["model"] == command[1] and reading["v"] == 1
    assert (
        len(report["linears"]) == 21
        and report["out"] == str(tmp_path / "out")
        and report["worst"] in {r["name"] for r in report["linears"]}
    )
    names = [event["event"] for event in events]
    assert names[0] == "plan" and names[1] == "start" and names[-1] == "done" and "v" not in events[0]
    assert events[0]["plan"]["rows"] == 8 and events[1]["resumed_blocks"] == 0
    blocks = [event for event in events if event["event"] == "block"]
    assert [event["block"] for event in blocks] == [1, 2, 3] and blocks[-1]["eta_seconds"] == 0
    assert blocks[-1]["bytes_read"] == report["source_bytes"] == events[-1]["source_bytes"], "every byte is read once"
    assert all(event["worst"]["relative_error"] > 0 and event["host_bytes"] > 2**20 and event["seconds"] > 0 for event in blocks)
    phases = [(event["block"], event["phase"]) for event in events if event["event"] == "phase"]
    assert [phase for block, phase in phases if block == 2 and "saving" not in phase] == ["load", "solve", "write", "replay"]
    assert [event["block"] for event in events if event["event"] == "checkpoint"] == [2, 3]

    code, out, err = run([*command, "--json"], capfd)
    assert code == 0 and json.loads(out)["resumed_blocks"] == 3
    _, *again = events_of(err)
    assert [event["event"] for event in again] == ["start", "note", "done"] and again[0]["resumed_blocks"] == 3
    assert "is finished already" in again[1]["message"]


def test_json_errors_are_events(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run([*command, "--json", "--group-size", "40"], capfd)
    reading, error = events_of(err)
    assert reading["event"] == "reading" and reading["v"] == 1
    assert (code, out) == (2, "") and error["event"] == "error" and error["exit_code"] == 2 and error["kind"] == "UsageError"
    assert "group size 40" in error["message"]
    code, out, err = run([*command, "--json", "--quiet", "--group-size", "40"], capfd)
    assert (code, out) == (2, "") and [event["event"] for event in events_of(err)] == ["error"]


def test_quiet_wins(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """But what was asked for with --json is still printed."""
    code, out, err = run([*command, "--json", "--quiet"], capfd)
    assert (code, err) == (0, "") and json.loads(out)["blocks"] == 3
    assert run([*command, "--quiet"], capfd) == (0, "", "")


def test_notes_and_warnings(command: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGQ_FAULT", "batch.begun:4:OOM")
    code, _, err = run([*command, "--json"], capfd)
    assert code == 0
    assert [event["message"] for event in events_of(err) if event["event"] == "note"] == ["out of memory: batch 8 → 4"]


def in_terminal(terminal: Terminal, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and stdout of a process whose stderr is a terminal."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TERM", "NO_COLOR", "COLUMNS")}
    paths = {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    whole = [sys.executable, "-m", "bigq", *arguments]
    process = subprocess.Popen(whole, env=kept | paths | dict(env or {}), stdout=subprocess.PIPE, stderr=terminal.slave, text=True)
    while process.poll() is None:
        terminal.look(0.05)
    assert process.stdout is not None
    terminal.look()
    return process.returncode, process.stdout.read()


def test_a_terminal_sees_a_line_that_moves(command: list[str]) -> None:
    terminal = Terminal(72)
    # Slow enough for a few looks at the line.
    code, out = in_terminal(terminal, *command, env={"NO_COLOR": "1", "BIGQ_FAULT": "linear.solved:4:sleep=0.6,linear.solved:12:sleep=0.6"})
    screen = terminal.look()
    assert code == 0 and out.startswith("done in ")
    assert [row.split("  ")[0] for row in screen.seen if row.startswith("block")] == ["block 1/3", "block 2/3", "block 3/3"]
    assert len([row for row in screen.seen if "%" in row]) == 0, "nothing is left of the line"
    assert screen.escapes <= {"K"}
    drawn = [line.split("\x1b")[0] for line in terminal.raw.decode().split("\r") if "\x1b[K" in line]
    assert any("solve  4/7 Linears" in line for line in drawn) and any("block 2/3 solve  5/7 Linears" in line for line in drawn)
    assert all(len(line) < 72 for line in drawn)
    terminal.close()


def test_a_terminal_that_cannot_redraw_gets_plain_lines(command: list[str]) -> None:
    terminal = Terminal(200)
    code, out = in_terminal(terminal, *command, env={"TERM": "dumb"})
    assert code == 0 and out.startswith("done in ")
    assert b"\x1b" not in terminal.raw and terminal.raw.count(b"\r") == terminal.raw.count(b"\r\n")
    terminal.close()


def test_eval_prints_results_only(checkpoint: Callable[[str], Path], ids_file: Path) -> None:
    terminal = Terminal(90)
    flags = ["--data", str(ids_file), "--seqlen", str(SEQLEN), "--device", "cpu", "--json"]
    code, out = in_terminal(terminal, "eval", str(checkpoint("llama")), *flags)
    assert code == 0 and set(json.loads(out)) == {"perplexity", "tokens"}
    drawn = [line for line in terminal.raw.decode().split("\r") if "of llama" in line]
    assert any("block 3/3 of llama" in line for line in drawn)
    assert "".join(terminal.look().seen) == f"reading {checkpoint('llama')} …"
    terminal.close()
