"""The record of a converted folder: what it was converted from, and the size and hash of every file.

    OUT/.bigq/conversion.json  formats before and after, the source folder; where a job of bigq quantized the source, that job's
                               request and its last run
    OUT/.bigq/journal.jsonl    one line per shard, as a job writes it: size, sha256, tensors, packed Linears
    OUT/.bigq/manifest.json    size and sha256 of every file, as a job writes it

There is no job.json: no job resumes in a converted folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.errors import CheckpointError
from bigq.io.atomic import write_bytes
from bigq.io.checksum import load_record, read_record_bytes, save_record, unseal
from bigq.io.folders import STATE_FOLDER
from bigq.io.shard_record import file_sha256
from bigq.job.journal import CONVERSION_NAME, JOURNAL_NAME, RUNS_NAME, Commit, read_commits, read_job
from bigq.job.manifest import MANIFEST_NAME

#: Advice for a damaged record of a conversion.
CONVERT_AGAIN = "convert the model again, into another folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionRecord:
    """How a folder was converted.

    at: UTC, ISO 8601. bigq: the version that converted. source: the folder that was read, absolute. source_bytes: of its tensors.
    fingerprint: a hash of the headers of its shards. blocks: decoder blocks of the model.
    job: the request of the job that quantized the model, run: the last run of that job without its end; None where no job of bigq did.
    """

    at: str
    bigq: str
    format_before: str
    format: str
    source: str
    source_bytes: int
    fingerprint: str
    blocks: int
    job: Mapping[str, Any] | None
    run: Mapping[str, Any] | None


_KINDS: Mapping[str, tuple[type, ...]] = {
    "at": (str,),
    "bigq": (str,),
    "format_before": (str,),
    "format": (str,),
    "source": (str,),
    "source_bytes": (int,),
    "fingerprint": (str,),
    "blocks": (int,),
    "job": (dict, type(None)),
    "run": (dict, type(None)),
}


def write_conversion(folder: Path, record: ConversionRecord, commits: Sequence[Commit]) -> None:
    """Write the record of a folder whose other files are complete. Raises ResourceError."""
    state = folder / STATE_FOLDER
    state.mkdir()
    write_bytes(state / JOURNAL_NAME, b"".join(commit.to_line() for commit in commits))
    save_record(state / CONVERSION_NAME, dataclasses.asdict(record))
    files = {commit.shard.file: {"size": commit.shard.size, "sha256": commit.shard.sha256} for commit in commits}
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = [name for path in paths if not (name := path.relative_to(folder).as_posix()).startswith(".")]
    for name in [*names, f"{STATE_FOLDER}/{JOURNAL_NAME}", f"{STATE_FOLDER}/{CONVERSION_NAME}"]:
        if name not in files:
            files[name] = {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    save_record(state / MANIFEST_NAME, {"files": files})


def is_conversion(out: Path) -> bool:
    """Whether ``bigq convert`` wrote a folder, by the file that only its folders have."""
    return (out / STATE_FOLDER / CONVERSION_NAME).exists()


def read_conversion(out: Path) -> ConversionRecord | None:
    """How the folder ``out`` was converted; None where ``bigq convert`` did not make it.

    Raises CheckpointError where the record is damaged, ResourceError where it cannot be read.
    """
    path = out / STATE_FOLDER / CONVERSION_NAME
    value = load_record(path, CONVERT_AGAIN)
    if value is None:
        return None
    known = value.keys() == _KINDS.keys() and all(type(value[name]) in kinds for name, kinds in _KINDS.items())
    if not known or value["blocks"] < 0 or value["source_bytes"] < 0:
        raise CheckpointError(f"{path}: is not the record of a conversion by this version of bigq; {CONVERT_AGAIN}")
    return ConversionRecord(**value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What the record of a source folder says: the job that quantized it, that job's last run, and its commits by shard file."""

    job: Mapping[str, Any] | None
    run: Mapping[str, Any] | None
    commits: Mapping[str, Commit]


def provenance_of(source: Path) -> Provenance:
    """The provenance of a packed checkpoint; a converted one passes on that of its source.

    Raises CheckpointError where a record is damaged, ResourceError where it cannot be read.
    """
    before = read_conversion(source)
    commits = {commit.shard.file: commit for commit in read_commits(source)[0]}
    if before is not None:
        return Provenance(job=before.job, run=before.run, commits=commits)
    job = read_job(source)
    return Provenance(job=job, run=None if job is None else _last_run(source), commits=commits)


def _last_run(source: Path) -> dict[str, Any] | None:
    lines = (read_record_bytes(source / STATE_FOLDER / RUNS_NAME) or b"").splitlines(keepends=True)
    runs = [run for line in lines if (run := unseal(line, line=True)) is not None]
    return {name: value for name, value in runs[-1].items() if name != "ended"} if runs else None
