"""A job's settings as the flags of ``bigq quantize`` that ask for them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from bigq.config import FROZEN_FIELDS, JobConfig
from bigq.scheme import QuantScheme, Rule

#: Settings whose flags are not called as they are, by value.
_SWITCHES = {"symmetric": {True: "--sym", False: "--asym"}}
#: What the output format decides.
_DERIVED = ("min_zero",)


def flags(config: JobConfig) -> list[str]:
    """The flags that differ from the defaults, and ``--batch`` and ``--seqlen``, which depend on the machine and the model otherwise.

    The calibration text is told by its name, without its folder.
    """
    default = JobConfig()
    found = list(_differing(config.scheme, default.scheme, [field.name for field in dataclasses.fields(QuantScheme)]))
    found += [word for rule in config.rules for word in _rule(rule)]
    found += _differing(config, default, [name for name in FROZEN_FIELDS if name not in ("scheme", "rules")])
    return found


def _differing(values: Any, defaults: Any, names: list[str]) -> Iterator[str]:
    for name in names:
        value = getattr(values, name)
        if value == getattr(defaults, name) or name in _DERIVED:
            continue
        flag = f"--{name.replace('_', '-')}"
        if name in _SWITCHES:
            yield _SWITCHES[name][value]
        elif isinstance(value, bool):
            yield flag if value else flag.replace("--", "--no-", 1)
        else:
            yield from (flag, os.path.basename(value) if name == "calibration" else str(value))


def rule_option(rule: Rule) -> str:
    """The option that asks for a rule, for messages."""
    option, value = _rule(rule)
    return f"{option} '{value}'"


def _rule(rule: Rule) -> tuple[str, str]:
    if rule.overrides is None:
        return "--skip", rule.pattern
    return "--rule", f"{rule.pattern}:{','.join(f'{key}={str(value).lower()}' for key, value in rule.overrides.items())}"
