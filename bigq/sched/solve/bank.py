"""Quantizing a bank of experts, one after the other, each with the inputs of the tokens that are routed to it.

An expert's matrices are solved in the order in which it computes them, so that a later one sees what the quantized earlier ones return.
Then the expert runs once and is added to the bank's output. One expert and one Hessian are in memory at a time; on a GPU a few are, since
the matrices of one expert are too small to fill it: the first matrices of all are solved side by side, then the next ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bigq.errors import NumericsError
from bigq.methods.base import CalibratedMethod, Collector, DataFreeMethod
from bigq.model.experts.bank import Bank, Expert, Product
from bigq.progress.clock import Clock
from bigq.progress.records import LinearRecord
from bigq.quantized_weight import QuantizedWeight
from bigq.sched.rows.routed import RoutedRows
from bigq.scheme import QuantScheme
from bigq.solver.rtn import round_to_nearest

#: Tokens of an expert that are computed at a time, so that memory does not depend on how many are routed to it.
CHUNK_TOKENS = 8192
#: Tokens are filled up with zeros to a multiple of this. oneDNN compiles products anew for every number of tokens, of which experts have
#: any, and keeps a thousand of them: 100 MiB for 128 experts.
STEP_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BankJob:
    """A bank to be quantized. prefix: its module's full name.

    schemes: by parameter; without any, the experts stay unquantized. names: of the matrices that one expert's part of a parameter is
    stored as, in the order of its outputs. load: an expert's parameters, on the device. finished: whether they are final already, because
    an earlier run committed the expert; then it only runs. finite_only: leave tokens that are not finite out of Hessians.
    at_once: experts that are solved side by side. ends: whether an expert is the last of its shard; no batch of experts goes beyond it, so
    that a job that goes on has the same batches.
    """

    prefix: str
    module: nn.Module
    bank: Bank
    schemes: Mapping[str, QuantScheme]
    names: Callable[[str, int], Sequence[str]]
    load: Callable[[int], Mapping[str, Tensor]]
    clock: Clock
    finished: Callable[[int], bool] = lambda e: False
    finite_only: bool = False
    at_once: int = 1
    ends: Callable[[int], bool] = lambda e: False


@dataclass(frozen=True, slots=True)
class SolvedMatrix:
    """One of an expert's matrices. rounded: why it was rounded to nearest instead of solved; None if it was solved."""

    name: str
    weight: QuantizedWeight
    rounded: str | None = None

    def record(self, tokens: int | None) -> LinearRecord:
        """The record for the journal and the report. tokens: see ``SolvedExpert``."""
        m, n = self.weight.codes.shape
        return LinearRecord(
            name=self.name,
            bits=self.weight.scheme.bits,
            group_size=self.weight.scheme.group_size,
            shape=(m, n),
            loss=self.weight.loss,
            relative_error=self.weight.relative_error,
            damping=self.weight.damping,
            dead_inputs=self.weight.dead_inputs,
            seconds={},
            tokens=tokens,
            rounded=self.rounded,
        )


@dataclass(frozen=True, slots=True)
class SolvedExpert:
    """One expert of the bank ``bank``. tokens: how many calibration tokens were routed to it; None without calibration. left_out: the most
    of them that a Hessian left out because they are not finite."""

    bank: str
    number: int
    tokens: int | None
    matrices: tuple[SolvedMatrix, ...]
    left_out: int = 0


def solve_bank(job: BankJob, method: CalibratedMethod, rows: RoutedRows) -> Iterator[SolvedExpert]:
    """Quantize every expert that is not finished, and add the outputs of all to ``rows.total``.

    An expert that cannot be solved, or that no token is routed to, is rounded to nearest in the same scheme, since readers take a bank as
    a whole or not at all. Raises NumericsError for weights that are not finite.
    """
    for batch, unsolved in _batches(job, rows):
        members = [_Member(number, tokens, slots, _expert(job, rows, number)) for number, tokens, slots in batch]
        for product in job.bank.products if unsolved else ():
            _solve(job, method, rows, members, product)
        while members:
            member = members.pop(0)
            _run(job, rows, member)
            if member.solved:
                yield SolvedExpert(job.prefix, member.number, len(member.tokens), tuple(member.solved), member.left_out)


