"""The settings of a job with ``bits_per_weight``: what gets the same bits, and the rules that were chosen for it. Pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from bigq.config import JobConfig
from bigq.job.fit import Candidate, misfits
from bigq.job.rules import deciding_rule
from bigq.mixed.groups import Group, Part, groups_of
from bigq.mixed.record import ChosenBits
from bigq.scheme import BITS, Rule, scheme_for


def mixed_groups(
    candidates: Sequence[Candidate], dtypes: Mapping[str, torch.dtype], config: JobConfig, blocks_path: str
) -> tuple[Group, ...]:
    """The groups of a job. What a rule decides keeps its bits, and so does the output head. dtypes: of weights in the checkpoint.

    Raises UsageError.
    """
    base = config.base_scheme
    fits: dict[int, frozenset[str]] = {}
    for bits in BITS:
        tried = dataclasses.replace(config, scheme=dataclasses.replace(config.scheme, bits=bits))
        fits[bits] = frozenset(each.name for each in candidates) - misfits(candidates, tried).keys()
    parts = []
    for each in candidates:
        scheme = scheme_for(each.name, base, config.rules)
        if scheme is not None:
            chosen = each.name.startswith(f"{blocks_path}.") and deciding_rule(each.name, config.rules) is None
            bits = tuple(b for b in BITS if each.name in fits[b])
            parts.append(Part(name=each.name, m=each.m, n=each.n, dtype=dtypes[each.name], scheme=scheme, chosen=chosen, bits=bits))
    return groups_of(parts, config.made)


def without_chosen(config: JobConfig, chosen: ChosenBits | None) -> JobConfig:
    """A job as it was given. A resumed one that is given no rules has the chosen ones, too."""
    rules = config.rules
    if chosen is not None and chosen.rules and rules[-len(chosen.rules) :] == chosen.rules:
        rules = rules[: -len(chosen.rules)]
    return dataclasses.replace(config, rules=rules, chosen_rules=0)


def with_chosen(config: JobConfig, chosen: ChosenBits | None) -> JobConfig:
    """A job with the chosen rules behind those that were given; unchanged before they are chosen."""
    if chosen is None:
        return config
    rules: tuple[Rule, ...] = (*config.rules, *chosen.rules)
    return dataclasses.replace(config, rules=rules, chosen_rules=len(chosen.rules))
