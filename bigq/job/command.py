"""A job's settings as arguments of ``bigq quantize``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from bigq.config import FROZEN_FIELDS, JobConfig
from bigq.data.spec import without_folders
from bigq.options import Option, Resume, table
from bigq.scheme import QuantScheme, Rule


def flags(config: JobConfig) -> list[str]:
    """The options whose values differ from the defaults, except those that the command line would refuse as having no effect.

    The calibration text is named without its folder.
    """
    kept = [each for name, each in table(JobConfig).items() if name in FROZEN_FIELDS and name not in ("scheme", "rules")]
    found = list(_differing(config.scheme, _with_effect(config, table(QuantScheme).values())))
    found += [word for rule in config.given_rules for word in rule_text(rule)]
    found += _differing(config, _with_effect(config, kept))
    return found


def _with_effect(config: JobConfig, options: Iterable[Option]) -> Iterator[Option]:
    return (each for each in options if all(effect.holds(config, "") for effect in each.effects if effect.refused))


def _differing(values: Any, options: Iterable[Option]) -> Iterator[str]:
    for each in options:
        value = getattr(values, each.name)
        if each.flag is not None and value != each.default:
            yield from each.words(without_folders(value) if each.name == "calibration" else value)


def kept_options(message: str) -> list[str]:
    """The options in a message that a resumed job may not change."""
    refused = {
        each.flag for options in (table(JobConfig), table(QuantScheme)) for each in options.values() if each.resume is Resume.REFUSED
    }
    return list(dict.fromkeys(flag for flag in re.findall(r"--[a-z][a-z-]*", message) if flag in refused or flag == "--skip"))


def rule_option(rule: Rule) -> str:
    """A rule as an option, for messages."""
    option, value = rule_text(rule)
    return f"{option} '{value}'"


def rule_text(rule: Rule) -> tuple[str, str]:
    """A rule as an option and its value."""
    if rule.overrides is None:
        return "--skip", rule.pattern
    return "--rule", f"{rule.pattern}:{','.join(f'{key}={str(value).lower()}' for key, value in rule.overrides.items())}"
