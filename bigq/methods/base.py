"""The interface of a quantization method, between the loop over units and the arithmetic of one Linear.

A method sees groups of Linears that share an input. A ``DataFreeMethod`` uses only weights. A ``CalibratedMethod`` receives the
group's inputs batch by batch (``Collector.add``), turns the accumulated sums into a ``Solver``, and solves the group's Linears with it:

    collector = method.collector(n, device, finite_only=…)
    collector.add(x, reference)                 once per batch of calibration rows
    collector.reduce(reduction)                 once, where several processes share the rows
    solver = collector.finish(label)            frees or takes over the accumulators
    factor = solver.factor(scheme, label, …)    once per ``solver.kind(scheme)``
    factor.solve(weights, scheme, label)        one pass over all Linears of one scheme

Several groups of one shape, as the experts of a bank have them, go through ``Collectors`` and ``Factors`` in the same way. A method that
can solve them side by side overrides ``CalibratedMethod.collectors``.

The loop does everything else: it replays rows, handles Linears that fail, measures time and packs. A new method is a new file
here, a line in ``bigq.methods.METHODS``, and its name in ``bigq.vocabulary``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from bigq.errors import NumericsError
from bigq.kernels.cholesky import Sharing
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.hessian import Reduction
from bigq.solver.scaling import InputStatistics, Reader
from bigq.vocabulary import FORMAT_NAMES, FormatName, MethodName


class Factor(Protocol):
    """Solves Linears whose schemes have one kind (see ``Solver.kind``)."""

    def solve(self, weights: list[Tensor], scheme: QuantScheme, label: str) -> list[QuantizedWeight]:
        """Quantize the weights [m_i, n] of Linears that share the input. Raises NumericsError, which begins with ``label``."""


class Solver(Protocol):
    """The statistics of one group's input."""

    def kind(self, scheme: QuantScheme) -> Hashable:
        """The kind of a scheme. Schemes of one kind share a factor. Kinds of one solver can be sorted."""

    def factor(self, scheme: QuantScheme, label: str, *, last: bool, sharing: Sharing | None = None) -> Factor:
        """The factor for the scheme's kind. Raises NumericsError, which begins with ``label``.

        last: no other factor will be asked for, so the accumulators' memory may be overwritten. sharing: processes that have the same sums,
        and ask for the same factor at the same time.
        """


class Collector(Protocol):
    """Accumulates the inputs of one group over the calibration rows."""

    @property
    def left_out(self) -> int:
        """Tokens that were left out because they are not finite."""

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Add the inputs [..., n] of a batch.

        reference: the same tokens' inputs in the unquantized model, for methods with ``passes`` 2.
        """

    def reduce(self, reduction: Reduction) -> None:
        """Add up the shares of several processes, each of which saw some of the rows (see ``bigq.machine.ranks``)."""

    def finish(self, label: str) -> Solver:
        """End the accumulation. Raises NumericsError, which begins with ``label``, if tokens were added, but none is usable."""


class Factors(Protocol):
    """Solves groups of Linears of the same shapes, each with its own factor."""

    def solve(
        self, weights: Sequence[list[Tensor]], scheme: QuantScheme, labels: Sequence[str]
    ) -> list[list[QuantizedWeight] | NumericsError]:
        """For each group the results of ``Factor.solve``, or why it failed, there or before."""


class Collectors(Protocol):
    """Collectors of groups of one shape. each: those of single groups."""

    @property
    def each(self) -> Sequence[Collector]: ...

    def reduce(self, reduction: Reduction, *, dealt: bool) -> None:
        """Add up the shares of several processes. dealt: each process goes on with those of the groups that are its own alone, so it needs
        no other sums."""

    def only(self, span: range) -> Collectors:
        """Those of a span of the groups, at least one. The others are not used any more."""

    def factor(self, scheme: QuantScheme, labels: Sequence[str]) -> Factors:
        """End the accumulation. A group that fails does not change the others."""


#: What divides: a norm, a Linear, or a matrix of an expert, for this expert's last one.
Divider = Literal["norm", "linear", "expert"]


class Scaling(Protocol):
    """How the scales of inputs are chosen that the module before divides by (``bigq.model.folding``)."""

    def takes(self, divider: Divider) -> bool:
        """Whether something of this kind may be what divides."""

    def choose(self, inputs: InputStatistics, readers: Sequence[Reader], channels: Tensor) -> Tensor:
        """The scales [count] of one input. readers: the Linears that read it. channels: int64 [n], which scale each feature takes."""


class Method(ABC):
    """The common part of all methods.

    name: the value of ``--method``. title: for reports and model cards. passes: how often the calibration rows pass through a block
    at each step: 0 without calibration, 1 through the quantized model, 2 through the unquantized model too. error_meaning: the
    definition of a Linear's relative error, in sentences for reports. formats: those that can hold the method's results; ``quantize``
    and ``plan`` refuse others. scaling: of inputs before a block is solved, or None.
    """

    name: ClassVar[MethodName]
    title: ClassVar[str]
    passes: ClassVar[int]
    error_meaning: ClassVar[str]
    formats: ClassVar[tuple[FormatName, ...]] = FORMAT_NAMES
    scaling: Scaling | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the method needs calibration rows."""
        return self.passes > 0


