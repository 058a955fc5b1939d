"""Options are declared once: what is made of the declarations, and what a declaration accepts."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from conftest import ROOT

from bigq.cli.commands import build_parser, subparser
from bigq.cli.flags import add_options
from bigq.config import FROZEN_FIELDS, JobConfig
from bigq.errors import UsageError
from bigq.infer.options import EvalConfig, GenerateConfig
from bigq.job import command, request
from bigq.options import Converted, Effect, Range, Resume, option, settle, table, without_effect
from bigq.scheme import OVERRIDES, QuantScheme, Rule
from bigq.vocabulary import ATTENTIONS, DTYPES, FETCH_CHOICES, FOLDS, FORMAT_NAMES, INPUT_SCALES, METHODS, ON_NONFINITE, TIER_CHOICES

CLASSES = (JobConfig, QuantScheme, EvalConfig, GenerateConfig)


def options_page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("options_page", ROOT / "scripts/options_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options_is_up_to_date() -> None:
    page = options_page()
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run scripts/options_page.py"


def test_the_page_names_every_option() -> None:
    text = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    for kind in CLASSES:
        for each in table(kind).values():
            assert each.flag is None or f"`{each.flag} " in text or f"`{each.flag}`" in text, each.name


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_is_an_option(kind: type) -> None:
    assert list(table(kind)) == [field.name for field in dataclasses.fields(kind)]
    for each in table(kind).values():
        assert each.help and each.group, each.name
        assert not (each.default is None and each.none and not each.unset) or each.name == "trace", f"{each.name}: what None means is said"


def test_options_with_a_fixed_set_of_values() -> None:
    options = table(JobConfig)
    assert {name: each.choices for name, each in options.items() if each.choices} == {
        "method": METHODS,
        "fold": FOLDS,
        "format": FORMAT_NAMES,
        "input_scales": INPUT_SCALES,
        "attention": ATTENTIONS,
        "activations": TIER_CHOICES,
        "fetch": FETCH_CHOICES,
        "dtype": DTYPES,
        "on_nonfinite": ON_NONFINITE,
    }


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("quantize", (JobConfig, QuantScheme)), ("eval", (EvalConfig,)), ("generate", (GenerateConfig,))],
)
def test_every_option_is_on_the_command_line_in_its_group(name: str, kinds: tuple[type, ...]) -> None:
    parser = subparser(build_parser(), name).filled()
    for each in (each for kind in kinds for each in table(kind).values() if each.flag is not None):
        (group,) = [group for group in parser._action_groups if any(each.flag in a.option_strings for a in group._group_actions)]
        assert group.title == each.group, each.name


def test_what_is_kept_is_what_a_resumed_job_is_held_to() -> None:
    assert tuple(name for name, each in table(JobConfig).items() if each.kept) == FROZEN_FIELDS
    assert all(each.resume is Resume.REFUSED and each.kept for each in table(QuantScheme).values())
    assert list(OVERRIDES) == ["bits", "group_size", "sym", "order", "damping", "scales", "sweeps"]


# A new option is one new field.


HOT = Effect(unless="while cold", holds=lambda job, _: job.heat > 100)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Oven:
    """A class of options that bigq knows nothing of."""

    heat: int = option(
        180, help="how hot", group="oven", unit="degrees", resume=Resume.REFUSED, range=Range(must="be hot", holds=lambda h: h > 50)
    )
    fan: bool = option(
        False, help="move the air", group="oven", effects=(Effect(unless="while cold", holds=lambda job, _: job.heat > 100),)
    )
    mode: Literal["bake", "grill"] = option("bake", help="what for", group="use", resume=Resume.WARNED)
    minutes: Converted[float | None, float | str | None] = option(
        None, help="how long", group="use", unset="for ever", convert=lambda given, _: 60.0 if given == "an hour" else given
    )

    def __post_init__(self) -> None:
        settle(self)


def test_a_declaration_is_all_that_the_command_line_needs() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, table(Oven).values())
    found = parser.parse_args(["--heat", "200", "--fan", "--mode", "grill", "--minutes", "an hour"])
    assert (found.heat, found.fan, found.mode, found.minutes) == (200, True, "grill", "an hour")
    assert parser.parse_args([]).heat is None and parser.parse_args(["--no-fan"]).fan is False
    text = parser.format_help()
    for part in ("oven:", "--heat DEGREES", "how hot (default: 180)", "--fan, --no-fan", "{bake,grill}", "how long (default: for ever)"):
        assert part in text, text
    for arguments, message in [
        (["--heat", "20"], "--heat 20: must be hot"),
        (["--heat", "x"], "--heat x: must be a whole number"),
        (["--mode", "gril"], "--mode gril: must be one of bake, grill; did you mean grill?"),
    ]:
        with pytest.raises(UsageError) as caught:
            parser.parse_args(arguments)
        assert str(caught.value) == message


def test_a_declaration_is_all_that_the_other_tables_need() -> None:
    settings = request._settings("settings", table(Oven))
    assert {name: change.may for name, change in settings.items()} == {"settings.heat": Resume.REFUSED, "settings.mode": Resume.WARNED}
    assert list(request._not_recorded(table(Oven))) == ["fan", "minutes"]
    assert list(command._differing(Oven(heat=70, fan=True), table(Oven).values())) == ["--heat", "70", "--fan"]


def test_values_are_converted_and_checked() -> None:
    assert Oven(minutes="an hour").minutes == 60.0 and Oven(minutes=3).minutes == 3
    for wrong, message in [
        ({"heat": "180"}, "Oven: heat must be an int, not '180'"),
        ({"heat": True}, "Oven: heat must be an int, not True"),
        ({"heat": 180.0}, "Oven: heat must be an int, not 180.0"),
        ({"heat": 20}, "--heat 20: must be hot"),
        ({"fan": 1}, "Oven: fan must be True or False, not 1"),
        ({"mode": None}, "Oven: mode must be a string, not None"),
        ({"mode": "gril"}, "--mode gril: must be one of bake, grill; did you mean grill?"),
        ({"minutes": "long"}, "Oven: minutes must be a number or None, not 'long'"),
        ({"heat": [1] * 100}, "Oven: heat must be an int, not [1, 1, 1"),
    ]:
        with pytest.raises(UsageError) as caught:
            Oven(**wrong)  # type: ignore[arg-type]
        assert str(caught.value).startswith(message) and len(str(caught.value)) < 140


def test_options_in_vain() -> None:
    options = table(Oven).values()
    cold = Oven(heat=60)
    assert without_effect({"fan": True}, options, cold, "cpu") == ["--fan: no effect while cold"]
    assert without_effect({"fan": True}, options, Oven(), "cpu") == []
    assert without_effect({"heat": 60}, options, cold, "cpu") == [], "only what was given"


# The job.


@pytest.mark.parametrize(
    ("given", "as_if"),
    [
        ({"scheme": {"bits": 3, "group_size": 64}}, {"scheme": QuantScheme(bits=3, group_size=64)}),
        ({"scheme": {}}, {}),
        ({"vram": "72GiB", "ram": "1.5GB", "disk": 5}, {"vram": 72 * 2**30, "ram": 1_500_000_000, "disk": 5}),
        ({"rules": ["q:bits=8", Rule("k", None)]}, {"rules": (Rule("q", {"bits": 8}), Rule("k", None))}),
        ({"calibration": Path("a/b.txt"), "trace": Path("t.json")}, {"calibration": "a/b.txt", "trace": "t.json"}),
        ({"checkpoint_every": "never"}, {"checkpoint_every": None}),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_a_job_is_given_and_what_it_holds(given: dict[str, Any], as_if: dict[str, Any]) -> None:
    job = JobConfig(**given)
    assert job == JobConfig(**as_if)
    assert all(type(getattr(job, name)) is type(value) for name, value in as_if.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": {"bits": "4"}}, "QuantScheme: bits must be an int, not '4'"),
        ({"scheme": {"bits": 5}}, "bits=5: must be one of 2, 3, 4, 8"),
        ({"scheme": {"groupsize": 64}}, "JobConfig: scheme has no field 'groupsize'; did you mean group_size?"),
        ({"scheme": {5: 64}}, "JobConfig: scheme has no field 5"),
        ({"scheme": "4 bits"}, "JobConfig: scheme must be a QuantScheme, not '4 bits'"),
        ({"scheme": None}, "JobConfig: scheme must be a QuantScheme, not None"),
        ({"rules": "q:bits=8"}, "JobConfig: rules must be a list, not 'q:bits=8'"),
        ({"rules": [5]}, "JobConfig: rules must hold Rules or strings such as 'REGEX:bits=8', not 5"),
        ({"rules": ["q:bitz=8"]}, "--rule 'q:bitz=8': 'bitz=8' is not key=value"),
        ({"vram": "72"}, "--vram 72: give a unit, such as 72GiB"),
        ({"vram": 7.5}, "JobConfig: vram must be an int or None, not 7.5"),
        ({"ram": -1}, "--ram -1: must be at least 0"),
        ({"samples": "8"}, "JobConfig: samples must be an int, not '8'"),
        ({"alpha": "0.5"}, "JobConfig: alpha must be a number, not '0.5'"),
        ({"calibration": 5}, "--calibration: an int is not calibration data"),
        ({"device": None}, "JobConfig: device must be a string, not None"),
        ({"quiet": "yes"}, "JobConfig: quiet must be True or False, not 'yes'"),
        ({"method": ["gptq"]}, "JobConfig: method must be a string, not ['gptq']"),
        ({"checkpoint_every": "often"}, "--checkpoint-every often: must be a number of seconds, such as 60, or never"),
    ],
    ids=str,
)
def test_what_a_job_cannot_be_given_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        JobConfig(**given)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("pattern", "overrides", "message"),
    [
        (5, None, "Rule: pattern must be a string, not 5"),
        ("q", "bits=8", "Rule: overrides must be a dict or None, not 'bits=8'"),
        ("q", {"bits": "8"}, "QuantScheme: bits must be an int, not '8'"),
        ("q", {"group": 8}, "Rule: QuantScheme has no field 'group'"),
    ],
)
def test_what_a_rule_cannot_be_given_is_named(pattern: Any, overrides: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Rule(pattern, overrides)
    assert str(caught.value).startswith(message)


def test_the_api_may_give_what_has_no_effect() -> None:
    assert JobConfig(scheme=QuantScheme(order="activation"), method="rtn", alpha=0.7).alpha == 0.7
