"""Commands about folders that jobs wrote, and the demo, on the command line."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from bigq.cli.parser import Parser
from bigq.errors import CheckpointError, UsageError
from bigq.progress.terminal import keep_quiet, one_line, print_result, tell
from bigq.vocabulary import FORMAT_NAMES

#: How often ``bigq status --watch`` looks.
WATCH_SECONDS = 2

if TYPE_CHECKING:
    from bigq.batch.overview import Overview
    from bigq.inspect.status import Status


def add_verify(p: Parser) -> None:
    p.add_argument("out", metavar="OUT", help="output folder of a job, finished or not")
    p.add_argument("--trust-remote-code", action="store_true", help="run model code in OUT, to build the model from its config")
    p.set_defaults(command=_run_verify)


def add_convert(p: Parser) -> None:
    p.description = f"{p.description} A format that cannot hold the same values is refused."
    p.add_argument("model", metavar="MODEL", help="folder of a quantized model, from bigq or another tool")
    p.add_argument("out", metavar="OUT", help="folder to write; a file for gguf")
    p.add_argument("--to", required=True, type=_format, metavar="{" + ",".join(FORMAT_NAMES) + "}", help="format to write")
    p.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint")
    p.add_argument("--quiet", action="store_true", help="print no progress and no summary, only errors")
    p.set_defaults(command=_run_convert)


def add_status(p: Parser) -> None:
    p.add_argument("out", metavar="OUT|FILE", help="output folder of a job, running or not; or a YAML file of jobs")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--html", metavar="PAGE", help="also write the state of a file's jobs as one HTML page")
    p.add_argument(
        "--watch", action="store_true", help=f"show it anew every {WATCH_SECONDS} seconds until no job runs; with --json a line each"
    )
    p.set_defaults(command=_run_status)


def add_report(p: Parser) -> None:
    p.description = f"{p.description} Works while the job runs, too."
    p.add_argument("out", metavar="OUT", help="output folder of a job, finished or not")
    p.add_argument("--out", dest="file", metavar="FILE", help="the HTML file to write (default: OUT-report.html beside OUT)")
    card = "write OUT/README.md, a model card for the hub, in place of the source's README; no HTML unless --out is given too"
    p.add_argument("--model-card", action="store_true", help=card)
    p.set_defaults(command=_run_report)


def add_demo(p: Parser) -> None:
    p.add_argument("--out", default="bigq-demo", metavar="FOLDER", help="folder for the quantized models (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda:N (default: auto)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    p.set_defaults(command=_run_demo)


def _format(text: str) -> str:
    if text not in FORMAT_NAMES:
        raise UsageError(f"--to {text}: must be one of {', '.join(FORMAT_NAMES)}")
    return text


def _run_verify(args: argparse.Namespace) -> int:
    from bigq.inspect.verify import verify

    problems = verify(Path(args.out), trust_remote_code=args.trust_remote_code)
    for problem in problems:
        print_result(one_line(problem))
    if problems:
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise CheckpointError(f"{args.out}: has {count}; run the command that made it again, or choose another folder")
    print_result(f"{one_line(args.out)}: sound")
    return 0


def _run_convert(args: argparse.Namespace) -> int:
    args.display.reading(args.model)
    from bigq.conversion.convert import convert
    from bigq.progress.sizes import show_size

    say = keep_quiet if args.quiet else tell
    done = convert(args.model, args.out, args.to, trust_remote_code=args.trust_remote_code, say=say)
    if not args.quiet:
        sizes = f"{show_size(done.bytes_before)} → {show_size(done.bytes)}"
        print_result(f"{one_line(args.out)}: {done.linears} Linears, {done.format_before} → {done.format}, {sizes}")
    return 0


def _run_status(args: argparse.Namespace) -> int:
    if args.watch:
        from bigq.cli.live import again_and_again

        again_and_again(lambda: not _show_status(args).may_run, WATCH_SECONDS)
    else:
        _show_status(args)
    return 0


def _show_status(args: argparse.Namespace) -> Status | Overview:
    """Print a state, and return it."""
    out = Path(os.path.expanduser(args.out))
    found: Status | Overview
    if out.is_file():
        from bigq.batch.overview import overview

        found = overview(out)
        if args.html is not None:
            from bigq.batch.page import write_page

            write_page(found, Path(os.path.expanduser(args.html)))
    elif args.html is not None:
        raise UsageError(f"--html {args.html}: {args.out} is no file of jobs; run bigq report {args.out}")
    else:
        from bigq.inspect.status import status

        found = status(out)
    print_result(json.dumps(found.to_json()) if args.json else found.text())
    return found


def _run_report(args: argparse.Namespace) -> int:
    from bigq.reports.write import write_model_card, write_report

    out = Path(os.path.expanduser(args.out))
    if args.model_card:
        print_result(str(write_model_card(out)))
    if args.file is not None or not args.model_card:
        print_result(str(write_report(out, None if args.file is None else Path(os.path.expanduser(args.file)))))
    return 0


def _run_demo(args: argparse.Namespace) -> int:
    from bigq.cli.demo import demo

    demo(args.out, args.device, as_json=args.json)
    return 0
