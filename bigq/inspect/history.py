"""The history of a job or a conversion, from the records in its output folder alone, for ``bigq report``.

Nothing is repaired, no shard is read, and nothing is trusted: records have checksums, but anybody can write them. Every value here
has the right type and is within limits, and every text is one printable line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.config import JobConfig
from bigq.errors import BigqError
from bigq.inspect.bounds import MAX_ITEMS, count, durations, items, mapping, number, text
from bigq.inspect.evaluations import EvaluationResult, parse_result, read_evaluations
from bigq.inspect.linear_results import BLOCK_UNIT, BY_RULE, MAX_BLOCKS, MAX_LINEARS, LeftOut, LinearResult, linear_results
from bigq.inspect.status import status
from bigq.io.checksum import unseal, valid_lines
from bigq.io.folders import STATE_FOLDER
from bigq.io.formats import FORMATS
from bigq.job.conversion_record import ConversionRecord, read_conversion
from bigq.job.journal import RUNS_NAME, Commit, read_commits, read_job
from bigq.job.manifest import GGUF_NAME, has_gguf
from bigq.scheme import scheme_for
from bigq.vocabulary import FORMAT_NAMES, FormatName

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/[0-9a-f]{7,64}/?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the job. Sizes in bytes, times in seconds; None for what is unknown.

    outcome: "finished", "stopped", "failed", "running", or "not recorded" for a run that was killed. message: its final message.
    resumed: blocks that earlier runs had committed.
    """

    at: str
    outcome: str
    message: str | None
    seconds: float | None
    by_phase: Mapping[str, float]
    waiting: Mapping[str, float]
    resumed: int | None
    command: tuple[str, ...]
    model: str | None
    folder: str | None
    machine: str
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    planned_host: int | None
    planned_device: int | None
    host_peak: int | None
    device_peak: int | None
    bytes_read: int | None
    bytes_written: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionFacts:
    """How a folder was converted. at: when; bigq: the version that did it; source: the folder that was read.

    job_format: the format of the job that quantized the model; None if that was no job of bigq.
    """

    at: str
    bigq: str
    format_before: str
    format: str
    source: str
    source_bytes: int
    job_format: FormatName | None


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The known facts about a job or a converted folder.

    state: see ``bigq.inspect.status``. config: None where job.json is not of this version, or another tool quantized the model.
    blocks: of the model, None where unknown. names: the Linears in a block, in order. linears, left_out: those of all blocks, and the
    output head. outdated: evaluations of weights that have changed since. damaged: what could not be read.
    source_bytes, parameters: of the source's tensors. output_bytes: of the committed shards and the GGUF file; gguf_bytes: of that
    file, None where there is none. conversion: of a converted folder; then config, linears and the only run are those of the job that
    quantized the model, as far as its source knew them.
    """

    out: str
    state: str
    config: JobConfig | None
    blocks: int | None
    blocks_done: int
    names: tuple[str, ...]
    linears: tuple[LinearResult, ...]
    left_out: tuple[LeftOut, ...]
    runs: tuple[Run, ...]
    evaluations: tuple[EvaluationResult, ...]
    outdated: int
    source_bytes: int | None
    parameters: int | None
    output_bytes: int
    gguf_bytes: int | None
    damaged: tuple[str, ...]
    conversion: ConversionFacts | None = None

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"

    @property
    def name(self) -> str:
        """The model's name: the last part of the hub id or path that it was quantized from; else of the folder that holds it."""
        run = self.runs[-1] if self.runs else None
        named = "" if run is None else _model_name(run.model or run.folder or "", run.folder)
        place = self.conversion.source if self.conversion is not None else self.out
        return named or place.rstrip("/").rpartition("/")[2] or place

    def largest_errors(self, count: int) -> list[LinearResult]:
        """The Linears with the largest errors, the largest first."""
        return sorted((linear for linear in self.linears if linear.error is not None), key=lambda linear: -(linear.error or 0.0))[:count]

    @property
    def head(self) -> LinearResult | None:
        """The output head, if it is quantized."""
        return next((linear for linear in self.linears if linear.block is None), None)

    @property
    def linear_bits(self) -> float | None:
        """Bits per weight of the quantized Linears, including scales, zero points and all other stored tensors; None if unknown."""
        stored = [linear.stored_bits for linear in self.linears]
        weights = sum(linear.weights for linear in self.linears)
        return sum(bits or 0 for bits in stored) / weights if weights and None not in stored else None

    @property
    def all_bits(self) -> float | None:
        """Bits per parameter of the shards; None unless the job is finished."""
        return 8 * (self.output_bytes - (self.gguf_bytes or 0)) / self.parameters if self.is_finished and self.parameters else None


