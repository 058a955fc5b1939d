"""Runs steps as processes with time boxes, and writes the results after every step and every few seconds."""

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

from gpu_steps.aims import AIMS
from gpu_steps.setting import NOT_POSSIBLE
from gpu_steps.watcher import Watcher

#: Modes of a step: its kernels launch one at a time; it explains a measurement by a profile; it takes more blocks.
DEBUG, PROFILE, LONG = "debug", "profile", "long"

#: A step does not start with less time left than this, or than its own time box if that is shorter.
LEAST_SECONDS = 20.0
#: Kept back at the end of the limit, for stopping steps and writing results.
RESERVE_SECONDS = 10.0
#: A step that is stopped has this long to write where it was.
GRACE_SECONDS = 1.0
POLL_SECONDS = 0.2
#: What running steps have found is saved this often.
SAVE_SECONDS = 5.0
#: Of a log, in results.json: lines if the step passed, and if it did not. In logs.txt.gz: bytes.
TAIL_PASSED, TAIL_FAILED, LOG_BYTES = 5, 40, 2_000_000
#: Rows per step in results.md.
SHOWN_ROWS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """seconds: its time box. together: it may run beside its neighbours that are ``together`` too.

    mode, focus: how it runs, and on which of its parts; empty for all as usual. reason: why it was chosen.
    """

    name: str
    seconds: float
    together: bool = False
    mode: str = ""
    focus: tuple[str, ...] = ()
    reason: str = ""


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
    about: what results.json says about the run itself. stem: the name of the result files. temporary: the work folder is deleted
    if this process is killed.
    """

    def __init__(
        self,
        out: Path,
        work: Path,
        limit: float,
        command: Callable[[Step], Sequence[str]],
        environment: Mapping[str, str],
        about: Mapping[str, Any],
        *,
        stem: str = "results",
        temporary: bool = False,
    ) -> None:
        self._out, self._work, self._command, self._environment = out, work, command, environment
        self._stem, self._temporary = stem, temporary
        self._begun = self._saved = time.monotonic()
        self._end = self._begun + limit - RESERVE_SECONDS
        self.result: dict[str, Any] = {**about, "limit_s": limit, "steps": {}}

    def run(self, steps: Sequence[Step]) -> int:
        """Run all steps. Returns 0 if every one passed, else 1."""
        self._save()
        self._watcher = Watcher(self._work if self._temporary else None)
        try:
            for together, group in itertools.groupby(steps, key=lambda step: step.together):
                for part in [list(group)] if together else [[step] for step in group]:
                    self._run_together(part)
        finally:
            self._watcher.close()
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
                if time.monotonic() > self._saved + SAVE_SECONDS:
                    self._save_running(running)
                time.sleep(POLL_SECONDS)
        finally:
            for one in running:  # none, unless this process is asked to end
                kill_group(one.process, signal.SIGKILL)
            if running:
                self._save_running(running)

    def _start(self, step: Step) -> Running:
        with open(self._log(step.name), "wb") as log:
            process = subprocess.Popen(self._command(step), stdout=log, stderr=log, env=self._environment, start_new_session=True)
        self._watcher.watch(process.pid)
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
        self._watcher.forget(one.process.pid)
        status = "cut off" if cut_off else {0: "passed", NOT_POSSIBLE: "not run"}.get(code, "failed")
        lines = self._log(name).read_text(errors="replace").splitlines()
        entry = {"status": status, "exit_code": code, "seconds": round(time.monotonic() - one.begun, 1), **self._findings(name)}
        if status == "not run":
            entry["reason"] = entry["found"].get("not possible", "")
        entry["log_tail"] = [line[:300] for line in lines[-(TAIL_PASSED if status == "passed" else TAIL_FAILED) :]]
        self.result["steps"][name] = entry
        print(f"[{time.monotonic() - self._begun:5.0f} s] {name}: {status} after {entry['seconds']} s", flush=True)
        self._save()

    def _save_running(self, running: Sequence[Running]) -> None:
        """What steps have found so far: a session that is killed keeps it."""
        now = time.monotonic()
        for one in running:
            entry = {"status": "running", "seconds": round(now - one.begun, 1), **self._findings(one.step.name)}
            self.result["steps"][one.step.name] = entry
        self._save_results()

    def _findings(self, name: str) -> dict[str, Any]:
        """What a step has recorded so far; a step that crashed at its start has no file."""
        try:
            return dict(json.loads((self._work / f"{name}.json").read_text()))
        except (OSError, ValueError):
            return {"failures": [], "found": {}}

    def _log(self, name: str) -> Path:
        return self._work / f"{name}.log"

    def _save(self) -> None:
        self._save_results()
        logs = [(name, self._log(name)) for name in self.result["steps"]]
        text = b"".join(f"\n===== {name}\n".encode() + log.read_bytes()[-LOG_BYTES:] for name, log in logs if log.exists())
        replace(self._out / f"{self._stem.replace('results', 'logs')}.txt.gz", gzip.compress(text))

    def _save_results(self) -> None:
        self._saved = time.monotonic()
        self.result["seconds"] = round(self._saved - self._begun, 1)
        replace(self._out / f"{self._stem}.json", (json.dumps(self.result, indent=1, ensure_ascii=False) + "\n").encode())
        replace(self._out / f"{self._stem}.md", as_markdown(self.result).encode())


def kill_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a step and to every process that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def replace(path: Path, content: bytes) -> None:
    """Write a file so that it is always either as before or complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.rename(path)


def as_markdown(result: Mapping[str, Any]) -> str:
    """The results for reading: a table of the steps, then the findings of each."""
    smoke = "This was a smoke run on a CPU: times and rates mean nothing." if result.get("smoke") else ""
    lines = ["# GPU session", "", f"{result.get('command', '')}, {result.get('revision', '')}", smoke, ""]
    lines += chosen_lines(result)
    lines += ["| step | status | seconds | failures |", "| --- | --- | --- | --- |"]
    for name, one in result["steps"].items():
        reason = "; ".join(one.get("failures", [])) or one.get("reason", "")
        lines.append(f"| {name} | {one['status']} | {one.get('seconds', '')} | {cell(reason)} |")
    aims = [(name, aim, row) for name, one in result["steps"].items() for aim, row in one.get("found", {}).get(AIMS, {}).items()]
    if aims:
        lines += ["", "## Aims", "", "| step | what | value | aim | met |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {name} | {cell(aim)} | {row['value']:.4g} | {row['aim']} | {'yes' if row['met'] else 'NO'} |" for name, aim, row in aims
        ]
    for name, one in result["steps"].items():
        found = {key: value for key, value in one.get("found", {}).items() if key != AIMS}
        leaves = list(rows(readable(found, one.get("failures", []))))
        if leaves:
            lines += ["", f"## {name}", "", "| finding | value |", "| --- | --- |"]
            lines += [f"| {cell(key)} | {cell(value)} |" for key, value in leaves[:SHOWN_ROWS]]
        if len(leaves) > SHOWN_ROWS:
            lines += ["", f"{len(leaves) - SHOWN_ROWS} more are in results.json."]
    return "\n".join(lines) + "\n"


def chosen_lines(result: Mapping[str, Any]) -> list[str]:
    """Of a second session: what it chose to run, and why."""
    if "chosen" not in result:
        return []
    lines = [f"Second session after {result['second_after']}. Chosen, best evidence first within a group:", ""]
    lines += [f"- {one['name']}{', ' + one['mode'] if 'mode' in one else ''}: {one['reason']}" for one in result["chosen"]]
    return [*lines, *(f"- left out: {name}: {reason}" for name, reason in result["left_out"].items()), ""]


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
