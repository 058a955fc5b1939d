"""Finer phases of a job on a model with experts, for ``bench_slice``: what each part of the work on experts takes.

bigq's own clock times a bank's phases under the names of a block's. This module names them apart (``experts: factor``) and divides
``replay``: gathering an expert's tokens, its forward, scattering its outputs, and the pass over the rows up to the router.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from expert_shapes import OF_EXPERTS

from bigq.model.experts.bank import Expert
from bigq.progress.clock import Clock, Lap
from bigq.sched.rows import tiers
from bigq.sched.solve import block

#: Phases that keep their names: what the computation waits for is summed over the whole job.
SHARED = ("load", "write", "transfer", "copy", "checkpoint")


class ExpertPhases:
    """tokens: of each expert of the last bank, as they are solved. rounded: its matrices that were rounded to nearest."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.rounded = 0
        self._clock: Clock | None = None
        self._inside = False

    def install(self) -> None:
        """Replace what is timed, for the rest of the process."""
        init, phase, solve_bank, record = Clock.__init__, Clock.phase, block.solve_bank, block.record_routed

        def made(clock: Clock, *args: Any, **kwargs: Any) -> None:
            init(clock, *args, **kwargs)
            self._clock = clock

        def named(clock: Clock, name: str) -> Lap:
            return phase(clock, f"{OF_EXPERTS}{name}" if self._inside and name not in SHARED else name)

        def solved(*args: Any) -> Iterator[Any]:
            self._inside, self.tokens, self.rounded = True, [], 0
            try:
                for one in solve_bank(*args):
                    self.tokens.append(one.tokens)
                    self.rounded += sum(matrix.rounded is not None for matrix in one.matrices)
                    yield one
            finally:
                self._inside = False

        def recorded(*args: Any) -> Any:
            assert self._clock is not None
            with self._clock.phase("up to the router"):
                return record(*args)

        Clock.__init__ = made  # type: ignore[method-assign]
        Clock.phase = named  # type: ignore[method-assign]
        block.solve_bank, block.record_routed = solved, recorded
        for kind in (tiers._TensorBuffer, tiers._TimedBuffer):
            for method, name in (("take", "gather"), ("add", "scatter")):
                setattr(kind, method, self._timed(getattr(kind, method), name))
        for method in ("run", "input_of"):
            setattr(Expert, method, self._timed(getattr(Expert, method), "forward"))

    def _timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, timed while a bank is solved."""

        @functools.wraps(call)
        def timed(*args: Any) -> Any:
            if not self._inside:
                return call(*args)
            assert self._clock is not None
            with self._clock.phase(name):
                return call(*args)

        return timed

    def summary(self) -> dict[str, float]:
        """Tokens of the last bank's experts."""
        if not self.tokens:
            return {}
        low, high, middle = min(self.tokens), max(self.tokens), statistics.median(self.tokens)
        return {"experts": len(self.tokens), "fewest": low, "median": middle, "most": high, "rounded": self.rounded}
