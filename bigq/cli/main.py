"""The command line: arguments to configs, results to stdout, errors to one line on stderr and an exit code.

The exit codes are listed in ``bigq.errors``. The environment is read here and nowhere else.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from bigq.cli.commands import build_parser
from bigq.cli.parser import ParseError
from bigq.errors import REPEAT, RESUME, BigqError, UsageError
from bigq.progress.terminal import abandon_broken_streams, flush_results, one_line, prepare_streams, tell

if TYPE_CHECKING:
    from bigq.progress.display import Display

INTERRUPTED = 130

#: Commands that several processes would do several times, or in each other's way.
ALONE = ("generate", "convert", "demo")
#: Commands that go on where they were stopped.
RESUMING = ("quantize", "batch")
#: Commands whose --json writes events to stderr.
WITH_EVENTS = ("quantize", "plan")


def program(argv: Sequence[str] | None = None, failed: Callable[[str], None] | None = None) -> NoReturn:
    """The installed program: run one command and end the process. failed: receives the error that the command ends with.

    Python's own end, which frees every object that torch and transformers made, takes a second. Nothing waits for it: what
    ``main`` started has ended, and files and streams are flushed.
    """
    status = main(argv, failed)
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def job_of_batch() -> NoReturn:
    """The process of one job of ``bigq batch``: ``bigq`` with the arguments after the first one, a file descriptor that takes its error."""
    from bigq.batch.run import report_to

    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)
    program(sys.argv[2:], report_to(fd))


def main(argv: Sequence[str] | None = None, failed: Callable[[str], None] | None = None) -> int:
    """Run one command; returns the exit code. failed: receives the error that the command ends with."""
    started = time.monotonic()
    prepare_streams()
    try:
        return _run(list(sys.argv[1:] if argv is None else argv), started, failed or (lambda _: None))
    except KeyboardInterrupt:  # before a command began
        return INTERRUPTED
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    finally:
        abandon_broken_streams()


def _run(argv: list[str], started: float, failed: Callable[[str], None]) -> int:
    try:
        args = build_parser().parse_args(argv)
    except ParseError as error:
        _report_parse_error(argv, error)
        failed(str(error))
        return error.exit_code
    finally:
        flush_results()
    args.given, args.started = argv, started
    if argv[0] == "batch":
        from bigq.batch.settings import ARRAY_VARIABLES

        args.array_variables = {name: os.environ[name] for name in ARRAY_VARIABLES if name in os.environ}
    args.display = display = _display(argv[0], args)
    with contextlib.ExitStack() as stack:
        try:
            try:
                if getattr(args, "json", False) or getattr(args, "quiet", False):
                    from bigq.cli.silence import silenced

                    stack.enter_context(silenced())
                from bigq.machine.ranks import place_of

                args.place = place_of(os.environ)
                if args.place is not None:
                    if argv[0] in ALONE:
                        raise UsageError(f"bigq {argv[0]}: {args.place.count} processes cannot share it; start it in one process")
                    # Ranks that lose each other say so in one line. torch's own warnings say it again, with the stacks of its threads.
                    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
                if spec := os.environ.get("BIGQ_FAULT"):
                    from bigq import faults

                    faults.arm(spec)
                status: int = args.command(args)
            finally:
                flush_results()
        except BigqError as error:
            display.error(error.exit_code, type(error).__name__, str(error))
            failed(str(error))
            return error.exit_code
        except KeyboardInterrupt:
            display.error(INTERRUPTED, "Interrupted", f"interrupted; {RESUME if argv[0] in RESUMING else REPEAT}")
            return INTERRUPTED
        return status


def _report_parse_error(argv: list[str], error: ParseError) -> None:
    if "--json" in argv and argv[0] in WITH_EVENTS:
        from bigq.progress.display import Events

        Events(sys.stderr).error(error.exit_code, "UsageError", str(error))
    else:
        tell(f"{error.prog}: error: {one_line(str(error))}")


def _display(command: str, args: argparse.Namespace) -> Display:
    """How the command shows its progress on stderr."""
    from bigq.progress.display import Display, Events, Lines

    quiet = bool(getattr(args, "quiet", False))
    if command in WITH_EVENTS and args.json:
        return Events(sys.stderr, quiet=quiet)
    if quiet:
        return Display()
    if command in ("quantize", "eval"):
        from bigq.progress.live_line import display_for

        return display_for(sys.stderr, dumb=os.environ.get("TERM") == "dumb")
    return Lines(sys.stderr) if command in ("plan", "generate", "convert") else Display()
