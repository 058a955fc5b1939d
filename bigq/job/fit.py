"""Refuses a job whose Linears do not fit its format: all of them at once, with options under which every Linear fits. Pure functions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.io.formats.base import Misfit, bank_of, fitting_group_size, listed
from bigq.io.formats.fused import FUSED, fused_linears
from bigq.io.formats.readers_table import BY_FUSED_NAME
from bigq.io.gguf_file import BLOCK, gguf_misfit
from bigq.job.command import rule_option
from bigq.job.rules import deciding_rule, require_sound_rules
from bigq.methods import method_of
from bigq.scheme import MAX_PATTERN, QuantScheme, Rule, scheme_for

#: Bits for which GGUF has blocks, symmetric or not.
GGUF_BITS = 4
#: Smallest group size that is advised for all Linears where a rule could give it to those alone that need it.
FINE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A Linear that a job quantizes unless a rule skips it: its module name, m outputs, n inputs, whether it is stored transposed.

    joined: whether it belongs to experts whose gate and up are one Linear.
    """

    name: str
    m: int
    n: int
    transposed: bool = False
    joined: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Remedy:
    """Changes to the options of a job, and the job with them."""

    changes: tuple[str, ...]
    config: JobConfig


def require_fit(linears: Sequence[Candidate], names: Sequence[str], head: str | None, config: JobConfig) -> None:
    """Raise UsageError if Linears do not fit the format or their group size.

    The message names all of them, and changes that work: with these options the job is not refused here again.
    linears: what the job would quantize. names: of all Linears in blocks. head: the name of the output head, if it is a Linear.
    """
    found = misfits(linears, config)
    if not found:
        return

    def works(changed: JobConfig) -> bool:
        try:
            require_sound_rules(names, head, changed)
        except UsageError:
            return False
        return not misfits(linears, changed) and any(_scheme(each, changed) is not None for each in linears)

    remedy = next((each for each in _remedies(linears, names, config, works) if works(each.config)), None)
    advice = "choose another --format" if remedy is None else f"use {_and(remedy.changes)}"
    raise UsageError(f"{listed(found)}; {advice}")


def require_distinct(linears: Sequence[Candidate], others: Iterable[str], config: JobConfig) -> None:
    """Raise UsageError where readers of the format would confuse the name of a module that stays unquantized with that of a packed Linear.

    linears: as for ``require_fit``. others: names of all modules that hold a matrix.
    """
    packed = {each.name for each in linears if _scheme(each, config) is not None}
    clash = config.made.clash(packed, [name for name in others if name not in packed])
    if clash is None:
        return
    tried = (dataclasses.replace(config, format=each) for each in method_of(config).formats if each not in ("gguf", config.format))
    other = next((each.format for each in tried if each.made.clash(packed, [clash[0]]) is None and not misfits(linears, each)), None)
    raise UsageError(
        f"--format {config.output_format}: {clash[0]} stays unquantized, and readers find its name in {clash[1]}, which is packed; "
        + ("choose another --format" if other is None else f"use --format {other}")
    )


def misfits(linears: Iterable[Candidate], config: JobConfig) -> dict[str, Misfit]:
    """What does not fit, by the Linear's name."""
    found: dict[str, Misfit] = {}
    base = config.base_scheme  # once: it is made anew each time, and a model with experts has many Linears
    linears = list(linears)
    for each in linears:
        scheme = scheme_for(each.name, base, config.rules)
        if scheme is None:
            continue
        expert = bank_of(each.name) is not None
        misfit = config.made.misfit(each.m, each.n, scheme, transposed=each.transposed, joined=each.joined, expert=expert)
        misfit = misfit or config.made.other_size(scheme, base.group_size)
        if misfit is None and config.format == "gguf":
            misfit = gguf_misfit(each.n, scheme)
        if misfit is not None:
            found[each.name] = misfit
    if (step := config.made.outputs_of_parts) > 1:
        for name, misfit in _cut_blocks({each.name: each.m for each in linears if _scheme(each, config) is not None}, step):
            found.setdefault(name, misfit)
    return found


def _cut_blocks(outputs: Mapping[str, int], step: int) -> Iterator[tuple[str, Misfit]]:
    """Parts of fused Linears whose last block of ``step`` outputs would have to hold some of the next part. outputs: by name."""
    for fused in fused_linears(outputs):
        if fused.experts:
            continue
        order = FUSED[fused.name.rpartition(".")[2]]
        for name in sorted(fused.parts, key=lambda part: order.index(part.rpartition(".")[2]))[:-1]:
            if outputs[name] % step:
                said = f"has {outputs[name]} outputs, but readers load {fused.said} as one Linear in blocks of {step} outputs"
                yield name, Misfit("shape", said)


