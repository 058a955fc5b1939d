"""Fits a job to Linears of odd widths: smaller groups for those whose inputs the group size does not divide, and no quantization of those
that the format cannot hold. It does so by rules, which are then the job's own, or by one group size for all Linears where a reader of the
format takes no other. Pure functions.

Only Linears that no rule of the user decides are adapted. Where none fits, the settings are wrong for the model, and where another format
holds what this one cannot, that is the better answer: such jobs are refused (``fit``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.io.formats.base import Misfit, bank_of, fitting_group_size, listed
from bigq.io.formats.fused import fused_linears
from bigq.io.formats.readers_table import BY_FUSED_NAME, ROWS
from bigq.job.fit import FINE, Candidate, misfits, patterns
from bigq.job.rules import deciding_rule, require_sound_rules
from bigq.methods import method_of
from bigq.mixed.groups import Group
from bigq.scheme import Rule
from bigq.vocabulary import FormatName


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A job whose Linears fit, if anything could be done for them.

    rules: those that were added. said: one sentence for each change. instead: a format in which all Linears would fit as they are.
    groups: with ``bits_per_weight``, what gets the same bits.
    """

    config: JobConfig
    rules: tuple[Rule, ...] = ()
    said: tuple[str, ...] = ()
    instead: FormatName | None = None
    groups: tuple[Group, ...] = ()

    def leaves_out(self, name: str) -> bool:
        """Whether the job leaves a Linear unquantized because of an added rule."""
        return self._skips(name) in self.rules

    def skipped_by_user(self, name: str) -> bool:
        """Whether the job leaves a Linear unquantized because of a rule that was given."""
        return (rule := self._skips(name)) is not None and rule not in self.rules

    def _skips(self, name: str) -> Rule | None:
        i = deciding_rule(name, self.config.rules)
        return None if i is None or self.config.rules[i].overrides is not None else self.config.rules[i]


def adapted(linears: Sequence[Candidate], names: Sequence[str], head: str | None, config: JobConfig) -> Adapted:
    """The job with rules under which all Linears fit; unchanged if they do already, or if there are none.

    linears, names, head: as for ``require_fit``. The rules of the job are sound.
    """
    found = misfits(linears, config)
    if not found or not _adaptable(linears, found, config):
        return Adapted(config=config)
    everything = [each.name for each in linears]
    changed, rules, said = _one_size(linears, found, config)
    for size, wanted in _sizes(linears, names, misfits(linears, changed), changed):
        overrides = None if size is None else {"group_size": size}
        tried = (_with_rule(changed, Rule(pattern, overrides)) for pattern in patterns(wanted, everything, names, config))
        fitting = next((each for each in tried if _is_sound(names, head, each)), None)
        if fitting is None:
            return Adapted(config=config)
        rules += [rule for rule in fitting.rules if rule not in changed.rules]
        among = set(wanted)
        reason = listed({name: misfit for name, misfit in found.items() if name in among})
        many = "1 Linear is" if len(wanted) == 1 else f"{len(wanted)} Linears are"
        said.append(f"{reason}: {many} {'left unquantized' if size is None else f'quantized in groups of {size}'}")
        changed = fitting
    if misfits(linears, changed):
        return Adapted(config=config)
    others = (each for each in method_of(config).formats if each not in (config.format, "gguf"))
    instead = next((each for each in others if not misfits(linears, dataclasses.replace(config, format=each))), None)
    return Adapted(config=changed, rules=tuple(rules), said=tuple(said), instead=instead)


def _adaptable(linears: Sequence[Candidate], found: Mapping[str, Misfit], config: JobConfig) -> bool:
    """Whether the misfits are odd widths of some Linears, and none of them what the user asked for."""
    kinds = {misfit.kind for misfit in found.values()}
    # With GGUF, group sizes do not fit because of its blocks, whatever the widths.
    if not kinds <= ({"shape"} if config.format == "gguf" else {"shape", "group_size"}):
        return False
    in_blocks = {each.name for each in linears if "." in each.name}
    of_head = [misfit.kind for name, misfit in found.items() if name not in in_blocks]
    if "shape" in of_head or any(deciding_rule(name, config.rules) is not None for name in found):
        return False
    return any(name not in found and deciding_rule(name, config.rules) is None for name in in_blocks)


def _one_size(linears: Sequence[Candidate], found: Mapping[str, Misfit], config: JobConfig) -> tuple[JobConfig, list[Rule], list[str]]:
    """The job with the largest group size that fits all Linears which the format can hold, if a reader of the format takes only one."""
    wrong = {name: misfit for name, misfit in found.items() if misfit.kind == "group_size"}
    given = config.scheme.group_size
    usual = [each for each in linears if deciding_rule(each.name, config.rules) is None]
    size = fitting_group_size([each.n for each in usual if each.name not in found or each.name in wrong], given)
    if not wrong or size < min(FINE, given) or all(row.mixed for row in ROWS if config.output_format in row.formats):
        return config, [], []
    changed = dataclasses.replace(config, scheme=dataclasses.replace(config.scheme, group_size=size))
    return changed, [], [f"{listed(wrong)}: all Linears are quantized in groups of {size}, since not all readers take several sizes"]


def _sizes(
    linears: Sequence[Candidate], names: Sequence[str], found: Mapping[str, Misfit], config: JobConfig
) -> Iterator[tuple[int | None, list[str]]]:
    """The Linears that need a rule, with the group size that fits, the largest first; None for those that cannot be held.

    What readers load as one is treated alike. Experts have rules of their own, since one pattern for them and others is hard to find.
    """
    by_name = {each.name: each for each in linears}
    by_size: dict[tuple[int, bool], list[str]] = {}
    for together in _together(linears, names, found, config):
        given = config.scheme.group_size
        size = fitting_group_size([by_name[name].n for name in together], given)
        other = config.made.one_size and size != given
        if any(name in found and found[name].kind == "shape" for name in together) or size < min(FINE, given) or other:
            size = 0
        by_size.setdefault((size, bank_of(together[0]) is not None), []).extend(together)
    for (size, _), wanted in sorted(by_size.items(), key=lambda item: (-item[0][0], item[0][1])):
        yield size or None, wanted


def _together(linears: Sequence[Candidate], names: Sequence[str], found: Mapping[str, Misfit], config: JobConfig) -> Iterator[list[str]]:
    """The Linears that do not fit, each with those that readers load as one with it: parts of a fused Linear, or all experts of a bank."""
    fused = fused_linears(names) if config.output_format in BY_FUSED_NAME else ()
    whole = {part: each.name for each in fused if not each.experts for part in each.parts}
    units: dict[str, list[str]] = {}
    for each in linears:
        units.setdefault(bank_of(each.name) or whole.get(each.name, each.name), []).append(each.name)
    yield from (unit for unit in units.values() if any(name in found for name in unit))


def _with_rule(config: JobConfig, rule: Rule) -> JobConfig:
    """The job with one more rule, which decides no Linear that another one decides.

    It is placed so that a resumed job to which some of the options are given again ends with the same rules: as on the command line,
    rules that skip come before the others.
    """
    rules = config.rules
    skips = next((i for i, each in enumerate(rules) if each.overrides is not None), len(rules))
    at = skips if rule.overrides is None else len(rules)
    return dataclasses.replace(config, rules=(*rules[:at], rule, *rules[at:]))


def _is_sound(names: Sequence[str], head: str | None, config: JobConfig) -> bool:
    try:
        require_sound_rules(names, head, config)
    except UsageError:
        return False
    return True
