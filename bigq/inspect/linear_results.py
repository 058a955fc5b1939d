"""The result of each Linear, from the commits of a job or a conversion: packed with its error, or unquantized with the reason."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bigq.config import JobConfig
from bigq.inspect.bounds import count, number, text
from bigq.io.formats import Format, PackedLinear
from bigq.job.journal import Commit
from bigq.methods import known_method
from bigq.progress.records import has_many_dead_inputs
from bigq.scheme import QuantScheme, scheme_for

#: The maximum number of blocks, and of Linears in a block, that are read.
MAX_BLOCKS, MAX_LINEARS = 2000, 400
#: Linears in a shard that may hold many blocks.
MAX_SHARD_LINEARS = 50_000

BY_RULE = "skipped by --skip"
UNFIT = "too small for the format, or calibration never reaches it"

BLOCK_UNIT = re.compile(r"block-(0|[1-9]\d{0,5})")
_EXPERTS_UNIT = re.compile(r"experts-(0|[1-9]\d{0,5})-(?:0|[1-9]\d{0,5})")
#: The number of an expert in the name of one of its matrices; the last number counts.
_EXPERT = re.compile(r"\.\d+\.(?!.*\.\d+\.)")
_HEAD_UNIT, _SHARD_UNIT = "head-0", re.compile(r"shard-\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearResult:
    """A quantized Linear: its shape [outputs, inputs], its relative error and the damping that was used.

    error, damping: None in a folder that was converted from another tool's checkpoint. block: None for the output head.
    symmetric, asked (the damping that its scheme asks for), stored_bits (of all tensors that the format stores for it): None where
    unknown or not applicable. dead_inputs: inputs that were 0 in every calibration token.

    count: of the Linears that this stands for: a block's experts are summed up, matrix by matrix, with ``*`` for their number in the name.
    error is then their mean, damping and dead_inputs the largest. tokens: calibration tokens of each of these experts; rounded: how many
    of the matrices were rounded to nearest instead of solved.
    """

    block: int | None
    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool | None
    error: float | None
    damping: float | None
    asked: float | None
    stored_bits: int | None
    dead_inputs: int = 0
    count: int = 1
    tokens: tuple[int, ...] = ()
    rounded: int = 0

    @property
    def has_raised_damping(self) -> bool:
        """Whether its factorization needed more damping than its scheme asks for."""
        return self.asked is not None and self.damping is not None and self.damping > self.asked * (1 + 1e-6)

    @property
    def has_many_dead_inputs(self) -> bool:
        """Whether more than a tenth of its inputs were 0 in every calibration token."""
        return has_many_dead_inputs(self.dead_inputs, self.shape[1])

    @property
    def weights(self) -> int:
        return self.count * self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A Linear that stays unquantized. block: None for the output head. wanted: whether a rule skips it."""

    block: int | None
    name: str
    reason: str
    wanted: bool


def linear_results(
    commits: Iterable[Commit], config: JobConfig | None, format: Format | None, float_bits: int
) -> tuple[list[LinearResult], list[LeftOut]]:
    """The quantized Linears, and those that could not be quantized. float_bits: of one number of the source."""
    commits = list(commits)
    linears: list[LinearResult] = []
    left_out: list[LeftOut] = []
    for unit_block, commit in _units(commits):
        many_blocks = _SHARD_UNIT.fullmatch(commit.unit) is not None
        for record in commit.linears[: MAX_SHARD_LINEARS if many_blocks else MAX_LINEARS]:
            full = str(record.get("name", ""))
            block = count(record.get("block")) if many_blocks else unit_block
            if block is not None and block >= MAX_BLOCKS:
                continue
            scheme = None if config is None else scheme_for(full, config.base_scheme, config.rules)
            result = _linear(block, text(_name_in_block(full, block)), record, config, scheme, format, float_bits)
            linears += [] if result is None else [result]
        for full in commit.left_out[:MAX_LINEARS]:
            reason = text((commit.skipped or {}).get(full, UNFIT))
            left_out.append(LeftOut(block=unit_block, name=text(_name_in_block(full, unit_block)), reason=reason, wanted=False))
    return [*linears, *_of_experts(commits, config, format, float_bits)], left_out


