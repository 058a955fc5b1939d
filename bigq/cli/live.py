"""``bigq serve``, and the repetition of ``bigq status``, on the command line."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from time import sleep as pause

from bigq.cli.parser import Parser
from bigq.errors import UsageError
from bigq.progress.terminal import print_result


def add_serve(p: Parser) -> None:
    p.description = f"{p.description} It is answered on this machine only; /metrics has the same for Prometheus, /status.json for programs."
    p.add_argument("out", nargs="+", metavar="OUT|FILE", help="output folders of jobs, running or not; or YAML files of jobs")
    p.add_argument("--port", type=_port, default=8642, help="port of 127.0.0.1; 0 for any that is free (default: %(default)s)")
    p.add_argument("--refresh", type=_seconds, default=5, metavar="SECONDS", help="how often the page is shown anew (default: %(default)s)")
    p.set_defaults(command=_run_serve)


def again_and_again(show: Callable[[], bool], seconds: float) -> None:
    """Show something until it says that this was the last time."""
    screen = sys.stdout.isatty()
    while True:
        if screen:
            sys.stdout.write("\x1b[H\x1b[2J")
        if show():
            return
        pause(seconds)


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise UsageError(f"--port {text}: must be a number from 0 to 65535")
    return int(text)


def _seconds(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 3600:
        raise UsageError(f"--refresh {text}: must be whole seconds from 1 to 3600")
    return int(text)


def _run_serve(args: argparse.Namespace) -> int:
    from bigq.live.server import Server
    from bigq.live.watched import require_places

    places = [Path(out).expanduser() for out in args.out]
    require_places(places)
    with Server(places, args.port, args.refresh) as server:
        print_result(server.url)
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            server.serve_forever()
    return 0
