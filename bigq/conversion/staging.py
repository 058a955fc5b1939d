"""A folder that is written beside the place that it is to have, and gets it when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from bigq.errors import ResourceError, UsageError
from bigq.io.atomic import remedy, sync_folder
from bigq.io.folders import refuse_nesting
from bigq.progress.sizes import show_size

#: In a folder that is being written, so that no other is taken for one: it holds the name that the folder is to get.
MARK = ".bigq-convert"


def place_for(source: Path, out: str | Path) -> Path:
    """The folder that is to be written, links followed. Raises UsageError where it can be none."""
    place = Path(os.path.realpath(os.path.expanduser(out)))
    if not place.name:
        raise UsageError(f"{out}: is the root of the file system; name another folder")
    if place == Path(os.path.realpath(os.curdir)):
        raise UsageError(f"{out or '.'}: is the folder that you are in, which cannot be replaced; name another one")
    try:
        refuse_nesting(source, place)
    except RuntimeError:  # of pathlib, before Python 3.13
        raise UsageError(f"{out}: it, or MODEL, is a link that leads to itself; name a folder") from None
    return place


@contextlib.contextmanager
def unfinished(out: Path, size: int) -> Iterator[Path]:
    """A folder to write to, which becomes ``out`` at the end, or goes if there is an error. size: the bytes that it will take."""
    folder = out.with_name(out.name + ".partial")
    ours = False
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out}: is there and not empty; choose another folder, or empty it")
        if os.path.lexists(folder) and not _is_left_over(folder, out):
            raise UsageError(f"{folder}: is in the way and was not made by bigq convert; remove it, or choose another folder")
        ours = True
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _mark(folder, out)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise ResourceError(f"{out}: takes about {show_size(size)}, but only {show_size(free)} of disk space are free there")
        yield folder
        sync_folder(folder)
        os.rename(folder, out)
        ours = False
        sync_folder(out.parent)
        with contextlib.suppress(OSError):  # it has done its work, and tells of no other folder
            (out / MARK).unlink()
    except OSError as error:
        raise ResourceError(f"{out}: cannot be written: {error.strerror}; {remedy(error)}") from error
    finally:
        if ours:
            shutil.rmtree(folder, ignore_errors=True)


def _mark(folder: Path, out: Path) -> None:
    """Let a folder say that it is to become ``out``, so that a complete one is not taken for what a killed run left for another."""
    with open(folder / MARK, "wb") as file:
        file.write(os.fsencode(out.name))
        file.flush()
        os.fsync(file.fileno())


def _is_left_over(folder: Path, out: Path) -> bool:
    """Whether a folder is what a killed run that was to make ``out`` left behind: empty, or with its mark, perhaps unwritten."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        return (folder / MARK).read_bytes() in (b"", os.fsencode(out.name))
    except FileNotFoundError:
        return not any(folder.iterdir())
