"""Calls of the system that fail: one line that says so, nothing lost, nothing half done that loads, and the same bytes in the end."""

from __future__ import annotations

import datetime
import errno
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Child
from models import shard_of
from tinyjob import TinyJob, at_points, committed, hashes, make_job, passes, quick, require_plain

import bigq
from bigq import faults
from bigq.errors import BigqError, CheckpointError, ResourceError
from bigq.io.folders import STATE_FOLDER
from bigq.job import journal as journal_module
from bigq.job import owner

ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS")

#: Points at which the system may well refuse.
WRITING = (
    "lock.taken",
    "owner.written",
    "file.opened",
    "file.written",
    "file.synced",
    "file.renamed",
    "shard.piece",
    "journal.opened",
    "journal.half",
    "journal.written",
    "journal.synced",
    "checkpoint.begun",
    "checkpoint.written",
    "checkpoint.recorded",
)
#: The others, and why no call of the system fails there.
NOT_WRITING = {
    **dict.fromkeys(("job.written", "run.recorded", "batch.halved"), "the file is durable already; its own writing has points"),
    **dict.fromkeys(("rows.embedded", "block.loaded", "batch.begun", "linear.solved", "block.solved", "block.replayed"), "computing"),
    **dict.fromkeys(("survey.block", "bits.written"), "with --bits-per-weight; test_mixed_bits.py has them"),
    "expert.solved": "computing, of models with experts",
    **dict.fromkeys(("push.uploaded", "push.recorded", "push.dropped"), "between steps, of jobs that upload; test_push.py has them"),
    "gguf.piece": "only where a GGUF file is written; test_gguf.py has it",
    **dict.fromkeys(
        ("finish.begun", "finish.side", "finish.index", "finish.manifest", "finish.config"), "between files, which have points of their own"
    ),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyJob]:
    with quick():
        yield make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def counts(job: TinyJob, tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """How often an undisturbed job passes each point."""
    out = tmp_path_factory.mktemp("counted") / "out"
    return passes(lambda: bigq.quantize(str(job.source), out, job.config(quiet=True)))


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.disarm()


@pytest.fixture
def copy(job: TinyJob, tmp_path: Path) -> Path:
    """The job's source, for tests that damage it."""
    return Path(shutil.copytree(job.source, tmp_path / "copy", copy_function=shutil.copy2))


def spread(count: int, most: int) -> list[int]:
    """At most so many numbers of 1 … count, evenly, with both ends."""
    most = min(most, count)
    return sorted({1 + (count - 1) * i // max(1, most - 1) for i in range(most)})


def test_every_point_is_known() -> None:
    assert spread(5, 9) == [1, 2, 3, 4, 5] and spread(9, 3) == [1, 5, 9] and spread(1, 6) == [1]
    assert {*WRITING} | {*NOT_WRITING} == {*faults.POINTS} and not {*WRITING} & {*NOT_WRITING}


@pytest.mark.parametrize("most", [6, pytest.param(10**6, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("point", WRITING)
def test_system_refuses(
    point: str, most: int, job: TinyJob, counts: Counter[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At every point of every file (a few of them, with one error each, or all with all)."""
    assert counts[point]
    for number, count in enumerate(spread(counts[point], most)):
        for name in ERRORS if most > 100 else [ERRORS[number % len(ERRORS)]]:
            out = tmp_path / f"{count}-{name}"
            faults.arm(f"{point}:{count}:{name}")
            outcome = job.attempt(out, capsys)
            faults.disarm()
            words = os.strerror(getattr(errno, name))
            if outcome.error is None:
                spared = ("no more activation checkpoints", "the end of this run is not recorded")
                assert any(said in outcome.told for said in spared) and words in outcome.told
            else:
                assert isinstance(outcome.error, ResourceError) and outcome.error.exit_code == 4
                assert words in str(outcome.error)
                job.complete(out, capsys)
            shutil.rmtree(out)


@pytest.mark.gpu
def test_system_refuses_a_job_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """When each point of writing is passed first; the job then resumes on the GPU and ends in the same bytes."""
    with quick():
        job = make_job(tmp_path, "cuda")
        for point in WRITING:
            test_system_refuses(point, 1, job, Counter({point: 1}), tmp_path, capsys)


def test_folder_that_is_finished_anew(job: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of its last files was damaged: until all are there again it does not load."""
    out = tmp_path / "out"
    job.complete(out, capsys)
    for count in range(1, 20):
        (out / "quantize_config.json").write_text("{}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal_module.Journal, "record_run", lambda *_: None)  # a file of its own, written before
            faults.arm(f"file.written:{count}:ENOSPC")
            outcome = job.attempt(out, capsys)
            faults.disarm()
        if outcome.error is None:
            break
    assert count == 7


@pytest.mark.parametrize("count", [1, 2])
def test_batch_that_cannot_be_recorded(count: int, job: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory ends, and the disk refuses the record of it: nothing that came of the smaller batch is committed."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    halved = f"batch.begun:{count}:OOM"
    faults.arm(halved)
    bigq.quantize(str(job.source), whole, job.config(quiet=True))
    faults.disarm()
    refused: list[str] = []
    for written in range(1, 12):
        faults.arm(f"{halved},file.written:{written}:EIO")
        with pytest.raises(ResourceError, match="Input/output error") as error:
            bigq.quantize(str(job.source), out, job.config(quiet=True))
        faults.disarm()
        refused.append(str(error.value))
        if "batches.json" in refused[-1]:
            break
        shutil.rmtree(out)
    assert "batches.json" in refused[-1]
    assert committed(out) == ["rest-0"]
    faults.arm(halved)
    bigq.quantize(str(job.source), out, job.config(quiet=True))
    assert hashes(out) == hashes(whole)


def failing_writes(patch: pytest.MonkeyPatch, first: int, number: int) -> list[int]:
    """From the ``first`` write into a file without a name on, the system refuses, after a short one; the sizes of those that went well."""
    pwritev = os.pwritev
    sizes: list[int] = []

    def failing(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        if len(sizes) >= first:
            raise OSError(number, os.strerror(number))
        whole = memoryview(buffers[0])
        part = whole[: len(whole) // 2] if len(sizes) == first - 1 else whole
        sizes.append(pwritev(fd, [part], offset, *flags))
        return sizes[-1]

    patch.setattr(os, "pwritev", failing)
    return sizes


@pytest.mark.parametrize("read_ahead", [0, 1])
def test_activations_that_cannot_be_written(read_ahead: int, job: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At every write: a pass that reads what never reached the disk must not lead to a shard."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = failing_writes(patch, 10**6, errno.EIO)
        assert job.attempt(tmp_path / "whole", capsys, read_ahead=read_ahead).error is None
    assert len(sizes) > 10
    told = 0
    for first in range(len(sizes)):
        out = tmp_path / str(first)
        number = (errno.EIO, errno.ENOSPC)[first % 2]
        with pytest.MonkeyPatch.context() as patch:
            failing_writes(patch, first, number)
            outcome = job.attempt(out, capsys, read_ahead=read_ahead)
        if outcome.error is not None:
            assert f"cannot store activations there: {os.strerror(number)}" in str(outcome.error)
            told += 1
        job.complete(out, capsys)
    assert told > len(sizes) // 2, "what is written last is read by nobody"


def failing_reads(patch: pytest.MonkeyPatch, victim: Path, after: int, number: int) -> None:
    """Of a file no byte can be read from ``after`` on; a read that reaches there is cut short first."""
    preadv = os.preadv

    def failing(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") != str(victim):
            return preadv(fd, buffers, offset, *flags)
        if offset >= after:
            raise OSError(number, os.strerror(number))
        return preadv(fd, [memoryview(buffers[0])[: after - offset]], offset, *flags)

    patch.setattr(os, "preadv", failing)


@pytest.mark.parametrize("read_ahead", [0, 1])
@pytest.mark.parametrize("after", [0, 20_000])
def test_source_that_cannot_be_read(after: int, read_ahead: int, job: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk that fails, or a file on a network file system that was replaced: shard by shard."""
    shards = sorted(job.source.glob("*.safetensors"))
    assert len(shards) > 4
    for i, victim in enumerate(shards):
        number = (errno.EIO, errno.ESTALE)[i % 2]
        with pytest.MonkeyPatch.context() as patch:
            failing_reads(patch, victim, after, number)
            outcome = job.attempt(tmp_path / str(i), capsys, read_ahead=read_ahead)
        assert isinstance(outcome.error, ResourceError) and outcome.error.exit_code == 4
        said = str(outcome.error)
        assert str(victim) in said and "tensor " in said and os.strerror(number) in said
        job.complete(tmp_path / str(i), capsys)


@pytest.mark.parametrize("what", ["model-00002", "activations"])
def test_own_file_that_cannot_be_read(what: str, job: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A committed shard that cannot be read is told (the disk is what wants looking at); a checkpoint is passed over."""
    out = tmp_path / "out"
    faults.arm("journal.opened:3:EIO")
    assert job.attempt(out, capsys, checkpoint_every=0.0 if what == "activations" else None).error is not None
    faults.disarm()
    (victim,) = [path for path in out.rglob("*.safetensors") if path.name.startswith(what)]
    with pytest.MonkeyPatch.context() as patch:
        failing_reads(patch, victim, 0, errno.EIO)
        outcome = job.attempt(out, capsys, checkpoint_every=0.0 if what == "activations" else None)
    if what == "activations":
        assert outcome.error is None and victim.name in outcome.told
    else:
        assert isinstance(outcome.error, ResourceError) and str(victim) in str(outcome.error)
        job.complete(out, capsys)


def test_source_cut_short_during_the_job(job: TinyJob, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    victim = shard_of(copy, "model.layers.1.mlp.down_proj.weight")
    kept, times = victim.read_bytes(), victim.stat()
    with at_points({("linear.solved", 1): lambda: os.truncate(victim, len(kept) // 2)}):
        outcome = job.attempt(out, capsys, source=copy)
    assert isinstance(outcome.error, CheckpointError) and str(victim) in str(outcome.error)
    victim.write_bytes(kept)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert job.attempt(out, capsys, source=copy).error is None


HOUR = 3600.0


class Clock:
    """A wall clock that can be set."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.shift = 0.0
        real, clock = time.time, self

        class Shifted(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.datetime.fromtimestamp(real() + clock.shift, tz)

        patch.setattr(time, "time", lambda: real() + self.shift)
        patch.setattr(owner.datetime, "datetime", Shifted)

    def set(self, hours: float) -> Callable[[], None]:
        def jump() -> None:
            self.shift = hours * HOUR

        return jump


def test_wall_clock_that_jumps(job: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By hours, to and fro, within a job and between two runs of it."""
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.005)
    out = tmp_path / "out"
    clock = Clock(monkeypatch)
    jumps = {("block.loaded", 1): clock.set(-7), ("linear.solved", 3): clock.set(9), ("checkpoint.begun", 1): clock.set(-2)}

    def fail() -> None:
        raise OSError(errno.EIO, "struck")

    with at_points({**jumps, ("journal.opened", 3): fail}):
        assert "struck" in str(job.attempt(out, capsys).error)
    clock.shift = -48 * HOUR
    with at_points({("block.loaded", 1): clock.set(48)}):
        report = job.complete(out, capsys)
    assert report.resumed_blocks == 1 and 0 <= report.seconds < 600


@pytest.mark.parametrize("hours", [-50, 50])
def test_times_of_files_that_jump(
    hours: int, job: TinyJob, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They only say whether a shard must be read again to see that it is whole."""
    out = tmp_path / "out"
    faults.arm("journal.opened:3:EIO")
    assert job.attempt(out, capsys).error is not None
    faults.disarm()
    hashed: list[str] = []
    file_sha256 = journal_module.file_sha256
    monkeypatch.setattr(journal_module, "file_sha256", lambda path: (hashed.append(path.name), file_sha256(path))[1])
    for path in out.rglob("*"):
        os.utime(path, (time.time() + hours * HOUR,) * 2)
    assert job.complete(out, capsys).resumed_blocks == 1
    assert hashed == ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A mount that can be made read-only ("ro") and writable again ("rw")."""
    root = tmp_path / "mount"
    root.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "bigq-test", str(root)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")

    def become(mode: str) -> Path:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(root)], check=True, capture_output=True)
        return root / "out"

    yield become
    subprocess.run(["umount", "-l", str(root)], check=True)


def test_read_only_mount(read_only: Callable[[str], Path], job: TinyJob, capsys: pytest.CaptureFixture[str]) -> None:
    """A new job, one that was begun, and one that was finished, which still loads."""
    out = read_only("ro")
    outcome = job.attempt(out, capsys)
    assert isinstance(outcome.error, ResourceError) and "Read-only file system" in str(outcome.error) and str(out) in str(outcome.error)
    read_only("rw")
    faults.arm("journal.opened:3:EIO")
    assert job.attempt(out, capsys).error is not None
    faults.disarm()
    (out / "model-00003-of-00003.safetensors.bigq-tmp").write_bytes(b"left over")
    (out / STATE_FOLDER / owner.OWNER_NAME).unlink()
    read_only("ro")
    outcome = job.attempt(out, capsys)
    assert isinstance(outcome.error, ResourceError) and "Read-only file system" in str(outcome.error)
    read_only("rw")
    job.complete(out, capsys)
    (out / STATE_FOLDER / owner.OWNER_NAME).unlink()
    read_only("ro")
    assert bigq.quantize(str(job.source), out, job.config(quiet=True)).resumed_blocks > 0, "nothing has to be written"
    assert hashes(out) == job.expected


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        ".bigq/lock",
        ".bigq/owner.json",
        ".bigq/job.json",
        ".bigq/runs.jsonl",
        ".bigq/journal.jsonl",
        ".bigq/batches.json",
        ".bigq/linears.jsonl",
        ".bigq/manifest.json",
        "config.json",
        "quantize_config.json",
        "model.safetensors.index.json",
    ],
)
def test_folder_in_a_files_place(name: str, job: TinyJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / STATE_FOLDER).mkdir(parents=True)
    (out / name).mkdir()
    with pytest.raises(BigqError) as error:
        bigq.quantize(str(job.source), out, job.config(quiet=True))
    require_plain(error.value)
    assert str(out) in str(error.value)
    (out / name).rmdir()
    bigq.quantize(str(job.source), out, job.config(quiet=True))
    assert hashes(out) == job.expected


@pytest.mark.parametrize(
    "name", [".bigq/checkpoints.json", ".bigq/activations-00001.safetensors", "model-00001-of-00003.safetensors.bigq-tmp"]
)
def test_folder_in_the_place_of_what_a_job_can_do_without(name: str, job: TinyJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    (out / STATE_FOLDER).mkdir(exist_ok=True)
    bigq.quantize(str(job.source), out, job.config(quiet=True))
    assert hashes(out) == job.expected


def test_state_folder_that_is_a_file(job: TinyJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / STATE_FOLDER).write_text("?")
    with pytest.raises(BigqError, match=str(out)) as error:
        bigq.quantize(str(job.source), out, job.config(quiet=True))
    require_plain(error.value)
    assert (out / STATE_FOLDER).read_text() == "?" and len(list(out.iterdir())) == 1


#: Become a root whom permissions concern (what may override them goes for good with the next program), then run main for each OUT.
POWERLESS = """
import ctypes, os, sys
if os.geteuid() == 0:
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        if ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            sys.exit(77)
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""
RUN_EACH = """
import sys
from bigq.cli.main import main
options = sys.argv[1].split("|")
for out in sys.argv[2:]:
    print("code", main([options[0], options[1], out, *options[2:]]), file=sys.stderr)
"""


def test_folders_without_permission(job: TinyJob, child: Child, tmp_path: Path) -> None:
    """OUT that may be used, that may only be read, that may not be entered, and that lies where one may not look."""
    outs = {"open": 0o700, "readable": 0o500, "closed": 0o000, "hidden/out": 0o700, "hidden": 0o000}
    for name, mode in outs.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name).chmod(mode)
    options = ["quantize", str(job.source), "--calibration", str(job.ids), "--samples", "2", "--seqlen", "8", "--group-size", "32"]
    options += ["--device", "cpu", "--quiet"]
    try:
        done = child("-c", POWERLESS, RUN_EACH, "|".join(options), *(tmp_path / name for name in list(outs)[:4]))
    finally:
        for name in reversed(outs):
            (tmp_path / name).chmod(0o700)
    if done.returncode == 77:
        pytest.skip("root's powers cannot be given up here")
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and [line for line in lines if line.startswith("code ")] == ["code 0"] + ["code 4"] * 3, done.stderr
    errors = [line for line in lines if line.startswith("bigq: error: ")]
    for line, name in zip(errors, list(outs)[1:4], strict=True):
        assert "Permission denied" in line and str(tmp_path / name) in line
