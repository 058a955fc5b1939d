"""The result of an evaluation: sums over the tokens of each row, and the figures that follow from all of them.

Sums are kept by row, so that figures do not depend on who evaluated which rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of an evaluation.

    tokens: predicted tokens, all but the first of each row. kl: mean KL(baseline ‖ model) per token, in nats. kl_stderr: its standard
    error by row: tokens of one row are not independent, so an error by token is too small. None with a single row, which does not tell.

    The last four are None without a baseline.
    """

    perplexity: float
    tokens: int
    baseline_perplexity: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None


@dataclass(slots=True)
class RowSums:
    """Sums over the predicted tokens of one row, in fp64. nll, baseline_nll, kl: in nats. agreed: tokens of which both models give the
    same one the highest probability.

    The last three stay 0 without a baseline. The fields are numbers that JSON can hold.
    """

    tokens: int = 0
    nll: float = 0.0
    baseline_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(self, targets: Tensor, logits: Tensor, baseline: Tensor | None = None) -> None:
        """Token ids [P] and the logits [P, V] that predict them, of the model and of the baseline."""
        log_p = torch.log_softmax(logits.float(), -1)
        self.tokens += len(targets)
        self.nll -= float(log_p.gather(1, targets[:, None]).double().sum())
        if baseline is None:
            return
        log_q = torch.log_softmax(baseline.float(), -1)
        self.baseline_nll -= float(log_q.gather(1, targets[:, None]).double().sum())
        self.kl += float((log_q.exp() * (log_q - log_p)).double().sum())
        self.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())


def figures(rows: Sequence[RowSums], *, compared: bool) -> Evaluation:
    """The figures of all rows, which have equal lengths. compared: whether there is a baseline."""
    n = sum(row.tokens for row in rows)
    perplexity = _exp(math.fsum(row.nll for row in rows) / n)
    if not compared:
        return Evaluation(perplexity=perplexity, tokens=n)
    means = [row.kl / row.tokens for row in rows]
    return Evaluation(
        perplexity=perplexity,
        tokens=n,
        baseline_perplexity=_exp(math.fsum(row.baseline_nll for row in rows) / n),
        kl=math.fsum(row.kl for row in rows) / n,
        kl_stderr=statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        top1_agreement=sum(row.agreed for row in rows) / n,
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
