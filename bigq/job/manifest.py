"""The manifest of a finished folder, and the GGUF file that may join it."""

from __future__ import annotations

from pathlib import Path

from bigq.errors import BigqError
from bigq.io.checksum import load_record, save_record
from bigq.io.folders import STATE_FOLDER
from bigq.io.shard_record import file_sha256
from bigq.job.journal import read_job

#: Written before config.json: what a finished folder holds.
MANIFEST_NAME = "manifest.json"
#: The whole model once more, where a job is to make it. Not hashed again to see whether a folder is finished.
GGUF_NAME = "model.gguf"


def has_gguf(out: Path, *, by_size: bool = False) -> bool:
    """Whether a finished folder holds the GGUF file that its manifest speaks of. Raises CheckpointError, ResourceError.

    One whose size and time are those of the file that was written is not read; by_size: nor is any other.
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
    """Whether a folder that is loadable is one of a job whose GGUF file is not there yet. False where nobody knows."""
    try:
        job = read_job(out)
        settings = {} if job is None else job.get("settings")
        return isinstance(settings, dict) and settings.get("format") == "gguf" and not has_gguf(out, by_size=True)
    except BigqError:
        return False


def add_gguf(out: Path) -> None:
    """Let the manifest of a finished folder speak of the GGUF file that was written to it. Raises ResourceError."""
    manifest = load_record(out / STATE_FOLDER / MANIFEST_NAME, "")
    assert manifest is not None
    path = out / GGUF_NAME
    entry = {"size": path.stat().st_size, "sha256": file_sha256(path), "modified": path.stat().st_mtime_ns}
    files = dict(sorted({**manifest["files"], GGUF_NAME: entry}.items()))
    save_record(out / STATE_FOLDER / MANIFEST_NAME, {**manifest, "files": files})
