"""``bigq batch``: check all of a file, run its jobs, print what became of them."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigq.batch.run import Outcome, Runner, Signals, exit_code_of, python_command
from bigq.batch.settings import ARRAY_VARIABLES
from bigq.batch.table import BatchJob, read_batch, require_sound
from bigq.cli.job import add_quantize, idle_options, job_config
from bigq.cli.parser import ParseError, Parser
from bigq.config import JobConfig
from bigq.data.spec import absolute
from bigq.errors import BigqError, Stopped, UsageError
from bigq.inspect.status import status
from bigq.job.journal import read_job
from bigq.options import Resume, table
from bigq.progress.sizes import show_seconds
from bigq.progress.terminal import keep_quiet, one_line, print_result, tell

AUTO = "auto"


def run_batch(args: argparse.Namespace) -> int:
    """Run the jobs; returns the exit code. Raises a BigqError where the file is refused, and Stopped before the first job."""
    path = Path(os.path.expanduser(args.file))
    on_stop: int = args.exit_code_on_stop or Stopped.exit_code
    signals = Signals(on_stop)
    with signals.handled():
        signals.interrupting = True
        jobs = read_batch(path)
        asked = jobs if args.index is None else [jobs[_index(args, path, len(jobs))]]
        done = {job.index: _is_done(job) for job in jobs}
        require_sound(path, jobs, asked, _checked, done)
        signals.interrupting = False
        say = keep_quiet if args.quiet else _say
        runner = Runner(file=path, command=python_command("bigq.cli.main", "job_of_batch"), signals=signals, say=say)
        outcomes = runner.run(asked, done, ["--quiet"] if args.quiet else [])
    code = exit_code_of(outcomes, on_stop)
    if args.json:
        print_result(json.dumps({"file": str(path), "exit_code": code, "jobs": [each.to_json() for each in outcomes]}))
    elif not args.quiet:
        print_result(_table(outcomes))
    return code


def _say(text: str) -> None:
    tell(one_line(text))


def _index(args: argparse.Namespace, path: Path, count: int) -> int:
    said, text = f"--index {args.index}", args.index
    if text == AUTO:
        variables: Mapping[str, str] = args.array_variables
        if not variables:
            raise UsageError(f"{said}: neither {' nor '.join(ARRAY_VARIABLES)} is set; give a number")
        name, text = next(iter(variables.items()))
        said = f"{said}: {name}={text}"
    if not (text.isascii() and text.isdigit() and int(text) < count):
        raise UsageError(f"{said}: {path} has the jobs 0 to {count - 1}")
    return int(text)


def _parsed(job: BatchJob) -> argparse.Namespace:
    return _quantize_parser().parse_args(job.words()[1:])


@functools.cache
def _quantize_parser() -> Parser:
    return Parser(prog="bigq quantize", description="", fill=add_quantize)


def _checked(job: BatchJob) -> None:
    """Raise UsageError for options that do not go together."""
    try:
        args = _parsed(job)
    except ParseError as error:
        raise UsageError(str(error)) from None
    idle_options(args, job_config(args), "")


def _is_done(job: BatchJob) -> bool:
    """Whether OUT holds this very job, finished. Where that takes more to know, its process finds out."""
    out = Path(os.path.expanduser(job.out))
    try:
        if not out.is_dir() or status(out).state != "finished" or (begun := read_job(out)) is None:
            return False
        before = JobConfig.from_frozen(begun["settings"])
        config = job_config(_parsed(job), begun["settings"])
        folder = job.model_folder
        if folder is not None and hashlib.sha256((folder / "config.json").read_bytes()).hexdigest() != begun.get("config"):
            return False
    except (BigqError, OSError, KeyError):
        return False
    return _identity(config) == _identity(before)


def _identity(config: JobConfig) -> dict[str, Any]:
    """The settings that decide a job's bytes."""
    kept = [name for name, each in table(JobConfig).items() if each.resume is Resume.REFUSED]
    return {name: getattr(config, name) for name in kept} | {"calibration": absolute(config.calibration), "push": config.push}


def _table(outcomes: Sequence[Outcome]) -> str:
    """What became of each job, for a person."""
    rows = [("job", "state", "code", "time", "out")]
    for each in outcomes:
        code = "" if each.exit_code is None else str(each.exit_code)
        rows.append((str(each.job.index), each.state, code, "" if each.seconds is None else show_seconds(each.seconds), each.job.out))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row, outcome in zip(rows, [None, *outcomes], strict=True):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        lines.append(f"{cells}  {one_line(row[4])}")
        if outcome is not None and outcome.message is not None and outcome.state != "done":
            lines.append(f"     {one_line(outcome.message)}")
    return "\n".join(lines)
