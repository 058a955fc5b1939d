"""The door of a model folder: whatever is read or copied out of it lies in it.

Everything below goes by file names that a checkpoint brings along; links and special files are looked for once, here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from bigq.errors import CheckpointError
from bigq.io.json_file import plain

#: Files and folders that are looked at; a model folder has some hundreds.
MAX_ENTRIES = 100_000


def require_contained(folder: Path) -> None:
    """Raise CheckpointError where a file in a folder or its subfolders lies somewhere else, or is none.

    Links may end in the folder, and in a hub cache (``models--X--Y/snapshots/REVISION``) in the same model's ``blobs``. Hidden
    subfolders (``.git``, ``.cache``) are passed over: nothing is read there.
    """
    root = folder.resolve()
    blobs = _blobs(root)
    left = [folder]
    seen = 0
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    seen += 1
                    if seen > MAX_ENTRIES:
                        raise CheckpointError(f"{folder}: holds more than {MAX_ENTRIES} files; is this the model's own folder?")
                    if entry.is_dir(follow_symlinks=False):
                        if not entry.name.startswith("."):
                            left.append(Path(entry.path))
                    elif entry.is_symlink():
                        _require_link(Path(entry.path), root, blobs)
                    elif not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                        raise CheckpointError(f"{plain(entry.path)}: is neither a file nor a folder; remove it from the model's folder")
        except OSError as error:
            raise CheckpointError(f"{plain(str(error.filename or folder))}: cannot be read: {error.strerror}") from error


def _blobs(root: Path) -> Path | None:
    """Where the files of a snapshot in a hub cache really lie; None where the folder is no snapshot."""
    model = root.parent.parent
    return model / "blobs" if root.parent.name == "snapshots" and model.name.startswith("models--") else None


def _require_link(link: Path, root: Path, blobs: Path | None) -> None:
    try:
        target = link.resolve()
    except RuntimeError:  # what Python before 3.13 says to a link that leads to itself
        raise CheckpointError(f"{plain(str(link))}: is a link that leads to itself; remove it") from None
    if target == root or root in target.parents:
        # Nothing is resolved twice: a link to a folder is not gone into, and what lies there is looked at where it is.
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise CheckpointError(f"{plain(str(link))}: is a link to what is neither a file nor a folder; remove it")
        return
    if blobs is not None and target.parent == blobs and (target.is_file() or not target.exists()):
        return
    raise CheckpointError(
        f"{plain(str(link))}: is a link out of the model's folder, to {plain(str(target))}; "
        "put a copy of the file in its place, or give the folder that it lies in as MODEL"
    )
