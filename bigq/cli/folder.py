"""Commands about folders that jobs wrote, on the command line: verify, status, report, convert."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from bigq.errors import CheckpointError
from bigq.progress.terminal import keep_quiet, one_line, print_result, tell


def add_folder_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Their parsers."""
    _add_verify(commands.add_parser("verify", help="check a job's output folder against its record"))
    _add_status(commands.add_parser("status", help="how far the job of an output folder is"))
    what = "write what a job did, and how well, as one HTML file or as a model card"
    _add_report(commands.add_parser("report", help=what, description=f"{what.capitalize()}. Works while the job runs, too."))
    what = "re-pack a quantized model in another format, without loss"
    _add_convert(commands.add_parser("convert", help=what, description=f"{what.capitalize()}, or refuse to."))


def _add_verify(p: argparse.ArgumentParser) -> None:
    p.add_argument("out", metavar="OUT", help="output folder of a job, finished or not")
    p.add_argument("--trust-remote-code", action="store_true", help="run model code that is in OUT, to see what its config describes")
    p.set_defaults(command=_run_verify)


def _add_convert(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="packed checkpoint, of bigq or others: folder")
    p.add_argument("out", metavar="OUT", help="folder to write; a file for gguf")
    p.add_argument("--to", required=True, choices=("gptq", "gptq_v2", "compressed-tensors", "gguf"), help="format to write")
    p.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint")
    p.add_argument("--quiet", action="store_true", help="no progress, no summary")
    p.set_defaults(command=_run_convert)


def _add_status(p: argparse.ArgumentParser) -> None:
    p.add_argument("out", metavar="OUT", help="output folder of a job, running or not")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.set_defaults(command=_run_status)


def _add_report(p: argparse.ArgumentParser) -> None:
    p.add_argument("out", metavar="OUT", help="output folder of a job, finished or not")
    p.add_argument("--out", dest="file", metavar="FILE", help="where to write the HTML file; OUT-report.html beside OUT if not given")
    card = "write OUT/README.md, a model card for the hub, in place of the source's; no HTML unless --out is given too"
    p.add_argument("--model-card", action="store_true", help=card)
    p.set_defaults(command=_run_report)


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
    from bigq.conversion.convert import convert
    from bigq.progress.sizes import show_size

    say = keep_quiet if args.quiet else tell
    done = convert(args.model, args.out, args.to, trust_remote_code=args.trust_remote_code, say=say)
    if not args.quiet:
        sizes = f"{show_size(done.bytes_before)} → {show_size(done.bytes)}"
        print_result(f"{one_line(args.out)}: {done.linears} Linears, {done.format_before} → {done.format}, {sizes}")
    return 0


def _run_status(args: argparse.Namespace) -> int:
    from bigq.inspect.status import status

    found = status(Path(args.out))
    print_result(json.dumps(found.to_json()) if args.json else found.text())
    return 0


def _run_report(args: argparse.Namespace) -> int:
    from bigq.reports.write import write_model_card, write_report

    out = Path(os.path.expanduser(args.out))
    if args.model_card:
        print_result(str(write_model_card(out)))
    if args.file is not None or not args.model_card:
        print_result(str(write_report(out, None if args.file is None else Path(os.path.expanduser(args.file)))))
    return 0
