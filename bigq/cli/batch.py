"""``bigq batch`` on the command line. Imports only what its help needs; ``bigq.cli.batch_run`` does the rest."""

from __future__ import annotations

import argparse

from bigq.batch.settings import ARRAY_VARIABLES, Ending
from bigq.cli.flags import add_options
from bigq.cli.parser import Parser
from bigq.options import table


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
    from bigq.cli.batch_run import run_batch

    return run_batch(args)
