"""``bigq batch`` on the command line, and the process of each of its jobs."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bigq.batch.run import Outcome, Runner, Signals, exit_code_of, python_command, report_to
from bigq.batch.settings import Ending
from bigq.batch.table import BatchJob, read_batch, require_sound
from bigq.cli.flags import add_options
from bigq.cli.job import idle_options, job_config
from bigq.cli.parser import Parser
from bigq.config import JobConfig
from bigq.data.spec import absolute
from bigq.errors import BigqError, Stopped, UsageError
from bigq.inspect.status import status
from bigq.job.journal import read_job
from bigq.options import Resume, table
from bigq.progress.sizes import show_seconds
from bigq.progress.terminal import keep_quiet, one_line, print_result, tell

#: Variables that hold the number of a task of an array.
ARRAY_VARIABLES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")
AUTO = "auto"


def add_batch(p: Parser) -> None:
    p.description = f"{p.description} A job that fails does not stop the others."
    p.add_argument("file", metavar="FILE", help="YAML file of jobs, see docs/batch.md")
    variables = " or ".join(ARRAY_VARIABLES)
    p.add_argument("--index", metavar="N|auto", help=f"run this job only, counted from 0; auto: the number in {variables}")
    add_options(p, table(Ending).values())
    p.add_argument("--quiet", action="store_true", help="print no progress and no table, only errors")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    p.set_defaults(command=_run_batch)


def _run_batch(args: argparse.Namespace) -> int:
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
        runner = Runner(file=path, command=python_command("bigq.cli.batch", "child"), signals=signals, say=say)
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
    from bigq.cli.commands import build_parser  # here: it imports this module

    return build_parser().parse_args(job.words())


def _checked(job: BatchJob) -> None:
    """Raise UsageError for options that do not go together."""
    args = _parsed(job)
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


def child() -> NoReturn:
    """The process of one job: ``bigq`` with the arguments after the first one, a file descriptor that its error is written to."""
    from bigq.cli.main import program

    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)
    program(sys.argv[2:], report_to(fd))
