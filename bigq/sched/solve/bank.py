"""Quantizing a bank of experts, one after the other, each with the inputs of the tokens that are routed to it.

An expert's matrices are solved in the order in which it computes them, so that a later one sees what the quantized earlier ones return.
Then the expert runs once and is added to the bank's output. One expert and one Hessian are in memory at a time; on a GPU a few are, since
the matrices of one expert are too small to fill it: the first matrices of all are solved side by side, then the next ones.

Methods that correct the upstream error see a token at an expert twice: as it is in the quantized model, which routed it there, and as it
is in the unquantized model, whatever that routed it to. There the expert runs with its unquantized weights on both kinds of tokens: on
these for the inputs of its matrices, and on those that the unquantized model routes to it for the bank's output in that model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bigq.errors import NumericsError
from bigq.machine.memory import return_freed_memory
from bigq.machine.ranks import OneProcess, Ranks
from bigq.methods.base import CalibratedMethod, Collector, DataFreeMethod
from bigq.model.experts.bank import Bank, Expert, Product, Rounding
from bigq.model.folding.fold import ExpertFold
from bigq.progress.clock import Clock
from bigq.quantized_weight import QuantizedWeight
from bigq.sched.rows.routed import RoutedRows
from bigq.sched.solve.expert_scales import GivenTokens, is_scaled, scale_inside
from bigq.sched.solve.results import SolvedExpert, SolvedMatrix
from bigq.sched.solve.shared import are_dealt, dealt, gathered
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

    schemes: by parameter; without any, the experts stay unquantized. names: of the matrices that one expert's part of a parameter is stored
    as, in the order of its outputs. load: an expert's parameters, on the device; original: those of the checkpoint, if ``load`` may return
    others. finished: whether ``load`` returns final ones, because an earlier run committed the expert; then it only runs. finite_only:
    leave tokens that are not finite out of Hessians. at_once: experts that are solved side by side. ends: whether an expert is the last of
    its shard; no batch of experts goes beyond it, so that a job that goes on has the same batches. rounded: see ``Expert``; of
    ``run_bank_rows``. ranks: the processes that share the calibration rows. fold: inside each expert, if methods may scale there.
    """

    prefix: str
    module: nn.Module
    bank: Bank
    schemes: Mapping[str, QuantScheme]
    names: Callable[[str, int], Sequence[str]]
    load: Callable[[int], Mapping[str, Tensor]]
    clock: Clock
    original: Callable[[int], Mapping[str, Tensor]] | None = None
    finished: Callable[[int], bool] = lambda e: False
    finite_only: bool = False
    at_once: int = 1
    ends: Callable[[int], bool] = lambda e: False
    rounded: Rounding | None = None
    ranks: Ranks = field(default_factory=OneProcess)
    fold: ExpertFold | None = None

    @property
    def load_original(self) -> Callable[[int], Mapping[str, Tensor]]:
        """An expert's parameters in the checkpoint."""
        return self.load if self.original is None else self.original


def solve_bank(job: BankJob, method: CalibratedMethod, rows: RoutedRows, reference: RoutedRows | None = None) -> Iterator[SolvedExpert]:
    """Quantize every expert that is not finished, and add the outputs of all to ``rows.total``.

    reference: the same tokens in the unquantized model, for methods that correct the upstream error; outputs of the unquantized experts are
    added to its total. An expert that cannot be solved, or that no token is routed to, is rounded to nearest in the same scheme, since
    readers take a bank as a whole or not at all. Raises NumericsError for weights that are not finite.
    """
    for batch, unsolved in _batches(job, rows, reference):
        members = [_member(job, rows, reference, visitors, unsolved) for visitors in batch]
        if unsolved:
            _count_everywhere(job.ranks, members)
            for member in members:
                _scale(job, method, member)
            _close_holes(members)
        for product in job.bank.products if unsolved else ():
            _solve(job, method, members, product)
            _close_holes(members)
        while members:
            member = members.pop(0)
            _run(job, rows, member.now, member.slots)
            if member.solved:
                yield SolvedExpert(job.prefix, member.number, member.tokens, tuple(member.solved), member.left_out)
            del member  # its weights go before the next ones come


@dataclass(frozen=True, slots=True)
class _Visitors:
    """The tokens that are routed to an expert, and their positions (see ``RoutedRows.routes``).

    before: the same in the unquantized model.
    """

    number: int
    tokens: Tensor
    slots: Tensor
    before: tuple[Tensor, Tensor] | None


