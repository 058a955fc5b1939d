"""What folding scales into a block takes (see ``sched.solve.fold``). Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from bigq.kernels.pick import piece
from bigq.methods.base import Scaling
from bigq.sched.plan.shape import BankShape, BlockShape, FoldShape, LinearShape
from bigq.scheme import QuantScheme
from bigq.solver.scaling import SAMPLED_EXPERTS, SAMPLED_TOKENS, TRIALS

#: Bytes that a trial moves for each weight besides the product: it is scaled, its range is found, it is rounded and subtracted.
MOVED_BY_TRIAL = 60
#: Buffers of fp32 of a piece of a weight during a trial.
BUFFERS = 7
FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTerms:
    """The calibration rows, of ``seqlen`` tokens, and those of a batch."""

    rows: int
    seqlen: int
    batch: int
    on_gpu: bool


def fold_phases(
    block: BlockShape, schemes: Mapping[str, QuantScheme], scaling: Scaling, rows: RowTerms, held: int
) -> list[tuple[str, int, dict[str, float], float]]:
    """The phases of folding, as those of ``BlockCost``: a pass over the rows without experts, and the choice. held: bytes of the block.

    Inside experts, see ``inside_phase``.
    """
    folds = used_folds(block, schemes, scaling)
    if not folds:
        return []
    held += _statistics_bytes(folds)
    products = 2.0 * rows.rows * rows.seqlen * sum(linear.m * linear.n for linear in block.linears)
    weights = sum(float(linear.m * linear.n) for fold in folds for linear in _readers(block, fold, schemes))
    chosen = {"single": TRIALS * 2 * SAMPLED_TOKENS * weights}
    return [
        ("replay", held + block.forward.at(rows.batch), {"products": products + rows.rows * block.attention}, 0.0),
        ("scale", held + _choice_bytes(block, folds, schemes, rows), chosen, TRIALS * MOVED_BY_TRIAL * weights),
    ]


def scales_inside(block: BlockShape, bank: BankShape, scaling: Scaling | None) -> bool:
    """Whether scales are folded inside the experts of a bank."""
    return scaling is not None and scaling.takes("expert") and any(fold.bank == bank.name for fold in block.folds)


def inside_phase(experts: int, product: Sequence[LinearShape], held: int, *, on_gpu: bool) -> tuple[str, int, dict[str, float], float]:
    """The choice of the scales inside each of so many experts. product: the last one of an expert. held: bytes that are there besides."""
    n, weights = product[0].n, sum(linear.m * linear.n for linear in product)
    statistics = FP32 * (2 + 2 * SAMPLED_TOKENS) * n
    choice = BUFFERS * FP32 * min(piece(on_gpu=on_gpu), weights)
    flops = {"single": float(experts) * TRIALS * 2 * SAMPLED_TOKENS * weights}
    return "scale", held + statistics + choice, flops, float(experts) * TRIALS * MOVED_BY_TRIAL * weights


def used_folds(block: BlockShape, schemes: Collection[str], scaling: Scaling) -> list[FoldShape]:
    """The folds around Linears with a reader that is quantized. schemes: names of such Linears, those of experts included."""
    banks = {bank.name: [linear.name for linear in bank.linears] for bank in block.banks}
    return [
        fold
        for fold in block.folds
        if fold.divider != "expert"
        and scaling.takes(fold.divider)
        and any(name in schemes or not set(banks.get(name, ())).isdisjoint(schemes) for name in fold.readers)
    ]


def _readers(block: BlockShape, fold: FoldShape, schemes: Collection[str]) -> list[LinearShape]:
    """The Linears that decide the scales of a fold; of experts, some."""
    linears = {linear.name: linear for linear in block.linears}
    found = [linears[name] for name in fold.readers if name in linears and name in schemes]
    for bank in (bank for bank in block.banks if bank.name in fold.readers):
        first = [linear for linear in bank.linears if linear.n == fold.n and linear.name in schemes]
        found += first * min(SAMPLED_EXPERTS, bank.experts)
    return found


def _statistics_bytes(folds: Collection[FoldShape]) -> int:
    """Bytes of what is collected of all inputs: sums, maxima, and sampled tokens, which are joined once."""
    return FP32 * sum((2 + SAMPLED_TOKENS) * fold.n for fold in folds) + FP32 * SAMPLED_TOKENS * max((f.n for f in folds), default=0)


def _choice_bytes(block: BlockShape, folds: Collection[FoldShape], schemes: Collection[str], rows: RowTerms) -> int:
    """Bytes while scales are chosen, besides the block and the statistics: pieces of a weight, and the readers among the experts."""
    own = {linear.name for linear in block.linears}
    readers = [_readers(block, fold, schemes) for fold in folds]
    largest = max((linear.m * linear.n for group in readers for linear in group), default=0)
    experts = max(sum(linear.m * linear.n for linear in group if linear.name not in own) for group in readers)
    return BUFFERS * FP32 * min(piece(on_gpu=rows.on_gpu), largest) + FP32 * experts
