"""A disk that fills up at any byte of any file: told in one line, nothing lost, and the job goes on when there is room.

First on a real small file system (tmpfs, which only root may mount), then with a quota that a shim of the system calls keeps.
"""

from __future__ import annotations

import builtins
import errno
import functools
import gc
import io
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tinyjob import Outcome, TinyJob, at_points, committed, hashes, make_job, open_below, quick

import bigq
from bigq.errors import ResourceError
from bigq.io.folders import STATE_FOLDER
from bigq.job import owner
from bigq.job.journal import JOURNAL_NAME
from bigq.job.owner import OWNER_NAME

PAGE = 4096
ROOMY = 64 * 2**20

#: What is written after the last shard.
FINISHING = (
    "linears.jsonl",
    "generation_config.json",
    "quantize_config.json",
    "model.safetensors.index.json",
    "manifest.json",
    "config.json",
)
#: Every kind of file that a job writes; see ``tinyjob.kind_in``.
EVERY_KIND = {
    "ownership",
    "job.json",
    "runs.jsonl",
    "rest shard",
    "journal.jsonl",
    "activations",
    "block shard",
    "checkpoint",
    "checkpoints.json",
    *FINISHING,
}


@dataclass
class SmallDisk:
    """A tmpfs whose size can be changed. A page of it is taken by a file of no use, so that it can be full from the start."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.root)], check=True, capture_output=True)

    def pages_used(self) -> int:
        there = os.statvfs(self.root)
        return there.f_blocks - there.f_bfree

    def leave_pages(self, pages: int) -> None:
        """No more than so much room from now on."""
        self.remount(f"size={(self.pages_used() + pages) * PAGE}")

    def leave_inodes(self, inodes: int) -> None:
        """Room for no more than so many new files."""
        there = os.statvfs(self.root)
        self.remount(f"nr_inodes={there.f_files - there.f_ffree + inodes}")

    def enlarge(self) -> None:
        self.remount(f"size={ROOMY},nr_inodes=10000")

    def clear(self) -> None:
        """As new: roomy, and empty but for that page."""
        self.enlarge()
        shutil.rmtree(self.out, ignore_errors=True)
        (self.root / "ballast").write_bytes(bytes(PAGE))
        if self.pages_used() > 1:
            gc.collect()  # files without a name that an error left in a cycle
        assert self.pages_used() == 1, f"something still holds blocks: {open_below(self.root)}"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyJob]:
    with quick():
        yield make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    root = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOMY},nr_inodes=10000", "bigq-test", str(root)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no small file system can be mounted here: {error}")
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield SmallDisk(root)
    subprocess.run(["umount", "-l", str(root)], check=True)


def require_told(outcome: Outcome, words: str) -> None:
    """Of a run that failed: with the code for the environment's failures, and in the system's own words."""
    assert isinstance(outcome.error, ResourceError) and outcome.error.exit_code == 4
    assert words in str(outcome.error)


def sweep(run: Callable[[int], tuple[str, ...]], stride: int) -> list[str]:
    """Kinds of files that fail: run(0), run(1), … up to the first that says nothing failed.

    With a stride, only every so many, and those in between where neighbours differ, down to the two beside each transition.
    """
    results: dict[int, tuple[str, ...]] = {}
    for n in itertools.count(0, stride):
        results[n] = run(n)
        if not results[n]:
            break
    pairs = list(itertools.pairwise(sorted(results)))
    while pairs:
        low, high = pairs.pop()
        if high - low > 1 and results[low] != results[high]:
            middle = (low + high) // 2
            results[middle] = run(middle)
            pairs += [(low, middle), (middle, high)]
    return sorted({name for names in results.values() for name in names})


STRIDES = pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])


@STRIDES
def test_every_number_of_pages(stride: int, job: TinyJob, disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    """Disks from no free page up to one that suffices; each job then goes on on a larger one."""

    def run(pages: int) -> tuple[str, ...]:
        disk.clear()
        disk.leave_pages(pages)
        outcome = job.attempt(disk.out, capsys)
        if outcome.error is not None:
            require_told(outcome, "No space left on device")
            disk.enlarge()
            job.complete(disk.out, capsys)
        return tuple(outcome.files)

    assert sweep(run, stride) == sorted(EVERY_KIND - {*FINISHING})


@pytest.mark.parametrize("what", ["pages", "inodes"])
def test_checkpoint_without_room_is_left_out(what: str, job: TinyJob, disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk that is full just then; the job says a word and goes on."""

    def run(room: int) -> tuple[str, ...]:
        disk.clear()
        fill = functools.partial(disk.leave_pages if what == "pages" else disk.leave_inodes, room)
        with at_points({("checkpoint.begun", 1): fill, ("block.loaded", 2): disk.enlarge}):
            outcome = job.attempt(disk.out, capsys)
        assert outcome.error is None
        assert bool(outcome.files) == ("no more activation checkpoints" in outcome.told)
        return tuple(outcome.files)

    assert sweep(run, 1) == ["checkpoint", "checkpoints.json"]


