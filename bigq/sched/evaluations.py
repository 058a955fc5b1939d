"""Results of ``bigq eval`` on a finished job, kept in its record: OUT/.bigq/evaluations.jsonl, a sealed line each.

They are about the shards that were there, so each says which: ``weights``. Nothing else depends on them.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bigq import __version__
from bigq.errors import ResourceError
from bigq.io.atomic import remedy, write_bytes
from bigq.io.sealed import seal, sound_lines, unseal
from bigq.sched.journal import STATE_FOLDER, Commit, read_commits, read_job

EVALUATIONS_NAME = "evaluations.jsonl"


def holds_finished_job(folder: Path) -> bool:
    """Whether a folder is the output of a job that is complete. Raises CheckpointError where the job's record is damaged."""
    return (folder / "config.json").is_file() and (folder / STATE_FOLDER).is_dir() and read_job(folder) is not None


def weights_of(commits: Iterable[Commit]) -> str:
    """A hash that tells whether two looks at a folder saw the same shards."""
    lines = sorted(f"{commit.shard.file} {commit.shard.sha256}\n" for commit in commits)
    return hashlib.sha256("".join(lines).encode(errors="backslashreplace")).hexdigest()[:32]


def record_evaluation(out: Path, evaluation: Mapping[str, Any]) -> None:
    """Add a result to the record of the finished job in ``out``. Raises ResourceError; then the record is as it was."""
    path = out / STATE_FOLDER / EVALUATIONS_NAME
    weights = weights_of(read_commits(out)[0])
    at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    line = seal({"at": at, "bigq": __version__, "weights": weights, **evaluation}, line=True)
    with _alone(out / STATE_FOLDER):
        write_bytes(path, b"".join([*sound_lines(path), line]))


def read_evaluations(out: Path) -> tuple[list[dict[str, Any]], int]:
    """The results that are kept, the oldest first, and how many others are of weights that are not there any more.

    Raises ResourceError, CheckpointError where the record is absurdly large.
    """
    weights = weights_of(read_commits(out)[0])
    found = [unseal(line, line=True) for line in sound_lines(out / STATE_FOLDER / EVALUATIONS_NAME)]
    known = [value for value in found if value is not None]
    current = [value for value in known if value.get("weights") == weights]
    return current, len(known) - len(current)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other evaluation writes meanwhile, where the file system has locks."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be opened: {error.strerror}; {remedy(error)}") from error
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
