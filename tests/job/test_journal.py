"""The record of a job: what survives crashes and damage, which shards are hashed, and which folders may be used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from bigq import faults
from bigq.errors import BigqError, CheckpointError, ResourceError, UsageError
from bigq.io.checksum import save_record, seal, unseal
from bigq.io.shard_record import ShardRecord
from bigq.job import journal as journal_module
from bigq.job.batches import Halving
from bigq.job.journal import Commit, Journal, read_commits, read_job, require_job_folder

UNITS = ["rest-0", "block-0", "block-1", "block-2"]
REQUEST = {"version": 1, "source": "abc", "rules": [["a", {"bits": 8}]]}


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.disarm()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / ".bigq").mkdir(parents=True)
    return folder


def same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Replaces ``request.compare``."""
    if before["source"] != now["source"]:
        raise UsageError(f"{out}: another source")
    return [] if before["version"] == now["version"] else ["another version"]


def opened(out: Path, request: Mapping[str, Any] = REQUEST, units: list[str] = UNITS) -> Journal:
    return Journal(out, request, units, same)


def shard_file(out: Path, unit: str) -> Path:
    return out / f"model-{UNITS.index(unit) + 1:05d}-of-{len(UNITS):05d}.safetensors"


def add(journal: Journal, unit: str) -> Commit:
    """Write a shard for the unit and commit it."""
    data = f"the tensors of {unit}".encode()
    path = shard_file(journal.out, unit)
    path.unlink(missing_ok=True)  # which may be a link
    path.write_bytes(data)
    shard = ShardRecord(file=path.name, size=len(data), sha256=hashlib.sha256(data).hexdigest(), tensors=(f"{unit}.w", "ü"))
    commit = Commit(unit=unit, shard=shard, modified=path.stat().st_mtime_ns, linears=({"name": f"{unit}.q", "loss": 0.1},), skipped={})
    journal.commit(commit)
    return commit


def began(out: Path, count: int = 3) -> list[Commit]:
    """A job that committed its first units and then ended."""
    journal = opened(out)
    return [add(journal, unit) for unit in UNITS[:count]]


def surviving(out: Path) -> list[str]:
    return [commit.unit for commit in opened(out).commits]


def path_of(out: Path) -> Path:
    return out / ".bigq" / "journal.jsonl"


def lines(out: Path) -> list[str]:
    """The units of the journal's lines, all of which must be valid."""
    commits = [Commit.from_line(line) for line in path_of(out).read_bytes().splitlines(keepends=True)]
    return [commit.unit if commit is not None else "damaged" for commit in commits]


