"""Checks an output folder: no file is changed, missing or extra, and readers can use every value.

The records of a job or a conversion are compared with its files, the files with each other, and all of it with the model that
config.json describes. Every byte is read once. Problems are reported, and nothing is repaired.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigq.config import JobConfig
from bigq.errors import BigqError, CheckpointError, ResourceError, UsageError
from bigq.inspect.folder_check import EVALUATIONS, JOURNAL, LOCK, MANIFEST, OWNER, FolderCheck
from bigq.inspect.scan import Scan
from bigq.inspect.verify_conversion import ConversionCheck
from bigq.inspect.verify_model import config_problems, index_problems, model_problems
from bigq.io.atomic import TEMP_SUFFIX
from bigq.io.folders import STATE_FOLDER
from bigq.io.formats import FORMATS
from bigq.io.index import INDEX_NAME, read_json_object
from bigq.job.away import read_away
from bigq.job.conversion_record import is_conversion
from bigq.job.finish import RECORDS
from bigq.job.journal import BATCHES_NAME, CHECKPOINTS_NAME, JOB_NAME, RUNS_NAME, read_job
from bigq.job.manifest import GGUF_NAME
from bigq.job.pushed import PUSHED_NAME

_JOB, _RUNS, _BATCHES, _CHECKPOINTS, _PUSHED = (
    f"{STATE_FOLDER}/{name}" for name in (JOB_NAME, RUNS_NAME, BATCHES_NAME, CHECKPOINTS_NAME, PUSHED_NAME)
)
#: The manifest does not list these: they may change after a job is finished.
_UNLISTED = (MANIFEST, _RUNS, EVALUATIONS, OWNER, LOCK, _PUSHED)
#: What a finished folder holds besides shards, whatever the model.
_ALWAYS = (INDEX_NAME, "config.json", _JOB, JOURNAL, f"{STATE_FOLDER}/linears.jsonl")

_SHARD = re.compile(r"model-(\d{5,})-of-(\d{5,})\.safetensors")
_UNIT = re.compile(r"(rest|block|head|experts)-(0|[1-9]\d{0,8})(?:-(0|[1-9]\d{0,8}))?")


def verify(out: Path, *, trust_remote_code: bool = False) -> list[str]:
    """Problems of an output folder of ``quantize`` or ``convert``, one line each that names the file or tensor.

    The list is empty if the folder is complete and intact. trust_remote_code: run model code in ``out``, as the job did.
    Shards that are on the hub instead (``--push-drop``) are read from there.
    Raises UsageError if ``out`` is no such folder, ResourceError if it cannot be listed, or the hub cannot be asked.
    """
    out = Path(os.path.expanduser(out))
    try:
        if not (out / STATE_FOLDER).is_dir():
            raise UsageError(f"{out}: holds no job of bigq; name the output folder of bigq quantize or bigq convert")
        check = ConversionCheck(out) if is_conversion(out) else _JobCheck(out)
        check.run(trust_remote_code)
    except OSError as error:
        raise ResourceError(f"{out}: cannot be read: {error.strerror}; check the disk and run the command again") from error
    return check.problems


class _JobCheck(FolderCheck):
    """The problems of a job's folder. job: its settings; saved: the checkpoints of activations, by file."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, "run the job's command again to rewrite it")
        self.job = self._read_job()
        self.commits = self.read_journal()
        self.shards = {commit.shard.file for commit in self.commits.values()}
        self.manifest = self._read_manifest()
        self.saved = self._read_checkpoints()
        self._find_away()

    def run(self, trust_remote_code: bool) -> None:
        """Run the checks that go beyond reading the records."""
        self._check_records()
        self._check_units()
        # Where the job's format is unknown: as v2, which can store every zero point.
        format = FORMATS["gptq_v2"] if self.job is None else self.job.made
        commits = self.commits.values()
        scans = {commit.shard.file: scan for commit in commits if (scan := self.scan(commit, format, self.manifest)) is not None}
        for file, entry in self.saved.items():
            self.compare(file, {_CHECKPOINTS: entry})
        if self.manifest is not None:
            self._check_files(self.manifest)
            if len(scans) == len(self.commits) and JOURNAL not in self.bad:
                self._check_model(scans, trust_remote_code)
        self._check_listing()

    def _read_job(self) -> JobConfig | None:
        try:
            job = read_job(self.out)
            if job is None:
                self.add(_JOB, "is missing, so the job's settings are unknown")
                return None
            return JobConfig.from_frozen(job.get("settings"), _JOB)
        except BigqError as error:
            self.add_error(_JOB, error)
            return None

    def _find_away(self) -> None:
        """Shards that are on the hub count as files of the folder."""
        self.away = read_away(self.out)
        for commit in self.commits.values():
            file = commit.shard.file
            if file in self.away.files and file not in self.listing:
                problem = self.away.problem(commit.shard)
                if problem is None:
                    self.listing[file] = commit.shard.size
                else:
                    self.astray[file] = problem

    def _read_manifest(self) -> dict[str, Any] | None:
        manifest = self.read_manifest()
        if MANIFEST not in self.listing and "config.json" in self.listing:
            self.add(MANIFEST, "is missing, so it is unknown what the folder should hold")
        elif MANIFEST not in self.listing:
            what = "a job is running" if self.busy else "run the same command again to resume it"
            self.problems.append(f"{self.out}: the job is not finished, {len(self.commits)} shards are committed; {what}")
        return manifest

    def _read_checkpoints(self) -> dict[str, dict[str, Any]]:
        """The activations that a job in progress keeps, by file."""
        record = self.sealed(_CHECKPOINTS) if self.manifest is None else None
        try:
            return {} if record is None else {f"{STATE_FOLDER}/{entry['file']}": dict(entry) for entry in record["kept"]}
        except (KeyError, TypeError, ValueError):
            self.add(_CHECKPOINTS, "is not a list of saved activations")
            return {}

    def _check_records(self) -> None:
        """Check the records that contain checksums."""
        runs = self.check_lines(_RUNS)
        self.check_lines(EVALUATIONS)
        self.check_lines(_PUSHED)
        if self.manifest is not None and not runs and _RUNS not in self.bad:
            self.add(_RUNS, "is missing or empty; no other record describes the job's runs")
        self.sealed(_BATCHES)

    def _check_units(self) -> None:
        """Check the journal's units: blocks come after the tensors outside them, and none is missing if the job is finished."""
        totals, numbers, outside = set(), set(), 0
        places: dict[int, tuple[int, int]] = {}
        for commit in self.commits.values():
            unit, file = _UNIT.fullmatch(commit.unit), _SHARD.fullmatch(commit.shard.file)
            if unit is None or file is None or (unit[3] is None) == (unit[1] == "experts"):
                self.add(JOURNAL, f"commits {commit.unit} in {commit.shard.file}, which no job of this version of bigq does")
                continue
            number, place = int(file[1]), int(unit[2])
            totals.add(int(file[2]))
            numbers.add(number)
            if unit[1] in ("block", "experts"):
                places[number] = place, -1 if unit[3] is None else int(unit[3])
            elif unit[1] == "rest" and number == place + 1:
                outside += 1
            elif unit[1] == "head" and (place, number) == (0, int(file[2])):
                continue
            else:
                self.add(JOURNAL, f"commits {commit.unit} in {commit.shard.file}, the place of another")
        if len(totals) > 1 or not _in_order(places):
            self.add(JOURNAL, "commits shards of several jobs, or blocks in each other's files")
        elif self.manifest is not None and numbers != set(range(1, max(totals, default=1) + 1)):
            count, all_shards = len(self.commits), max(totals, default=1)
            self.add(JOURNAL, f"commits {count} shards, not all of {all_shards}, although the job is finished")
        elif self.manifest is not None and places and min(places.items()) != (outside + 1, (0, -1)):
            self.add(JOURNAL, "commits no block-0 after the tensors outside the blocks")

    def _check_files(self, manifest: Mapping[str, Any]) -> None:
        """Compare all files except shards with the manifest."""
        packed = any(commit.linears for commit in self.commits.values())
        config_file = self.job.made.config_file if self.job is not None and packed else None
        gguf = [GGUF_NAME] if self.job is not None and self.job.format == "gguf" else []
        for file in [*_ALWAYS, *([] if config_file is None else [config_file]), *gguf, *sorted(self.shards)]:
            if file not in manifest:
                self.add(MANIFEST, f"does not list {file}")
        for file, entry in manifest.items():
            if file not in self.shards:
                self.compare(file, {MANIFEST: entry})

    def _check_model(self, scans: Mapping[str, Scan], trust_remote_code: bool) -> None:
        """The tensors of all shards against index, configs and model, where these are sound so far."""
        left_out = tuple(name for commit in self.commits.values() for name in commit.left_out)
        try:
            if INDEX_NAME in self.listing:
                total = sum(commit.shard.size for commit in self.commits.values())
                self.add_all(index_problems(read_json_object(self.out / INDEX_NAME), scans, total))
            code = any(file.endswith(".py") for file in self.bad)
            if self.job is None or code or self.bad & {INDEX_NAME, "config.json", "quantize_config.json"}:
                return
            # In the order of the shards: experts are committed before their block.
            commits = sorted(self.commits.values(), key=lambda commit: commit.shard.file)
            self.add_all(config_problems(self.out, self.job, commits, scans, trust_remote_code=trust_remote_code))
            if not self.bad & {"config.json", "quantize_config.json"}:
                remote = None if self.away is None else self.away.remote(self.out)
                self.add_all(model_problems(self.out, self.job, left_out, scans, remote, trust_remote_code=trust_remote_code))
        except BigqError as error:
            self.add_error("config.json" if isinstance(error, CheckpointError) else str(self.out), error)

    def _check_listing(self) -> None:
        shards = () if JOURNAL in self.bad else (".safetensors",)
        listed = (file for file in self.manifest or () if not file.endswith((TEMP_SUFFIX, *shards)))
        known = {*_UNLISTED, *self.shards, *listed, *self.saved, *self.free}
        if self.manifest is None or self.busy:
            known |= {_CHECKPOINTS, *(f"{STATE_FOLDER}/{name}" for name in RECORDS)}
        self.check_listing(known, complete=self.manifest is not None)


def _in_order(places: Mapping[int, tuple[int, int]]) -> bool:
    """Whether blocks and groups of experts are in the shards of a job. places: shard number → block, and group (−1 for the block itself).

    From one shard to the next comes the next group of the block or the next block. Some may be missing.
    """
    shards = sorted(places.items())
    for (number, (block, group)), (later, (next_block, next_group)) in itertools.pairwise(shards):
        gap = later - number
        if next_block == block and next_group - group != gap:
            return False
        # Between two blocks are the other groups of the first, and whole blocks, each with one shard at least.
        if next_block != block and not (next_block > block and gap >= next_block - block + next_group + 1):
            return False
    if any(group >= 0 for _, group in places.values()):
        return True
    return len({number - block for number, (block, _) in shards}) <= 1