def _of_experts(commits: Iterable[Commit], config: JobConfig | None, format: Format | None, float_bits: int) -> Iterator[LinearResult]:
    """The matrices of experts, summed up by block and name."""
    found: dict[tuple[int, str], list[LinearResult]] = {}
    for commit in commits:
        match = _EXPERTS_UNIT.fullmatch(commit.unit)
        if match is None or int(match[1]) >= MAX_BLOCKS:
            continue
        block = int(match[1])
        for record in commit.linears[:MAX_SHARD_LINEARS]:
            full = str(record.get("name", ""))
            scheme = None if config is None else scheme_for(full, config.base_scheme, config.rules)
            name = _EXPERT.sub(".*.", text(_name_in_block(full, block)))
            result = _linear(block, name, record, config, scheme, format, float_bits)
            if result is not None:
                found.setdefault((block, name), []).append(result)
    for _, same in sorted(found.items(), key=lambda item: item[0]):
        yield _summed(same)


def _summed(results: list[LinearResult]) -> LinearResult:
    errors = [result.error for result in results if result.error is not None]
    dampings = [result.damping for result in results if result.damping is not None]
    stored = [result.stored_bits for result in results if result.stored_bits is not None]
    return dataclasses.replace(
        results[0],
        error=sum(errors) / len(errors) if errors else None,
        damping=max(dampings, default=None),
        stored_bits=sum(stored) if len(stored) == len(results) else None,
        dead_inputs=max(result.dead_inputs for result in results),
        count=len(results),
        tokens=tuple(tokens for result in results for tokens in result.tokens),
        rounded=sum(result.rounded for result in results),
    )


def _units(commits: Iterable[Commit]) -> Iterator[tuple[int | None, Commit]]:
    """Each block once, by number; after them the output head, and the shards of a converted folder that are no units of a job."""
    found = {int(match[1]): commit for commit in commits if (match := BLOCK_UNIT.fullmatch(commit.unit))}
    head = [commit for commit in commits if commit.unit == _HEAD_UNIT]
    yield from sorted((i, commit) for i, commit in found.items() if i < MAX_BLOCKS)
    yield from ((None, commit) for commit in head[-1:])
    yield from ((None, commit) for commit in commits if _SHARD_UNIT.fullmatch(commit.unit))


def _name_in_block(full: str, block: int | None) -> str:
    """The name of a Linear within its block: what follows the block's number."""
    _, found, name = f".{full}".partition(f".{block}.")
    return name if found else full


def _linear(
    block: int | None,
    name: str,
    record: Mapping[str, Any],
    config: JobConfig | None,
    scheme: QuantScheme | None,
    format: Format | None,
    float_bits: int,
) -> LinearResult | None:
    """None if the record is invalid."""
    try:
        m, n = record["shape"]
        sizes = [count(value) for value in (m, n, record["bits"])]
        group_size = record["group_size"]
    except (KeyError, TypeError, ValueError):
        return None
    method = None if config is None else known_method(config)
    error, damping = number(record.get("relative_error")), number(record.get("damping"))
    unmeasured = "relative_error" not in record and "damping" not in record
    if None in sizes or type(group_size) is not int or not name or (None in (error, damping) and not unmeasured):
        return None
    outputs, inputs, bits = (value or 0 for value in sizes)
    symmetric = scheme.symmetric if scheme is not None else record["symmetric"] if type(record.get("symmetric")) is bool else None
    tokens = count(record.get("tokens"))
    stored = None
    if format is not None and symmetric is not None:
        groups = 1 if group_size == -1 else inputs // max(group_size, 1)
        packed = PackedLinear(bits=bits, outputs=outputs, inputs=inputs, groups=groups)
        tensors = format.layout(name, packed, symmetric, torch.float32 if float_bits == 32 else torch.float16).values()
        stored = sum(8 * dtype.itemsize * math.prod(shape) for dtype, shape in tensors)
    return LinearResult(
        block=block,
        name=name,
        shape=(outputs, inputs),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        error=error,
        damping=damping,
        asked=None if scheme is None or method is None or not method.calibrated else scheme.damping,
        stored_bits=stored,
        dead_inputs=min(count(record.get("dead_inputs", 0)) or 0, inputs),
        tokens=() if tokens is None else (tokens,),
        rounded=int(record.get("rounded") is not None),
    )
