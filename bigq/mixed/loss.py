"""What is lost at each number of bits, from a survey of the model, and the choice of bits. Pure functions.

Losses of single Linears do not add up: in a model whose other Linears are quantized too, some kinds cost many times what they cost alone.
So the survey measures in that context. All Linears are rounded, and then all but one kind of them in all blocks, or all but those of a run
of blocks. What the last hidden states gain from each exception tells how much that kind, and that run, matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bigq.mixed.groups import Group, capacity, reached, require_budget
from bigq.mixed.knapsack import Item, choose
from bigq.mixed.record import ChosenBits
from bigq.mixed.rules import rules_of

#: The most runs of blocks.
RUNS = 4
#: Tokens of each stream of a survey, if the calibration has so many, and bits of rounded Linears.
TOKENS, ROUNDED = 1024, 4
#: The streams without exceptions: as the model is, and with everything rounded.
PLAIN, ALL = "plain", ""
#: The loss at each number of bits, relative to 3 bits: measured with GPTQ it falls by 4 per bit. 2 bits cost more in a quantized model.
RATIOS: Mapping[int, float] = {2: 6.0, 3: 1.0, 4: 0.25, 8: 4.0**-5}
#: The powers to which the importance of a kind and of a run are taken. A survey by rounding exaggerates that of kinds, and that of runs is
#: inexact: a choice that trusts them fully loses to uniform bits.
TRUST_KIND, TRUST_RUN = 0.5, 0.25
#: The least that a kind or a run matters, as a fraction of the mean per weight: small gains are inexact.
LEAST = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a group is. kind: what it is called in its block; run: the number of its run of blocks."""

    kind: str
    run: int

    @classmethod
    def of(cls, group: Group, blocks_path: str, blocks: int) -> Place | None:
        """None outside the blocks."""
        if not group.name.startswith(f"{blocks_path}."):
            return None
        number, _, kind = group.name.removeprefix(f"{blocks_path}.").partition(".")
        return cls(kind=kind, run=run_of(int(number), blocks))

    @property
    def exceptions(self) -> tuple[str, str]:
        """The names of the kind and of the run."""
        return self.kind, run_name(self.run)


def run_of(block: int, blocks: int) -> int:
    """The number of a block's run."""
    return block * min(RUNS, blocks) // blocks


def run_name(run: int) -> str:
    return f"run {run}"


def streams_of(groups: Sequence[Group], blocks_path: str, blocks: int) -> tuple[str, ...]:
    """The streams of a survey; none if no group's bits are to be chosen."""
    places = [Place.of(group, blocks_path, blocks) for group in groups if not group.fixed]
    exceptions = dict.fromkeys(name for place in places if place is not None for name in place.exceptions)
    return (PLAIN, ALL, *exceptions) if places else ()


def rows_of(rows: int, seqlen: int) -> int:
    """How many of the calibration rows a survey takes."""
    return min(rows, -(-TOKENS // seqlen))


def rates(everything: float, without: Mapping[str, float], weights: Mapping[str, int]) -> dict[str, float]:
    """How much a weight of each kind, or of each run, matters relative to the mean. everything: the change of the hidden states if all is
    rounded; without: if all but these are. weights: of each."""
    gains = {name: max(0.0, everything - change) for name, change in without.items()}
    mean = sum(gains.values()) / max(1, sum(weights[name] for name in gains))
    if mean <= 0:
        return dict.fromkeys(gains, 1.0)
    return {name: max(LEAST, gain / weights[name] / mean) for name, gain in gains.items()}


def choose_bits(groups: Sequence[Group], blocks_path: str, blocks: int, budget: float, changes: Mapping[str, float]) -> ChosenBits:
    """Solve the knapsack. changes: of the last hidden states, by exception; "" without any. Raises UsageError for a budget too small."""
    require_budget(groups, budget)
    places = {group.name: Place.of(group, blocks_path, blocks) for group in groups}
    weights: Counter[str] = Counter()
    for group in groups:
        if (place := places[group.name]) is not None and not group.fixed:
            for name in place.exceptions:
                weights[name] += group.weights
    runs = {run_name(run) for run in range(RUNS)}
    found: dict[str, float] = {}
    for names in ([name for name in weights if name in runs], [name for name in weights if name not in runs]):
        found |= rates(changes[""], {name: changes[name] for name in names}, weights)

    def items(group: Group) -> list[Item]:
        place = places[group.name]
        matters = 1.0 if place is None or group.fixed else found[place.kind] ** TRUST_KIND * found[run_name(place.run)] ** TRUST_RUN
        return [Item(size, group.weights * matters * RATIOS[bits]) for bits, size in group.sizes.items()]

    picked = choose([items(group) for group in groups], capacity(groups, budget))
    bits = {group.name: list(group.sizes)[i] for group, i in zip(groups, picked, strict=True)}
    counts: Counter[int] = Counter()
    for group in groups:
        counts[bits[group.name]] += group.weights
    return ChosenBits(
        rules=rules_of(groups, {group.name: bits[group.name] for group in groups if not group.fixed}, blocks_path),
        budget=budget,
        reached=reached(groups, lambda group: bits[group.name]),
        weights=dict(sorted(counts.items())),
        loss=dict(changes),
    )