class DataFreeMethod(Method):
    """A method that uses only weights."""

    passes = 0

    @abstractmethod
    def quantize(self, weight: Tensor, scheme: QuantScheme, label: str) -> QuantizedWeight:
        """Quantize one weight [m, n]. Raises NumericsError, which begins with ``label``."""


class CalibratedMethod(Method):
    """A method that uses the inputs of Linears. hessians: whether it needs products of all pairs of inputs, and a factor of these; else
    something of each input by itself."""

    hessians: ClassVar[bool] = True

    @abstractmethod
    def collector(self, n: int, device: torch.device, *, finite_only: bool) -> Collector:
        """An accumulator for inputs of n features. finite_only: leave out tokens that hold NaN or Inf."""

    def collectors(self, count: int, n: int, device: torch.device, *, finite_only: bool) -> Collectors:
        """Accumulators for ``count`` groups with inputs of n features."""
        return OneByOne([self.collector(n, device, finite_only=finite_only) for _ in range(count)])

    def for_head(self) -> CalibratedMethod:
        """The method for the output head, whose inputs are known only in the quantized model."""
        return self


_T = TypeVar("_T")


def _or_error(result: Callable[[], _T]) -> _T | NumericsError:
    """A result, or the error instead of it."""
    try:
        return result()
    except NumericsError as error:
        return error


@dataclass(frozen=True, slots=True)
class OneByOne:
    """``Collectors`` of groups that are factored and solved one after the other."""

    each: Sequence[Collector]

    def reduce(self, reduction: Reduction, *, dealt: bool) -> None:
        for each in self.each:
            each.reduce(reduction)

    def only(self, span: range) -> OneByOne:
        return OneByOne(self.each[span.start : span.stop])

    def factor(self, scheme: QuantScheme, labels: Sequence[str]) -> FactorsOneByOne:
        def factor(collector: Collector, label: str) -> Factor:
            return collector.finish(label).factor(scheme, label, last=True)

        return FactorsOneByOne([_or_error(partial(factor, *pair)) for pair in zip(self.each, labels, strict=True)])


@dataclass(frozen=True, slots=True)
class FactorsOneByOne:
    """``Factors`` of such groups. each: the factor of a group, or why it has none."""

    each: Sequence[Factor | NumericsError]

    def solve(
        self, weights: Sequence[list[Tensor]], scheme: QuantScheme, labels: Sequence[str]
    ) -> list[list[QuantizedWeight] | NumericsError]:
        def solve(factor: Factor | NumericsError, group: list[Tensor], label: str) -> list[QuantizedWeight]:
            if isinstance(factor, NumericsError):
                raise factor
            return factor.solve(group, scheme, label)

        return [_or_error(partial(solve, *given)) for given in zip(self.each, weights, labels, strict=True)]
