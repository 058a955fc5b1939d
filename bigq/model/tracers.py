"""Following data through a block: what is computed from a marked tensor carries the mark."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class DataflowTracer(Protocol):
    """Traces the dataflow in a block."""

    def begin(self, hidden: Tensor) -> Tensor:
        """Hidden states that ``is_sum`` works on."""

    def mark(self, y: Tensor) -> Tensor:
        """A tensor like y with a mark that spreads to everything computed from it."""

    def is_marked(self, x: Tensor) -> bool:
        """Whether x has the mark."""

    def is_sum(self, total: Tensor, a: Tensor, b: Tensor) -> bool:
        """Whether total was computed as a + b."""

    def same(self, a: Tensor, b: Tensor) -> bool:
        """Whether two ways of computing something agree."""


class NanTracer:
    """Traces by values, for loaded blocks: NaN is the mark, and equal bits mean equal computations."""

    def begin(self, hidden: Tensor) -> Tensor:
        return hidden

    def mark(self, y: Tensor) -> Tensor:
        return torch.full_like(y, float("nan"))

    def is_marked(self, x: Tensor) -> bool:
        return bool(torch.isnan(x).any())

    def is_sum(self, total: Tensor, a: Tensor, b: Tensor) -> bool:
        return torch.equal(total, a + b)

    def same(self, a: Tensor, b: Tensor) -> bool:
        return torch.equal(a, b)


class GradientTracer:
    """Traces by gradients, for tensors on meta, with gradients enabled. ``same`` can only compare shapes."""

    def begin(self, hidden: Tensor) -> Tensor:
        return self.mark(hidden)

    def mark(self, y: Tensor) -> Tensor:
        return y.detach().requires_grad_().clone()

    def is_marked(self, x: Tensor) -> bool:
        return x.requires_grad

    def is_sum(self, total: Tensor, a: Tensor, b: Tensor) -> bool:
        made = total.grad_fn
        if made is None or made.name() != "AddBackward0":
            return False
        return [source for source, _ in made.next_functions] in ([a.grad_fn, b.grad_fn], [b.grad_fn, a.grad_fn])

    def same(self, a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape
