"""The plan of a job: how it runs within given budgets, and what each phase needs. Pure functions."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigq.calibration import Made
from bigq.common_options import default_batch
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.io.formats.readers import Verdict, read_by
from bigq.job.rules import RuleCount, count_words
from bigq.machine.ceilings import DISK_RATE, Ceilings
from bigq.methods.base import Method
from bigq.presets import quality_of
from bigq.progress.layout import entry
from bigq.progress.sizes import show_seconds, show_size
from bigq.sched.plan.budgets import Budgets, Fetch, over, shortages
from bigq.sched.plan.cost import Cost, Phase, job_cost
from bigq.sched.plan.costs.bank import numbers_at_once
from bigq.sched.plan.costs.row import last_width
from bigq.sched.plan.fold_text import fold_records, fold_text
from bigq.sched.plan.output import output_of
from bigq.sched.plan.scaling import Scaling, Times
from bigq.sched.plan.shape import ModelShape
from bigq.sched.plan.share import NOTHING_KEPT, Kept
from bigq.sched.plan.work import Choice, Work

#: The fraction of a memory budget to stay within if possible: estimates are within a tenth.
HEADROOM = 0.9

#: Memory of the libraries after a job's first products, on a CPU and on the host of a GPU, in bytes.
WARM_CPU, WARM_GPU = 20 * 2**20, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a job runs on. base: bytes that the process holds before the job. ceilings: None if times are not needed.

    budgets: of one process, but for the disk. disk_rate: bytes per second that a host reads and writes.
    """

    on_gpu: bool
    base: int
    budgets: Budgets
    ceilings: Ceilings | None
    disk_rate: float = DISK_RATE


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a job is run and what it needs. Sizes in bytes, times in seconds.

    seconds: by phase, at the device's peak rates: no run is faster. shortages: one sentence each; empty if the job fits.
    rules: how many Linears each rule decides. readers: which programs load the output. notes: further sentences about readers.
    warnings: sentences about the model. fetch: how shards that are not here get here, or None.
    solving: how Linears are solved, and the quality that stands for it.
    texts: what was made of the calibration text, an entry per text. kept: weights in blocks that stay unquantized.
    disk_rate: see ``Machine``. scaling: of a job that several processes share, whose first one the plan is of; else None.
    budget: ``bits_per_weight``. bits_chosen: whether the bits are among the rules already.
    """

    shape: ModelShape
    work: Work
    choice: Choice
    cost: Cost
    budgets: Budgets
    ceilings: Ceilings | None
    seconds: Mapping[str, float]
    shortages: tuple[str, ...]
    rules: tuple[RuleCount, ...] = ()
    readers: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    fetch: Fetch | None = None
    texts: tuple[Made, ...] = ()
    solving: tuple[str, ...] = ()
    kept: Kept = NOTHING_KEPT
    disk_rate: float = DISK_RATE
    scaling: Scaling | None = None
    budget: float | None = None
    bits_chosen: bool = False

    @property
    def fits(self) -> bool:
        """Whether the job fits into all its budgets."""
        return not self.shortages

    @property
    def read_by(self) -> tuple[str, ...]:
        """Programs that load the output, each with its requirements."""
        return tuple(read_by(self.readers))

    @property
    def disk(self) -> int:
        """Bytes on OUT's file system: the output, activations during the job, and what is fetched to the same file system."""
        return self.cost.on_disk + (0 if self.fetch is None else self.fetch.on_disk)

    @property
    def times(self) -> Times:
        """Lower bounds. Reading and writing overlap with the computation if the plan says so."""
        reads = 1 if self.scaling is None else self.scaling.reads
        links = None if self.ceilings is None else self.ceilings.links
        return Times(
            phases=self.seconds,
            disk=(reads * self.cost.read + self.cost.output) / self.disk_rate,
            bus=self.cost.read / links.bus if links is not None else 0.0,
            beside=self.choice.beside,
        )

    @property
    def total_seconds(self) -> float:
        """A lower bound."""
        return max(0.0 if self.fetch is None else self.fetch.seconds_beside, self.times.total)

    def to_json(self) -> dict[str, Any]:
        phases = [
            {"phase": p.name, "device_bytes": p.device, "host_bytes": p.host, "flops": dict(p.flops), "seconds": self.seconds.get(p.name)}
            for p in self.cost.phases
        ]
        rules = [
            {"pattern": count.rule.pattern, "overrides": None if count.rule.overrides is None else dict(count.rule.overrides)}
            | {"linears": count.linears}
            for count in self.rules
        ]
        return {
            "blocks": len(self.shape.blocks),
            "rows": self.work.rows if self.scaling is None else self.scaling.rows,
            "ranks": None if self.scaling is None else self.scaling.to_json(),
            "seqlen": self.shape.seqlen,
            "text": [made.to_json() for made in self.texts],
            "activations": self.choice.tier,
            "batch": self.choice.batch,
            "experts_at_once": self.choice.experts_at_once or 1,
            "memo": self.choice.memo,
            "kept_rows": self.choice.kept_rows,
            "kept_tier": self.choice.kept_tier if self.choice.kept_rows else None,
            "read_ahead_bytes": self.choice.ahead,
            "device_bytes": self.cost.device,
            "host_bytes": self.cost.host,
            "disk_bytes": self.disk,
            "read_bytes": self.cost.read,
            "written_bytes": self.cost.output,
            "fetch": None if self.fetch is None else self.fetch.to_json(),
            "budgets": {"device": self.budgets.device, "host": self.budgets.host, "disk": self.budgets.disk},
            "device": None if self.ceilings is None else self.ceilings.name,
            "seconds_at_least": self.total_seconds if self.ceilings is not None else None,
            "phases": phases,
            "folds": fold_records(self.shape.blocks, scaling) if (scaling := self.work.method.scaling) is not None else None,
            "bits_per_weight": self.budget,
            "rules": rules,
            "kept": self.kept.to_json(),
            "readers": [dataclasses.asdict(verdict) for verdict in self.readers],
            "warnings": list(self.warnings),
            "shortages": list(self.shortages),
        }

    def brief(self) -> str:
        """The text that a job prints before it starts: lines of at most 60 columns."""
        needs = [
            f"{what} {show_size(need)} of {show_size(has)}"
            for what, need, has in (
                ("device", self.cost.device, self.budgets.device),
                ("host", self.cost.host, self.budgets.host),
                ("disk", self.disk, self.budgets.disk),
            )
            if what != "device" or self.choice.on_gpu
        ]
        count = self.work.rows if self.scaling is None else self.scaling.rows
        rows = f"{count} × {self.shape.seqlen} tokens" if self.work.method.calibrated else "no calibration"
        lines = [f"plan: {len(self.shape.blocks)} blocks, {rows}"]
        for made in self.texts:
            lines += entry("text" if made is self.texts[0] else "", made.text())
        if self.scaling is not None:
            lines += self.scaling.brief()
        lines += entry("solve", list(self.solving))
        if (scaling := self.work.method.scaling) is not None:
            lines += entry("scales", fold_text(self.shape.blocks, scaling))
        if self.work.streams:
            lines += entry("run", self._how())
        lines += entry("needs", needs)
        if self.fetch is not None:
            lines += entry("fetches", self.fetch.text())
        if self.budget is not None:
            chosen = "" if self.bits_chosen else ": a survey of a few rows comes first"
            lines += entry("bits", f"at most {self.budget:g} per quantized weight{chosen}")
        if words := count_words(self.rules):
            lines += entry("rules", words)
        if kept := self.kept.text():
            lines += entry("kept", kept)
        lines += entry("read by", list(self.read_by) or "no program known to bigq but bigq")
        for note in self.notes:
            lines += entry("note", note)
        for shortage in self.shortages:
            lines += entry("short", shortage)
        return "\n".join(lines)

    def table(self) -> str:
        """The whole plan as text, in lines of at most 60 columns."""
        lines = [self.brief(), *(line for warning in self.warnings for line in entry("warning", warning)), ""]
        lines.append(f"  {'phase':8}{'device':>12}{'host':>12}{'arithmetic':>14}{'at least':>11}")
        for phase in self.cost.phases:
            device = show_size(phase.device) if self.choice.on_gpu else "–"
            seconds = show_seconds(self.seconds[phase.name]) if phase.name in self.seconds else "–"
            arithmetic = _operations(sum(phase.flops.values()))
            lines.append(f"  {phase.name:8}{device:>12}{show_size(phase.host):>12}{arithmetic:>14}{seconds:>11}")
        lines.append("")
        lines += entry("reads", show_size(self.cost.read))
        scratch = f", and {show_size(self.cost.scratch)} for activations during the job" if self.cost.scratch else ""
        lines += entry("writes", show_size(self.cost.output) + scratch)
        if self.ceilings is not None:
            lines += entry(
                "time", f"at least {show_seconds(self.total_seconds)} on {self.ceilings.name}, with a disk of {self.disk_rate / 1e9:g} GB/s"
            )
            lines += entry("rates", self.ceilings.source)
        if self.scaling is not None:
            lines += self.scaling.table()
        return "\n".join(lines)

    def _how(self) -> list[str]:
        where = {"gpu": "on the GPU", "host": "in host memory", "disk": "on disk"}[self.choice.tier]
        parts = [f"activations {'of both models ' if self.work.streams > 1 else ''}{where}", f"batch {self.choice.batch}"]
        if (experts := self.choice.experts_at_once or 1) > 1:
            parts.append(f"{experts} experts at once")
        memos = [memo for block in self.shape.blocks for memo in block.memos]
        if not all(memo.last for memo in memos):
            parts.append("attention outputs kept" if self.choice.memo else "attention outputs not kept")
        if any(memo.last for memo in memos):
            kept = self.choice.kept_rows
            which = f"of {kept} rows " if 0 < kept < self.work.rows else ""
            where = " in host memory" if kept and self.choice.on_gpu and self.choice.kept_tier == "host" else ""
            parts.append(f"last inputs {which}{'kept' if kept else 'not kept'}{where}")
        parts.append(f"{show_size(self.choice.ahead)} prefetched" if self.choice.ahead else "no prefetch")
        return parts


