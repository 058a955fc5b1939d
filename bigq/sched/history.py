"""What a job did, from the record in its output folder alone: for ``bigq report``.

Nothing is repaired, no shard is read, and nothing is believed: records carry checksums, but anybody can make one. What comes out of
here is of the right type, within bounds, and its texts are one printable line each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.config import JobConfig
from bigq.errors import BigqError
from bigq.io.sealed import sound_lines, unseal
from bigq.sched.evaluations import read_evaluations
from bigq.sched.journal import RUNS_NAME, STATE_FOLDER, Commit, read_commits, read_job
from bigq.sched.status import status
from bigq.scheme import scheme_for

#: Characters of a text that are taken, and how many things of a kind.
MAX_TEXT, MAX_ITEMS = 2000, 1000
#: Blocks of a model, and Linears in one.
MAX_BLOCKS, MAX_LINEARS = 2000, 400

BY_RULE = "left as it is by --skip"
UNFIT = "too small for the format, or calibration never reaches it"

_BLOCK = re.compile(r"block-(0|[1-9]\d{0,5})")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearResult:
    """A Linear that was quantized: [outputs, inputs], its relative output error, and the damping that was used.

    asked: the damping that its scheme asks for; None where that is unknown or there is none.
    """

    block: int
    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    error: float
    damping: float
    asked: float | None

    @property
    def raised(self) -> bool:
        """Whether it took more damping than asked for."""
        return self.asked is not None and self.damping > self.asked * (1 + 1e-6)

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def stored_bits(self) -> int:
        """Of codes, scales (fp16), zero points and group indices (int32), as the format stores them."""
        m, n = self.shape
        groups = 1 if self.group_size == -1 else n // max(self.group_size, 1)
        return m * n * self.bits + m * groups * (16 + self.bits) + 32 * n


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A Linear that stays as it is. wanted: whether that is what was asked for."""

    block: int
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
class Judged:
    """A result of ``bigq eval``: perplexities, KL divergence in nats per token."""

    at: str
    data: str
    samples: int
    seqlen: int
    tokens: int
    perplexity: float
    baseline: str | None
    baseline_perplexity: float | None
    kl: float | None
    kl_stderr: float | None
    top1_agreement: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """All that is known of a job.

    state: see ``bigq.sched.status``. config: None where job.json is not this version's. blocks: of the model, None where unknown.
    names: the Linears in a block, in order. outdated: evaluations of weights that are not there any more.
    damaged: what could not be read. source_bytes, parameters: of the source's tensors; output_bytes: of the committed shards.
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
    damaged: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    def worst(self, count: int) -> list[LinearResult]:
        """The Linears with the largest errors, the largest first."""
        return sorted(self.linears, key=lambda linear: -linear.error)[:count]

    @property
    def linear_bits(self) -> float | None:
        """Bits per weight of the quantized Linears, with scales, zero points and group indices."""
        weights = sum(linear.weights for linear in self.linears)
        return sum(linear.stored_bits for linear in self.linears) / weights if weights else None

    @property
    def all_bits(self) -> float | None:
        """Bits per parameter of the whole checkpoint; None unless the job is finished."""
        return 8 * self.output_bytes / self.parameters if self.finished and self.parameters else None


def read_history(out: Path) -> History:
    """Gather what is known. Raises UsageError where ``out`` holds no job, ResourceError where it cannot be read."""
    out = out.expanduser()
    found = status(out)
    damaged = list(found.damaged)
    config = _config(out, damaged)
    commits, lines = _commits(out), _sealed(out / STATE_FOLDER / RUNS_NAME)
    last = lines[-1] if lines else {}
    path, kinds = _structure(last.get("blocks"))
    linears, left_out = _solved(commits, config)
    names = list(dict.fromkeys(name for kind in kinds for name in kind))
    names += sorted(({linear.name for linear in linears} | {linear.name for linear in left_out}) - set(names))
    order = {name: place for place, name in enumerate(names)}
    if config is not None:
        done = {int(match[1]) for commit in commits if (match := _BLOCK.fullmatch(commit.unit))}
        known = {(linear.block, linear.name) for linear in linears} | {(linear.block, linear.name) for linear in left_out}
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
    return History(
        out=text(str(out.absolute())),
        state=found.state,
        config=config,
        blocks=len(kinds) or found.blocks,
        blocks_done=found.blocks_done,
        names=tuple(names[:MAX_LINEARS]),
        linears=tuple(linears),
        left_out=tuple(sorted(left_out, key=lambda each: (each.block, order[each.name]))),
        runs=tuple(runs),
        evaluations=tuple(judged for value in evaluations[-MAX_ITEMS:] if (judged := _judged(value)) is not None),
        outdated=outdated,
        source_bytes=_count(last.get("source_bytes")),
        parameters=_count(last.get("parameters")),
        output_bytes=found.bytes_written,
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
        return [value for line in sound_lines(path) if (value := unseal(line, line=True)) is not None]
    except BigqError:  # ``status`` has told
        return []


def _structure(blocks: Any) -> tuple[str, list[tuple[str, ...]]]:
    """Where the blocks are, and the names of the Linears in each; nothing of what a run does not tell."""
    try:
        kinds = [tuple(text(str(name)) for name, *_ in kind[:MAX_LINEARS]) for kind in blocks["kinds"][:MAX_BLOCKS]]
        return text(str(blocks["path"])), [kinds[index] for index in blocks["of"][:MAX_BLOCKS]]
    except (KeyError, TypeError, ValueError, IndexError):
        return "", []


def _solved(commits: Iterable[Commit], config: JobConfig | None) -> tuple[list[LinearResult], list[LeftOut]]:
    """The Linears that were quantized, and those that could not be."""
    linears: list[LinearResult] = []
    left_out: list[LeftOut] = []
    for i, commit in _blocks(commits):
        named = [str(record.get("name", "")) for record in commit.linears[:MAX_LINEARS]]
        for record, full in zip(commit.linears, named, strict=False):
            scheme = None if config is None or config.method == "rtn" else scheme_for(full, config.base_scheme, config.rules)
            result = _linear(i, text(_in_block(full, i)), record, None if scheme is None else scheme.damping)
            linears += [] if result is None else [result]
        for full in commit.left_out[:MAX_LINEARS]:
            reason = text((commit.skipped or {}).get(full, UNFIT))
            left_out.append(LeftOut(block=i, name=text(_in_block(full, i)), reason=reason, wanted=False))
    return linears, left_out


def _blocks(commits: Iterable[Commit]) -> Iterator[tuple[int, Commit]]:
    """Each block once, by number."""
    found = {int(match[1]): commit for commit in commits if (match := _BLOCK.fullmatch(commit.unit))}
    yield from sorted((i, commit) for i, commit in found.items() if i < MAX_BLOCKS)


def _in_block(full: str, block: int) -> str:
    """The name of a Linear within its block: what follows the block's number."""
    _, found, name = f".{full}".partition(f".{block}.")
    return name if found else full


