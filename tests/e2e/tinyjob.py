"""A job so small that it can be run hundreds of times, and what must hold of it whenever something failed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_checkpoint, random_ids, save_ids

import bigq
from bigq import faults
from bigq.config import JobConfig
from bigq.errors import BigqError
from bigq.io.atomic import TEMP_SUFFIX
from bigq.io.folders import STATE_FOLDER
from bigq.job.journal import read_commits
from bigq.progress.records import Report
from bigq.scheme import QuantScheme

#: The file or folder that an error or a warning is about.
NAMED = re.compile(r"(?:cannot (?:write|read) |^|\()(/[^\s:]+): ")
#: What no message of a job may look like: the words of Python itself.
PYTHON_WORDS = re.compile(r"Errno|Traceback|Error\(|\n")


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of everything in an output folder that is not the job's own record."""
    return {path.name: file_hash(path) for path in sorted(out.iterdir()) if path.is_file()}


def open_below(folder: Path) -> list[str]:
    """What this process has open below a folder, removed files too."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target.startswith(f"{folder}/"):
                found.append(target)
    return found


def kind(path: str) -> str:
    """The kind of a file that a job writes: its name without numbers."""
    name = Path(path).name
    if name.startswith("model-"):
        return "rest shard" if name.startswith("model-00001-") else "block shard"
    return "checkpoint" if name.startswith("activations-") else name


def kind_in(line: str) -> str | None:
    """The kind of file that a line complains about; None where it complains about none."""
    if "cannot store activations" in line:
        return "activations"
    if "cannot be used as output folder" in line:
        return "ownership"
    match = NAMED.search(line)
    return kind(match[1]) if match else None


@dataclass
class Outcome:
    """How a run ended. error: what it raised, if anything. told: its lines on stderr. files: kinds of files that it complained about."""

    report: Report | None
    error: BigqError | None
    told: str

    @property
    def files(self) -> list[str]:
        """The kind of each file that the run complained about, in order: skipped ones first, last the one that ended it."""
        lines = [*self.told.splitlines(), "" if self.error is None else str(self.error)]
        return [found for line in lines if (found := kind_in(line))]


@dataclass
class TinyJob:
    """Two llama blocks, 8 × 16 tokens, activations on disk, a checkpoint after the first block.

    expected: the hashes of an undisturbed run on ``device``.
    """

    source: Path
    ids: Path
    expected: dict[str, str]
    device: str = "cpu"

    def config(self, **changes: Any) -> JobConfig:
        values: dict[str, Any] = {
            "scheme": QuantScheme(group_size=32),
            "calibration": str(self.ids),
            "samples": 8,
            "seqlen": 16,
            "batch": 3,
            "activations": "disk",
            "checkpoint_every": 0.0,
            "disk": 2**50,
            "device": self.device,
        }
        return JobConfig(**{**values, **changes})

    def attempt(self, out: Path, capsys: pytest.CaptureFixture[str], source: Path | None = None, **changes: Any) -> Outcome:
        """Run the job; whatever fails must fail as it should."""
        before, temporary = committed(out), temporary_files(out)
        capsys.readouterr()
        error, report = None, None
        try:
            report = bigq.quantize(str(source or self.source), out, self.config(**changes))
        except BigqError as raised:
            error = type(raised)(str(raised))  # without its traceback, which holds files without a name
            kept = open_below(out)
            assert not kept, f"what raised keeps files open: {kept}"
        told = capsys.readouterr().err
        assert "Traceback" not in told
        if error is None:
            assert hashes(out) == self.expected, told
        else:
            require_sound(out, before)
            require_plain(error)
            assert temporary_files(out) <= temporary, "half of a file still takes room"
        return Outcome(report, error, told)

    def complete(self, out: Path, capsys: pytest.CaptureFixture[str]) -> Report:
        """Run the job again, with nothing in its way: it goes on with what is committed, and ends as an undisturbed one."""
        there = committed(out)
        again = self.attempt(out, capsys)
        assert again.error is None, again.error
        assert again.report is not None
        assert again.report.resumed_blocks == sum(unit.startswith("block-") for unit in there), again.told
        assert not temporary_files(out) and not [*out.rglob("activations-*")]
        return again.report


def temporary_files(out: Path) -> set[str]:
    return {path.name for path in out.rglob(f"*{TEMP_SUFFIX}")}


def committed(out: Path) -> list[str]:
    """The units in the journal."""
    return [commit.unit for commit in read_commits(out)[0]] if (out / STATE_FOLDER).is_dir() else []


def require_sound(out: Path, committed_before: list[str]) -> None:
    """Of a job that ended with an error: nothing that loads, nothing lost that was committed, nothing committed that is not whole."""
    assert not (out / "config.json").exists(), "a job that failed left a folder that loads"
    if not (out / STATE_FOLDER).is_dir():
        return
    commits, damaged = read_commits(out)
    assert not damaged, "a line of the journal is torn"
    assert set(committed_before) <= {commit.unit for commit in commits}
    for commit in commits:
        assert file_hash(out / commit.shard.file) == commit.shard.sha256


def require_plain(error: BigqError) -> None:
    """One line that names a file and says what to do."""
    line = str(error)
    assert not PYTHON_WORDS.search(line) and len(line) < 400, line
    assert kind_in(line), f"names no file: {line}"
    assert "; " in line or "cannot be used as output folder" in line, f"says not what to do: {line}"


def make_job(folder: Path, device: str = "cpu") -> TinyJob:
    """The job on a device, with its undisturbed run done."""
    source = make_checkpoint(folder / "model", "llama", num_hidden_layers=2)
    job = TinyJob(source, save_ids(folder / "ids.safetensors", random_ids()), {}, device)
    bigq.quantize(str(source), folder / "out", job.config(quiet=True, activations="host", checkpoint_every=None))
    job.expected = hashes(folder / "out")
    return job


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """One thread: for jobs as small as this, waking a second one costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def passes(run: Callable[[], object]) -> Counter[str]:
    """How often each fault point is passed."""
    passed: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "point", lambda name: passed.update([name]))
        run()
    return passed


@contextlib.contextmanager
def at_points(actions: Mapping[tuple[str, int], Callable[[], None]]) -> Iterator[None]:
    """(fault point, count) → what to do the count-th time that it is passed, instead of what fault points do."""
    passed: Counter[str] = Counter()

    def point(name: str) -> None:
        passed[name] += 1
        if (name, passed[name]) in actions:
            actions[name, passed[name]]()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "point", point)
        yield
