"""What damping is a fraction of, computed in another way than bigq does."""

from __future__ import annotations

import statistics

from torch import Tensor


def usual_by_hand(diagonal: Tensor) -> float:
    """The mean of a Hessian's diagonal, without zeros and the largest twentieth of the others; 1 if all are 0."""
    live = sorted(value for value in diagonal.double().tolist() if value != 0)
    return statistics.fmean(live[: len(live) - len(live) // 20]) if live else 1.0
