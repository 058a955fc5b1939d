"""The manifest of a finished folder, and the GGUF file that is added to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigq.errors import BigqError, CheckpointError
from bigq.io.checksum import load_record, save_record
from bigq.io.folders import STATE_FOLDER
from bigq.io.shard_record import file_sha256
from bigq.job.journal import read_job

#: Size and hash of every file of a finished folder. Written just before config.json.
MANIFEST_NAME = "manifest.json"
#: The whole model as one GGUF file, made by jobs with ``--format gguf``. It is not hashed to decide whether a folder is finished.
GGUF_NAME = "model.gguf"


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a finished folder. Raises CheckpointError where it is missing or damaged, ResourceError."""
    path, remedy = out / STATE_FOLDER / MANIFEST_NAME, "run the command that made the folder again"
    manifest = load_record(path, remedy)
    if manifest is None or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path}: is missing or lists no files; {remedy}")
    return manifest


def has_gguf(out: Path, *, by_size: bool = False) -> bool:
    """Whether a finished folder holds the GGUF file that its manifest lists. Raises CheckpointError, ResourceError.

    The file is hashed only if its modification time differs from the recorded one. by_size: compare the size alone.
    """
    manifest, path = load_record(out / STATE_FOLDER / MANIFEST_NAME, ""), out / GGUF_NAME
    try:
        entry = None if manifest is None else manifest["files"][GGUF_NAME]
        if entry is None or path.stat().st_size != entry["size"]:
            return False
        return by_size or path.stat().st_mtime_ns == entry.get("modified") or file_sha256(path) == entry["sha256"]
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def lacks_gguf(out: Path) -> bool:
    """Whether the folder's job must still write its GGUF file. False if its records cannot be read."""
    try:
        job = read_job(out)
        settings = {} if job is None else job.get("settings")
        return isinstance(settings, dict) and settings.get("format") == "gguf" and not has_gguf(out, by_size=True)
    except BigqError:
        return False


def add_gguf(out: Path) -> None:
    """Add the GGUF file to the manifest of a finished folder. Raises CheckpointError, ResourceError."""
    manifest, path = read_manifest(out), out / GGUF_NAME
    entry = {"size": path.stat().st_size, "sha256": file_sha256(path), "modified": path.stat().st_mtime_ns}
    files = dict(sorted({**manifest["files"], GGUF_NAME: entry}.items()))
    save_record(out / STATE_FOLDER / MANIFEST_NAME, {**manifest, "files": files})
