"""Checks a job's rules against the names of its model's Linears: how many each decides, and which are refused. Pure functions.

A rule that decides nothing is a mistake. So is a rule that splits a fused Linear, which readers load as one: vLLM fails on most of these
and loads some with wrong weights.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.io.formats.fused import FusedLinear, fused_linears
from bigq.io.formats.readers_table import BY_FUSED_NAME, Kind
from bigq.job.command import rule_option
from bigq.scheme import QuantScheme, Rule, scheme_for

#: The number of Linears that a refusal lists.
LISTED = 8
#: Prefixes of patterns for other quantizers.
_FOREIGN = re.compile(r"re:|[+-]:|\^")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleCount:
    """How many Linears a rule decides, without those that an earlier rule matches."""

    rule: Rule
    linears: int


def deciding_rule(name: str, rules: Sequence[Rule]) -> int | None:
    """The index of the first rule that matches, or None."""
    return next((i for i, rule in enumerate(rules) if re.match(rule.pattern, name)), None)


def rule_counts(names: Iterable[str], rules: Sequence[Rule]) -> tuple[RuleCount, ...]:
    """One per rule, in order. names: of all Linears that the job could quantize."""
    counts = Counter(deciding_rule(name, rules) for name in names)
    return tuple(RuleCount(rule=rule, linears=counts[i]) for i, rule in enumerate(rules))


def count_words(counts: Iterable[RuleCount]) -> list[str]:
    """The counts as text, such as ["6 Linears at 8 bits", "12 left out"]; empty without rules."""
    summed: dict[str, int] = {}
    for count in counts:
        words = "left out" if count.rule.overrides is None else " ".join(_words(count.rule.overrides))
        summed[words] = summed.get(words, 0) + count.linears
    left_out = summed.pop("left out", 0)
    found = [f"{linears} {words}" for words, linears in [*summed.items(), ("left out", left_out)] if linears]
    if found:
        number, _, rest = found[0].partition(" ")
        found[0] = f"{number} Linear{'' if number == '1' else 's'} {rest}"
    return found


def _words(overrides: Mapping[str, int | float | bool | str]) -> Iterator[str]:
    if not overrides:
        yield "as the rest"
    for name, value in overrides.items():
        if name == "bits":
            yield f"at {value} bits"
        elif name == "group_size":
            yield "in whole rows" if value == -1 else f"in groups of {value}"
        elif name in ("sym", "symmetric"):
            yield "symmetric" if value else "asymmetric"
        elif isinstance(value, bool):
            yield f"{'with' if value else 'without'} {name.replace('_', '-')}"
        else:
            yield f"with {name.replace('_', '-')} {value}"


def require_sound_rules(names: Sequence[str], head: str | None, config: JobConfig) -> None:
    """Raise UsageError for the first rule that decides nothing, then for the first that splits a fused Linear.

    names: module names of the Linears in blocks. head: that of the output head, if it is a Linear.
    """
    if not config.rules:
        return
    by_fused_name = BY_FUSED_NAME.get(config.output_format)
    readers = None if by_fused_name is None else _Readers.of(names, config.base_scheme, by_fused_name)
    _require_effect(names, head, config, readers)
    found = None if readers is None else readers.split(config.rules)
    if readers is not None and found is not None:
        raise UsageError(readers.refusal(found, config.rules))


def splits(names: Sequence[str], base: QuantScheme, rules: Sequence[Rule]) -> bool:
    """Whether rules give the parts of a fused Linear different bits, group sizes or symmetry, or skip only some of them."""
    return bool(rules) and _Readers.of(names, base, by_fused_name=False).split(rules) is not None


# Rules that decide nothing.


def _require_effect(names: Sequence[str], head: str | None, config: JobConfig, readers: _Readers | None) -> None:
    decided = [*names, *([head] if head is not None and config.lm_head else [])]
    owners: dict[str, Rule] = {}
    for rule in config.rules:
        matched = [name for name in decided if re.match(rule.pattern, name)]
        if not matched:
            raise UsageError(_no_match(rule, names, head, config, readers))
        fresh = [name for name in matched if name not in owners]
        if not fresh:
            deciding = [id(owners[name]) for name in matched]
            raise UsageError(_hidden(rule, [each for each in config.rules if id(each) in deciding]))
        owners |= dict.fromkeys(fresh, rule)


def _no_match(rule: Rule, names: Sequence[str], head: str | None, config: JobConfig, readers: _Readers | None) -> str:
    option = rule_option(rule)
    if head is not None and not config.lm_head and re.match(rule.pattern, head):
        if rule.overrides is None:
            return f"{option}: the output head {head} stays unquantized unless --lm-head is given; leave out this --skip"
        return f"{option}: matches only the output head {head}, which is quantized with --lm-head; add --lm-head or leave out this rule"
    said = f"{option}: matches no Linear (patterns match from the start of a name such as {names[0]})"
    exact = _completed(rule.pattern, names)
    candidate = exact or _near(rule.pattern, names)
    if candidate is None:
        last = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        return f"{said}; Linears are called {', '.join(last[:LISTED])}{' …' if len(last) > LISTED else ''}"
    if readers is not None:
        changed = _replaced(config.rules, rule, candidate)
        found = readers.split(changed)
        if found is not None and found.rule is not None and found.rule.pattern == candidate:
            wider = readers.wider(found, changed)
            if wider is not None:
                parts = found.fused.said
                if exact is None:
                    return f"{said}; did you mean '{wider}'? Readers load {parts} as one Linear"
                return f"{said}; '{candidate}' would match, but readers load {parts} as one Linear: use '{wider}'"
    return f"{said}; did you mean '{candidate}'?" if exact is None else f"{said}; use '{candidate}'"


def _completed(pattern: str, names: Sequence[str]) -> str | None:
    """The pattern without the prefix of another quantizer, or with the ``.*`` that it lacks; None where neither matches some names."""
    bare = _FOREIGN.sub("", pattern, count=1) if _FOREIGN.match(pattern) else pattern
    return _first_match([bare, f".*{bare}"], names)


def _near(pattern: str, names: Sequence[str]) -> str | None:
    """A guess: a pattern for the Linears whose last name is much like a word of the pattern."""
    last = sorted({name.rpartition(".")[2] for name in names})
    words = reversed(re.findall(r"\w+", pattern))
    return _first_match([f".*{close}" for word in words for close in difflib.get_close_matches(word, last, n=1)], names)


def _first_match(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    return next((each for each in candidates if _is_rule(each) and any(re.match(each, name) for name in names)), None)


def _hidden(rule: Rule, first: Sequence[Rule]) -> str:
    option = rule_option(rule)
    before = _and([rule_option(owner) for owner in first])
    said = f"{option}: has no effect, since {before} {'decides' if len(first) == 1 else 'decide'} all Linears that it matches"
    if rule.overrides is not None and any(owner.overrides is not None and owner.pattern != rule.pattern for owner in first):
        return f"{said}; give it first, or leave it out"
    return f"{said}; leave it out"


# Rules that split fused Linears.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """A fused Linear that rules split. rule: the one to change; parts: whether the parts differ, or only the fused name does."""

    fused: FusedLinear
    rule: Rule | None
    parts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Readers:
    """How readers apply rules. names: of the Linears in blocks; base: the scheme without rules.

    by_fused_name: whether readers look rules up by the fused Linear's name.
    """

    names: Sequence[str]
    base: QuantScheme
    by_fused_name: bool
    fused: tuple[FusedLinear, ...]

    @classmethod
    def of(cls, names: Sequence[str], base: QuantScheme, by_fused_name: bool) -> _Readers:
        return cls(names=names, base=base, by_fused_name=by_fused_name, fused=fused_linears(names))

    def split(self, rules: Sequence[Rule]) -> _Split | None:
        """The first fused Linear that rules split."""
        for linear in self.fused:
            kinds = {self._kind(part, rules) for part in linear.parts}
            differ = len(kinds) > 1
            # Readers do not look up a Linear that is not packed, but they do look up experts.
            looked_up = self.by_fused_name and (linear.experts or kinds != {None})
            unseen = looked_up and self._kind(linear.name, rules) not in kinds
            if differ or unseen:
                members = linear.parts if differ else (*linear.parts, linear.name)
                deciders = [deciding_rule(member, rules) for member in members]
                partial = [i for i in deciders if i is not None and deciders.count(i) < len(deciders)]
                return _Split(fused=linear, rule=rules[min(partial)] if partial else None, parts=differ)
        return None

    def _kind(self, name: str, rules: Sequence[Rule]) -> Kind | None:
        scheme = scheme_for(name, self.base, tuple(rules))
        return None if scheme is None else Kind.of(scheme)

    def refusal(self, found: _Split, rules: Sequence[Rule]) -> str:
        parts, whole = found.fused.said, found.fused.name.rpartition(".")[2]
        option = "--rule" if found.rule is None else rule_option(found.rule)
        wider = self.wider(found, rules)
        remedy = f"use '{wider}'" if wider is not None else f"give {parts} the same bits, group_size and sym, or skip all of them"
        if found.parts:
            one = "together" if found.fused.experts else f"as one Linear, {whole}"
            return f"{option}: readers such as vLLM load {parts} {one}, which needs one scheme; {remedy}"
        return f"{option}: vLLM looks for {parts} under the name {whole}, for which the rules say something else; {remedy}"

    def wider(self, found: _Split, rules: Sequence[Rule]) -> str | None:
        """A replacement for the rule's pattern that decides the same Linears and splits no fused Linear, or None."""
        if found.rule is None:
            return None
        together = _alternatives(found.fused, self.by_fused_name)
        last_names = () if found.fused.experts else found.fused.last_names
        pattern, i = found.rule.pattern, next(i for i, rule in enumerate(rules) if rule is found.rule)
        candidates = [pattern.replace(part, together, 1) for part in last_names if part in pattern]
        if found.fused.experts:
            candidates += [rf".*\.{together}", rf"{pattern}|.*\.{together}"]
        head, dot, _ = pattern.rpartition(r"\.")
        candidates += [f"{head}{dot}{together}", f"{head}{dot}.*{together}"] * bool(dot)
        candidates += [f".*{together}", f"{pattern}|.*{together}"]
        decided = {name for name in self.names if deciding_rule(name, rules) == i}
        for candidate in filter(_is_rule, candidates):
            changed = _replaced(rules, found.rule, candidate)
            if self.split(changed) is None and all(deciding_rule(name, changed) == i for name in decided):
                return candidate
        return None


def _alternatives(fused: FusedLinear, by_fused_name: bool) -> str:
    """A pattern for the last names of all parts, such as "(q|k|v|qkv)_proj"; for the name of a bank of experts."""
    if fused.experts:
        return fused.name.rpartition(".")[2]
    names = [*fused.last_names, *([fused.name.rpartition(".")[2]] if by_fused_name else [])]
    if all(name.endswith("_proj") for name in names):
        return f"({'|'.join(name.removesuffix('_proj') for name in names)})_proj"
    return f"({'|'.join(names)})"


def _replaced(rules: Sequence[Rule], rule: Rule, pattern: str) -> list[Rule]:
    return [Rule(pattern, each.overrides) if each is rule else each for each in rules]


def _is_rule(pattern: str) -> bool:
    try:
        Rule(pattern, None)
    except UsageError:
        return False
    return True


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
