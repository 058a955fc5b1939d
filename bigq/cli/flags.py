"""From declared options to arguments of a command, and from parsed arguments back to options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bigq.options import Option


class Switch(argparse.Action):
    """An option that is on or off; ``off`` are the spellings that switch it off. Both in one command are an error."""

    def __init__(self, option_strings: Sequence[str], dest: str, off: Sequence[str] = (), **how: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **how)
        self.off = off

    def __call__(self, parser: argparse.ArgumentParser, args: argparse.Namespace, values: Any, flag: str | None = None) -> None:
        value, before = flag not in self.off, getattr(args, self.dest, None)
        typed = vars(args).setdefault("switches", {})
        if before is not None and before != value:
            raise argparse.ArgumentError(None, f"{typed[self.dest]} and {flag}: contradict each other; give one of them")
        typed[self.dest] = flag
        setattr(args, self.dest, value)


def group_of(p: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The group of that title in a command's help."""
    return next((group for group in p._action_groups if group.title == title), None) or p.add_argument_group(title)


def add_options(p: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Add options in their groups. An option that is not given parses to None; its default only appears in the help."""
    for each in options:
        if each.flag is not None:
            add_option(group_of(p, each.group), each)


def add_option(group: argparse._ActionsContainer, each: Option, **more: Any) -> None:
    assert each.flag is not None
    text = help_text(each)
    if each.types == (bool,):
        off = [] if each.opposite is None else list(dict.fromkeys([f"--no-{each.flag[2:]}", each.opposite]))
        group.add_argument(each.flag, *off, dest=each.name, action=Switch, off=off, default=None, help=text)
    else:
        group.add_argument(each.flag, dest=each.name, type=_reader(each), default=None, metavar=each.placeholder, help=text, **more)


def help_text(each: Option) -> str:
    """Help with the default, escaped for argparse."""
    default = f" (default: {each.default_text})" if each.default_text else ""
    return f"{each.help}{default}".replace("%", "%%")


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options that were given, by name."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _reader(each: Option) -> Callable[[str], Any]:
    """Checks an argument. Where a config converts the value itself, the text is passed on."""

    def read(text: str) -> Any:
        value = each.parse(text)
        return value if each.convert is None else text

    return read
