"""Checks a converted folder: its files against the record of its conversion, its tensors against config.json and the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bigq.errors import BigqError, CheckpointError
from bigq.inspect.folder_check import EVALUATIONS, JOURNAL, LOCK, MANIFEST, OWNER, FolderCheck, recorded_geometry
from bigq.inspect.scan import Scan
from bigq.inspect.verify_model import Problems, index_problems
from bigq.io.folders import STATE_FOLDER
from bigq.io.formats import FORMATS, PackedLinear
from bigq.io.index import INDEX_NAME, read_json_object
from bigq.job.conversion_record import CONVERT_AGAIN, ConversionRecord, read_conversion
from bigq.job.journal import CONVERSION_NAME, Commit
from bigq.model import skeleton
from bigq.model.pager import Pager

CONVERSION = f"{STATE_FOLDER}/{CONVERSION_NAME}"
#: The manifest does not list these: they may change.
_UNLISTED = (MANIFEST, EVALUATIONS, OWNER, LOCK)
_ALWAYS = (INDEX_NAME, "config.json", CONVERSION, JOURNAL)


class ConversionCheck(FolderCheck):
    """The problems of a converted folder."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, CONVERT_AGAIN)
        self.record = self._read_record()
        self.commits = self.read_journal()
        self.shards = {commit.shard.file for commit in self.commits.values()}
        self.manifest = self.read_manifest()
        if MANIFEST not in self.listing:
            self.add(MANIFEST, f"is missing, so it is unknown what the folder should hold; {CONVERT_AGAIN}")

    def run(self, trust_remote_code: bool) -> None:
        """Run the checks that go beyond reading the records."""
        self.check_lines(EVALUATIONS)
        # Where the format is unknown: as v2, which can store every zero point.
        format = FORMATS["gptq_v2" if self.record is None else self.record.format]
        commits = self.commits.values()
        scans = {commit.shard.file: scan for commit in commits if (scan := self.scan(commit, format, self.manifest)) is not None}
        if self.manifest is not None:
            self._check_files(self.manifest)
            if len(scans) == len(self.commits) and JOURNAL not in self.bad:
                self._check_model(scans, trust_remote_code)
        listed = () if self.manifest is None else tuple(self.manifest)
        self.check_listing({*_UNLISTED, *self.shards, *listed, *self.free, CONVERSION, JOURNAL}, complete=self.manifest is not None)

    def _read_record(self) -> ConversionRecord | None:
        try:
            record = read_conversion(self.out)
            if record is not None and record.format not in FORMATS:
                raise CheckpointError(f"{CONVERSION}: names a format that this version of bigq does not write; {CONVERT_AGAIN}")
            return record
        except BigqError as error:
            self.add_error(CONVERSION, error)
            return None

    def _check_files(self, manifest: Mapping[str, Any]) -> None:
        """Compare all files except shards with the manifest."""
        config_file = None if self.record is None else FORMATS[self.record.format].config_file
        for file in [*_ALWAYS, *([] if config_file is None else [config_file]), *sorted(self.shards)]:
            if file not in manifest:
                self.add(MANIFEST, f"does not list {file}")
        for file in sorted(file for file in manifest if file.endswith(".safetensors") and file not in self.shards):
            self.add(JOURNAL, f"does not commit {file}, which {MANIFEST} lists")
        for file, entry in manifest.items():
            if file not in self.shards:
                self.compare(file, {MANIFEST: entry})

    def _check_model(self, scans: Mapping[str, Scan], trust_remote_code: bool) -> None:
        """The tensors of all shards against index, config and model, where these are sound so far."""
        try:
            if INDEX_NAME in self.listing:
                total = sum(commit.shard.size for commit in self.commits.values())
                self.add_all(index_problems(read_json_object(self.out / INDEX_NAME), scans, total))
            code = any(file.endswith(".py") for file in self.bad)
            if self.record is None or code or self.bad & {INDEX_NAME, "config.json"}:
                return
            commits = list(self.commits.values())
            self.add_all(_model_problems(self.out, self.record, commits, scans, trust_remote_code=trust_remote_code))
        except BigqError as error:
            self.add_error("config.json" if isinstance(error, CheckpointError) else str(self.out), error)


def _model_problems(
    out: Path, record: ConversionRecord, commits: list[Commit], scans: Mapping[str, Scan], *, trust_remote_code: bool
) -> Problems:
    """Whether the model has all its parameters, and its packed Linears are those of the record, with the schemes that config.json says.

    Raises DataError for what does not fit config.json.
    """
    skeleton.silence_transformers()
    with torch.no_grad():
        pager = Pager(out, device=torch.device("cpu"), dtype="float32", trust_remote_code=trust_remote_code)
    if pager.schemes is None or pager.schemes.format.name != record.format:
        yield "config.json", f"does not say the format {record.format}, which {CONVERSION} says"
        return
    recorded = {str(linear.get("name")): recorded_geometry(linear) for commit in commits for linear in commit.linears}
    linears = {prefix: linear for scan in scans.values() for prefix, linear in scan.linears.items()}
    zeros = {prefix: seen for scan in scans.values() for prefix, seen in scan.zeros.items()}
    mark = pager.schemes.format.mark
    packed = pager.packed_sources()
    for module, source in packed.items():
        prefix, scheme, middle = source.prefix, source.scheme, 2 ** (source.scheme.bits - 1)
        m, n = skeleton.linear_weight(pager.model.get_submodule(module)).shape if f"{module}.weight" in pager.packed else source.shape
        expected = PackedLinear(bits=scheme.bits, outputs=m, inputs=n, groups=n // scheme.group_width(n))
        file = pager.checkpoint[f"{prefix}.{mark}"].file.name
        if recorded.get(module) != expected:
            yield "config.json", f"does not say of {module} what {JOURNAL} says"
        if prefix in linears and linears[prefix] != expected:
            yield file, f"tensor {prefix}.{mark} is packed as {linears[prefix]}; the model and config.json make it {expected}"
        elif scheme.symmetric and zeros.get(prefix, (middle, middle)) != (middle, middle):
            tensor = f"{prefix}.{pager.schemes.format.zeros}"
            yield file, f"tensor {tensor} holds zero points other than {middle}, although config.json says that they are symmetric"
    for name in sorted(recorded.keys() - packed.keys()):
        yield JOURNAL, f"says that {name} is packed, but it is not"
