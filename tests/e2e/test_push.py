"""Jobs that upload their shards while they run: the hub gets the bytes of a local folder, whatever is killed or fails meanwhile."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Child
from fake_hub import uploads
from fake_hub.client import use_hub
from fake_hub.server import Hub, running_hub
from fake_hub.uploads import Repository
from tinyjob import TinyJob, at_points, committed, hashes, make_job, quick

import bigq
from bigq import faults
from bigq.errors import ResourceError, Stopped, UsageError
from bigq.inspect.status import status
from bigq.inspect.verify import verify
from bigq.io.folders import STATE_FOLDER
from bigq.job.pushed import read_pushed
from bigq.job.stop import Stop
from bigq.progress.records import Report
from bigq.sched import push

NAME = "me/tiny"
POINTS = ("push.uploaded", "push.recorded", "push.dropped")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyJob]:
    with quick():
        made = make_job(tmp_path_factory.mktemp("job"))
        for name in ("LICENSE", "README.md"):
            (made.source / name).write_text(f"{name} of the model")
        out = tmp_path_factory.mktemp("again") / "out"
        bigq.quantize(str(made.source), out, made.config(quiet=True, activations="host", checkpoint_every=None))
        made.expected = hashes(out)
        yield made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as server:
        use_hub(server, monkeypatch)
        yield server


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.disarm()


def run(job: TinyJob, out: Path, drop: bool = True, **changes: Any) -> Report:
    return bigq.quantize(str(job.source), out, job.config(**{"quiet": True, "push": NAME, "push_drop": drop, **changes}))


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard is uploaded alone, and the loop waits for it."""
    for name in ("INTERVAL", "WAITING_SHARDS", "WAITING_BYTES"):
        monkeypatch.setattr(push, name, 0)


def uploaded(repository: Repository) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in repository.files.items() if name != ".gitattributes"}


