"""Runs steps as processes with time boxes, and writes the results after every step."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facts import rows

from gpu_steps.setting import NOT_POSSIBLE

#: A step does not start with less time left than this, or than its own time box if that is shorter.
LEAST_SECONDS = 20.0
#: Kept back at the end of the limit, for stopping steps and writing results.
RESERVE_SECONDS = 10.0
#: A step that is stopped has this long to write where it was.
GRACE_SECONDS = 1.0
POLL_SECONDS = 0.2
#: Of a log, in results.json: lines if the step passed, and if it did not. In logs.txt.gz: bytes.
TAIL_PASSED, TAIL_FAILED, LOG_BYTES = 5, 40, 2_000_000
#: Rows per step in results.md.
SHOWN_ROWS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """seconds: its time box. together: it may run beside its neighbours that are ``together`` too."""

    name: str
    seconds: float
    together: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A step's process. deadline: by ``time.monotonic``."""

    step: Step
    process: subprocess.Popen[bytes]
    begun: float
    deadline: float


class Session:
    """A run of several steps within ``limit`` seconds.

    out: folder of the results. work: folder of logs and findings. command: the command line of a step.
    about: what results.json says about the run itself.
    """

    def __init__(
        self,
        out: Path,
        work: Path,
        limit: float,
        command: Callable[[Step], Sequence[str]],
        environment: Mapping[str, str],
        about: Mapping[str, Any],
    ) -> None:
        self._out, self._work, self._command, self._environment = out, work, command, environment
        self._begun = time.monotonic()
        self._end = self._begun + limit - RESERVE_SECONDS
        self.result: dict[str, Any] = {**about, "limit_s": limit, "steps": {}}

    def run(self, steps: Sequence[Step]) -> int:
        """Run all steps. Returns 0 if every one passed, else 1."""
        for together, group in itertools.groupby(steps, key=lambda step: step.together):
            for part in [list(group)] if together else [[step] for step in group]:
                self._run_together(part)
        self._save()
        for name, one in self.result["steps"].items():
            print(f"{name:10}  {one['status']:10}  {one.get('seconds', '')}")
            for failure in one.get("failures", []):
                print(f"    failed: {failure}")
        return 0 if all(one["status"] == "passed" for one in self.result["steps"].values()) else 1

    def _run_together(self, steps: Sequence[Step]) -> None:
        running: list[Running] = []
        for step in steps:
            if self._end - time.monotonic() < min(LEAST_SECONDS, step.seconds):
                self.result["steps"][step.name] = {"status": "not run", "reason": "no time left"}
                continue
            running.append(self._start(step))
        try:
            while running:
                for one in list(running):
                    ended = one.process.poll() is not None
                    if ended or time.monotonic() > one.deadline:
                        running.remove(one)
                        self._finish(one, cut_off=not ended)
                time.sleep(POLL_SECONDS)
        finally:
            for one in running:
                kill_group(one.process, signal.SIGKILL)

    def _start(self, step: Step) -> Running:
        with open(self._log(step.name), "wb") as log:
            process = subprocess.Popen(self._command(step), stdout=log, stderr=log, env=self._environment, start_new_session=True)
        now = time.monotonic()
        return Running(step=step, process=process, begun=now, deadline=min(now + step.seconds, self._end))

    def _finish(self, one: Running, *, cut_off: bool) -> None:
        if cut_off:
            with contextlib.suppress(ProcessLookupError):
                one.process.send_signal(signal.SIGABRT)  # faulthandler writes the stack to the log
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(GRACE_SECONDS)
        kill_group(one.process, signal.SIGKILL)  # and what the step has left running
        code, name = one.process.wait(), one.step.name
        status = "cut off" if cut_off else {0: "passed", NOT_POSSIBLE: "not run"}.get(code, "failed")
        lines = self._log(name).read_text(errors="replace").splitlines()
        entry = {"status": status, "exit_code": code, "seconds": round(time.monotonic() - one.begun, 1), **self._findings(name)}
        if status == "not run":
            entry["reason"] = entry["found"].get("not possible", "")
        entry["log_tail"] = [line[:300] for line in lines[-(TAIL_PASSED if status == "passed" else TAIL_FAILED) :]]
        self.result["steps"][name] = entry
        print(f"[{time.monotonic() - self._begun:5.0f} s] {name}: {status} after {entry['seconds']} s", flush=True)
        self._save()

    def _findings(self, name: str) -> dict[str, Any]:
        """What a step has recorded so far; a step that crashed at its start has no file."""
        try:
            return dict(json.loads((self._work / f"{name}.json").read_text()))
        except (OSError, ValueError):
            return {"failures": [], "found": {}}

    def _log(self, name: str) -> Path:
        return self._work / f"{name}.log"

    def _save(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self._begun, 1)
        replace(self._out / "results.json", json.dumps(self.result, indent=1, ensure_ascii=False) + "\n")
        replace(self._out / "results.md", as_markdown(self.result))
        with gzip.open(self._out / "logs.txt.gz", "wb") as packed:
            for name in self.result["steps"]:
                if self._log(name).exists():
                    packed.write(f"\n===== {name}\n".encode() + self._log(name).read_bytes()[-LOG_BYTES:])


def kill_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a step and to every process that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.rename(path)


def as_markdown(result: Mapping[str, Any]) -> str:
    """The results for reading: a table of the steps, then the findings of each."""
    smoke = "This was a smoke run on a CPU: times and rates mean nothing." if result.get("smoke") else ""
    lines = ["# GPU session", "", f"{result.get('command', '')}, {result.get('revision', '')}", smoke, ""]
    lines += ["| step | status | seconds | failures |", "| --- | --- | --- | --- |"]
    for name, one in result["steps"].items():
        reason = "; ".join(one.get("failures", [])) or one.get("reason", "")
        lines.append(f"| {name} | {one['status']} | {one.get('seconds', '')} | {cell(reason)} |")
    for name, one in result["steps"].items():
        leaves = list(rows(readable(one.get("found", {}), one.get("failures", []))))
        if leaves:
            lines += ["", f"## {name}", "", "| finding | value |", "| --- | --- |"]
            lines += [f"| {cell(key)} | {cell(value)} |" for key, value in leaves[:SHOWN_ROWS]]
        if len(leaves) > SHOWN_ROWS:
            lines += ["", f"{len(leaves) - SHOWN_ROWS} more are in results.json."]
    return "\n".join(lines) + "\n"


def readable(found: Mapping[str, Any], failures: Sequence[str]) -> dict[str, Any]:
    """Failures first, then figures, then checks that passed; a check and its limit in one value."""
    checks = {name: f"{float(value['value']):.3g} (≤ {value['limit']:g})" for name, value in found.items() if is_check(value)}
    passed = {name: checks.get(name, value) for name, value in found.items() if name in checks or value is True}
    failed = {name: checks.get(name, found.get(name)) for name in failures}
    return failed | {name: value for name, value in found.items() if name not in passed} | passed


def is_check(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"value", "limit"}


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:200]
