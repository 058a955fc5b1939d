"""A check that no file of a model folder is outside of it.

File names come from the checkpoint, so a link could make bigq read or copy any file. Links and special files are checked once,
here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from bigq.errors import CheckpointError
from bigq.io.json_file import show_name

#: The maximum number of files and folders. A model folder has some hundreds.
MAX_ENTRIES = 100_000


def require_contained(folder: Path) -> None:
    """Raise CheckpointError if a folder or its subfolders contain a link out of the folder, or a special file.

    Links may point into the folder. In a hub cache (``models--X--Y/snapshots/REVISION``) they may point into ``blobs`` of the same
    model. Hidden subfolders (``.git``, ``.cache``) are skipped, since nothing is read there.
    """
    root = folder.resolve()
    blobs = hub_blobs(root)
    left = [folder]
    seen = 0
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    seen += 1
                    if seen > MAX_ENTRIES:
                        raise CheckpointError(f"{folder}: more than {MAX_ENTRIES} files; give the folder of a single model as MODEL")
                    if entry.is_dir(follow_symlinks=False):
                        if not entry.name.startswith("."):
                            left.append(Path(entry.path))
                    elif entry.is_symlink():
                        _require_link(Path(entry.path), root, blobs)
                    elif not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                        raise CheckpointError(f"{show_name(entry.path)}: neither a file nor a folder; remove it from the model folder")
        except OSError as error:
            raise CheckpointError(f"{show_name(str(error.filename or folder))}: cannot be read: {error.strerror}") from error


def hub_blobs(root: Path) -> Path | None:
    """The folder that the links of a hub cache snapshot point into, or None if ``root`` is not a snapshot."""
    model = root.parent.parent
    return model / "blobs" if root.parent.name == "snapshots" and model.name.startswith("models--") else None


def _require_link(link: Path, root: Path, blobs: Path | None) -> None:
    try:
        target = link.resolve()
    except RuntimeError:  # raised before Python 3.13 for a link to itself
        raise CheckpointError(f"{show_name(str(link))}: a link to itself; remove it") from None
    if target == root or root in target.parents:
        # A link to a folder is not followed: the walk visits that folder itself.
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise CheckpointError(f"{show_name(str(link))}: a link to something that is neither a file nor a folder; remove it")
        return
    if blobs is not None and target.parent == blobs and (target.is_file() or not target.exists()):
        return
    raise CheckpointError(
        f"{show_name(str(link))}: a link out of the model folder, to {show_name(str(target))}; "
        "replace it by a copy of the file, or give the folder with the original files as MODEL"
    )
