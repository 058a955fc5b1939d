"""The record of what a hub repository holds of a job: which line counts, and what a crash or a full disk leaves of it."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest

from bigq.errors import ResourceError, UsageError
from bigq.io.remote.push import Held
from bigq.io.shard_record import ShardRecord
from bigq.job.away import Away
from bigq.job.pushed import PUSHED_NAME, Pushed, PushRecord, foreign_files, read_pushed, refuse_source, repository_of

ONE = Pushed(file="model-00001-of-00002.safetensors", size=3, sha256="aa", repository="me/x", revision="c1", confirmed=True, dropped=True)
TWO = Pushed(file="config.json", size=5, sha256="bb", repository="me/x")
SHARD = ShardRecord(file=ONE.file, size=3, sha256="aa", tensors=())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / ".bigq").mkdir()
    return tmp_path


def test_the_last_line_of_a_file_counts(out: Path) -> None:
    record = PushRecord(out)
    sent = dataclasses.replace(ONE, confirmed=False, dropped=False, revision="")
    record.add([sent, TWO])
    record.add([ONE])
    assert record.entries == {ONE.file: ONE, TWO.file: TWO}
    assert read_pushed(out) == ({ONE.file: ONE, TWO.file: TWO}, 0)


def test_a_torn_line_is_as_good_as_absent(out: Path) -> None:
    """At every byte; a record that is opened by the job then takes further lines."""
    PushRecord(out).add([TWO])
    path = out / ".bigq" / PUSHED_NAME
    whole, line = path.read_bytes(), ONE.to_line()
    for cut in range(1, len(line)):
        path.write_bytes(whole + line[:cut])
        assert read_pushed(out)[0] == {TWO.file: TWO} and read_pushed(out)[1] == 1
    PushRecord(out).add([ONE])
    assert read_pushed(out) == ({TWO.file: TWO, ONE.file: ONE}, 0)


def test_lines_of_another_kind_are_ignored() -> None:
    assert Pushed.from_line(ONE.to_line()) == ONE
    for changed in (ONE.to_line().replace(b'"aa"', b'"ab"'), b"{}\n", b"[]\n", b"\xff\n"):
        assert Pushed.from_line(changed) is None


def test_a_full_disk_leaves_the_record_as_it_was(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = PushRecord(out)
    record.add([TWO])

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(ResourceError, match=r"pushed.jsonl: cannot be written: No space left on device; free some space"):
            record.add([ONE])
    assert record.entries == {TWO.file: TWO} and read_pushed(out) == ({TWO.file: TWO}, 0)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (Held(size=3, sha256="aa", blob="x"), None),
        (Held(size=4, sha256="aa", blob="x"), "has other bytes in me/x on the hub"),
        (Held(size=3, sha256="ab", blob="x"), "has other bytes in me/x on the hub"),
        (Held(size=3, sha256=None, blob="aa"), "has other bytes in me/x on the hub"),
        (None, "is not in me/x on the hub any more"),
    ],
)
def test_a_shard_that_is_away(held: Held | None, said: str | None) -> None:
    there = {} if held is None else {ONE.file: held}
    assert Away({ONE.file: ONE}, there).problem(SHARD) == said


def test_a_shard_that_was_never_dropped_is_missing() -> None:
    held = {ONE.file: Held(size=3, sha256="aa", blob="x")}
    for entries in ({}, {ONE.file: dataclasses.replace(ONE, dropped=False)}, {ONE.file: dataclasses.replace(ONE, sha256="zz")}):
        assert Away(entries, held).problem(SHARD) == "is missing"


def test_which_repository_a_run_needs(out: Path) -> None:
    assert repository_of(out, {}, None) is None and repository_of(out, {}, "a/b") == "a/b"
    assert repository_of(out, {TWO.file: TWO}, "a/b") == "a/b" and repository_of(out, {TWO.file: TWO}, None) is None
    assert repository_of(out, {ONE.file: ONE}, None) == "me/x" == repository_of(out, {ONE.file: ONE}, "me/x")
    with pytest.raises(
        UsageError, match=r"--push a/b: shards of the job in .* are in me/x only; give --push me/x, or choose another folder"
    ):
        repository_of(out, {ONE.file: ONE}, "a/b")


def test_files_of_others() -> None:
    names = [".gitattributes", "README.md", ONE.file, "x.bin", "config.json"]
    assert foreign_files(names, {ONE.file: ONE, TWO.file: TWO}, "me/x") == ["x.bin"]
    assert foreign_files(names, {ONE.file: ONE}, "me/y") == ["config.json", ONE.file, "x.bin"]


def test_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("me/x", "me/x@main"):
        with pytest.raises(UsageError, match="--push me/x: is the repository that MODEL is read from; name another one"):
            refuse_source("me/x", model)
    refuse_source("me/x", "me/y")
    refuse_source(None, "me/x")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "x").mkdir(parents=True)
    refuse_source("me/x", "me/x")  # a folder
