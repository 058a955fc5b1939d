"""The output head as a unit of work, for jobs with ``--lm-head``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bigq.config import JobConfig
from bigq.errors import NumericsError
from bigq.io.index import TensorInfo
from bigq.job.settle import head_scheme
from bigq.model.pager import Pager
from bigq.progress.records import LinearRecord, dead_inputs_warning
from bigq.sched.shards import Product, Shard
from bigq.sched.solve.head import HeadJob
from bigq.sched.solving import Solving
from bigq.sched.units.base import Bench, StreamedUnit
from bigq.scheme import QuantScheme


@dataclass(frozen=True, slots=True)
class Head:
    """The output head that is quantized: its Linear, the checkpoint's tensor that its weight [V, d] comes from, and its scheme."""

    name: str
    module: nn.Linear
    source: TensorInfo
    scheme: QuantScheme


def head_to_quantize(pager: Pager, config: JobConfig) -> Head | None:
    """The head, or None if it stays unquantized. Raises UsageError if the job asks for it but it cannot be quantized."""
    scheme = head_scheme(pager, config)
    name, module = pager.head_name, pager.head
    if scheme is None or not isinstance(module, nn.Linear):
        return None
    return Head(name, module, pager.sources[f"{name}.weight"], scheme)


class HeadUnit(StreamedUnit):
    """The output head. number: of its shard."""

    def __init__(self, number: int, head: Head) -> None:
        self.head = head
        self.shard = Shard(number=number, name="head-0", sources=[head.source.name])

    def visit(self, bench: Bench, solving: Solving, *, last: bool) -> None:
        head, control, config = self.head, bench.control, bench.config
        control.begin("head", "the output head")
        control.progress.phase("output head")
        control.clock.subject = head.name
        control.progress.read(head.source.stored_bytes)
        job = HeadJob(
            name=head.name,
            module=head.module,
            scheme=head.scheme,
            pager=bench.pager,
            clock=control.clock,
            finite_only=config.on_nonfinite == "skip",
            largest_inputs=bool(config.made.input_suffix),
        )
        records: list[LinearRecord] = []
        skipped: dict[str, str] = {}
        try:
            solved = solving.head(job)
        except NumericsError as error:
            if config.on_nonfinite != "skip":
                raise
            skipped[head.name] = str(error).removeprefix(f"{head.name}: ").partition(";")[0]
            control.progress.say(f"{head.name} stays unquantized: {skipped[head.name]}")
            tensors = [bench.writer.stored(head.source.name)]
        else:
            made, prefix, packed = config.made, head.source.name.removesuffix(".weight"), {}
            with control.clock.phase("pack"):
                if bench.writer.ranks.writes(self.shard.number):
                    packed = made.pack(prefix, solved.weight, head.source.dtype) | made.pack_inputs(prefix, solved.largest_input)
            records.append(solved.record())
            if (warning := dead_inputs_warning(records)) is not None:
                control.progress.warn_once("dead inputs", warning)
            tensors = bench.writer.packed(packed)
        product = Product(tensors=tensors, records=records, left_out=list(skipped), skipped=skipped, batch=solving.batch)
        bench.writer.hand_over(self.shard, product)