def _model_name(model: str, folder: str | None) -> str:
    """A model's name without its owner, revision or path; of a snapshot in the hub's cache, its repository's name."""
    snapshot = _SNAPSHOT.search(folder or model)
    if snapshot is not None:
        return snapshot[1].rpartition("--")[2]
    named = model.rstrip("/").rpartition("/")[2]
    named = named.partition("@")[0] if _HUB_ID.fullmatch(model) else named
    return (folder or "").rstrip("/").rpartition("/")[2] if named in ("", ".", "..") else named


def read_history(out: Path) -> History:
    """Read all records of a folder that ``quantize`` or ``convert`` wrote.

    Raises UsageError if ``out`` is no such folder, ResourceError if it cannot be read.
    """
    out = out.expanduser()
    found = status(out)
    damaged = list(found.damaged)
    conversion = _conversion(out)
    if conversion is None:
        config, commits, lines = _config(out, damaged), _commits(out), _run_lines(out)
    else:
        config, commits = _converted_config(conversion, damaged), _commits(out)
        lines = [] if conversion.run is None else [dict(conversion.run)]
    last = lines[-1] if lines else {}
    path, kinds = _structure(last.get("blocks"))
    source_bytes, parameters = count(last.get("source_bytes")), count(last.get("parameters"))
    float_bits = 32 if source_bytes and parameters and source_bytes > 3 * parameters else 16
    format = FORMATS.get(conversion.format) if conversion is not None else None if config is None else config.made
    linears, left_out = linear_results(commits, config, format, float_bits)
    names = list(dict.fromkeys(name for kind in kinds for name in kind))
    known = {*((each.block, each.name) for each in linears), *((each.block, each.name) for each in left_out)}
    names += sorted({name for block, name in known if block is not None} - set(names))
    if config is not None:
        done = {int(match[1]) for commit in commits if (match := BLOCK_UNIT.fullmatch(commit.unit))}
        left_out += [
            LeftOut(block=i, name=name, reason=BY_RULE, wanted=True)
            for i, kind in enumerate(kinds)
            for name in kind
            if i in done and (i, name) not in known and scheme_for(f"{path}.{i}.{name}", config.base_scheme, config.rules) is None
        ]
    order = {name: place for place, name in enumerate(names)}
    runs = [_run(line) for line in lines[-MAX_ITEMS:]]
    if runs and runs[-1].outcome == "not recorded" and found.state in ("running", "unknown"):
        runs[-1] = _run(lines[-1], "running")
    evaluations, outdated = read_evaluations(out)
    sources = {name for run in runs for name in (run.model, run.folder) if name}
    gguf_bytes = _gguf_bytes(out)
    return History(
        out=text(str(out.absolute())),
        state=found.state,
        config=config,
        blocks=len(kinds) or found.blocks,
        blocks_done=found.blocks_done,
        names=tuple(names[:MAX_LINEARS]),
        linears=tuple(linears),
        left_out=tuple(sorted(left_out, key=lambda each: (_place(each.block), order.get(each.name, 0)))),
        runs=tuple(runs),
        evaluations=tuple(each for value in evaluations[-MAX_ITEMS:] if (each := parse_result(value, sources)) is not None),
        outdated=outdated,
        source_bytes=source_bytes,
        parameters=parameters,
        output_bytes=found.bytes_written + (gguf_bytes or 0),
        gguf_bytes=gguf_bytes,
        damaged=tuple(text(each) for each in damaged[:MAX_ITEMS]),
        conversion=None if conversion is None else _conversion_facts(conversion),
    )


def _config(out: Path, damaged: list[str]) -> JobConfig | None:
    try:
        job = read_job(out)
        return None if job is None else JobConfig.from_frozen(job.get("settings"), f"{STATE_FOLDER}/job.json")
    except BigqError as error:
        damaged += [said for said in [str(error).replace(f"{out}/", "")] if said not in damaged]
        return None


def _conversion(out: Path) -> ConversionRecord | None:
    try:
        return read_conversion(out)
    except BigqError:  # ``status`` has reported it
        return None