@dataclass(slots=True)
class _Member:
    """An expert, its tokens and their positions (see ``RoutedRows.routes``), and what is solved of it.

    inputs: the rows of all its tokens once they are gathered, unless there are more than ``CHUNK_TOKENS``.
    """

    number: int
    tokens: Tensor
    slots: Tensor
    expert: Expert
    inputs: Tensor | None = None
    solved: list[SolvedMatrix] = field(default_factory=list)
    left_out: int = 0


def _batches(job: BankJob, rows: RoutedRows) -> Iterator[tuple[list[tuple[int, Tensor, Tensor]], bool]]:
    """All experts in order, as (number, tokens, positions): those to be solved in batches, the others one by one; and which they are."""
    batch: list[tuple[int, Tensor, Tensor]] = []
    for number, ((tokens, slots),) in rows.routes(job.bank, None):
        unsolved = number < job.bank.experts and bool(job.schemes) and not job.finished(number)
        if batch and (not unsolved or len(batch) == job.at_once or job.ends(batch[-1][0])):
            yield batch, True
            batch = []
        if unsolved:
            batch.append((number, tokens, slots))
        else:
            yield [(number, tokens, slots)], False
    if batch:
        yield batch, True


def run_bank_rows(job: BankJob, rows: RoutedRows, batch: int | None = None) -> None:
    """Add the outputs of all experts, with the parameters that ``job.load`` returns, to ``rows.total``.

    batch: rows whose tokens an expert takes at once, as the model would; None as ``solve_bank`` does.
    """
    for number, parts in rows.routes(job.bank, batch):
        if any(len(tokens) for tokens, _ in parts):
            expert = _expert(job, rows, number)
            for i, (tokens, slots) in enumerate(parts):
                if batch is None:
                    _run(job, rows, _Member(number, tokens, slots, expert))
                elif len(tokens):
                    _run_as_called(job, rows, expert, tokens, slots, rows.spans(batch)[i])


def round_bank(job: BankJob, method: DataFreeMethod) -> Iterator[SolvedExpert]:
    """Quantize every expert that is not finished with a method without calibration."""
    for number in range(job.bank.experts) if job.schemes else ():
        if job.finished(number):
            continue
        held = job.load(number)
        solved: list[SolvedMatrix] = []
        for product in job.bank.products:
            value = held[product.parameter]
            names = job.names(product.parameter, number)
            parts = (value.T if product.transposed else value).chunk(len(names))
            with job.clock.phase("solve"):
                scheme = job.schemes[product.parameter]
                solved += [SolvedMatrix(n, method.quantize(part, scheme, n)) for n, part in zip(names, parts, strict=True)]
        yield SolvedExpert(job.prefix, number, None, tuple(solved))


def _expert(job: BankJob, rows: RoutedRows, number: int) -> Expert:
    with job.clock.phase("load"):
        return Expert(job.module, job.bank, rows.call, job.load(number))


def _set(weight: Tensor, matrices: Sequence[SolvedMatrix]) -> None:
    at = 0
    for matrix in matrices:
        m = matrix.weight.codes.shape[0]
        weight[at : at + m] = matrix.weight.dequantize(weight.dtype)
        at += m


def _run(job: BankJob, rows: RoutedRows, member: _Member) -> None:
    """Add the expert's outputs. Each token is there once, so the sum of every token is in the order of the experts."""
    assert rows.total is not None
    with job.clock.phase("replay"):
        for part, slot in zip(member.tokens.split(CHUNK_TOKENS), member.slots.split(CHUNK_TOKENS), strict=True):
            if len(part):
                output = member.expert.run(_inputs(rows, member, part), _filled(rows.weights[part, slot]))
                rows.total.add(part, output[: len(part)])


