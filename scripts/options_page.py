#!/usr/bin/env python3
"""Write docs/options.md from the commands' parsers and the declared options. ``--check`` only says whether it is up to date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bigq.errors
from bigq.cli.commands import COMMANDS, build_parser, subparser
from bigq.cli.parser import Parser
from bigq.config import JobConfig
from bigq.infer.options import EvalConfig, GenerateConfig
from bigq.options import Option, Resume, table
from bigq.presets import Presetting
from bigq.scheme import QuantScheme

PAGE = ROOT / "docs" / "options.md"

INTRO = """# Options

<!-- Written by scripts/options_page.py from the options that the code declares. Do not edit. -->

Each option of a command is a field of a Python class, named in the second column:
fields of `bigq.JobConfig`, with those of its `scheme` (`bigq.QuantScheme`),
of `bigq.EvalConfig` and `bigq.GenerateConfig`.
Options without a field belong to the command line only.

Sizes have a unit: `72GiB`, `80GB`, `500MB`. In Python a number is bytes.
A switch has an opposite: `--lm-head`, `--no-lm-head`. Both in one command are an error.
Options are written in full; an abbreviation is an error.
"""

#: What the column of resumed jobs says.
RESUMED = {Resume.FREE: "may change", Resume.WARNED: "warned", Resume.REFUSED: "refused"}

RESUME_KEY = f"""
When a job is resumed with another value, that is
**refused**: {Resume.REFUSED.value.partition("; ")[2]};
**warned**: {Resume.WARNED.value};
or it **may change**: {Resume.FREE.value.partition("; ")[2]}.
"""

#: The classes that declare a command's options, with what stands before a field's name in Python.
CLASSES: Mapping[str, Mapping[type, str]] = {
    "quantize": {JobConfig: "", QuantScheme: "scheme.", Presetting: ""},
    "plan": {JobConfig: "", QuantScheme: "scheme.", Presetting: ""},
    "eval": {EvalConfig: ""},
    "generate": {GenerateConfig: ""},
}


def render() -> str:
    """The page."""
    parser = build_parser()
    parts = [INTRO]
    for name in COMMANDS:
        parts.append("\n".join(command_lines(name, subparser(parser, name).filled())) + "\n")
    codes = (bigq.errors.__doc__ or "").partition("Exit codes of every command:\n\n")[2].partition("\n\n")[0]
    parts.append("## Exit codes\n\n| code | meaning |\n|---|---|\n" + "\n".join(code_rows(codes)) + "\n")
    return "\n".join(parts)


def code_rows(codes: str) -> Iterator[str]:
    for line in codes.splitlines():
        code, _, meaning = line.strip().partition(" ")
        yield f"| {code} | {meaning.strip()} |"


def command_lines(name: str, parser: Parser) -> Iterator[str]:
    """A command's section."""
    assert parser.usage is not None and parser.description is not None
    yield f"## {parser.usage}"
    yield ""
    yield parser.description.replace(". ", ".\n")
    if name == "quantize":
        yield RESUME_KEY.rstrip()
    options = {each.name: (prefix, each) for kind, prefix in CLASSES.get(name, {}).items() for each in table(kind).values()}
    if name == "plan":
        yield ""
        yield "Takes the options of `bigq quantize` that decide what a job needs, and these:"
    resumed = name == "quantize"
    groups = [(group.title or "", group._group_actions) for group in parser._action_groups]
    if not resumed:
        groups = [("", [action for _, actions in groups for action in actions])]
    for title, found in groups:
        actions = [action for action in found if action.dest != "help" and not (name == "plan" and action.dest in (*options, "skip"))]
        if actions:
            yield ""
            if title:
                yield f"### {('arguments' if title == 'positional arguments' else title).capitalize()}"
                yield ""
            yield "| option | Python | default | meaning |" + (" resumed |" if resumed else "")
            yield "|---|---|---|---|" + ("---|" if resumed else "")
            for action in actions:
                yield row(action, *options.get(action.dest, ("", None)), resumed=resumed)


def row(action: argparse.Action, prefix: str, option: Option | None, *, resumed: bool) -> str:
    """One option's line."""
    spelled = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar}`"
    if action.option_strings and action.nargs != 0 and action.metavar:
        spelled = ", ".join(f"`{flag} {action.metavar}`" for flag in action.option_strings)
    help_ = (action.help or "").replace("%%", "%").replace("%(default)s", str(action.default))
    meaning, _, default = help_.partition(" (default: ")
    if option is not None:
        ranged = option.range is not None and option.range.must.partition("; ")[0]
        meaning += "".join([f"; must {ranged}" if ranged else "", *(f"; no effect {effect.unless}" for effect in option.effects)])
    cells = [spelled, _in_python(prefix, option), default.removesuffix(")"), meaning]
    if resumed:
        cells.append("" if option is None else RESUMED[option.resume])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _in_python(prefix: str, option: Option | None) -> str:
    """A field; of what is none, the method that sets it."""
    if option is None:
        return ""
    return f"`with_{option.name}`" if option.name in table(Presetting) else f"`{prefix}{option.name}`"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != render())
    PAGE.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