@dataclass(slots=True)
class _Visited:
    """An expert as it is in one model, and tokens at it. inputs: their rows once they are gathered, unless there are more than
    ``CHUNK_TOKENS``."""

    rows: RoutedRows
    expert: Expert
    tokens: Tensor
    inputs: Tensor | None = None

    def input_of(self, product: Product, part: Tensor) -> Tensor:
        """The inputs of a product for some of the tokens."""
        return self.expert.input_of(product, self.taken(part))[: len(part)]

    def taken(self, part: Tensor) -> Tensor:
        """The inputs of some of the tokens, see ``_taken``.

        If these are all, the same tensor is returned again: what the expert's products return for it is kept as well (``Expert``).
        """
        if len(part) < len(self.tokens):
            return _taken(self.rows, part)
        if self.inputs is None:
            self.inputs = _taken(self.rows, part)
        return self.inputs


@dataclass(slots=True)
class _Member:
    """An expert, and what is solved of it. now: in the quantized model; slots: the positions of its tokens. before: the same tokens in the
    unquantized model. tokens: how many of all ranks are routed to it, once it is known."""

    number: int
    now: _Visited
    slots: Tensor
    before: _Visited | None = None
    tokens: int = 0
    solved: list[SolvedMatrix] = field(default_factory=list)
    left_out: int = 0


def _batches(job: BankJob, rows: RoutedRows, reference: RoutedRows | None) -> Iterator[tuple[list[_Visitors], bool]]:
    """All experts in order: those to be solved in batches, the others one by one; and which they are."""
    before = itertools.repeat(None) if reference is None else (parts[0] for _, parts in reference.routes(job.bank, None))
    batch: list[_Visitors] = []
    for (number, (routed,)), routed_before in zip(rows.routes(job.bank, None), before, strict=False):
        visitors = _Visitors(number, *routed, routed_before)
        unsolved = number < job.bank.experts and bool(job.schemes) and not job.finished(number)
        if batch and (not unsolved or len(batch) == job.at_once or job.ends(batch[-1].number)):
            yield batch, True
            batch = []
        if unsolved:
            batch.append(visitors)
        else:
            yield [visitors], False
    if batch:
        yield batch, True


def _member(job: BankJob, rows: RoutedRows, reference: RoutedRows | None, visitors: _Visitors, unsolved: bool) -> _Member:
    """An expert with its parameters. In the unquantized model it runs at once, on the tokens that are routed to it there."""
    held = _loaded(job, job.load, visitors.number)
    member = _Member(visitors.number, _Visited(rows, Expert(job.module, job.bank, rows.call, held), visitors.tokens), visitors.slots)
    if reference is not None and visitors.before is not None:
        if unsolved:  # its weights change in their place
            held = {name: value.clone() for name, value in held.items()}
        elif job.schemes and visitors.number < job.bank.experts:
            held = _loaded(job, job.load_original, visitors.number)
        expert = Expert(job.module, job.bank, reference.call, held)
        tokens, slots = visitors.before
        _run(job, reference, _Visited(reference, expert, tokens), slots)
        member.before = _Visited(reference, expert, visitors.tokens) if unsolved else None
    return member


def _scale(job: BankJob, method: CalibratedMethod, member: _Member) -> None:
    """Scale the inputs of an expert's last matrix, if the method does so. In the unquantized model it has run already."""
    fold, scaling = job.fold, method.scaling
    if fold is None or scaling is None or not is_scaled(fold, scaling, member.tokens):
        return
    experts = [visited.expert for visited in (member.now, member.before) if visited is not None]
    given = GivenTokens(count=member.tokens, parts=_parts(member), inputs=functools.partial(member.now.input_of, fold.reader))
    scale_inside(fold, scaling, job.schemes[fold.reader.parameter], experts, given, job.clock, job.ranks)


def _parts(member: _Member) -> Sequence[Tensor]:
    """An expert's tokens, as many as are computed at a time. None where all of them are at other ranks: no expert runs on no token."""
    return member.now.tokens.split(CHUNK_TOKENS) if len(member.now.tokens) else ()


def _close_holes(members: Sequence[_Member]) -> None:
    """Return what is free between buffers in the heap, which would add up over experts. With few tokens it is not worth its time."""
    if any(len(member.now.tokens) > CHUNK_TOKENS for member in members):
        return_freed_memory()


def _count_everywhere(ranks: Ranks, members: Sequence[_Member]) -> None:
    counts = [len(member.now.tokens) for member in members]
    of_all: list[Any] = ranks.everyone(counts)
    for member, *numbers in zip(members, *of_all, strict=True):
        member.tokens = sum(numbers)