def shards_in(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.safetensors"))


def require_done(job: TinyJob, out: Path, hub: Hub, drop: bool = True) -> None:
    """The hub has the bytes of a local job; OUT has them too, but for shards that were dropped. config.json came last."""
    repository = hub.uploads.repositories[NAME]
    assert uploaded(repository) == job.expected
    local = {name: digest for name, digest in job.expected.items() if not (drop and name.endswith(".safetensors"))}
    assert hashes(out) == local
    assert verify(out) == []
    first = next(files for files in repository.commits.values() if "config.json" in files)
    assert {name: first.get(name) for name in repository.files} == repository.files


def stopped_job(job: TinyJob, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that ended before its last block, with all committed shards on the hub only."""
    at_once(monkeypatch)
    faults.arm("journal.opened:3:EIO")
    with pytest.raises(ResourceError, match="Input/output error"):
        run(job, out, checkpoint_every=None)
    faults.disarm()
    assert committed(out) == ["rest-0", "block-0"]


@pytest.mark.parametrize("drop", [False, True])
def test_a_job_that_uploads(drop: bool, job: TinyJob, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new repository is private. Few commits are made, and a finished job makes none."""
    out = tmp_path / "out"
    run(job, out, drop, quiet=False)
    told = capsys.readouterr().err
    assert f"{NAME} is new on the hub, and private" in told and f"the model is in {NAME} on the hub" in told
    require_done(job, out, hub, drop)
    repository = hub.uploads.repositories[NAME]
    assert repository.private and len(repository.messages) == 4
    assert not any(name.startswith(".bigq") for name in repository.files)
    assert status(out).pushed == 3 and status(out).state == "finished" and status(out).damaged == ()
    assert f"pushed    3 of 3 shards to {NAME}" in status(out).text()
    asked = len(hub.uploads.asked)
    report = run(job, out, drop)
    assert report.resumed_blocks == 2 and "commit" not in hub.uploads.asked[asked:] and "put" not in hub.uploads.asked[asked:]


def test_the_disk_holds_few_shards(
    job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loop waits for uploads, and says so once. What a block is made of stays while it is read."""
    at_once(monkeypatch)
    out, seen = tmp_path / "out", []
    with at_points({("journal.opened", n): lambda: seen.append(shards_in(out)) for n in (1, 2, 3)}):
        run(job, out, quiet=False)
    assert [names[-1] for names in seen] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert all(len(names) <= 2 for names in seen)
    assert capsys.readouterr().err.count("wait for their upload to me/tiny") == 1
    require_done(job, out, hub)


def test_dropped_shards_count_as_committed(job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed job reads what it needs of them from the hub, by parts, and asks for all of them at once."""
    out = tmp_path / "out"
    stopped_job(job, out, monkeypatch)
    assert status(out).blocks_done == 1 and status(out).pushed == len(status(out).damaged) + 2
    asked, ranges = len(hub.uploads.asked), len(hub.ranges)
    shutil.rmtree(out / "model-00001-of-00003.safetensors", ignore_errors=True)
    report = run(job, out, checkpoint_every=None)
    assert report.resumed_blocks == 1
    assert hub.uploads.asked[asked:].count("put") == 1
    assert hub.uploads.asked[asked:].index("paths-info") < hub.uploads.asked[asked:].index("batch")
    assert len(hub.ranges) > ranges
    require_done(job, out, hub)


@pytest.mark.parametrize("what", ["removed", pytest.param("changed", marks=pytest.mark.long)])
def test_a_dropped_shard_that_the_hub_lost(
    what: str, job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Noticed by verify, and made again by the next run, whether the job was finished or not."""
    out, victim = tmp_path / "out", "model-00002-of-00003.safetensors"
    stopped_job(job, out, monkeypatch)

    def lose() -> str:
        repository = hub.uploads.repositories[NAME]
        if what == "removed":
            repository.remove(victim)
            return f"is not in {NAME} on the hub any more"
        data = repository.files[victim]
        repository.put(**{victim: data[:-1] + bytes([data[-1] ^ 1])})
        return f"has other bytes in {NAME} on the hub"

    for blocks in (0, 1):
        said = lose()
        assert any(problem.startswith(f"{victim}: {said}") for problem in verify(out))
        report = run(job, out, checkpoint_every=None, quiet=False)
        assert report.resumed_blocks == blocks
        assert f"{victim}: {said}; it is made again" in capsys.readouterr().err
        require_done(job, out, hub)


@pytest.mark.long
@pytest.mark.parametrize("drop", [False, True])
def test_a_lost_shard_that_is_here_is_uploaded_again(drop: bool, job: TinyJob, hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(job, out, drop=False)
    hub.uploads.repositories[NAME].remove("model-00002-of-00003.safetensors")
    hub.uploads.repositories[NAME].remove("LICENSE")
    assert run(job, out, drop).resumed_blocks == 2
    require_done(job, out, hub, drop)


@pytest.mark.long
def test_a_job_that_begins_to_upload_later(job: TinyJob, hub: Hub, tmp_path: Path) -> None:
    """Its next run uploads what is committed; one that names another repository is refused once shards are in one only."""
    out = tmp_path / "out"
    faults.arm("journal.opened:3:EIO")
    with pytest.raises(ResourceError):
        run(job, out, push=None, drop=False)
    faults.disarm()
    assert run(job, out).resumed_blocks == 1
    require_done(job, out, hub)
    with pytest.raises(UsageError, match=f"--push me/other: shards of the job in .* are in {NAME} only; give --push {NAME}"):
        run(job, out, push="me/other")
    assert run(job, out, push=None, drop=False).resumed_blocks == 2


@pytest.mark.long
def test_a_job_that_ends_without_uploading(job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run uploaded is left as it is."""
    at_once(monkeypatch)
    out = tmp_path / "out"
    faults.arm("journal.opened:3:EIO")
    with pytest.raises(ResourceError):
        run(job, out, drop=False)
    faults.disarm()
    asked = len(hub.uploads.asked)
    run(job, out, push=None, drop=False)
    assert len(hub.uploads.asked) == asked and hashes(out) == job.expected and verify(out) == []
    assert status(out).state == "finished" and status(out).damaged == ()


def image(out: Path, to: Path) -> Path:
    """The folder as a kill at this instant leaves it."""
    while True:
        try:
            shutil.copytree(out, to, copy_function=shutil.copy2)
            break
        except shutil.Error:  # another thread has renamed a file since the folder was listed
            shutil.rmtree(to)
    for name in ("lock", "owner.json"):
        (to / STATE_FOLDER / name).unlink(missing_ok=True)
    return to


@pytest.mark.parametrize("count", [1, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 3))])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_between_two_steps(point: str, count: int, job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder and the hub as they are there. What is on the hub is not sent again."""
    at_once(monkeypatch)
    out, killed = tmp_path / "out", tmp_path / "killed"
    states: list[tuple[Repository, int]] = []

    def kill() -> None:
        image(out, killed)
        repository = hub.uploads.repositories[NAME]
        states.append((Repository(True, dict(repository.commits), list(repository.messages)), len(hub.uploads.puts)))

    with at_points({(point, count): kill}):
        run(job, out)
    ((repository, puts),) = states
    hub.uploads.repositories[NAME] = repository
    sent = len(hub.uploads.puts) - puts
    asked = len(hub.uploads.asked)
    run(job, killed)
    require_done(job, killed, hub)
    assert hub.uploads.asked[asked:].count("put") <= sent


KILLED = """
import sys
from bigq import faults, quantize
from bigq.config import JobConfig
from bigq.sched import push
from bigq.scheme import QuantScheme
model, out, ids, name, fault = sys.argv[1:]
push.INTERVAL, push.WAITING_SHARDS, push.WAITING_BYTES = 0.0, 0, 0
if fault:
    faults.arm(fault)
config = JobConfig(scheme=QuantScheme(group_size=32), calibration=ids, samples=8, seqlen=16, batch=3, activations="disk",
                   checkpoint_every=0.0, disk=2**50, device="cpu", quiet=True, push=name, push_drop=True)
quantize(model, out, config)
"""


@pytest.mark.long
@pytest.mark.parametrize("fault", [*(f"{point}:1" for point in POINTS), "push.recorded:4", "journal.half:2"])
def test_killed_processes(fault: str, job: TinyJob, hub: Hub, child: Child, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {**hub.environment(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    killed = child("-c", KILLED, job.source, out, job.ids, NAME, fault, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = child("-c", KILLED, job.source, out, job.ids, NAME, "", env=environment)
    assert done.returncode == 0, done.stderr
    require_done(job, out, hub)


FAULTS = [
    ("create", "503"),
    ("preupload", "429"),
    ("preupload", "503"),
    ("batch", "500"),
    ("put", "503"),
    ("put", "cut"),
    ("put", "403"),
    ("verify", "cut"),
    ("commit", "503"),
    ("commit", "429"),
    ("commit", "cut"),
    ("commit", "lost"),
    ("paths-info", "502"),
    ("paths-info", "cut"),
]


@pytest.mark.parametrize("drop", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_bad_hub(drop: bool, job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of failure, several times: the same bytes, and no commit twice."""
    at_once(monkeypatch)
    hub.uploads.faults = [fault for fault in FAULTS for _ in range(1 if fault[0] == "create" else 2)]
    run(job, tmp_path / "out", drop)
    assert hub.uploads.faults == []
    require_done(job, tmp_path / "out", hub, drop)
    assert len(set(hub.uploads.repositories[NAME].messages)) == len(hub.uploads.repositories[NAME].messages)


@pytest.mark.parametrize(
    ("step", "kind"), [("put", "503"), *(pytest.param("commit", kind, marks=pytest.mark.long) for kind in ("429", "cut"))]
)
def test_a_hub_that_stays_silent(
    step: str, kind: str, job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error that says what to do; the same command then goes on, with nothing solved again."""
    at_once(monkeypatch)
    use_hub(hub, monkeypatch, silence=0.2)
    hub.uploads.faults = [(step, kind)] * 1000
    with pytest.raises(ResourceError, match=f"{NAME}.*: the hub does not take it: .*; the job can go on later: run the same command again"):
        run(job, tmp_path / "out", quiet=False)
    assert "trying again" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()
    hub.uploads.faults = []
    use_hub(hub, monkeypatch)
    run(job, tmp_path / "out")
    require_done(job, tmp_path / "out", hub)


def test_the_last_commit_fails(job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT is whole but the repository does not load: the job counts as failed, and its next run uploads the rest."""
    use_hub(hub, monkeypatch, silence=0.1)
    out = tmp_path / "out"

    def break_off() -> None:
        hub.uploads.faults = [("commit", "503")] * 1000

    with at_points({("finish.config", 1): break_off}), pytest.raises(ResourceError, match="the hub does not take it"):
        run(job, out)
    assert "config.json" not in hub.uploads.repositories[NAME].files and status(out).state == "failed"
    hub.uploads.faults = []
    assert run(job, out).resumed_blocks == 2
    require_done(job, out, hub)


@pytest.mark.long
def test_a_card_that_the_hub_refuses(job: TinyJob, hub: Hub, tmp_path: Path) -> None:
    """The advice is followed: the job goes on with the corrected card."""
    source, out = Path(shutil.copytree(job.source, tmp_path / "model", copy_function=shutil.copy2)), tmp_path / "out"
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    config = job.config(quiet=True, push=NAME)
    with pytest.raises(
        ResourceError, match=r"the hub refuses the metadata at the top of README.md .*; correct MODEL's README.md and remove"
    ):
        bigq.quantize(str(source), out, config)
    shutil.copy2(job.source / "README.md", source)
    (out / "README.md").unlink()
    bigq.quantize(str(source), out, config)
    require_done(job, out, hub, drop=False)


def test_other_bytes_than_were_sent(job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that stores something else is found out before the shard is removed."""
    at_once(monkeypatch)
    out = tmp_path / "out"
    hub.uploads.faults = [("put", "wrong")]
    with pytest.raises(ResourceError, match=r"model-00001-of-00003.safetensors: after its upload, the hub does not hold the bytes of"):
        run(job, out)
    assert shards_in(out)[0] == "model-00001-of-00003.safetensors"
    assert not any(entry.confirmed for entry in read_pushed(out)[0].values())
    hub.uploads.stored.clear()
    run(job, out)
    require_done(job, out, hub)


@pytest.mark.long
def test_stopped_while_it_uploads(job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that waits for the hub leaves when it is asked to."""
    hub.uploads.faults = [("commit", "429")] * 10**6
    stop, out = Stop(60.0), tmp_path / "out"
    config = job.config(quiet=True, push=NAME, push_drop=True)
    with at_points({("journal.synced", 3): lambda: stop.request("SIGTERM")}), pytest.raises(Stopped, match="while shards were uploaded"):
        bigq.quantize(str(job.source), out, config, stop)
    assert len(committed(out)) == 3 and not (out / "config.json").exists()
    hub.uploads.faults = []
    run(job, out)
    require_done(job, out, hub)


def test_a_failed_job_does_not_wait_for_the_hub(job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    monkeypatch.setattr(push, "WAITING_SHARDS", 1)
    hub.uploads.faults = [("commit", "429")] * 10**6
    faults.arm("journal.opened:2:EIO")
    with pytest.raises(ResourceError, match="Input/output error"):
        run(job, tmp_path / "out")


def test_a_hub_without_large_files(job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it does not say hashes; the advice about .gitattributes is followed."""
    monkeypatch.setattr(uploads, "LARGE", ())
    said = "model-00001-of-00003.safetensors: the hub keeps it in git itself .*; add .* and remove the file there"
    with pytest.raises(ResourceError, match=said):
        run(job, tmp_path / "out")
    monkeypatch.undo()
    use_hub(hub, monkeypatch)
    for name in [name for name in hub.uploads.repositories[NAME].files if name.endswith(".safetensors")]:
        hub.uploads.repositories[NAME].remove(name)
    run(job, tmp_path / "out")
    require_done(job, tmp_path / "out", hub)


def test_a_disk_that_fails_while_it_uploads(job: TinyJob, hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for point in POINTS:
        faults.arm(f"{point}:1:EIO")
        with pytest.raises(ResourceError, match=f"{out}: uploading failed: Input/output error; run the same command again"):
            run(job, out)
        faults.disarm()
    run(job, out)
    require_done(job, out, hub)


def test_a_folder_that_lets_nothing_be_removed(job: TinyJob, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, unlink = tmp_path / "out", Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors" and path.parent == out:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(ResourceError, match="safetensors: cannot be removed: Permission denied; check the folder's permissions, then"):
            run(job, out)
    run(job, out)
    require_done(job, out, hub)
