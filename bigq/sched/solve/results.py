"""The result for one Linear: solved, or skipped with a reason; and for one expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bigq.progress.clock import Lap
from bigq.progress.records import LinearRecord
from bigq.quantized_weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class Solved:
    """One quantized Linear: its full module name, its weight, and the seconds of its factor and solve (laps of the clock).

    left_out: calibration tokens that were left out of its Hessian because they are not finite. largest_input: the largest magnitude of
    its inputs in calibration, where it was gathered.
    """

    name: str
    weight: QuantizedWeight
    seconds: Mapping[str, Lap]
    left_out: int = 0
    largest_input: float | None = None

    def record(self) -> LinearRecord:
        """The record for the journal and the report."""
        weight = self.weight
        m, n = weight.codes.shape
        return LinearRecord(
            name=self.name,
            bits=weight.scheme.bits,
            group_size=weight.scheme.group_size,
            shape=(m, n),
            loss=weight.loss,
            relative_error=weight.relative_error,
            damping=weight.damping,
            dead_inputs=weight.dead_inputs,
            seconds=self.seconds,
        )


@dataclass(frozen=True, slots=True)
class Skipped:
    """One Linear that cannot be quantized and stays unquantized: its full module name, and the reason."""

    name: str
    reason: str


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
