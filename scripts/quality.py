#!/usr/bin/env python3
r"""Quantize several models with bigq, GPTQModel, llm-compressor and auto-round on the same tokens, and judge all of them alike.

    scripts/clients/venvs DIR gptqmodel llmc auto_round                # once; not needed for bigq alone
    python scripts/quality.py --work DIR --venvs DIR                   # makes models, texts and runs that are not there yet
    python scripts/quality.py --work DIR --summary                     # prints what is there
    python scripts/quality.py --work DIR --collect --out docs/results  # docs/results/quality.json and docs/quality.md
    python scripts/quality.py --out docs/results --table               # docs/quality.md again, from quality.json
    python scripts/quality.py --work DIR --out docs/results --restore  # WORK/runs again, from quality.json, to add runs to them

Choose runs with --only and a regular expression, searched in SUBJECT.SETTING.CONTESTANT.DRAW, such as smollm2-docs.4g64-sym.bigq-search.0:

    python scripts/quality.py --work DIR --only 'smollm2-docs\.4g64-sym\.bigq'
    python scripts/quality.py --work DIR --only 'my-idea\.[012]$' --add 'my idea=--order group --scale-bits 11' --tree WORKTREE

--add NAME=FLAGS adds a contestant with options of ``bigq quantize``; --tree names the source tree whose bigq is measured (this one unless
given). Subjects, settings and contestants are tables in quality_bench/settings.py, which also says which half each model belongs to:
settings are chosen with one half and judged with the other. A run that is done is kept as WORK/runs/NAME.json and not made again, so
the script may be stopped, and several may share a WORK. Models and texts lie in WORK/models, or where --models says.

All compute in fp32 from the same bf16 checkpoint. Weights are unpacked by code that is not bigq's (of another program: by its own) into a
dense checkpoint, which transformers runs; its distribution at every held-out token is compared with the original's.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts")]

from quality_bench import collected, comparison
from quality_bench.page import page
from quality_bench.settings import CONTESTANTS, DRAWS, Contestant, all_runs


def added(text: str) -> Contestant:
    name, equals, flags = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FLAGS")
    return Contestant(name=name, flags=flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for models, outputs and records of runs")
    parser.add_argument("--models", type=Path, help="folder of prepared models and texts (default: WORK/models)")
    parser.add_argument("--venvs", type=Path, help="folder with the virtual environments of other programs; without it, only bigq runs")
    parser.add_argument("--tree", type=Path, default=ROOT, help="source tree whose bigq is measured (default: this one)")
    parser.add_argument("--only", default="", metavar="REGEX", help="only runs in whose name it is found")
    parser.add_argument("--add", type=added, action="append", default=[], metavar="NAME=FLAGS", help="another contestant of bigq")
    parser.add_argument("--draws", type=int, default=3, help=f"draws of calibration rows, up to {DRAWS} (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the quantized models")
    parser.add_argument("--list", action="store_true", help="print the names of the runs and which are there, and make none")
    parser.add_argument("--summary", action="store_true", help="print the figures of the runs that are there, and make none")
    parser.add_argument("--against", default="bigq", metavar="CONTESTANT", help="whom --summary compares with (default: %(default)s)")
    parser.add_argument("--collect", action="store_true", help="make no run; write the result file and the page")
    parser.add_argument("--table", action="store_true", help="only write the page, from the result file")
    parser.add_argument("--restore", action="store_true", help="only write the records of the result file to WORK/runs")
    parser.add_argument("--out", type=Path, help="folder for quality.json; quality.md goes to the folder above")
    args = parser.parse_args()
    if (args.table or args.collect or args.restore) and args.out is None:
        parser.error("--out is needed")
    if args.table:
        (args.out.parent / "quality.md").write_text(page(args.out), encoding="utf-8")
        return
    if args.work is None:
        parser.error("--work is needed, unless --table is given")
    work, models = args.work.resolve(), (args.models or args.work / "models").resolve()
    every = all_runs(range(args.draws), [*CONTESTANTS, *args.add])
    runs = [run for run in every if re.search(args.only, run.name)]
    if args.list:
        print("\n".join(f"{'done' if (work / 'runs' / f'{run.name}.json').exists() else '-':5} {run.name}" for run in runs))
    elif args.summary:
        print(comparison.summary(collected.records(work, runs), args.against))
    elif args.restore:
        print(f"{collected.restore(args.out / 'quality.json', work, every)} records written")
    elif args.collect:
        collected.write_result(work, models, runs, args.out / "quality.json")
        (args.out.parent / "quality.md").write_text(page(args.out), encoding="utf-8")
    else:
        from quality_bench.runs import Bench

        venvs = args.venvs.resolve() if args.venvs else None
        problems = Bench(models=models, work=work, tree=args.tree.resolve(), venvs=venvs, keep=args.keep).make(runs)
        if problems:
            sys.exit(f"quality: {len(problems)} runs failed; see above")


if __name__ == "__main__":
    main()