def make_plan(
    shape: ModelShape,
    work: Work,
    config: JobConfig,
    machine: Machine,
    *,
    fetch: Fetch | None = None,
    warnings: tuple[str, ...] = (),
    texts: Sequence[Made] = (),
) -> Plan:
    """The fastest way to run the job that fits with room to spare; if none does, the one that needs least.

    fetch: how shards that are not here get here. warnings: about the model. texts: what the calibration rows were made of.
    Settings that ``config`` gives (tier, batch, read-ahead) are kept.
    Raises UsageError for activations on a GPU if the job runs on a CPU.
    """
    on_gpu, ceilings = machine.on_gpu, machine.ceilings
    if config.activations == "gpu" and not on_gpu:
        raise UsageError("--activations gpu: the job runs on a CPU; use host, disk or auto")
    base = machine.base + (WARM_GPU if on_gpu else WARM_CPU)
    wanted, fetch = fetch, None if fetch is None else fetch.within(0)
    left = dataclasses.replace(machine.budgets, disk=machine.budgets.disk - (0 if fetch is None else fetch.on_disk))
    spare = Budgets(device=int(HEADROOM * left.device), host=int(HEADROOM * left.host), disk=left.disk)
    best: tuple[tuple[int, int], Choice, Cost] | None = None
    for choice in _choices(shape, work, config, on_gpu):
        cost = job_cost(shape, work, choice, base)
        strain = sum(over(cost, left)), sum(over(cost, spare))
        if best is None or strain < best[0]:
            best = strain, choice, cost
        if not any(strain):
            break
    assert best is not None
    _, choice, cost = best
    if (keeping := _keeping_inputs(shape, work, choice, base, spare)) != choice:
        choice, cost = keeping, job_cost(shape, work, keeping, base)
    if config.checkpoint_every is not None and work.streams:
        saving = dataclasses.replace(choice, checkpoints=True)
        if not over(with_them := job_cost(shape, work, saving, base), left)[2]:
            choice, cost = saving, with_them
    seconds = {} if ceilings is None else {phase.name: phase_seconds(phase, ceilings) for phase in cost.phases}
    output = output_of(shape, work, config)
    short = tuple(shortages(cost, left, fetch, config, work.sharing.local))
    if wanted is not None:
        fetch = wanted.within(machine.budgets.disk - cost.on_disk)
    return Plan(
        shape=shape,
        work=work,
        choice=choice,
        cost=cost,
        budgets=machine.budgets,
        ceilings=ceilings,
        seconds=seconds,
        disk_rate=machine.disk_rate,
        shortages=short,
        rules=output.rules,
        readers=output.readers,
        notes=output.notes,
        warnings=warnings,
        fetch=fetch,
        texts=tuple(texts),
        solving=_solving(config, work.method),
        budget=config.bits_per_weight,
        bits_chosen=config.chosen_rules > 0,
    )


