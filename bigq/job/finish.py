"""Finishing a job: writes the files that make its folder loadable. Also reads back the packed weights of a committed block."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigq import faults
from bigq.config import JobConfig
from bigq.errors import BigqError, ResourceError
from bigq.io.atomic import TEMP_SUFFIX, copy_file, json_bytes, remedy, sync_folder, write_bytes, write_json
from bigq.io.checksum import load_record, save_record
from bigq.io.folders import STATE_FOLDER
from bigq.io.formats import Format, Quantization
from bigq.io.index import INDEX_NAME, read_header, read_json_object
from bigq.io.reader import read_tensor
from bigq.io.shard_record import file_sha256
from bigq.io.side_files import side_files
from bigq.job.away import Away
from bigq.job.journal import BATCHES_NAME, CHECKPOINTS_NAME, JOB_NAME, JOURNAL_NAME, Commit, Journal, read_commits
from bigq.job.manifest import GGUF_NAME, MANIFEST_NAME, read_manifest
from bigq.kernels.dequantize import dequantize_packed
from bigq.mixed.record import BITS_NAME
from bigq.model.plain import PlainModules
from bigq.model.quantization import original_dtype, without_quantization
from bigq.scheme import QuantScheme, scheme_for
from bigq.version import __version__

#: The model card and the mark in one that bigq wrote. Users may edit such a card, so the manifest does not list it.
CARD_NAME, CARD_MARK = "README.md", "<!-- model card written by bigq -->"
#: The job's records that no longer change once it is finished.
RECORDS = (JOB_NAME, BITS_NAME, JOURNAL_NAME, BATCHES_NAME, "linears.jsonl")


def is_finished(journal: Journal) -> bool:
    """Whether every shard is committed, and all files written after the last shard exist unchanged."""
    return not journal.missing and _rest_is_whole(journal.out, journal.commits)


def complete_commits(out: Path, away: Away | None = None) -> list[Commit] | None:
    """The commits of a finished folder if shards and all other files exist unchanged, else None. Nothing is repaired.

    A shard counts as unchanged if its size and modification time match its commit. away: shards that are on the hub instead.
    """
    try:
        found, damaged = read_commits(out)
        commits = list({commit.unit: commit for commit in found}.values())
        if damaged or not commits or not commits[0].shard.file.endswith(f"-of-{len(commits):05d}.safetensors"):
            return None
        if _leftovers(out) or not _rest_is_whole(out, commits):
            return None
        return commits if all(_is_unchanged(out, commit, away) for commit in commits) else None
    except (BigqError, OSError):
        return None


def _is_unchanged(out: Path, commit: Commit, away: Away | None) -> bool:
    try:
        at = (out / commit.shard.file).stat(follow_symlinks=False)
    except FileNotFoundError:
        return away is not None and away.problem(commit.shard) is None
    return (at.st_size, at.st_mtime_ns) == (commit.shard.size, commit.modified)


def _leftovers(out: Path) -> list[Path]:
    """Files of a run that was killed: temporary ones, and saved activations. Raises OSError."""
    state = out / STATE_FOLDER
    return [*out.rglob("*" + TEMP_SUFFIX), *state.glob("activations-*"), *state.glob(CHECKPOINTS_NAME)]


def _rest_is_whole(out: Path, commits: Sequence[Commit]) -> bool:
    """Whether the manifest lists exactly these shards, and every other file matches it."""
    try:
        manifest = load_record(out / STATE_FOLDER / MANIFEST_NAME, "")
        if manifest is None:
            return False
        shards = {commit.shard.file for commit in commits}
        records = {name for record in RECORDS if (out / (name := f"{STATE_FOLDER}/{record}")).exists()}
        if not shards | records <= set(manifest["files"]):
            return False
        others = {name: entry for name, entry in manifest["files"].items() if name not in shards and name != GGUF_NAME}
        return all(file_sha256(out / name) == entry["sha256"] for name, entry in others.items())
    except (BigqError, KeyError, TypeError, AttributeError):
        return False


def reopen_folder(out: Path) -> None:
    """Remove the files that make a finished folder loadable, before shards are made again. Raises ResourceError."""
    try:
        for name in ("config.json", INDEX_NAME, GGUF_NAME, f"{STATE_FOLDER}/{MANIFEST_NAME}"):
            (out / name).unlink(missing_ok=True)
        sync_folder(out)
    except OSError as error:
        raise ResourceError(f"{out}: cannot be written to: {error.strerror}; {remedy(error)}") from error


def finish_folder(source: Path, journal: Journal, config: JobConfig, modules: PlainModules) -> None:
    """Write the files that make the folder loadable: side files, the index, the manifest, and config.json last.

    modules: of the model and the tensors of the output. Raises ResourceError; then there is no config.json.
    """
    out = journal.out
    faults.point("finish.begun")
    reopen_folder(out)
    lines = [_json_line(record) for commit in journal.commits for record in commit.linears]
    write_bytes(out / STATE_FOLDER / "linears.jsonl", b"".join(lines))
    side = [name for name in side_files(source).files if not (name == CARD_NAME and is_card(out / CARD_NAME))]
    copy_side_files(source, side, out)
    faults.point("finish.side")
    meta = {
        "quantizer": [f"bigq:{__version__}"],
        "method": config.method,
        "true_sequential": config.true_sequential,
        "mse": 0.0 if config.scheme.scales == "minmax" else 2.0,
    }
    original = read_json_object(source / "config.json")
    quantization = quantization_of(journal.commits, config, modules, meta, original_dtype(original))
    quantization_config = config.made.config(quantization)
    if config.made.config_file is not None and quantization.packed:
        write_json(out / config.made.config_file, quantization_config)
    weight_map = {name: commit.shard.file for commit in journal.commits for name in commit.shard.tensors}
    total = sum(commit.shard.size for commit in journal.commits)
    write_json(out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    faults.point("finish.index")
    # If every Linear was skipped, the folder is a plain unquantized checkpoint.
    added = {"quantization_config": quantization_config} if quantization.packed else {}
    untied = {"tie_word_embeddings": False} if config.rotate else {}
    final = json_bytes(without_quantization(original) | untied | added)
    free = {"free": [CARD_NAME]} if is_card(out / CARD_NAME) else {}
    files = {name: entry for name, entry in _manifest(journal, final, side).items() if name not in free.get("free", ())}
    save_record(out / STATE_FOLDER / MANIFEST_NAME, {"files": files, **free})
    faults.point("finish.manifest")
    try:
        write_bytes(out / "config.json", final)
    except ResourceError:
        # The file may already have its name, although writing it failed. A failed job must leave nothing that loads.
        with contextlib.suppress(OSError):
            (out / "config.json").unlink(missing_ok=True)
        raise
    faults.point("finish.config")


def quantization_of(
    commits: Iterable[Commit], config: JobConfig, modules: PlainModules, meta: Mapping[str, Any], dtype: torch.dtype
) -> Quantization:
    """The input of the format's quantization_config. modules: of the model and the tensors of the output. dtype: of the original model."""
    commits = list(commits)
    names = [name for commit in commits for record in commit.linears if isinstance(name := record.get("name"), str)]
    found = {name: scheme_for(name, config.base_scheme, config.rules) for name in names}
    packed = {name: scheme for name, scheme in found.items() if scheme is not None}
    bases = {name.rsplit(".", 2)[0] for name in packed}
    return Quantization(
        scheme=config.base_scheme,
        rules=config.rules,
        packed=packed,
        left_out=tuple(name for commit in commits for name in commit.left_out),
        others=tuple(name for name in modules.every if name not in packed),
        outside=modules.outside,
        apart=(*modules.apart, *(path for path in modules.banks if path not in bases)),
        head=next((str(record.get("name")) for commit in commits if commit.unit.startswith("head") for record in commit.linears), None),
        dtype=dtype,
        meta=meta,
    )


