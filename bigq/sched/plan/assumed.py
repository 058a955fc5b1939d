"""What ``bigq plan`` assumes besides the job and this machine, as options. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from bigq.common_options import BUDGETS, RUN
from bigq.errors import UsageError
from bigq.options import Converted, at_least, option, settle
from bigq.size_options import size_given


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """No settings of a job: a launcher says how many processes there are, and a job takes as long as its disk does.

    Raises UsageError if hosts would have different numbers of processes.
    """

    ranks: int = option(1, help="plan for one of so many processes that share the job", group=RUN, placeholder="N", range=at_least(1))
    hosts: int = option(1, help="machines that they run on, as many on each", group=RUN, placeholder="N", range=at_least(1))
    disk_rate: Converted[int | None, int | str | None] = option(
        None,
        help="what a machine reads and writes per second, for the plan's time, such as 40GB",
        group=BUDGETS,
        placeholder="SIZE",
        unset="3 GB",
        convert=size_given,
        range=at_least(1),
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.ranks % self.hosts:
            raise UsageError(f"--hosts {self.hosts}: must divide --ranks {self.ranks}, since each has the same number of processes")
