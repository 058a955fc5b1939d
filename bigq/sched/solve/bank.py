"""Quantizing a bank of experts, one after the other, each with the inputs of the tokens that are routed to it.

An expert's matrices are solved in the order in which it computes them, so that a later one sees what the quantized earlier ones return.
Then the expert runs once and is added to the bank's output. One expert and one Hessian are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bigq.errors import NumericsError
from bigq.methods.base import CalibratedMethod
from bigq.model.experts.bank import Bank, BankCall, Expert, Product, routed
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.rtn import round_to_nearest

#: Tokens of an expert that are computed at a time, so that memory does not depend on how many are routed to it.
CHUNK_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class BankJob:
    """A bank to be quantized. prefix: its module's full name. schemes: by parameter. load: an expert's parameters, on the device."""

    prefix: str
    module: nn.Module
    bank: Bank
    schemes: Mapping[str, QuantScheme]
    method: CalibratedMethod
    load: Callable[[int], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class SolvedMatrix:
    """One of an expert's matrices. rounded: why it was rounded to nearest instead of solved; None if it was solved."""

    product: Product
    weight: QuantizedWeight
    rounded: str | None = None


@dataclass(frozen=True, slots=True)
class SolvedExpert:
    """One expert of a bank. tokens: how many calibration tokens were routed to it."""

    number: int
    tokens: int
    matrices: tuple[SolvedMatrix, ...]


def solve_bank(job: BankJob, rows: BankCall, total: Tensor) -> Iterator[SolvedExpert]:
    """Quantize every expert, and add its output to ``total`` [tokens, d], which has the dtype of the bank's sum.

    rows: the calibration tokens at the bank. An expert that cannot be solved, or that no token is routed to, is rounded to nearest in
    the same scheme, since readers take a bank as a whole or not at all. Raises NumericsError for weights that are not finite.
    """
    for number, tokens, slots in routed(rows.experts, job.bank.experts):
        expert = Expert(job.module, job.bank, rows, job.load(number))
        matrices = []
        for product in job.bank.products:
            solved = _solve(job, expert, number, product, rows.tokens, tokens)
            weight = expert.weight(product)
            weight.copy_(solved.weight.dequantize(weight.dtype))
            matrices.append(solved)
        for part, slot in zip(tokens.split(CHUNK_TOKENS), slots.split(CHUNK_TOKENS), strict=True):
            if len(part):
                total.index_add_(0, part, expert.run(rows.tokens[part], rows.weights[part, slot]))
        yield SolvedExpert(number, len(tokens), tuple(matrices))


def _solve(job: BankJob, expert: Expert, number: int, product: Product, hidden: Tensor, tokens: Tensor) -> SolvedMatrix:
    label = f"{job.prefix}.{number}.{product.parameter}"
    weight, scheme = expert.weight(product), job.schemes[product.parameter]
    try:
        if not len(tokens):
            raise NumericsError(f"{label}: no calibration token is routed to it")
        collector = job.method.collector(weight.shape[1], weight.device, finite_only=False)
        for part in tokens.split(CHUNK_TOKENS):
            collector.add(expert.input_of(product, hidden[part]))
        factor = collector.finish(label).factor(scheme, label, last=True)
        return SolvedMatrix(product, factor.solve([weight], scheme, label)[0])
    except NumericsError as error:
        reason = str(error).removeprefix(f"{label}: ").partition(";")[0]
    return SolvedMatrix(product, round_to_nearest(weight, scheme, label), reason)


def bank_total(bank: Bank, rows: BankCall) -> Tensor:
    """Where the outputs of a bank's experts are added up: zeros [tokens, d]."""
    return torch.zeros(rows.tokens.shape, dtype=bank.total, device=rows.tokens.device)
