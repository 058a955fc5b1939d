"""The commands of bigq and their parsers. Imports only what the help of one command needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from bigq.cli.parser import ParseError, Parser
from bigq.errors import UsageError
from bigq.version import __version__


class _Bigq(Parser):
    """``bigq`` itself: all commands."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        arguments = list(args or ())
        command = self.command(arguments)
        try:
            command.require_known(arguments[command is not self :])
            args, unexpected = super().parse_known_args(arguments, namespace)  # type: ignore[no-untyped-call]
            if unexpected:
                command.error(f"unrecognized arguments: {' '.join(unexpected)}")
            if complete := getattr(args, "complete", None):
                complete(command, args)
            return args, unexpected
        except ParseError:
            raise
        except UsageError as error:
            raise ParseError(command.prog, str(error)) from None

    def command(self, arguments: Sequence[str]) -> Parser:
        """The parser for the arguments: a command's, or this one for ``--help`` and ``--version``. Raises ParseError."""
        if not arguments:
            self.error(f"give a command: {', '.join(COMMANDS)}")
        name = arguments[0]
        if name in COMMANDS:
            return subparser(self, name).filled()
        if not name.startswith("-"):
            from bigq.options import did_you_mean  # here: ``bigq --help`` does without

            self.error(f"{name}: unknown command{did_you_mean(name, COMMANDS)}")
        return self


def build_parser() -> Parser:
    parser = _Bigq(
        prog="bigq",
        usage="bigq COMMAND ...",
        description="GPTQ quantization of language models far larger than the machine.",
        epilog="bigq COMMAND --help shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"bigq {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser, prog="bigq")
    for name, (what, positionals, fill) in COMMANDS.items():
        usage = f"bigq {name} {positionals} [options]".replace("  ", " ")
        commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", usage=usage, fill=fill)
    return parser


def subparser(parser: argparse.ArgumentParser, name: str) -> Parser:
    """The parser of a command."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    found: Parser = commands.choices[name]
    return found


def _quantize(p: Parser) -> None:
    from bigq.cli.job import add_quantize

    add_quantize(p)


def _plan(p: Parser) -> None:
    from bigq.cli.job import add_plan

    add_plan(p)


def _batch(p: Parser) -> None:
    from bigq.cli.batch import add_batch

    add_batch(p)


def _eval(p: Parser) -> None:
    from bigq.cli.evaluate import add_eval

    add_eval(p)


def _generate(p: Parser) -> None:
    from bigq.cli.generate import add_generate

    add_generate(p)


def _convert(p: Parser) -> None:
    from bigq.cli.folder import add_convert

    add_convert(p)


def _verify(p: Parser) -> None:
    from bigq.cli.folder import add_verify

    add_verify(p)


def _status(p: Parser) -> None:
    from bigq.cli.folder import add_status

    add_status(p)


def _serve(p: Parser) -> None:
    from bigq.cli.live import add_serve

    add_serve(p)


def _report(p: Parser) -> None:
    from bigq.cli.folder import add_report

    add_report(p)


def _demo(p: Parser) -> None:
    from bigq.cli.folder import add_demo

    add_demo(p)


#: Each command: what it does, its positional arguments, and what adds its arguments.
COMMANDS: dict[str, tuple[str, str, Callable[[Parser], None]]] = {
    "quantize": ("quantize a model, or resume a job that was stopped", "MODEL OUT", _quantize),
    "batch": ("quantize the models of a file of jobs one after another, or resume them", "FILE", _batch),
    "plan": ("estimate memory, disk and time of a job before it starts", "MODEL [OUT]", _plan),
    "eval": ("measure a model's perplexity and its distance from another model", "MODEL --data FILE", _eval),
    "generate": ("generate text with a model, original or quantized", "MODEL --prompt TEXT", _generate),
    "convert": ("re-pack a quantized model in another format, without loss", "MODEL OUT --to FORMAT", _convert),
    "verify": ("check a job's output folder against its records", "OUT", _verify),
    "status": ("show the progress of a job, or of all jobs of a file", "OUT", _status),
    "serve": ("show jobs that run as a page in the browser, and as metrics", "OUT ...", _serve),
    "report": ("write a job's report as one HTML file, or as a model card", "OUT", _report),
    "demo": ("quantize the tiny model that ships with bigq and compare the results", "", _demo),
}