def touched(path: Path, data: bytes | None = None) -> None:
    """A file with the same bytes and another modification time."""
    there = path.stat()
    if data is not None:
        path.write_bytes(data)
    os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns + 10**9))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are hashed from now on."""
    found: list[str] = []
    real = journal_module.file_sha256

    def reading(path: Path) -> str:
        found.append(path.name)
        return real(path)

    monkeypatch.setattr(journal_module, "file_sha256", reading)
    return found


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fsync, so that hundreds of jobs are quick."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


# Starting, committing, resuming.


def test_a_fresh_job_freezes_its_request(out: Path) -> None:
    journal = opened(out)
    assert journal.commits == [] and journal.notes == [] and journal.missing == [0, 1, 2, 3] and journal.halvings == []
    assert read_job(out) == REQUEST and unseal((out / ".bigq" / "job.json").read_bytes()) == REQUEST


def test_commits_are_there_when_the_job_is_resumed(out: Path) -> None:
    commits = began(out)
    journal = opened(out)
    assert journal.commits == commits and journal.missing == [3] and journal.notes == []
    assert journal.commit_of(1) == commits[1] and journal.commit_of(3) is None
    last = add(journal, "block-2")
    assert journal.commits == [*commits, last] and journal.missing == []
    assert opened(out).commits == [*commits, last] and lines(out) == UNITS
    assert read_commits(out) == ([*commits, last], 0)


def test_each_commit_is_in_the_file_at_once(out: Path) -> None:
    journal = opened(out)
    for count, unit in enumerate(UNITS, 1):
        add(journal, unit)
        assert lines(out) == UNITS[:count]


def test_units_come_in_their_order_however_they_were_committed(out: Path) -> None:
    journal = opened(out)
    for unit in ("block-1", "rest-0", "block-2"):
        add(journal, unit)
    for again in (journal, opened(out)):
        assert [commit.unit for commit in again.commits] == ["rest-0", "block-1", "block-2"] and again.missing == [1]
    assert lines(out) == ["block-1", "rest-0", "block-2"], "nothing to write anew"


def test_the_last_commit_of_a_unit_counts(out: Path) -> None:
    began(out)
    line = path_of(out).read_bytes().splitlines(keepends=True)[1]
    path_of(out).write_bytes(path_of(out).read_bytes() + line)
    assert surviving(out) == UNITS[:3] and sorted(lines(out)) == sorted(UNITS[:3])


def test_a_commit_survives_its_line() -> None:
    shard = ShardRecord(file="a", size=3, sha256="00", tensors=("x", "line\nbreak", "ü"))
    commit = Commit(
        unit="block-9",
        shard=shard,
        linears=({"name": "q", "shape": [1, 2]},),
        modified=2**62,
        left_out=("a.b",),
        skipped={"c": "NaN"},
        source="5f",
        batch=4,
    )
    line = commit.to_line()
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert Commit.from_line(line) == commit
    assert all(Commit.from_line(line[:cut]) is None for cut in range(len(line)))
    value = unseal(line, line=True)
    assert value is not None
    for key in value:
        fewer = {name: part for name, part in value.items() if name != key}
        assert Commit.from_line(seal(fewer, line=True)) is None, f"without {key}"
    for key in ("tensors", "linears", "left_out"):
        assert Commit.from_line(seal({**value, key: 5}, line=True)) is None


# Torn and damaged lines.


def test_a_line_torn_at_any_byte_is_as_good_as_absent(out: Path, unsynced: None) -> None:
    commits = began(out)
    path = path_of(out)
    whole = path.read_bytes()
    last = len(commits[2].to_line())
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        journal = opened(out)
        assert journal.commits == commits[:2], f"{cut} bytes short"
        assert journal.notes == [], "nothing unusual about a crash"
        assert path.read_bytes() == whole[:-last], "what comes next must not be joined to what was torn"


@pytest.mark.parametrize("tail", [b"\x00", b"\x00" * 4096, b"{", b"\xff", b"\r", b"half"], ids=repr)
def test_garbage_of_a_power_failure_at_the_end_is_removed(tail: bytes, out: Path) -> None:
    began(out)
    path = path_of(out)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert surviving(out) == UNITS[:3] and path.read_bytes() == whole
    add(opened(out), "block-2")
    assert surviving(out) == UNITS


@pytest.mark.parametrize(
    "line",
    [b"[]", b"null", b"{}", b'{"unit": "block-0"}', b"\xff\xfe", b"", b"[" * 100_000, b"9" * 10_000],
    ids=lambda line: repr(line[:20]),
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_invalid_line_loses_only_its_unit(at: int, line: bytes, out: Path, reads: list[str]) -> None:
    commits = began(out)
    path = path_of(out)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*whole[:at], line + b"\n", *whole[at + 1 :]]))
    assert read_commits(out) == ([c for i, c in enumerate(commits) if i != at], 1)
    journal = opened(out)
    assert journal.commits == [c for i, c in enumerate(commits) if i != at] and journal.missing == [at, 3]
    assert journal.notes == ["journal.jsonl: some lines are damaged; their shards are made again"]
    assert path.read_bytes() == b"".join([*whole[:at], *whole[at + 1 :]])
    assert reads == [] and opened(out).notes == [], "it is reported once"
    add(journal, UNITS[at])
    assert surviving(out) == UNITS[:3]


def test_a_changed_byte_loses_one_or_two_units_and_nothing_else(out: Path, unsynced: None) -> None:
    """Two where the byte is a newline. The remaining commits are unchanged."""
    commits = began(out)
    path = path_of(out)
    whole = path.read_bytes()
    for at in sorted({*range(0, len(whole), 7), *(i for i, byte in enumerate(whole) if byte == 10)}):
        for byte in (whole[at] ^ 1, 10):
            if byte != whole[at]:
                path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
                found = opened(out).commits
                assert all(commit in commits for commit in found)
                assert 3 - len(found) == (1 if whole[at] != 10 else min(2, 1 + (at < len(whole) - 1)))


def test_a_line_with_a_changed_value_is_ignored(out: Path) -> None:
    """Edited by hand, still valid JSON."""
    began(out)
    path = path_of(out)
    path.write_bytes(path.read_bytes().replace(b'"batch":null', b'"batch":7777', 1))
    assert opened(out).missing == [0, 3]


# Damaged shards.


def _altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    touched(path, bytes(data))


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "altered": (_altered, "was changed after it was written"),
    "missing": (Path.unlink, "is missing"),
    "shorter": (lambda path: touched(path, path.read_bytes()[:-1]), r"has 2\d bytes instead of 2\d"),
    "longer": (lambda path: touched(path, path.read_bytes() + b"x"), r"has 2\d bytes instead of 2\d"),
    "empty": (lambda path: path.write_bytes(b""), r"has 0 bytes instead of 2\d"),
    "a folder": (_as_folder, r"has \d+ bytes instead of 2\d"),
    "a link": (_as_link, r"has 9 bytes instead of 2\d"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_damaged_shard_loses_only_its_unit(at: int, damage: Callable[[Path], Any], said: str, out: Path, reads: list[str]) -> None:
    commits = began(out)
    shard = shard_file(out, UNITS[at])
    damage(shard)
    journal = opened(out)
    assert journal.commits == [c for i, c in enumerate(commits) if i != at] and journal.missing == [at, 3]
    (note,) = journal.notes
    assert note.startswith(f"{shard.name}: ") and note.endswith("; it is made again")
    assert re.search(said, note)
    assert reads == ([shard.name] if "changed" in said else []), "sizes tell without reading"
    assert lines(out) == [u for i, u in enumerate(UNITS[:3]) if i != at]
    if shard.is_dir():
        shard.rmdir()
    add(journal, UNITS[at])
    assert surviving(out) == UNITS[:3]


def test_unchanged_shards_are_not_read(out: Path, reads: list[str]) -> None:
    began(out)
    assert surviving(out) == UNITS[:3] and reads == []


def test_shards_with_another_modification_time_are_read(out: Path, reads: list[str]) -> None:
    """As in a copied folder."""
    began(out)
    touched(shard_file(out, "block-0"))
    assert surviving(out) == UNITS[:3] and reads == [shard_file(out, "block-0").name]
    os.utime(shard_file(out, "block-0"), ns=(0, 0))
    assert surviving(out) == UNITS[:3] and len(reads) == 2


def test_shards_of_another_size_are_made_again(out: Path) -> None:
    began(out)
    shard = shard_file(out, "block-0")
    there = shard.stat()
    shard.write_bytes(b"x")
    os.utime(shard, ns=(there.st_atime_ns, there.st_mtime_ns))
    assert opened(out).missing == [1, 3]


def test_a_commit_of_another_file_or_unit_is_ignored(out: Path) -> None:
    began(out)
    path = path_of(out)
    value = unseal(path.read_bytes().splitlines(keepends=True)[1], line=True)
    assert value is not None
    for change in ({"file": "../job.json"}, {"file": "model-00001-of-00004.safetensors"}, {"unit": "block-77"}, {"unit": ["block-0"]}):
        path.write_bytes(seal({**value, **change}, line=True))
        assert opened(out).commits == [] and path.read_bytes() == b""


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("failing", ["stat", "read"])
def test_a_temporary_disk_error_loses_no_commit(failing: str, number: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began(out)
    shard = shard_file(out, "block-0")
    if failing == "read":
        touched(shard)
    before = path_of(out).read_bytes()
    stat, real = Path.stat, open

    def no_stat(self: Path, **options: Any) -> os.stat_result:
        if self == shard and failing == "stat":
            raise OSError(number, os.strerror(number))
        return stat(self, **options)

    def no_open(path: Any, *args: Any, **options: Any) -> Any:
        if path == shard:
            raise OSError(number, os.strerror(number))
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", no_stat)
        patch.setattr("bigq.io.shard_record.open", no_open, raising=False)
        again = "(check the disk, then run the same|check the disk and run the) command again"
        with pytest.raises(ResourceError, match=f"^{shard}: cannot be .*: {os.strerror(number)}; {again}"):
            opened(out)
    assert path_of(out).read_bytes() == before and surviving(out) == UNITS[:3]


# Committing where the disk has no room.


@pytest.mark.parametrize("number", ["ENOSPC", "EIO", "EDQUOT"])
@pytest.mark.parametrize("place", ["journal.opened", "journal.half", "journal.written"])
def test_a_commit_that_fails_leaves_the_journal_unchanged(place: str, number: str, out: Path) -> None:
    began(out)
    before, journal = path_of(out).read_bytes(), opened(out)
    faults.arm(f"{place}:1:{number}")
    with pytest.raises(ResourceError, match=f"^{path_of(out)}: cannot be written: {os.strerror(getattr(errno, number))}; free some space"):
        add(journal, "block-2")
    assert path_of(out).read_bytes() == before
    assert journal.missing == [3], "a commit that was not written must not count"
    add(journal, "block-2")
    assert surviving(out) == UNITS


def test_a_first_commit_that_fails(out: Path) -> None:
    journal = opened(out)
    faults.arm("journal.half:1:ENOSPC")
    with pytest.raises(ResourceError, match="cannot be written"):
        add(journal, "rest-0")
    assert path_of(out).read_bytes() == b"" and surviving(out) == []


@pytest.mark.parametrize("room", [0, 1, 10, 150, 300])
def test_a_disk_that_takes_part_of_a_line(room: int, out: Path) -> None:
    """A short write, by a limit on file sizes. The rest of the line must not be written later, when there is space again."""
    began(out)
    before, journal = path_of(out).read_bytes(), opened(out)
    pid = os.fork()
    if pid == 0:
        import resource

        code = 9
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, resource.RLIM_INFINITY))
            add(journal, "block-2")
        except ResourceError as error:
            code = 3 if "File too large" in str(error) and journal.missing == [3] else 4
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert path_of(out).read_bytes() == before


def test_a_journal_that_cannot_be_written_is_a_bigq_error(out: Path) -> None:
    journal = opened(out)
    path_of(out).mkdir()
    with pytest.raises(BigqError, match=r"journal\.jsonl: cannot be written: Is a directory"):
        add(journal, "rest-0")
    assert journal.commits == []


@pytest.mark.parametrize("place", ["journal.opened", "journal.half", "journal.written", "journal.synced"])
@pytest.mark.parametrize("count", [1, 3])
def test_killed_while_committing(count: int, place: str, out: Path) -> None:
    pid = os.fork()
    if pid == 0:
        faults.arm(f"{place}:{count}")
        began(out)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    there = count - (place in ("journal.opened", "journal.half"))
    journal = opened(out)
    assert [commit.unit for commit in journal.commits] == UNITS[:there] and journal.notes == []
    for unit in UNITS[there:]:
        add(journal, unit)
    assert surviving(out) == UNITS


@pytest.mark.parametrize("place", ["file.opened", "file.written", "file.synced", "file.renamed", "job.written"])
def test_killed_while_the_request_is_frozen(place: str, out: Path) -> None:
    pid = os.fork()
    if pid == 0:
        faults.arm(place)
        opened(out)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    require_job_folder(out)
    assert read_job(out) == (REQUEST if place in ("file.renamed", "job.written") else None)
    assert opened(out).missing == [0, 1, 2, 3] and read_job(out) == REQUEST


# Other files in the folder.


def test_only_leftover_temporary_files_are_removed(out: Path) -> None:
    began(out)
    for folder in (out, out / ".bigq"):
        (folder / "x.safetensors.bigq-tmp").write_bytes(b"half")
    (out / "notes.txt").write_text("mine")
    assert surviving(out) == UNITS[:3]
    assert not list(out.rglob("*.bigq-tmp")) and (out / "notes.txt").read_text() == "mine"


def test_a_leftover_that_cannot_be_removed_is_not_an_error(out: Path) -> None:
    began(out)
    (out / "x.bigq-tmp").mkdir()
    assert surviving(out) == UNITS[:3]


def test_a_foreign_folder_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=f"{tmp_path}: OUT is not empty and holds no bigq job"):
        require_job_folder(tmp_path)
    (tmp_path / ".bigq").write_text("not a folder")
    with pytest.raises(UsageError, match="holds no bigq job"):
        require_job_folder(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".bigq", "thesis.tex"]


def test_a_file_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("x")
    assert read_job(file) is None
    with pytest.raises(UsageError, match=f"{file}: OUT is a file"):
        require_job_folder(file)
    assert file.read_text() == "x"


def test_folders_that_may_be_used(tmp_path: Path) -> None:
    for ours in (tmp_path, tmp_path / "new", tmp_path / "new" / "deep"):
        require_job_folder(ours)
    (tmp_path / ".bigq").mkdir()
    (tmp_path / "model.safetensors").write_text("x")
    require_job_folder(tmp_path)


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(ResourceError, match=f"^{tmp_path}: cannot be used as output folder: Permission denied"):
        require_job_folder(tmp_path)
    with pytest.raises(ResourceError, match="cannot be used as output folder: File name too long"):
        require_job_folder(tmp_path / ("x" * 300))


# The request.


def test_another_request_is_refused_and_the_job_is_unchanged(out: Path) -> None:
    began(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="another source"):
        opened(out, {**REQUEST, "source": "xyz"})
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_harmless_difference_is_noted_and_the_request_is_unchanged(out: Path) -> None:
    began(out)
    assert opened(out, {**REQUEST, "version": 2}).notes == ["another version"]
    assert read_job(out) == REQUEST


@pytest.mark.parametrize("data", [b"", b"{", b"{}\n", b"\x00" * 50, json.dumps(REQUEST, indent=2).encode() + b"\n"], ids=repr)
def test_a_damaged_request_is_reported_with_its_file(data: bytes, out: Path) -> None:
    began(out)
    before = path_of(out).read_bytes()
    (out / ".bigq" / "job.json").write_bytes(data)
    for use in (opened, read_job):
        with pytest.raises(CheckpointError, match=rf"^{out}/\.bigq/job\.json: damaged or edited by hand; restore it from a copy, or"):
            use(out)
    assert path_of(out).read_bytes() == before


def test_any_byte_of_the_request_counts(out: Path) -> None:
    began(out)
    path = out / ".bigq" / "job.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"job\.json"):
            opened(out)


def test_a_missing_request_is_told_where_there_is_a_journal(out: Path) -> None:
    began(out)
    (out / ".bigq" / "job.json").unlink()
    with pytest.raises(CheckpointError, match=rf"^{out}/\.bigq/job\.json: is missing, so the job's request is unknown; restore it"):
        opened(out)
    assert lines(out) == UNITS[:3]
    path_of(out).unlink()
    assert opened(out).missing == [0, 1, 2, 3], "without commits there is nothing to mix"


def test_a_missing_journal_is_created_again(out: Path) -> None:
    began(out)
    path_of(out).unlink()
    assert read_commits(out) == ([], 0)
    assert surviving(out) == []


def test_an_absurdly_large_journal_is_reported(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began(out)
    monkeypatch.setattr("bigq.io.checksum.MAX_BYTES", 2**20)
    with open(path_of(out), "ab") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match=r"journal\.jsonl: larger than"):
        opened(out)


# Runs and halvings.


def runs(out: Path) -> list[Any]:
    return [unseal(line, line=True) for line in (out / ".bigq" / "runs.jsonl").read_bytes().splitlines(keepends=True)]


def test_damaged_lines_of_runs_are_removed(out: Path) -> None:
    for number in range(3):
        opened(out).record_run({"run": number, "notes": ["ü"]})
    assert runs(out) == [{"run": number, "notes": ["ü"]} for number in range(3)]
    path = out / ".bigq" / "runs.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second.replace(b"1", b"7") + b"\xff\n" + third + b'{"torn')
    opened(out).record_run({"run": 3})
    assert [run["run"] for run in runs(out)] == [0, 2, 3]


def test_a_run_that_cannot_be_recorded_leaves_the_earlier_ones(out: Path) -> None:
    journal = opened(out)
    journal.record_run({"run": 0})
    for place in ("file.opened", "file.written", "file.synced"):
        faults.arm(f"{place}:1:ENOSPC")
        with pytest.raises(ResourceError, match=r"runs\.jsonl: cannot be written: No space left"):
            journal.record_run({"run": 1})
        assert runs(out) == [{"run": 0}]


def test_halvings_come_back(out: Path) -> None:
    journal = opened(out)
    for halving in (Halving(0, 0, 0, 4), Halving(2, 9, 8, 2)):
        journal.record_halving(halving)
    assert opened(out).halvings == [Halving(0, 0, 0, 4), Halving(2, 9, 8, 2)]


@pytest.mark.parametrize(
    "value", [{}, {"halvings": 3}, {"halvings": [[1, 2]]}, {"halvings": [[1, 2, 3, "x"]]}, {"halvings": [None]}], ids=repr
)
def test_invalid_halvings_are_reported(value: dict[str, Any], out: Path) -> None:
    began(out)
    save_record(out / ".bigq" / "batches.json", value)
    with pytest.raises(CheckpointError, match=r"batches\.json: is not a list of halvings; restore it from a copy"):
        opened(out)


def test_damaged_halvings_are_reported(out: Path) -> None:
    opened(out).record_halving(Halving(0, 0, 0, 4))
    path = out / ".bigq" / "batches.json"
    path.write_bytes(path.read_bytes().replace(b"4", b"2", 1))
    with pytest.raises(CheckpointError, match=r"batches\.json: damaged or edited by hand"):
        opened(out)