def _run_as_called(job: BankJob, rows: RoutedRows, expert: Expert, tokens: Tensor, slots: Tensor, span: tuple[int, int]) -> None:
    """Add the expert's outputs for tokens of one batch, the inputs [span), with the bits of the model itself."""
    assert rows.total is not None
    count = (span[1] - span[0]) // rows.per_token
    step = CHUNK_TOKENS if rows.call.sums else len(tokens)
    with job.clock.phase("replay"):
        for part, slot in zip(tokens.split(step), slots.split(step), strict=True):
            given, places = rows.call.together(rows.inputs.take(part), (part - span[0]) // rows.per_token, count)
            output = expert.run(given, rows.weights[part, slot])
            rows.total.add(part, output if places is None else output[places])


def _inputs(rows: RoutedRows, member: _Member, part: Tensor) -> Tensor:
    """The inputs of some of an expert's tokens, see ``_taken``.

    If these are all, the same tensor is returned again: what the expert's products return for it is kept as well (``Expert``).
    """
    if len(part) < len(member.tokens):
        return _taken(rows, part)
    if member.inputs is None:
        member.inputs = _taken(rows, part)
    return member.inputs


def _taken(rows: RoutedRows, part: Tensor) -> Tensor:
    """The bank's inputs of tokens ``part``, with zeros behind them, up to a multiple of ``STEP_TOKENS`` tokens. They are copied once."""
    missing = -len(part) % STEP_TOKENS
    if not missing:
        return rows.inputs.take(part)
    taken = rows.inputs.take(torch.cat([part, part[:1].expand(missing)]))
    taken[len(part) :] = 0
    return taken


def _filled(x: Tensor) -> Tensor:
    """x [tokens] with zeros behind it, up to a multiple of ``STEP_TOKENS`` tokens."""
    missing = -len(x) % STEP_TOKENS
    return x if not missing else torch.cat([x, x.new_zeros(missing)])


def _solve(job: BankJob, method: CalibratedMethod, rows: RoutedRows, members: Sequence[_Member], product: Product) -> None:
    """Solve one product of experts, set what their weights have become, and add their stored matrices to what is solved.

    One that cannot be solved is rounded to nearest, without an effect on the others.
    """
    scheme = job.schemes[product.parameter]
    names = {member.number: job.names(product.parameter, member.number) for member in members}
    weights = {member.number: list(member.expert.weight(product).chunk(len(names[member.number]))) for member in members}
    no_tokens = NumericsError("no calibration token is routed to it")
    results: dict[int, list[QuantizedWeight] | NumericsError] = dict.fromkeys(weights, no_tokens)
    if seen := [member for member in members if len(member.tokens)]:
        labels = [f"{job.prefix}.{member.number}.{product.parameter}" for member in seen]
        weight = seen[0].expert.weight(product)
        collectors = method.collectors(len(seen), weight.shape[1], weight.device, finite_only=job.finite_only)
        for member, collector in zip(seen, collectors.each, strict=True):
            _collect(job, rows, member, product, collector)
        with job.clock.phase("factor"):
            factors = collectors.factor(scheme, labels)
        with job.clock.phase("solve"):
            solved = factors.solve([weights[member.number] for member in seen], scheme, labels)
        for member, label, result in zip(seen, labels, solved, strict=True):
            if isinstance(result, NumericsError):
                result = NumericsError(str(result).removeprefix(f"{label}: ").partition(";")[0])
            results[member.number] = result
    for member in members:
        result, parts = results[member.number], zip(names[member.number], weights[member.number], strict=True)
        if isinstance(result, NumericsError):
            with job.clock.phase("solve"):
                matrices = [SolvedMatrix(name, round_to_nearest(part, scheme, name), str(result)) for name, part in parts]
        else:
            matrices = [SolvedMatrix(name, part) for name, part in zip(names[member.number], result, strict=True)]
        _set(member.expert.weight(product), matrices)
        member.solved += matrices


def _collect(job: BankJob, rows: RoutedRows, member: _Member, product: Product, collector: Collector) -> None:
    """Add an expert's inputs of a product to its collector."""
    for part in member.tokens.split(CHUNK_TOKENS):
        with job.clock.phase("replay"):
            x = member.expert.input_of(product, _inputs(rows, member, part))[: len(part)]
        with job.clock.phase("hessian"):
            collector.add(x)
    member.left_out = max(member.left_out, collector.left_out)