def _scheme(linear: Candidate, config: JobConfig) -> QuantScheme | None:
    return scheme_for(linear.name, config.base_scheme, config.rules)


def _remedies(
    linears: Sequence[Candidate], names: Sequence[str], config: JobConfig, works: Callable[[JobConfig], bool]
) -> Iterator[_Remedy]:
    """Remedies to try, best first. None of them is certain to work."""
    begun = [_Remedy(changes=(), config=config)]
    if _has_no_place(linears, config):
        others = (dataclasses.replace(config, format=format) for format in method_of(config).formats if format != config.format)
        begun[:0] = [_Remedy(changes=(f"--format {o.format}",), config=o) for o in others if not _has_no_place(linears, o)]
    for formatted in begun:
        for skipped in _skips(linears, names, formatted):
            for fewer in _bits(linears, skipped):
                yield from _group_sizes(linears, names, fewer, works)


def _has_no_place(linears: Sequence[Candidate], config: JobConfig) -> bool:
    """Whether the format cannot hold Linears of some kind, whatever their scheme."""
    return any(misfit.kind in ("transposed", "joined") for misfit in misfits(linears, config).values())


def _skips(linears: Sequence[Candidate], names: Sequence[str], begun: _Remedy) -> Iterator[_Remedy]:
    """Skip the Linears that no scheme makes fit."""
    config = begun.config
    wanted = [name for name, misfit in misfits(linears, config).items() if misfit.kind in ("shape", "transposed", "joined")]
    if not wanted:
        yield begun
    for pattern in patterns(wanted, [each.name for each in linears], names, config) if wanted else ():
        # The command line puts rules that skip before all others.
        changed = dataclasses.replace(config, rules=(Rule(pattern, None), *config.rules))
        yield _Remedy(changes=(*begun.changes, f"--skip '{pattern}'"), config=changed)


def _bits(linears: Sequence[Candidate], begun: _Remedy) -> Iterator[_Remedy]:
    sources = {_source(name, "bits", begun.config) for name, misfit in misfits(linears, begun.config).items() if misfit.kind == "bits"}
    bits = GGUF_BITS if GGUF_BITS in begun.config.made.bits else begun.config.made.bits[0]
    yield _with(begun, "bits", dict.fromkeys(sorted(sources, key=_order), bits))


def _group_sizes(
    linears: Sequence[Candidate], names: Sequence[str], begun: _Remedy, works: Callable[[JobConfig], bool]
) -> Iterator[_Remedy]:
    """For all that have their group size from one option; for the Linears alone that do not fit; a size that fits all; whole rows."""
    config = begun.config
    wrong = [name for name, misfit in misfits(linears, config).items() if misfit.kind == "group_size"]
    if not wrong:
        yield begun
        return
    inputs: dict[int | None, list[int]] = {}
    for each in linears:
        if _scheme(each, config) is not None:
            inputs.setdefault(_source(each.name, "group_size", config), []).append(each.n)
    sources = sorted({_source(name, "group_size", config) for name in wrong}, key=_order)
    step = BLOCK if config.format == "gguf" else min(_held(config), default=8)
    sizes = {source: fitting_group_size(inputs[source], _most(source, config), step) for source in sources}
    broad = _with(begun, "group_size", sizes)
    alone = list(_alone(linears, names, wrong, begun, step)) if sources == [None] and len(wrong) < len(inputs[None]) else []
    if min(sizes.values()) >= min(FINE, *(_size(source, config) for source in sources)):
        yield broad
        yield from alone
    else:
        yield from (each for each in alone if works(each.config))
        yield broad
    among = inputs if config.made.one_size else sources
    common = fitting_group_size([n for source in among for n in inputs[source]], min(_most(source, config) for source in among), step)
    for size in (common, -1):
        yield _with(begun, "group_size", dict.fromkeys(sources, size))
        yield _with(begun, "group_size", dict.fromkeys([None, *range(len(config.rules))], size))


def _alone(linears: Sequence[Candidate], names: Sequence[str], wrong: Sequence[str], begun: _Remedy, step: int) -> Iterator[_Remedy]:
    config = begun.config
    size = fitting_group_size([each.n for each in linears if each.name in wrong], _most(None, config), step)
    for pattern in patterns(wrong, [each.name for each in linears], names, config):
        rule = Rule(pattern, {"group_size": size})
        yield _Remedy(changes=(*begun.changes, rule_option(rule)), config=dataclasses.replace(config, rules=(*config.rules, rule)))