def _linear(block: int, name: str, record: Mapping[str, Any], asked: float | None) -> LinearResult | None:
    """None where a record is none."""
    try:
        m, n = record["shape"]
        sizes = [_count(value) for value in (m, n, record["bits"])]
        group_size = record["group_size"]
        error, damping = _number(record["relative_error"]), _number(record["damping"])
    except (KeyError, TypeError, ValueError):
        return None
    if None in sizes or type(group_size) is not int or error is None or damping is None or not name:
        return None
    outputs, inputs, bits = (value or 0 for value in sizes)
    return LinearResult(
        block=block, name=name, shape=(outputs, inputs), bits=bits, group_size=group_size, error=error, damping=damping, asked=asked
    )


def _run(line: Mapping[str, Any], unended: str = "no word") -> Run:
    ended, planned, machine = (_mapping(line.get(name)) for name in ("ended", "planned", "machine"))
    outcome = ended.get("outcome")
    device = _mapping(line.get("choice")).get("on_gpu")
    return Run(
        at=text(line.get("at") or "at an unknown time"),
        outcome=outcome if outcome in ("finished", "stopped", "failed") else unended,
        said=text(ended["said"]) if ended.get("said") else None,
        seconds=_number(ended.get("seconds")),
        by_phase=_seconds(ended.get("seconds_by_phase")),
        waiting=_seconds(ended.get("waiting")),
        resumed=_count(line.get("resumed_blocks")),
        command=tuple(text(word) for word in _list(line.get("command"))),
        model=text(line["model"]) if line.get("model") else None,
        folder=text(line["folder"]) if line.get("folder") else None,
        machine=text(machine.get("name") or machine.get("device") or "unknown"),
        versions={text(name): text(version) for name, version in list(_mapping(line.get("versions")).items())[:20] if version is not None},
        notes=tuple(text(note) for note in _list(line.get("notes"))),
        planned_host=_count(planned.get("host")),
        planned_device=_count(planned.get("device")) if device else None,
        host_peak=_count(ended.get("host_peak_bytes")),
        device_peak=_count(ended.get("device_peak_bytes")) if device else None,
        bytes_read=_count(ended.get("bytes_read")),
        bytes_written=_count(ended.get("bytes_written")),
    )


def _judged(value: Mapping[str, Any]) -> Judged | None:
    perplexity, counts = value.get("perplexity"), [_count(value.get(name)) for name in ("samples", "seqlen", "tokens")]
    if not isinstance(perplexity, float | int) or None in counts:
        return None
    samples, seqlen, tokens = (count or 0 for count in counts)
    return Judged(
        at=text(value.get("at") or ""),
        data=text(value.get("data") or "unknown"),
        samples=samples,
        seqlen=seqlen,
        tokens=tokens,
        perplexity=float(perplexity),
        baseline=text(value["baseline"]) if value.get("baseline") else None,
        **{name: _number(value.get(name)) for name in ("baseline_perplexity", "kl", "kl_stderr", "top1_agreement")},
    )


def text(value: Any) -> str:
    """Anything as one printable line of bounded length."""
    line = str(value)[: MAX_TEXT + 1]
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    return printable if len(printable) <= MAX_TEXT else printable[: MAX_TEXT - 1] + "…"


def phases_of(runs: Sequence[Run]) -> list[str]:
    """Names of all phases, the one that took longest first."""
    total: dict[str, float] = {}
    for run in runs:
        for name, seconds in run.by_phase.items():
            total[name] = total.get(name, 0.0) + seconds
    return sorted(total, key=lambda name: -total[name])[:50]


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**62 else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and math.isfinite(value) and value >= 0 else None


def _seconds(value: Any) -> dict[str, float]:
    items = list(_mapping(value).items())[:50]
    return {text(name): seconds for name, said in items if (seconds := _number(said)) is not None}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value[:MAX_ITEMS] if isinstance(value, list) else []