def _solving(config: JobConfig, method: Method) -> tuple[str, ...]:
    scheme = config.scheme
    scales = {"search": "searched scales", "minmax": "scales of ranges"}[scheme.scales]
    quality = quality_of(config.method, scheme)
    columns = [f"{scheme.order} order"] * method.calibrated
    sweeps = [f"{scheme.sweeps} sweep{'s' * (scheme.sweeps > 1)}"] * (method.calibrated and scheme.sweeps > 0)
    inputs = ["static scales of inputs"] * (config.input_scales == "static")
    return (method.title, *columns, scales, *sweeps, *inputs, *([f"--quality {quality}"] * (quality is not None)))


def phase_seconds(phase: Phase, ceilings: Ceilings) -> float:
    """The minimum time of a phase: arithmetic and data movement at the device's peak rates."""
    rates = {"products": ceilings.products, "hessian": ceilings.hessian, "single": ceilings.single, "solve": ceilings.correcting}
    return sum(count / rates[kind] for kind, count in phase.flops.items()) + phase.moved / ceilings.copy


def _choices(shape: ModelShape, work: Work, config: JobConfig, on_gpu: bool) -> Iterator[Choice]:
    """Ways to run a job, the fastest first.

    The experts that are solved side by side shrink first, then the batch; then the cache and the prefetch are dropped, last the tier
    changes.
    """
    tiers = (("gpu", "host", "disk") if on_gpu else ("host", "disk")) if config.activations == "auto" else (config.activations,)
    kind = "cuda" if on_gpu else "cpu"
    first = min(config.batch or default_batch(kind, shape.seqlen), max(1, work.rows))
    batches = [first]
    while config.batch is None and batches[-1] > 1:
        batches.append(batches[-1] // 2)
    wanted = config.blocks_ahead(kind)
    aheads = (wanted,) if config.read_ahead is not None or not wanted else (wanted, 0)
    largest = max(block.stored for block in shape.blocks)
    # Only true-sequential jobs replay anything after a solved Linear.
    cached = any(not memo.last for block in shape.blocks for memo in block.memos)
    memos = (True, False) if work.true_sequential and cached else (False,)
    together = numbers_at_once(shape if work.streams else None, config.experts_at_once, work.sharing.ranks, on_gpu=on_gpu)
    for tier, ahead, memo, batch, experts in itertools.product(tiers, aheads, memos, batches, together):
        yield Choice(
            on_gpu=on_gpu,
            tier=tier,
            batch=batch,
            memo=memo,
            ahead=ahead * largest,
            beside=ahead > 0,
            experts_at_once=experts,
        )


def _keeping_inputs(shape: ModelShape, work: Work, choice: Choice, base: int, spare: Budgets) -> Choice:
    """The same way to run a job, with inputs of last Linears kept in the memory that is left, for as many batches as fit.

    Device memory is tried before host memory, which takes them where it holds more. With activations on disk there is none to spare.
    """
    replayed = len(shape.blocks) > 1 or work.lm_head
    if not (work.true_sequential and work.streams and replayed and any(map(last_width, shape.blocks))) or choice.tier == "disk":
        return choice
    best = choice
    for tier in ("gpu", "host") if choice.on_gpu else ("host",):

        def keeping(batches: int, tier: str = tier) -> Choice:
            return dataclasses.replace(choice, kept_rows=min(batches * choice.batch, work.rows), kept_tier=tier)

        def too_many(batches: int) -> bool:
            return any(over(job_cost(shape, work, keeping(batches), base), spare))

        # The first number of batches that does not fit; none fit if one does not.
        first = bisect.bisect_left(range(1, -(-work.rows // choice.batch) + 1), True, key=too_many) + 1
        if first > 1 and (found := keeping(first - 1)).kept_rows > best.kept_rows:
            best = found
    return best


def _operations(count: float) -> str:
    if not count:
        return "–"
    unit, size = next(((unit, size) for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15)) if count >= 10 * size), ("TFLOP", 1e12))
    return f"{count / size:.1f} {unit}"