def test_every_number_of_pages_at_the_end(job: TinyJob, disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    """What comes after the last block needs less than a block; so the disk fills up when the blocks are done."""

    def run(pages: int) -> tuple[str, ...]:
        disk.clear()
        with at_points({("finish.begun", 1): lambda: disk.leave_pages(pages)}):
            outcome = job.attempt(disk.out, capsys)
        disk.enlarge()
        if outcome.error is not None:
            require_told(outcome, "No space left on device")
            assert job.complete(disk.out, capsys).resumed_blocks == 2
        return tuple(outcome.files)

    assert sweep(run, 1) == sorted(FINISHING)


@STRIDES
def test_every_number_of_inodes(stride: int, job: TinyJob, disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    """A file system without room for one more file, at every file."""
    failed: set[str] = set()
    for point in ("lock.taken", "finish.begun"):

        def run(inodes: int, point: str = point) -> tuple[str, ...]:
            disk.clear()
            with at_points({(point, 1): lambda: disk.leave_inodes(inodes)}):
                outcome = job.attempt(disk.out, capsys)
            disk.enlarge()
            if outcome.error is not None:
                require_told(outcome, "No space left on device")
                job.complete(disk.out, capsys)
            return tuple(outcome.files)

        failed.update(sweep(run, stride))
    assert failed == EVERY_KIND - {"checkpoint"}, "the files without a name left it theirs"


@pytest.mark.parametrize("inodes", [0, 1, 2])
def test_no_room_for_the_folders(inodes: int, job: TinyJob, disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    """OUT, .bigq in it, the lock."""
    disk.clear()
    disk.leave_inodes(inodes)
    outcome = job.attempt(disk.out, capsys)
    require_told(outcome, "No space left on device")
    assert outcome.files == ["ownership"]
    disk.enlarge()
    job.complete(disk.out, capsys)


def test_disk_that_grows_page_by_page(job: TinyJob, disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    """One job, run again and again, each time with a page more than before: it never loses what it has, and gets there."""
    disk.clear()
    progress = [0]
    for pages in itertools.count():
        disk.remount(f"size={(1 + pages) * PAGE}")
        outcome = job.attempt(disk.out, capsys)
        if outcome.error is None:
            break
        require_told(outcome, "No space left on device")
        progress.append(len(committed(disk.out)))
    assert progress == sorted(progress)
    assert set(progress) == {0, 1, 2}, "the last block and all that follows has the room that its activations had"


class Quota:
    """A quota that the kernel would keep, kept by replacements of the calls that files below a folder are written with.

    After ``limit`` bytes in all no write below it succeeds; the one that crosses the limit is cut short first. A file whose room is
    asked for beforehand is charged then.
    written: (file's name, first byte, last byte) of every write, counted from the job's beginning.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.used = str(folder), limit, 0
        self.written: list[tuple[str, int, int]] = []
        self._open, self._allocate = builtins.open, os.posix_fallocate

    def charge(self, name: str, size: int, *, whole: bool = False) -> int:
        """How many bytes of a write there is room for. Raises OSError where for none, or not for the ``whole``."""
        granted = min(size, self.limit - self.used)
        if size and granted < (size if whole else 1):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        self.written.append((name, self.used, self.used + granted))
        self.used += granted
        return granted

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        ours = isinstance(file, str | Path) and str(file).startswith(self.folder)
        if not ours or not set(mode) & set("wax+") or "opener" in kwargs:
            return self._open(file, mode, buffering, *args, **kwargs)
        raw = _Charged(self, str(file), mode.replace("b", ""))
        if "b" in mode:
            return io.BufferedWriter(raw) if buffering else raw
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8")

    def allocate(self, fd: int, offset: int, size: int) -> None:
        self.charge("activations", size, whole=True)
        self._allocate(fd, offset, size)

    def __enter__(self) -> Quota:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(builtins, "open", self.open)
        self._patch.setattr(io, "open", self.open)
        self._patch.setattr(os, "posix_fallocate", self.allocate)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


class _Charged(io.FileIO):
    def __init__(self, quota: Quota, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self._quota = quota

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        return super().write(view[: self._quota.charge(str(self.name), len(view))])


def limits(written: list[tuple[str, int, int]]) -> list[int]:
    """Where a job's writes begin, file by file, and the middles of the files."""
    found: list[int] = []
    for _, group in itertools.groupby(written, key=lambda write: write[0]):
        writes = list(group)
        first, last = writes[0][1], writes[-1][2]
        found += [first, (first + last) // 2] if last > first else []
    return found


@pytest.mark.parametrize("every", [None, pytest.param(499, marks=pytest.mark.slow)], ids=["each file", "many bytes"])
def test_quota(every: int | None, job: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exceeded at the first byte of every file and in its middle; the job goes on when there is more."""
    with Quota(tmp_path, 2**40) as quota:
        assert job.attempt(tmp_path / "whole", capsys).error is None
    assert quota.used > 100_000
    failed: set[str] = set()
    for limit in sorted({*limits(quota.written), *(range(0, quota.used, every) if every else ())}):
        out = tmp_path / str(limit)
        with Quota(tmp_path, limit):
            outcome = job.attempt(out, capsys)
        failed.update(outcome.files)
        if outcome.error is not None:
            require_told(outcome, "Disk quota exceeded")
            job.complete(out, capsys)
        else:
            assert set(outcome.files) <= {"runs.jsonl"}, (
                "with room for all but how the run went and its owner's last word a job is finished"
            )
        shutil.rmtree(out)
    assert failed == EVERY_KIND


def test_heartbeats_without_room(job: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not worth a job."""
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.005)
    missed: list[str] = []

    class NoBeats(Quota):
        def charge(self, name: str, size: int, *, whole: bool = False) -> int:
            if OWNER_NAME in name and any("journal" in written for written, _, _ in self.written):
                missed.append(name)
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            return super().charge(name, size, whole=whole)

    with NoBeats(tmp_path, 2**40):
        assert job.attempt(tmp_path / "out", capsys).error is None
    assert len(missed) > 2
    job.complete(tmp_path / "out", capsys)


def test_line_that_finds_no_room_leaves_the_journal_as_it_was(job: TinyJob, disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    """The third line reaches over the end of a page."""
    disk.clear()
    path = disk.out / STATE_FOLDER / JOURNAL_NAME
    before: list[bytes] = []

    def fill() -> None:
        before.append(path.read_bytes())
        disk.leave_pages(0)

    with at_points({("journal.opened", 3): fill}):
        require_told(job.attempt(disk.out, capsys), "No space left on device")
    assert len(before[0].splitlines()) == 2
    assert path.read_bytes() == before[0]


def test_next_job_of_the_same_process(job: TinyJob, disk: SmallDisk) -> None:
    """Who frees some space and calls again need not start Python anew."""
    disk.clear()
    with at_points({("finish.begun", 1): lambda: disk.leave_pages(0)}), pytest.raises(ResourceError):
        bigq.quantize(str(job.source), disk.out, job.config(quiet=True))
    disk.enlarge()
    bigq.quantize(str(job.source), disk.out, job.config(quiet=True))
    assert hashes(disk.out) == job.expected