def _converted_config(conversion: ConversionRecord, damaged: list[str]) -> JobConfig | None:
    """The settings of the job that quantized a converted model, with the format that it has now."""
    format = next((name for name in FORMAT_NAMES if name == conversion.format and name in FORMATS), None)
    if conversion.job is None or format is None:
        return None
    try:
        config = JobConfig.from_frozen(conversion.job.get("settings"), f"{STATE_FOLDER}/conversion.json: its job")
        return dataclasses.replace(config, format=format)
    except BigqError as error:
        damaged.append(str(error))
        return None


def _conversion_facts(record: ConversionRecord) -> ConversionFacts:
    return ConversionFacts(
        at=text(record.at),
        bigq=text(record.bigq),
        format_before=text(record.format_before),
        format=text(record.format),
        source=text(record.source),
        source_bytes=count(record.source_bytes) or 0,
        job_format=_job_format(record),
    )


def _job_format(record: ConversionRecord) -> FormatName | None:
    said = mapping(mapping(record.job).get("settings")).get("format")
    return next((name for name in FORMAT_NAMES if name == said), None)


def _commits(out: Path) -> list[Commit]:
    try:
        return read_commits(out)[0][: MAX_BLOCKS + MAX_ITEMS]
    except BigqError:  # ``status`` has reported it
        return []


def _run_lines(out: Path) -> list[dict[str, Any]]:
    try:
        return [value for line in valid_lines(out / STATE_FOLDER / RUNS_NAME) if (value := unseal(line, line=True)) is not None]
    except BigqError:  # ``status`` has reported it
        return []


def _structure(blocks: Any) -> tuple[str, list[tuple[str, ...]]]:
    """The path of the blocks, and the names of the Linears in each; empty if no run recorded them."""
    try:
        kinds = [tuple(text(str(name)) for name, *_ in kind[:MAX_LINEARS]) for kind in blocks["kinds"][:MAX_BLOCKS]]
        return text(str(blocks["path"])), [kinds[index] for index in blocks["of"][:MAX_BLOCKS]]
    except (KeyError, TypeError, ValueError, IndexError):
        return "", []


def _gguf_bytes(out: Path) -> int | None:
    """Size of the GGUF file of a finished folder; None where there is none."""
    with contextlib.suppress(BigqError, OSError):  # a damaged manifest, or a file that was removed meanwhile
        return (out / GGUF_NAME).stat().st_size if has_gguf(out, by_size=True) else None
    return None


def _place(block: int | None) -> int:
    return MAX_BLOCKS if block is None else block


def _run(line: Mapping[str, Any], without_end: str = "not recorded") -> Run:
    ended, planned, machine = (mapping(line.get(name)) for name in ("ended", "planned", "machine"))
    outcome = ended.get("outcome")
    device = mapping(line.get("choice")).get("on_gpu")
    return Run(
        at=text(line.get("at") or "at an unknown time"),
        outcome=outcome if outcome in ("finished", "stopped", "failed") else without_end,
        message=text(ended["said"]) if ended.get("said") else None,
        seconds=number(ended.get("seconds")),
        by_phase=durations(ended.get("seconds_by_phase")),
        waiting=durations(ended.get("waiting")),
        resumed=count(line.get("resumed_blocks")),
        command=tuple(text(word) for word in items(line.get("command"))),
        model=text(line["model"]) if line.get("model") else None,
        folder=text(line["folder"]) if line.get("folder") else None,
        machine=text(machine.get("name") or machine.get("device") or "unknown"),
        versions={text(name): text(version) for name, version in list(mapping(line.get("versions")).items())[:20] if version is not None},
        notes=tuple(text(note) for note in items(line.get("notes"))),
        planned_host=count(planned.get("host")),
        planned_device=count(planned.get("device")) if device else None,
        host_peak=count(ended.get("host_peak_bytes")),
        device_peak=count(ended.get("device_peak_bytes")) if device else None,
        bytes_read=count(ended.get("bytes_read")),
        bytes_written=count(ended.get("bytes_written")),
    )


def phases_of(runs: Sequence[Run]) -> list[str]:
    """Names of all phases, the longest first."""
    total: dict[str, float] = {}
    for run in runs:
        for name, seconds in run.by_phase.items():
            total[name] = total.get(name, 0.0) + seconds
    return sorted(total, key=lambda name: -total[name])[:50]
