"""A parser of one command whose errors are one line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from bigq.errors import UsageError


class ParseError(UsageError):
    """A command line that cannot be parsed. prog: the command, with which the message begins."""

    def __init__(self, prog: str, message: str) -> None:
        super().__init__(message)
        self.prog = prog


#: argparse's messages and their replacements; other messages stay.
_MESSAGES = (
    (r"the following arguments are required: (.*)", r"missing: \1"),
    (r"argument ([^:/]+)[^:]*: expected (?:one|at least one) argument", r"\1: needs a value"),
    (r"argument ([^:/]+)[^:]*: ignored explicit argument (.*)", r"\1: takes no value"),
    (r"unrecognized arguments: (.*)", r"unexpected: \1"),
    (r"argument ([^:/]+)[^:]*: (.*)", r"\1: \2"),
)


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are one line. Its arguments are added by ``fill`` when it is first used."""

    def __init__(self, *, fill: Callable[[Parser], None] | None = None, **how: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **how)  # type: ignore[arg-type]
        self._fill = fill

    def filled(self) -> Parser:
        if self._fill is not None:
            fill, self._fill = self._fill, None
            fill(self)
        return self

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        parsed, extra = super(Parser, self.filled()).parse_known_args(args, namespace)
        return parsed, self._placed(parsed, extra)

    def _placed(self, parsed: argparse.Namespace, extra: list[str]) -> list[str]:
        """Give arguments that are left over to positional ones that may be absent and are. Returns the others.

        argparse takes such a one for absent as soon as it meets an option before it.
        """
        absent = [
            each.dest for each in self._actions if not each.option_strings and each.nargs == "?" and getattr(parsed, each.dest) is None
        ]
        if not absent or not extra:
            return extra
        rest = list(extra)
        if "--" in rest:
            rest.remove("--")
        for dest in absent[: len(rest)]:
            setattr(parsed, dest, rest.pop(0))
        return rest

    def format_help(self) -> str:
        return super(Parser, self.filled()).format_help()

    def error(self, message: str) -> NoReturn:
        for pattern, said in _MESSAGES:
            if re.fullmatch(pattern, message, re.DOTALL):
                message = re.sub(pattern, said, message, flags=re.DOTALL)
                break
        advised = message.endswith("?") or "contradict" in message
        raise ParseError(self.prog, message if advised else f"{message}; see {self.prog} --help")

    def require_known(self, arguments: Sequence[str]) -> None:
        """Raise ParseError for the first argument that looks like an option but is none."""
        before = ""
        for argument in arguments:
            flag = argument.partition("=")[0]
            if argument == "--":
                return
            known = self._option_string_actions
            if flag not in known and re.fullmatch(r"-\D.*|--.+", flag, re.DOTALL) and " " not in argument:
                if before in known and known[before].nargs != 0:
                    raise ParseError(self.prog, f"{before} {argument}: a value that begins with a dash is written {before}={argument}")
                from bigq.options import did_you_mean  # here: ``bigq --help`` does without

                self.error(f"argument {flag}: unknown option{did_you_mean(flag, (name for name in known if name.startswith('--')))}")
            before = argument


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)