def is_card(path: Path) -> bool:
    """Whether a file is a model card that bigq wrote. It may have been edited since."""
    try:
        with open(path, "rb") as file:
            return CARD_MARK.encode() in file.read(2**20)
    except OSError:
        return False


def free_card(out: Path) -> None:
    """Remove the model card from the manifest of a finished folder, so that it may change. Raises CheckpointError, ResourceError."""
    manifest = read_manifest(out)
    files = {name: entry for name, entry in manifest["files"].items() if name != CARD_NAME}
    if manifest != (freed := {"files": files, "free": [CARD_NAME]}):
        save_record(out / STATE_FOLDER / MANIFEST_NAME, freed)


def copy_side_files(source: Path, names: Iterable[str], out: Path) -> None:
    """Copy files to the same places in another folder. Raises ResourceError."""
    for name in names:
        try:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{(out / name).parent}: cannot be made: {error.strerror}; {remedy(error)}") from error
        copy_file(source / name, out / name)


def _manifest(journal: Journal, config_json: bytes, side: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of every file of a finished folder, by path. side: of the side files, which may be in subfolders."""
    out = journal.out
    files = {c.shard.file: {"size": c.shard.size, "sha256": c.shard.sha256} for c in journal.commits}
    records = [path.name for path in _files_in(out / STATE_FOLDER) if path.name in RECORDS]
    names = [path.name for path in _files_in(out)] + [f"{STATE_FOLDER}/{name}" for name in records] + list(side)
    for name in sorted(set(names) - set(files) - {"config.json"}):
        files[name] = {"size": (out / name).stat().st_size, "sha256": file_sha256(out / name)}
    files["config.json"] = {"size": len(config_json), "sha256": hashlib.sha256(config_json).hexdigest()}
    return files


class FinishedBlock:
    """The packed Linears of a committed block. Raises CheckpointError, ResourceError if its shard cannot be read."""

    def __init__(self, journal: Journal, commit: Commit, format: Format) -> None:
        file, away = commit.shard.file, journal.away
        self._tensors, _ = read_header(journal.out / file) if away is None else away.header(journal.out, file)
        self._format = format

    def weight(self, prefix: str, scheme: QuantScheme, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The dequantized weight [m, n] of the Linear whose tensors begin with ``prefix``."""
        stored = self._format.read(prefix, lambda n: read_tensor(self._tensors[n]), scheme)
        words, scales, zeros = (t.to(device) for t in stored)
        return dequantize_packed(words, scales, zeros, scheme.bits, dtype, scheme.points)

    def plain(self, name: str) -> Tensor:
        """An unquantized tensor of the block, by its name in the shard."""
        return read_tensor(self._tensors[name])


def _files_in(folder: Path) -> list[Path]:
    """The files in a folder, sorted by name. Raises ResourceError."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be listed: {error.strerror}; check the disk, then run the same command again") from error


def _json_line(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()