def _source(name: str, field: str, config: JobConfig) -> int | None:
    """The index of the rule that gives a Linear's field; None where the option for all Linears gives it."""
    i = deciding_rule(name, config.rules)
    return i if i is not None and field in (config.rules[i].overrides or {}) else None


def _order(source: int | None) -> int:
    return -1 if source is None else source


def _size(source: int | None, config: JobConfig) -> int:
    return config.scheme.group_size if source is None else int((config.rules[source].overrides or {})["group_size"])


def _held(config: JobConfig) -> list[int]:
    """The group sizes that the format holds, without whole rows; empty where it holds any."""
    return [size for size in config.made.group_sizes or () if size != -1]


def _most(source: int | None, config: JobConfig) -> int:
    """The largest group size to advise: the one that was asked for, or the largest that the format holds."""
    size, most = _size(source, config), max(_held(config), default=None)
    return size if most is None else most if size == -1 else min(size, most)


def _with(begun: _Remedy, field: str, values: Mapping[int | None, int]) -> _Remedy:
    """A field changed where the sources give it: in the options of all Linears, or in rules that have it."""
    config, changes = begun.config, list(begun.changes)
    for source, value in values.items():
        if source is None:
            if value != getattr(config.scheme, field):
                changes.append(f"--{field.replace('_', '-')} {value}")
            new: Mapping[str, Any] = {field: value}
            config = dataclasses.replace(config, scheme=dataclasses.replace(config.scheme, **new))
        else:
            rule = config.rules[source]
            if field not in (rule.overrides or {}) or (rule.overrides or {})[field] == value:
                continue
            changes.append(f"{field}={value} in {rule_option(begun.config.rules[source])}")
            changed = Rule(rule.pattern, {**(rule.overrides or {}), field: value})
            config = dataclasses.replace(config, rules=(*config.rules[:source], changed, *config.rules[source + 1 :]))
    return _Remedy(changes=tuple(changes), config=config)


def patterns(wanted: Sequence[str], linears: Sequence[str], names: Sequence[str], config: JobConfig) -> Iterator[str]:
    """Patterns that match the wanted Linears and no others; then patterns that take in what readers load with them as one Linear."""
    by_fused_name = BY_FUSED_NAME.get(config.output_format)
    fused = () if by_fused_name is None else fused_linears(names)
    among = set(wanted)
    together = [each for each in fused if not among.isdisjoint(each.parts)]
    wider = list(dict.fromkeys([*wanted, *(part for each in together for part in each.parts)]))
    whole = [each.name for each in together] if by_fused_name else []
    for parts in (wanted, wider) if together else (wanted,):
        for extra in ([], whole) if whole else ([],):
            for pattern in _spellings([*parts, *extra]):
                if len(pattern) <= MAX_PATTERN and {name for name in {*linears, *names} if re.match(pattern, name)} == set(parts):
                    yield pattern


def _spellings(names: Sequence[str]) -> Iterator[str]:
    """Patterns for names, the shortest first: of all experts, by their last part, by their path in a block, by blocks, one by one."""
    if any(bank_of(name) is not None for name in names):
        rest = [name for name in names if bank_of(name) is None and not name.endswith(".experts")]
        yield f"(.*\\.experts|{next(_spellings(rest))})" if rest else r".*\.experts"
    if len(names) == 1 and "." not in names[0]:
        yield f"{names[0]}$"
    yield f".*{_any(name.rpartition('.')[2] for name in names)}$"
    split = [re.match(r"(.*?\.)(\d+)\.(.*)$", name) for name in names]
    if all(split):
        parts = [match.groups() for match in split if match is not None]
        tails = _any(re.escape(tail) for _, _, tail in parts)
        yield rf".*\.{tails}$"
        if len({path for path, _, _ in parts}) == 1:
            yield rf"{re.escape(parts[0][0])}{_any(number for _, number, _ in parts)}\.{tails}$"
    yield f"{_any(map(re.escape, names))}$"


def _any(words: Iterable[str]) -> str:
    """A pattern for one of some words."""
    words = list(dict.fromkeys(words))
    if len(words) == 1:
        return words[0]
    if all(word.endswith("_proj") for word in words):
        return f"({'|'.join(word.removesuffix('_proj') for word in words)})_proj"
    return f"({'|'.join(words)})"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
