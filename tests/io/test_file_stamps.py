"""Files that change during a job are detected. A failing disk is not reported as a changed file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigq.errors import CheckpointError, ResourceError
from bigq.io.file_stamps import Stamps


def _rewritten(path: Path) -> None:
    """In place and with the same size: only the modification time differs."""
    there = path.stat()
    path.write_bytes(b"y" * there.st_size)
    os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns + 1))


def _replaced(path: Path) -> None:
    """By a file of the same size and modification time."""
    there = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"y" * there.st_size)
    os.utime(other, ns=(there.st_atime_ns, there.st_mtime_ns))
    other.replace(path)


def _longer(path: Path) -> None:
    there = path.stat()
    with open(path, "ab") as file:
        file.write(b"y")
    os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns))


CHANGES: list[Callable[[Path], Any]] = [_rewritten, _longer, Path.unlink]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("config.json", "a.safetensors", "b.safetensors")]
    for path in paths:
        path.write_bytes(b"x" * 100)
    return paths


def test_another_inode_is_no_change(files: list[Path]) -> None:
    """Some network and user-space file systems assign new inode numbers."""
    stamps = Stamps(files)
    _replaced(files[1])
    stamps.require_unchanged()


def test_unchanged_files_pass(files: list[Path]) -> None:
    stamps = Stamps(files)
    stamps.require_unchanged()
    for path in files:
        path.read_bytes()
        path.chmod(0o600)
        os.utime(path, ns=(1, path.stat().st_mtime_ns))
    (files[0].parent / "new").write_bytes(b"z")
    stamps.require_unchanged()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("which", [0, 2])
def test_an_error_names_the_changed_file(which: int, change: Callable[[Path], Any], files: list[Path]) -> None:
    stamps = Stamps(files)
    change(files[which])
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"^{files[which]}: changed or replaced while the job was running"):
            stamps.require_unchanged()


def test_links_are_followed(files: list[Path]) -> None:
    link = files[0].parent / "link"
    link.symlink_to(files[1])
    stamps = Stamps([link])
    _rewritten(files[1])
    with pytest.raises(CheckpointError, match=f"^{link}: "):
        stamps.require_unchanged()


def test_a_file_that_appears_is_a_change(tmp_path: Path) -> None:
    stamps = Stamps([tmp_path / "x", tmp_path / "y"])
    stamps.require_unchanged()
    (tmp_path / "y").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'y'}: "):
        stamps.require_unchanged()


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.EACCES])
def test_a_failing_disk_is_not_a_changed_file(number: int, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = Stamps(files)
    stat = os.stat

    def failing(path: Any, **options: Any) -> os.stat_result:
        if path == files[2]:
            raise OSError(number, os.strerror(number))
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing)
        with pytest.raises(ResourceError, match=f"^{files[2]}: stat failed: {os.strerror(number)}"):
            stamps.require_unchanged()
    stamps.require_unchanged()
