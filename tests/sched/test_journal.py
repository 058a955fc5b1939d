"""The record of a job: what survives a crash, and who may take a folder up again."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigq.errors import BigqError, CheckpointError, ResourceError, UsageError
from bigq.io.writer import ShardRecord
from bigq.sched.journal import Commit, Journal

UNITS = ["rest-0", "block-0", "block-1", "block-2"]
REQUEST = {"version": 1, "source": "abc", "scheme": {"bits": 4, "group_size": 128, "symmetric": True}, "rules": [["a", {"bits": 8}]]}


@contextlib.contextmanager
def opened(out: Path, request: dict[str, Any] = REQUEST, units: list[str] = UNITS) -> Iterator[Journal]:
    journal = Journal(out, request, units)
    try:
        yield journal
    finally:
        journal.close()


def add(journal: Journal, unit: str) -> Commit:
    """Write a shard for the unit and commit it."""
    data = f"the tensors of {unit}".encode()
    (journal.out / f"{unit}.safetensors").write_bytes(data)
    shard = ShardRecord(file=f"{unit}.safetensors", size=len(data), sha256=hashlib.sha256(data).hexdigest(), tensors=(f"{unit}.w", "ü"))
    commit = Commit(unit=unit, shard=shard, linears=({"name": f"{unit}.q", "loss": 0.1},))
    journal.commit(commit)
    return commit


def began(out: Path, count: int = 3) -> list[Commit]:
    """A job that committed its first units and then went away."""
    with opened(out) as journal:
        return [add(journal, unit) for unit in UNITS[:count]]


def surviving(out: Path) -> list[str]:
    with opened(out) as journal:
        return [commit.unit for commit in journal.commits]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ".bigq" / "journal.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("exists", [False, True], ids=["new folder", "empty folder"])
def test_a_fresh_job_freezes_its_request(exists: bool, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    if exists:
        out.mkdir(parents=True)
    with opened(out) as journal:
        assert journal.commits == []
    assert json.loads((out / ".bigq" / "job.json").read_text()) == REQUEST


def test_commits_are_there_when_the_job_is_taken_up(tmp_path: Path) -> None:
    commits = began(tmp_path)
    with opened(tmp_path) as journal:
        assert journal.commits == commits
        last = add(journal, "block-2")
        assert journal.commits == [*commits, last]
    with opened(tmp_path) as journal:
        assert journal.commits == [*commits, last]
    assert [line["unit"] for line in lines(tmp_path)] == UNITS


def test_each_commit_is_in_the_file_at_once(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        for count, unit in enumerate(UNITS, 1):
            add(journal, unit)
            assert [line["unit"] for line in lines(tmp_path)] == UNITS[:count]


@pytest.mark.parametrize("kept", [1, 10, 60, -2])
def test_a_torn_last_line_is_cut_off(kept: int, tmp_path: Path) -> None:
    began(tmp_path)
    path = tmp_path / ".bigq" / "journal.jsonl"
    whole, last = path.read_bytes()[:-1].rsplit(b"\n", 1)
    path.write_bytes(whole + b"\n" + last[:kept])
    with opened(tmp_path) as journal:
        assert [c.unit for c in journal.commits] == UNITS[:2]
        add(journal, "block-1")
    assert surviving(tmp_path) == UNITS[:3]
    assert [line["unit"] for line in lines(tmp_path)] == UNITS[:3]


def test_a_last_line_that_lost_only_its_newline_does_not_swallow_the_next(tmp_path: Path) -> None:
    began(tmp_path)
    path = tmp_path / ".bigq" / "journal.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    with opened(tmp_path) as journal:
        for unit in UNITS[len(journal.commits) :]:
            add(journal, unit)
    assert surviving(tmp_path) == UNITS


@pytest.mark.parametrize("line", [b"[]", b"null", b"{}", b'{"unit": "block-0"}', b"\xff\xfe", b""], ids=repr)
def test_a_line_that_is_no_commit_ends_what_survives(line: bytes, tmp_path: Path) -> None:
    began(tmp_path)
    path = tmp_path / ".bigq" / "journal.jsonl"
    first, _, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, third, b""]))
    assert surviving(tmp_path) == UNITS[:1]
    assert [line["unit"] for line in lines(tmp_path)] == UNITS[:1]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_shard_altered_in_one_byte_ends_what_survives(at: int, tmp_path: Path) -> None:
    began(tmp_path)
    shard = tmp_path / f"{UNITS[at]}.safetensors"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    assert surviving(tmp_path) == UNITS[:at]
    assert [line["unit"] for line in lines(tmp_path)] == UNITS[:at]


@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "a folder"])
def test_a_shard_that_is_not_whole_ends_what_survives(damage: str, tmp_path: Path) -> None:
    began(tmp_path)
    shard = tmp_path / "block-0.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    if damage == "a folder":
        shard.mkdir()
    elif damage != "missing":
        shard.write_bytes(data[:-1] if damage == "shorter" else data + b"x")
    assert surviving(tmp_path) == UNITS[:1]


def test_commits_out_of_order_do_not_survive(tmp_path: Path) -> None:
    began(tmp_path)
    path = tmp_path / ".bigq" / "journal.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + third + second)
    assert surviving(tmp_path) == UNITS[:1]


def test_more_commits_than_units_are_cut(tmp_path: Path) -> None:
    began(tmp_path)
    with opened(tmp_path, units=UNITS[:2]) as journal:
        assert [c.unit for c in journal.commits] == UNITS[:2]
    assert len(lines(tmp_path)) == 2


def test_leftover_temp_files_go_and_nothing_else(tmp_path: Path) -> None:
    began(tmp_path)
    for folder in (tmp_path, tmp_path / ".bigq"):
        (folder / "x.safetensors.bigq-tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert surviving(tmp_path) == UNITS[:3]
    assert not list(tmp_path.rglob("*.bigq-tmp")) and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scheme": {**REQUEST["scheme"], "bits": 8}}, r"scheme bits = 4, now it is 8"),  # type: ignore[dict-item]
        ({"scheme": {**REQUEST["scheme"], "symmetric": False}}, r"scheme symmetric = True, now it is False"),  # type: ignore[dict-item]
        ({"scheme": {**REQUEST["scheme"], "mse": True}}, r"scheme mse = None, now it is True"),  # type: ignore[dict-item]
        ({"source": "xyz"}, r"source \('abc', now 'xyz'\)"),
        ({"rules": []}, r"rules \(\[\['a', \{'bits': 8\}\]\], now \[\]\)"),
        ({"extra": 5}, r"extra \(None, now 5\)"),
    ],
    ids=["bits", "symmetric", "new setting", "source", "rules", "new section"],
)
def test_another_request_is_refused_with_the_setting_and_both_values(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    began(tmp_path)
    with pytest.raises(UsageError, match=said) as caught:
        Journal(tmp_path, {**REQUEST, **change}, UNITS)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert len(lines(tmp_path)) == 3 and json.loads((tmp_path / ".bigq" / "job.json").read_text()) == REQUEST, "the job must stay as it was"


def test_a_request_without_a_setting_that_the_job_has_is_another_request(tmp_path: Path) -> None:
    began(tmp_path)
    scheme = {"bits": 4, "group_size": 128}
    with pytest.raises(UsageError, match="symmetric"):
        Journal(tmp_path, {**REQUEST, "scheme": scheme}, UNITS)


def test_a_request_equal_as_json_is_the_same_request(tmp_path: Path) -> None:
    """Tuples come back as lists."""
    began(tmp_path)
    with opened(tmp_path, {**REQUEST, "rules": (("a", {"bits": 8}),)}) as journal:
        assert len(journal.commits) == 3


def test_a_refused_request_does_not_keep_the_folder_locked(tmp_path: Path) -> None:
    """While the error is looked at (a notebook keeps it, and with it the journal), the right request must go through."""
    began(tmp_path)
    with pytest.raises(UsageError) as caught:
        Journal(tmp_path, {**REQUEST, "source": "xyz"}, UNITS)
    assert surviving(tmp_path) == UNITS[:3]
    assert "xyz" in str(caught.value)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=f"{tmp_path}: OUT is not empty and holds no job of bigq"):
        Journal(tmp_path, REQUEST, UNITS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("x")
    with pytest.raises(UsageError, match=f"{out}: OUT is a file"):
        Journal(out, REQUEST, UNITS)
    assert out.read_text() == "x"


def test_a_folder_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot be used as output folder"):
        Journal(tmp_path / "file" / "out", REQUEST, UNITS)


def test_a_folder_in_use_is_refused_until_it_is_closed(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        add(journal, "rest-0")
        with pytest.raises(UsageError, match=f"{tmp_path}: another bigq job is writing"):
            Journal(tmp_path, REQUEST, UNITS)
        add(journal, "block-0")
    assert surviving(tmp_path) == UNITS[:2]


def test_a_damaged_request_is_told_by_file(tmp_path: Path) -> None:
    began(tmp_path)
    (tmp_path / ".bigq" / "job.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"job\.json: its JSON cannot be read"):
        Journal(tmp_path, REQUEST, UNITS)


def test_a_commit_survives_its_line() -> None:
    shard = ShardRecord(file="a", size=3, sha256="00", tensors=("x", "line\nbreak", "ü"))
    commit = Commit(unit="block-9", shard=shard, linears=({"name": "q", "shape": [1, 2]},))
    line = commit.to_line()
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert Commit.from_line(line) == commit
    assert all(Commit.from_line(line[:cut]) is None for cut in range(len(line) - 1))


def test_a_journal_that_cannot_be_written_is_a_bigq_error(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        (tmp_path / ".bigq" / "journal.jsonl").mkdir()
        with pytest.raises(BigqError, match=r"cannot write .*journal\.jsonl"):
            add(journal, "rest-0")
        assert journal.commits == [], "a commit that was not written must not count"
