"""What a job did, from the record in its output folder alone: for ``bigq report``.

Nothing is repaired, no shard is read, and nothing is believed: records carry checksums, but anybody can make one. What comes out of
here is of the right type, within bounds, and its texts are one printable line each.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigq.config import JobConfig
from bigq.errors import BigqError
from bigq.inspect.evaluations import Judged, judged, read_evaluations
from bigq.inspect.status import status
from bigq.inspect.untrusted import MAX_ITEMS, count, durations, items, mapping, number, text
from bigq.io.checksum import unseal, valid_lines
from bigq.io.folders import STATE_FOLDER
from bigq.io.formats import PackedLinear
from bigq.job.journal import RUNS_NAME, Commit, read_commits, read_job
from bigq.job.manifest import GGUF_NAME, has_gguf
from bigq.methods import method_of
from bigq.scheme import QuantScheme, scheme_for

#: Blocks of a model, and Linears in one.
MAX_BLOCKS, MAX_LINEARS = 2000, 400

BY_RULE = "left as it is by --skip"
UNFIT = "too small for the format, or calibration never reaches it"

_BLOCK, _HEAD = re.compile(r"block-(0|[1-9]\d{0,5})"), "head-0"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearResult:
    """A Linear that was quantized: [outputs, inputs], its relative error, and the damping that was used.

    block: None of the output head. symmetric, asked (the damping that its scheme asks for), stored_bits (of all that the format stores
    of it): None where that is unknown or there is none.
    """

    block: int | None
    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool | None
    error: float
    damping: float
    asked: float | None
    stored_bits: int | None

    @property
    def raised(self) -> bool:
        """Whether it took more damping than asked for."""
        return self.asked is not None and self.damping > self.asked * (1 + 1e-6)

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A Linear that stays as it is. block: None of the output head. wanted: whether that is what was asked for."""

    block: int | None
    name: str
    reason: str
    wanted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the job. Sizes in bytes, times in seconds; None for what is not known.

    outcome: "finished", "stopped", "failed", "running", or "no word" for one that was killed. resumed: blocks that were there already.
    """

    at: str
    outcome: str
    said: str | None
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
class History:
    """All that is known of a job.

    state: see ``bigq.inspect.status``. config: None where job.json is not this version's. blocks: of the model, None where unknown.
    names: the Linears in a block, in order; linears, left_out: those of all blocks, and the output head. outdated: evaluations of
    weights that are not there any more. damaged: what could not be read. source_bytes, parameters: of the source's tensors.
    output_bytes: of the committed shards and the GGUF file; gguf_bytes: of that, None where there is none.
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
    evaluations: tuple[Judged, ...]
    outdated: int
    source_bytes: int | None
    parameters: int | None
    output_bytes: int
    gguf_bytes: int | None
    damaged: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    def worst(self, count: int) -> list[LinearResult]:
        """The Linears with the largest errors, the largest first."""
        return sorted(self.linears, key=lambda linear: -linear.error)[:count]

    @property
    def head(self) -> LinearResult | None:
        """The output head, if it is quantized."""
        return next((linear for linear in self.linears if linear.block is None), None)

    @property
    def linear_bits(self) -> float | None:
        """Bits per weight of the quantized Linears, with all that the format stores of them; None where that is unknown."""
        stored = [linear.stored_bits for linear in self.linears]
        weights = sum(linear.weights for linear in self.linears)
        return sum(bits or 0 for bits in stored) / weights if weights and None not in stored else None

    @property
    def all_bits(self) -> float | None:
        """Bits per parameter of the shards; None unless the job is finished."""
        return 8 * (self.output_bytes - (self.gguf_bytes or 0)) / self.parameters if self.finished and self.parameters else None


def read_history(out: Path) -> History:
    """Gather what is known. Raises UsageError where ``out`` holds no job, ResourceError where it cannot be read."""
    out = out.expanduser()
    found = status(out)
    damaged = list(found.damaged)
    config = _config(out, damaged)
    commits, lines = _commits(out), _sealed(out / STATE_FOLDER / RUNS_NAME)
    last = lines[-1] if lines else {}
    path, kinds = _structure(last.get("blocks"))
    source_bytes, parameters = count(last.get("source_bytes")), count(last.get("parameters"))
    linears, left_out = _solved(commits, config, 32 if source_bytes and parameters and source_bytes > 3 * parameters else 16)
    names = list(dict.fromkeys(name for kind in kinds for name in kind))
    known = {*((each.block, each.name) for each in linears), *((each.block, each.name) for each in left_out)}
    names += sorted({name for block, name in known if block is not None} - set(names))
    order = {name: place for place, name in enumerate(names)}
    if config is not None:
        done = {int(match[1]) for commit in commits if (match := _BLOCK.fullmatch(commit.unit))}
        left_out += [
            LeftOut(block=i, name=name, reason=BY_RULE, wanted=True)
            for i, kind in enumerate(kinds)
            for name in kind
            if i in done and (i, name) not in known and scheme_for(f"{path}.{i}.{name}", config.base_scheme, config.rules) is None
        ]
    runs = [_run(line) for line in lines[-MAX_ITEMS:]]
    if runs and runs[-1].outcome == "no word" and found.state in ("running", "unknown"):
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
        evaluations=tuple(each for value in evaluations[-MAX_ITEMS:] if (each := judged(value, sources)) is not None),
        outdated=outdated,
        source_bytes=source_bytes,
        parameters=parameters,
        output_bytes=found.bytes_written + (gguf_bytes or 0),
        gguf_bytes=gguf_bytes,
        damaged=tuple(text(each) for each in damaged[:MAX_ITEMS]),
    )


