"""The staging folder: the output is written into it, and it is renamed to the output when it is complete."""

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

#: A file that marks a staging folder and holds the name of the output.
MARK = ".bigq-convert"


def output_folder(source: Path, out: str | Path) -> Path:
    """The folder to write, with links resolved. Raises UsageError if ``out`` cannot be an output folder."""
    place = Path(os.path.realpath(os.path.expanduser(out)))
    if not place.name:
        raise UsageError(f"{out}: is the root of the file system; name another folder")
    if place == Path(os.path.realpath(os.curdir)):
        raise UsageError(f"{out or '.'}: is the current folder, which cannot be replaced; name another one")
    try:
        refuse_nesting(source, place)
    except RuntimeError:  # of pathlib, before Python 3.13
        raise UsageError(f"{out}: it or MODEL is a link that leads to itself; name a folder") from None
    return place


@contextlib.contextmanager
def staging_folder(out: Path, size: int) -> Iterator[Path]:
    """A folder to write to. It becomes ``out`` at the end, or is removed after an error. size: bytes that will be written."""
    folder = out.with_name(out.name + ".partial")
    ours = False
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out}: exists and is not empty; choose another folder, or empty it")
        if os.path.lexists(folder) and not _is_abandoned(folder, out):
            raise UsageError(f"{folder}: is not a staging folder of bigq convert, but has its name; remove it, or choose another OUT")
        ours = True
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _mark(folder, out)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise ResourceError(f"{out}: needs about {show_size(size)} of disk space, but only {show_size(free)} are free; free some space")
        yield folder
        sync_folder(folder)
        os.rename(folder, out)
        ours = False
        sync_folder(out.parent)
        with contextlib.suppress(OSError):  # the mark is not needed any more, and must not appear in the output
            (out / MARK).unlink()
    except OSError as error:
        raise ResourceError(f"{out}: cannot be written: {error.strerror}; {remedy(error)}") from error
    finally:
        if ours:
            shutil.rmtree(folder, ignore_errors=True)


def _mark(folder: Path, out: Path) -> None:
    """Write the name of the output into its staging folder, so that the staging folder of another output is not taken for this one's."""
    with open(folder / MARK, "wb") as file:
        file.write(os.fsencode(out.name))
        file.flush()
        os.fsync(file.fileno())


def _is_abandoned(folder: Path, out: Path) -> bool:
    """Whether a folder is the staging folder of a killed run for ``out``: empty, or with its mark, which may be empty too."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        return (folder / MARK).read_bytes() in (b"", os.fsencode(out.name))
    except FileNotFoundError:
        return not any(folder.iterdir())