def run_bank_rows(job: BankJob, rows: RoutedRows, batch: int | None = None) -> None:
    """Add the outputs of all experts, with the parameters that ``job.load`` returns, to ``rows.total``.

    batch: rows whose tokens an expert takes at once, as the model would; None as ``solve_bank`` does.
    """
    for number, parts in rows.routes(job.bank, batch):
        if any(len(tokens) for tokens, _ in parts):
            expert = Expert(job.module, job.bank, rows.call, _loaded(job, job.load, number), job.rounded)
            for i, (tokens, slots) in enumerate(parts):
                if batch is None:
                    _run(job, rows, _Visited(rows, expert, tokens), slots)
                elif len(tokens):
                    _run_as_called(job, rows, expert, tokens, slots, rows.spans(batch)[i])


def run_bank_variants(
    job: BankJob, streams: Sequence[RoutedRows], variants: Callable[[int, Mapping[str, Tensor]], Callable[[int], Mapping[str, Tensor]]]
) -> None:
    """Add the outputs of all experts to the total of each of several streams, which may see other parameters. Each expert is loaded once.

    variants: from an expert's number and what ``job.load`` returns for it, its parameters in each stream.
    """
    for each in zip(*(rows.routes(job.bank, None) for rows in streams), strict=True):
        number = each[0][0]
        visits = [(i, tokens, slots) for i, (_, ((tokens, slots),)) in enumerate(each) if len(tokens)]
        parameters = variants(number, _loaded(job, job.load, number)) if visits else None
        for i, tokens, slots in visits:
            assert parameters is not None
            expert = Expert(job.module, job.bank, streams[i].call, parameters(i))
            _run(job, streams[i], _Visited(streams[i], expert, tokens), slots)


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


def _loaded(job: BankJob, load: Callable[[int], Mapping[str, Tensor]], number: int) -> Mapping[str, Tensor]:
    with job.clock.phase("load"):
        return load(number)


def _set(weight: Tensor, matrices: Sequence[SolvedMatrix]) -> None:
    at = 0
    for matrix in matrices:
        m = matrix.weight.codes.shape[0]
        weight[at : at + m] = matrix.weight.dequantize(weight.dtype)
        at += m


def _run(job: BankJob, rows: RoutedRows, visited: _Visited, slots: Tensor) -> None:
    """Add the expert's outputs. Each token is there once, so the sum of every token is in the order of the experts."""
    assert rows.total is not None
    with job.clock.phase("replay"):
        for part, slot in zip(visited.tokens.split(CHUNK_TOKENS), slots.split(CHUNK_TOKENS), strict=True):
            if len(part):
                output = visited.expert.run(visited.taken(part), _filled(rows.weights[part, slot]))
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


def _solve(job: BankJob, method: CalibratedMethod, members: Sequence[_Member], product: Product) -> None:
    """Solve one product of experts, set what their weights have become, and add their stored matrices to what is solved.

    One that cannot be solved is rounded to nearest, without an effect on the others. Each of several ranks solves some of the experts.
    """
    scheme = job.schemes[product.parameter]
    names = {member.number: job.names(product.parameter, member.number) for member in members}
    weights = {member.number: list(member.now.expert.weight(product).chunk(len(names[member.number]))) for member in members}
    no_tokens = NumericsError("no calibration token is routed to it")
    results: dict[int, list[QuantizedWeight] | NumericsError] = dict.fromkeys(weights, no_tokens)
    if seen := [member for member in members if member.tokens]:
        labels = [f"{job.prefix}.{member.number}.{product.parameter}" for member in seen]
        weight = seen[0].now.expert.weight(product)
        collectors = method.collectors(len(seen), weight.shape[1], weight.device, finite_only=job.finite_only)
        for member, collector in zip(seen, collectors.each, strict=True):
            _collect(job, member, product, collector)
        mine, solved = dealt(len(seen), scheme, job.ranks), list[list[QuantizedWeight] | NumericsError]()
        with job.clock.phase("hessian"):
            collectors.reduce(job.ranks, dealt=are_dealt(scheme, job.ranks))
        for member, collector in zip(seen, collectors.each, strict=True):
            member.left_out = max(member.left_out, collector.left_out)
        if mine:
            with job.clock.phase("factor"):
                factors = collectors.only(mine).factor(scheme, labels[mine.start : mine.stop])
            with job.clock.phase("solve"):
                solved = factors.solve([weights[seen[i].number] for i in mine], scheme, [labels[i] for i in mine])
        with job.clock.phase("solve"):
            solved = gathered(solved, len(seen), scheme, weight.device, job.ranks)
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
        _set(member.now.expert.weight(product), matrices)
        member.solved += matrices


def _collect(job: BankJob, member: _Member, product: Product, collector: Collector) -> None:
    """Add an expert's inputs of a product to its collector."""
    for part in _parts(member):
        with job.clock.phase("replay"):
            before = None if member.before is None else member.before.input_of(product, part)
            x = member.now.input_of(product, part)
        with job.clock.phase("hessian"):
            collector.add(x, before)