def _config(out: Path, damaged: list[str]) -> JobConfig | None:
    try:
        job = read_job(out)
        return None if job is None else JobConfig.from_frozen(job.get("settings"), f"{STATE_FOLDER}/job.json")
    except BigqError as error:
        damaged += [said for said in [str(error).replace(f"{out}/", "")] if said not in damaged]
        return None


def _commits(out: Path) -> list[Commit]:
    try:
        return read_commits(out)[0][: MAX_BLOCKS + MAX_ITEMS]
    except BigqError:  # ``status`` has told
        return []


def _sealed(path: Path) -> list[dict[str, Any]]:
    try:
        return [value for line in valid_lines(path) if (value := unseal(line, line=True)) is not None]
    except BigqError:  # ``status`` has told
        return []


def _structure(blocks: Any) -> tuple[str, list[tuple[str, ...]]]:
    """Where the blocks are, and the names of the Linears in each; nothing of what a run does not tell."""
    try:
        kinds = [tuple(text(str(name)) for name, *_ in kind[:MAX_LINEARS]) for kind in blocks["kinds"][:MAX_BLOCKS]]
        return text(str(blocks["path"])), [kinds[index] for index in blocks["of"][:MAX_BLOCKS]]
    except (KeyError, TypeError, ValueError, IndexError):
        return "", []


def _gguf_bytes(out: Path) -> int | None:
    """Size of the GGUF file that belongs to a finished folder; None where there is none."""
    with contextlib.suppress(BigqError, OSError):  # a manifest that is damaged, or a file that went meanwhile
        return (out / GGUF_NAME).stat().st_size if has_gguf(out, by_size=True) else None
    return None


def _solved(commits: Iterable[Commit], config: JobConfig | None, float_bits: int) -> tuple[list[LinearResult], list[LeftOut]]:
    """The Linears that were quantized, and those that could not be. float_bits: of a number of the source."""
    linears: list[LinearResult] = []
    left_out: list[LeftOut] = []
    for i, commit in _units(commits):
        for record in commit.linears[:MAX_LINEARS]:
            full = str(record.get("name", ""))
            scheme = None if config is None else scheme_for(full, config.base_scheme, config.rules)
            result = _linear(i, text(_in_block(full, i)), record, config, scheme, float_bits)
            linears += [] if result is None else [result]
        for full in commit.left_out[:MAX_LINEARS]:
            reason = text((commit.skipped or {}).get(full, UNFIT))
            left_out.append(LeftOut(block=i, name=text(_in_block(full, i)), reason=reason, wanted=False))
    return linears, left_out


def _units(commits: Iterable[Commit]) -> Iterator[tuple[int | None, Commit]]:
    """Each block once, by number, and behind them the output head."""
    found = {int(match[1]): commit for commit in commits if (match := _BLOCK.fullmatch(commit.unit))}
    head = [commit for commit in commits if commit.unit == _HEAD]
    yield from sorted((i, commit) for i, commit in found.items() if i < MAX_BLOCKS)
    yield from ((None, commit) for commit in head[-1:])


def _place(block: int | None) -> int:
    return MAX_BLOCKS if block is None else block


def _in_block(full: str, block: int | None) -> str:
    """The name of a Linear within its block: what follows the block's number."""
    _, found, name = f".{full}".partition(f".{block}.")
    return name if found else full


def _linear(
    block: int | None, name: str, record: Mapping[str, Any], config: JobConfig | None, scheme: QuantScheme | None, float_bits: int
) -> LinearResult | None:
    """None where a record is none."""
    try:
        m, n = record["shape"]
        sizes = [count(value) for value in (m, n, record["bits"])]
        group_size = record["group_size"]
        error, damping = number(record["relative_error"]), number(record["damping"])
    except (KeyError, TypeError, ValueError):
        return None
    if None in sizes or type(group_size) is not int or error is None or damping is None or not name:
        return None
    outputs, inputs, bits = (value or 0 for value in sizes)
    stored = None
    if config is not None and scheme is not None:
        groups = 1 if group_size == -1 else inputs // max(group_size, 1)
        packed = PackedLinear(bits=bits, outputs=outputs, inputs=inputs, groups=groups)
        dtype = torch.float32 if float_bits == 32 else torch.float16
        tensors = config.made.layout(name, packed, scheme.symmetric, dtype).values()
        stored = sum(8 * dtype.itemsize * math.prod(shape) for dtype, shape in tensors)
    return LinearResult(
        block=block,
        name=name,
        shape=(outputs, inputs),
        bits=bits,
        group_size=group_size,
        symmetric=None if scheme is None else scheme.symmetric,
        error=error,
        damping=damping,
        asked=None if scheme is None or config is None or not method_of(config).calibrated else scheme.damping,
        stored_bits=stored,
    )


def _run(line: Mapping[str, Any], unended: str = "no word") -> Run:
    ended, planned, machine = (mapping(line.get(name)) for name in ("ended", "planned", "machine"))
    outcome = ended.get("outcome")
    device = mapping(line.get("choice")).get("on_gpu")
    return Run(
        at=text(line.get("at") or "at an unknown time"),
        outcome=outcome if outcome in ("finished", "stopped", "failed") else unended,
        said=text(ended["said"]) if ended.get("said") else None,
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
    """Names of all phases, the one that took longest first."""
    total: dict[str, float] = {}
    for run in runs:
        for name, seconds in run.by_phase.items():
            total[name] = total.get(name, 0.0) + seconds
    return sorted(total, key=lambda name: -total[name])[:50]
