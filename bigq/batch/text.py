"""The settings of a job as a YAML file that makes the same job; the opposite of ``settings``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bigq.batch.settings import LISTS, Ending, job_options
from bigq.config import JobConfig
from bigq.data.given import GIVEN
from bigq.io.yaml_file import write_scalar
from bigq.job.command import rule_text
from bigq.options import Option, table
from bigq.presets import PRESETS
from bigq.version import __version__

#: Words that YAML reads as something else.
_RESERVED = ("y", "yes", "n", "no", "on", "off", "true", "false", "null")


def settings_text(model: str, out: str, given: Mapping[str, Any], config: JobConfig) -> str:
    """The file. given: the options of the command line and of its file, by the name of the field; each is written in the same words.

    config: the job that they make, with what a job in ``out`` adds. Options that have their defaults are comments.
    """
    lines = [
        f"# A job of bigq {__version__}: bigq quantize --config FILE makes it. Options behind # have the values that are shown.",
        f"model: {_value(model)}",
        f"out: {_value(out)}",
    ]
    options = [each for each in (*job_options(), *table(Ending).values()) if each.flag is not None]
    for group in dict.fromkeys(each.group for each in options):
        lines += ["", f"# {group[0].upper()}{group[1:]}", *(_line(each, given, config) for each in options if each.group == group)]
    rules = [rule_text(rule) for rule in config.given_rules]
    listed = {name: given.get(LISTS[name]) or [text for option, text in rules if option == f"--{name}"] for name in LISTS}
    for name, texts in listed.items():
        lines += ["", f"{name}:", *(f"  - {write_scalar(text)}" for text in texts)] if texts else []
    return "\n".join(lines)


def _line(each: Option, given: Mapping[str, Any], config: JobConfig) -> str:
    assert each.flag is not None
    name = each.flag[2:]
    if each.name in given:
        return f"{name}: {_value(given[each.name])}"
    implied = _implied(given)
    if each.name in implied:
        return f"# {name}: {_value(implied[each.name])}"
    if each.name in _ours(config, each) and (value := _ours(config, each)[each.name]) != each.default:
        return f"{name}: {_value(value)}"
    if each.default is None:
        return f"# {name}:{each.unset and f'  # {each.unset}'}"
    return f"# {name}: {_value(each.default)}"


def _implied(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options that a quality stands for."""
    if "quality" not in given:
        return {}
    preset = PRESETS[given["quality"]]
    return {**preset.of_scheme, **preset.of_job}


def _ours(config: JobConfig, each: Option) -> Mapping[str, Any]:
    """The option's value in a job, if the job holds one that can be given."""
    holder = next((held for held in (config.scheme, config) if each.name in table(type(held))), None)
    refused = any(effect.refused and not effect.holds(config, "") for effect in each.effects)
    value = getattr(holder, each.name, None)
    return {} if holder is None or refused or value is None or value == GIVEN else {each.name: value}


def _value(value: Any) -> str:
    """A value as YAML. Texts that another reader of YAML could take for something else are in quotes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    plain = re.fullmatch(r"[A-Za-z][\w.-]*", value, re.ASCII) and value.lower() not in _RESERVED
    return value if plain else write_scalar(value)
