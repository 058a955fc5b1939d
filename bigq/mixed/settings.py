"""The settings of a job with ``bits_per_weight``: what gets the same bits, and the rules that were chosen for it. Pure functions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch

from bigq.config import JobConfig
from bigq.mixed.groups import Group, Part, groups_of
from bigq.scheme import BITS, Rule, scheme_for


class Candidate(Protocol):
    """A Linear [m outputs, n inputs] that a job quantizes unless a rule skips it."""

    @property
    def name(self) -> str: ...
    @property
    def m(self) -> int: ...
    @property
    def n(self) -> int: ...


def mixed_groups(
    candidates: Sequence[Candidate],
    dtypes: Mapping[str, torch.dtype],
    config: JobConfig,
    blocks_path: str,
    misfits: Callable[[JobConfig], Collection[str]],
) -> tuple[Group, ...]:
    """The groups of a job. What a rule decides keeps its bits, and so does the output head.

    dtypes: of weights in the checkpoint. misfits: the names of those that do not fit the format of a job. Raises UsageError.
    """
    base = config.base_scheme
    fits: dict[int, frozenset[str]] = {}
    for bits in BITS:
        tried = dataclasses.replace(config, scheme=dataclasses.replace(config.scheme, bits=bits))
        fits[bits] = frozenset(each.name for each in candidates) - frozenset(misfits(tried))
    parts = []
    for each in candidates:
        scheme = scheme_for(each.name, base, config.rules)
        if scheme is not None:
            chosen = each.name.startswith(f"{blocks_path}.") and not any(re.match(rule.pattern, each.name) for rule in config.rules)
            which = tuple(b for b in BITS if each.name in fits[b])
            parts.append(Part(name=each.name, m=each.m, n=each.n, dtype=dtypes[each.name], scheme=scheme, chosen=chosen, bits=which))
    return groups_of(parts, config.made)


def lacks_bits(config: JobConfig) -> bool:
    """Whether bits are yet to be chosen."""
    return config.bits_per_weight is not None and not config.chosen_rules


def without_chosen(config: JobConfig) -> JobConfig:
    """A job as it was given."""
    return dataclasses.replace(config, rules=config.given_rules, chosen_rules=0)


def with_chosen(config: JobConfig, rules: Sequence[Rule]) -> JobConfig:
    """A job with the chosen rules behind those that were given."""
    return dataclasses.replace(config, rules=(*config.given_rules, *rules), chosen_rules=len(rules))
