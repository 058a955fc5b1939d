"""Whether a job's output folder is sound: nothing changed, nothing missing, nothing extra, and values that a reader can use.

The record of a job is held against its files, the files against each other, and all of it against the model that config.json
describes. Every byte is read once. What is found is told and nothing is repaired; running the job's command again does that.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bigq.config import JobConfig
from bigq.errors import BigqError, CheckpointError, ResourceError, UsageError
from bigq.inspect.evaluations import EVALUATIONS_NAME
from bigq.inspect.scan import Scan, scan_shard
from bigq.inspect.verify_model import config_problems, index_problems, model_problems
from bigq.io.atomic import TEMP_SUFFIX
from bigq.io.checksum import load_record, read_record_bytes, unseal
from bigq.io.folders import STATE_FOLDER
from bigq.io.formats import FORMATS, PackedLinear
from bigq.io.index import INDEX_NAME, read_json_object
from bigq.io.shard_record import file_sha256
from bigq.job.finish import CARD_NAME, RECORDS
from bigq.job.journal import BATCHES_NAME, CHECKPOINTS_NAME, JOB_NAME, JOURNAL_NAME, RUNS_NAME, Commit, read_job
from bigq.job.manifest import GGUF_NAME, MANIFEST_NAME
from bigq.job.owner import LOCK_NAME, OWNER_NAME, Holder

# Records, as they are called in what is said.
_JOB, _JOURNAL, _RUNS, _BATCHES, _MANIFEST, _OWNER, _CHECKPOINTS = (
    f"{STATE_FOLDER}/{name}" for name in (JOB_NAME, JOURNAL_NAME, RUNS_NAME, BATCHES_NAME, MANIFEST_NAME, OWNER_NAME, CHECKPOINTS_NAME)
)
_EVALUATIONS = f"{STATE_FOLDER}/{EVALUATIONS_NAME}"
#: Of these the manifest does not speak: they may change when a job is finished.
_LIVING = (_MANIFEST, _RUNS, _EVALUATIONS, _OWNER, f"{STATE_FOLDER}/{LOCK_NAME}")
#: What a finished folder holds besides shards, whatever the model.
_ALWAYS = (INDEX_NAME, "config.json", _JOB, _JOURNAL, f"{STATE_FOLDER}/linears.jsonl")

_SHARD = re.compile(r"model-(\d{5,})-of-(\d{5,})\.safetensors")
_UNIT = re.compile(r"(rest|block|head)-(0|[1-9]\d*)")


def verify(out: Path, *, trust_remote_code: bool = False) -> list[str]:
    """Problems of a job's output folder, a line each that names the file or tensor; none where it is finished and sound.

    trust_remote_code: run model code that lies in ``out``, as the job did. Raises UsageError where ``out`` is not the folder of a job,
    ResourceError where it cannot be listed.
    """
    out = Path(os.path.expanduser(out))
    try:
        if not (out / STATE_FOLDER).is_dir():
            raise UsageError(f"{out}: holds no job of bigq; name the output folder of bigq quantize")
        found = _Verification(out)
        found.run(trust_remote_code)
    except OSError as error:
        raise ResourceError(f"{out}: cannot be looked at: {error.strerror}") from error
    return found.problems


class _Verification:
    """One look at a folder. Files are called by their path in it; ``_bad`` are those that something was said of."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.problems: list[str] = []
        self._bad: set[str] = set()
        self._there = _listed(out)
        self._busy = self._held()
        self._job = self._asked()
        self._commits = self._journal()
        self._shards = {commit.shard.file for commit in self._commits.values()}
        self._free: set[str] = set()
        self._manifest = self._promised()
        self._saved = self._checkpoints()

    def run(self, trust_remote_code: bool) -> None:
        """Look at everything that was not looked at yet."""
        self._records()
        self._units()
        scans = {commit.shard.file: scan for commit in self._commits.values() if (scan := self._shard(commit)) is not None}
        for file, entry in self._saved.items():
            self._compare(file, {_CHECKPOINTS: entry})
        if self._manifest is not None:
            self._files(self._manifest)
            if len(scans) == len(self._commits) and _JOURNAL not in self._bad:
                self._model(scans, trust_remote_code)
        self._extra()

    def _say(self, file: str, text: str) -> None:
        self._bad.add(file)
        self.problems.append(f"{file}: {text}")

    def _say_all(self, found: Iterable[tuple[str, str]]) -> None:
        for file, text in found:
            self._say(file, text)

    def _tell(self, file: str, error: BigqError) -> None:
        """An error while a file was looked at; it may name another one."""
        text = str(error).replace(f"{self.out}/", "").removeprefix(f"{self.out}: ")
        named = next((name for name in self._there if text.startswith(f"{name}: ")), file)
        self._say(named, text.removeprefix(f"{named}: "))

    # The job's record.

    def _held(self) -> bool:
        """Whether somebody may be writing to the folder now."""
        try:
            holder = Holder.read(self.out / STATE_FOLDER)
        except BigqError as error:
            self._tell(_OWNER, error)
            return True
        if holder is None and _OWNER in self._there:
            self._say(_OWNER, "cannot be read; the job's command writes it anew")
        return holder is not None and holder.alive is not False

    def _asked(self) -> JobConfig | None:
        try:
            job = read_job(self.out)
            if job is None:
                self._say(_JOB, "is missing, so what the job was asked for is unknown")
                return None
            return JobConfig.from_frozen(job.get("settings"), _JOB)
        except BigqError as error:
            self._tell(_JOB, error)
            return None

    def _lines(self, file: str) -> list[bytes]:
        """The lines of a record, newlines and all; none where it cannot be read."""
        try:
            return (read_record_bytes(self.out / file) or b"").splitlines(keepends=True)
        except BigqError as error:
            self._tell(file, error)
            return []

    def _journal(self) -> dict[str, Commit]:
        """What is committed, by unit."""
        commits: dict[str, Commit] = {}
        for number, line in enumerate(self._lines(_JOURNAL), 1):
            commit = Commit.from_line(line)
            if commit is None:
                self._say(_JOURNAL, f"line {number} is damaged or was changed by hand")
            elif commit.unit in commits:
                self._say(_JOURNAL, f"line {number} commits {commit.unit} once more")
            else:
                commits[commit.unit] = commit
        return commits

    def _sealed(self, file: str) -> dict[str, Any] | None:
        try:
            return load_record(self.out / file, "the job's command writes it anew")
        except BigqError as error:
            self._tell(file, error)
            return None

    def _promised(self) -> dict[str, Any] | None:
        """Size and hash of the folder's files by name; None where it is not finished, or nobody knows."""
        manifest = self._sealed(_MANIFEST)
        if manifest is not None:
            files = manifest.get("files")
            self._free = {CARD_NAME} if manifest.get("free") == [CARD_NAME] else set()
            if isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values()):
                return files
            self._say(_MANIFEST, "is no list of files")
        elif _MANIFEST not in self._there and "config.json" in self._there:
            self._say(_MANIFEST, "is missing, so what the folder should hold is unknown")
        elif _MANIFEST not in self._there:
            what = "a job is at it" if self._busy else "run the same command again to go on"
            self.problems.append(f"{self.out}: the job is not finished, {len(self._commits)} shards are committed; {what}")
        return None

    def _checkpoints(self) -> dict[str, dict[str, Any]]:
        """The activations that an unfinished job keeps, by file."""
        record = self._sealed(_CHECKPOINTS) if self._manifest is None else None
        try:
            return {} if record is None else {f"{STATE_FOLDER}/{entry['file']}": dict(entry) for entry in record["kept"]}
        except (KeyError, TypeError, ValueError):
            self._say(_CHECKPOINTS, "is no list of saved activations")
            return {}

    def _records(self) -> None:
        """Records that carry checksums of their own."""
        runs = self._lines(_RUNS)
        for file, lines in ((_RUNS, runs), (_EVALUATIONS, self._lines(_EVALUATIONS))):
            for number, line in enumerate(lines, 1):
                if unseal(line, line=True) is None:
                    self._say(file, f"line {number} is damaged or was changed by hand")
        if self._manifest is not None and not runs and _RUNS not in self._bad:
            self._say(_RUNS, "is missing or empty; nothing else tells how the job ran")
        self._sealed(_BATCHES)

    def _units(self) -> None:
        """The journal's units: blocks behind what lies outside them, none missing where the job is finished."""
        totals, numbers, shifts, outside = set(), set(), set(), 0
        for commit in self._commits.values():
            unit, file = _UNIT.fullmatch(commit.unit), _SHARD.fullmatch(commit.shard.file)
            if unit is None or file is None:
                self._say(_JOURNAL, f"commits {commit.unit} in {commit.shard.file}, which no job of this version of bigq does")
                continue
            number, place = int(file[1]), int(unit[2])
            totals.add(int(file[2]))
            numbers.add(number)
            if unit[1] == "block":
                shifts.add(number - 1 - place)
            elif unit[1] == "rest" and number == place + 1:
                outside += 1
            elif unit[1] == "head" and (place, number) == (0, int(file[2])):
                continue
            else:
                self._say(_JOURNAL, f"commits {commit.unit} in {commit.shard.file}, the place of another")
        if len(totals) > 1 or len(shifts) > 1:
            self._say(_JOURNAL, "commits shards of several jobs, or blocks in each other's files")
        elif self._manifest is not None and numbers != set(range(1, max(totals, default=1) + 1)):
            self._say(_JOURNAL, f"commits {len(self._commits)} shards, not all of {max(totals, default=1)}, although the job is finished")
        elif self._manifest is not None and shifts - {outside}:
            self._say(_JOURNAL, "commits no block-0 behind what lies outside the blocks")

    # Files.

    def _compare(self, file: str, records: Mapping[str, Mapping[str, Any]], scan: Scan | None = None) -> None:
        """Hold a file against the size and hash that records have of it. scan: has its hash."""
        size = self._there.get(file)
        if size is None:
            what = "is no file" if file in self._there else "is missing"
            self._say(file, f"{what}, although {' and '.join(records)} tells its size")
            return
        for record, entry in records.items():
            if size != entry.get("size"):
                self._say(file, f"has {size} bytes, but {entry.get('size')} by {record}")
                return
        if file in self._bad:
            return
        try:
            sha256 = file_sha256(self.out / file) if scan is None else scan.sha256
        except BigqError as error:
            self._tell(file, error)
            return
        differing = [record for record, entry in records.items() if entry.get("sha256") != sha256]
        if differing:
            self._say(file, f"was changed after it had been written: its hash is not the one in {' and '.join(differing)}")

    def _shard(self, commit: Commit) -> Scan | None:
        """Read a committed shard; hold it against the journal and the manifest. None where it cannot be read."""
        file = commit.shard.file
        records: dict[str, Mapping[str, Any]] = {_JOURNAL: {"size": commit.shard.size, "sha256": commit.shard.sha256}}
        if self._manifest is not None and file in self._manifest:
            records[_MANIFEST] = self._manifest[file]
        scan = None
        if self._there.get(file) is not None:
            try:
                # Where it is unknown what was asked for: as v2, in which every zero point can be stored.
                scan = scan_shard(self.out / file, FORMATS["gptq_v2"] if self._job is None else self._job.made)
            except BigqError as error:
                self._tell(file, error)
        self._compare(file, records, scan)
        if scan is None:
            return None
        self._say_all((file, problem) for problem in scan.problems)
        if tuple(scan.tensors) != commit.shard.tensors:
            self._say(file, f"does not hold the tensors that {_JOURNAL} says ({_difference(scan, commit)})")
        if Counter(scan.linears.values()) != Counter(map(_recorded, commit.linears)):
            self._say(file, f"does not hold the packed Linears that {_JOURNAL} says")
        return scan

    def _files(self, manifest: Mapping[str, Any]) -> None:
        """Everything but shards, against the manifest."""
        packed = any(commit.linears for commit in self._commits.values())
        beside = self._job.made.config_file if self._job is not None and packed else None
        gguf = [GGUF_NAME] if self._job is not None and self._job.format == "gguf" else []
        for file in [*_ALWAYS, *([] if beside is None else [beside]), *gguf, *sorted(self._shards)]:
            if file not in manifest:
                self._say(_MANIFEST, f"says nothing of {file}")
        for file, entry in manifest.items():
            if file not in self._shards:
                self._compare(file, {_MANIFEST: entry})

    def _model(self, scans: Mapping[str, Scan], trust_remote_code: bool) -> None:
        """The tensors of all shards against index, configs and model; as far as these are worth looking at."""
        left_out = tuple(name for commit in self._commits.values() for name in commit.left_out)
        try:
            if INDEX_NAME in self._there:
                total = sum(commit.shard.size for commit in self._commits.values())
                self._say_all(index_problems(read_json_object(self.out / INDEX_NAME), scans, total))
            code = any(file.endswith(".py") for file in self._bad)
            if self._job is None or code or self._bad & {INDEX_NAME, "config.json", "quantize_config.json"}:
                return
            commits = list(self._commits.values())
            self._say_all(config_problems(self.out, self._job, commits, trust_remote_code=trust_remote_code))
            if not self._bad & {"config.json", "quantize_config.json"}:
                self._say_all(model_problems(self.out, self._job, left_out, scans, trust_remote_code=trust_remote_code))
        except BigqError as error:
            self._tell("config.json" if isinstance(error, CheckpointError) else str(self.out), error)

    def _extra(self) -> None:
        """What nothing accounts for. Other names that begin with a dot are others' business."""
        shards = () if _JOURNAL in self._bad else (".safetensors",)
        promised = (file for file in self._manifest or () if not file.endswith((TEMP_SUFFIX, *shards)))
        known = {*_LIVING, *self._shards, *promised, *self._saved, *self._free}
        if self._manifest is None or self._busy:
            known |= {_CHECKPOINTS, *(f"{STATE_FOLDER}/{name}" for name in RECORDS)}
        for file in sorted(self._there.keys() - known):
            path = Path(file)
            passing = file.endswith(TEMP_SUFFIX) or path.match(f"{STATE_FOLDER}/activations-*.safetensors")
            if path.name.startswith(".") or (passing and self._busy):
                continue
            # Side files of a job that is not finished, or whose manifest is lost, cannot be told from what is not the job's.
            if passing or path.suffix == ".safetensors" or path.parent.name or self._manifest is not None:
                self._say(file, "nothing accounts for it: left over from a job that was killed, or put there by somebody; remove it")


def _listed(out: Path) -> dict[str, int | None]:
    """Everything in the folder and in its state folder, by path in it: the size of a file, None for what is none."""
    return {
        path.relative_to(out).as_posix(): path.stat().st_size if path.is_file() else None
        for folder in (out, out / STATE_FOLDER)
        for path in sorted(folder.iterdir())
    }


def _difference(scan: Scan, commit: Commit) -> str:
    here, said = set(scan.tensors), set(commit.shard.tensors)
    if here == said:
        return "their order differs"
    name = min(here ^ said)
    return f"for one, {name} is {'there' if name in here else 'not there'}"


def _recorded(record: Mapping[str, Any]) -> PackedLinear | None:
    """A packed Linear as its record in the journal says."""
    try:
        (m, n), size = record["shape"], record["group_size"]
        return PackedLinear(bits=record["bits"], outputs=m, inputs=n, groups=1 if size == -1 else n // size)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
