"""The output of a job: how many Linears each rule decides, and which programs load the result. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from bigq.config import JobConfig
from bigq.io.formats.readers import Verdict, Written, not_run_with, refused_by, verdicts
from bigq.io.formats.readers_table import Kind
from bigq.job.rules import RuleCount, rule_counts, splits
from bigq.sched.plan.shape import ModelShape
from bigq.sched.plan.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """rules: one per rule, in order. readers: whether each reader of the format loads it. notes: sentences about readers that do not load
    it, or were not run with such a model."""

    rules: tuple[RuleCount, ...]
    readers: tuple[Verdict, ...]
    notes: tuple[str, ...]


def output_of(shape: ModelShape, work: Work, config: JobConfig) -> Output:
    """The output of a job whose scheme is settled."""
    names = shape.linear_names()
    head = [shape.head.name] if work.lm_head and shape.head is not None else []
    experts = shape.experts()
    of_experts = {work.scheme(name) for name in experts}
    schemes = [*(work.scheme(name) for name in (*names, *head)), *of_experts]
    readers = verdicts(
        Written(
            format=config.output_format,
            base=Kind.of(config.scheme),
            kinds=frozenset(Kind.of(scheme) for scheme in schemes if scheme is not None),
            family=shape.family,
            static=bool(config.made.input_suffix),
            head=any(work.scheme(name) is not None for name in head),
            transposed=shape.transposed,
            experts=frozenset(None if scheme is None else Kind.of(scheme) for scheme in of_experts),
            whole=any(bank.whole for block in shape.blocks for bank in block.banks) and any(scheme is not None for scheme in of_experts),
            split=splits([*names, *experts], config.base_scheme, config.rules),
        )
    )
    notes = refused_by(readers)
    untried = not_run_with(readers, shape.family)
    return Output(
        rules=rule_counts([*names, *(name for name, count in experts.items() for _ in range(count)), *head], config.rules),
        readers=readers,
        notes=(*notes, *([untried] if untried is not None else [])),
    )
