#!/usr/bin/env python3
"""Measure how several processes share a job: the CPU seconds of each, from the claim of the folder to its end.

    python scripts/rank_shares.py [--ranks N] [--samples N] [--seqlen N] [--repeat N] [--json docs/results/rank_shares.json]
    python scripts/rank_shares.py --eval [--json docs/results/rank_shares_eval.json]       # an evaluation, from its first block on

The model is the one that is shipped with bigq. CPU seconds are those of all threads of a process; imports, planning and the reading of
the text come before and are left out, since each process does them whatever their number. Of several repetitions the one with the fewest
CPU seconds counts: another program on the machine only adds to them. By phase there are the CPU seconds of the computing thread.
``packing`` and ``writing`` are the first rank's alone, so it takes more than the others. Of an evaluation, ``blocks`` are what passes
through the blocks, with what comes before the first one, and ``head`` is the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

from facts import revision, versions
from rank_processes import PRELOADED, places, run_rank

MODEL = ROOT / "bigq/assets/tiny-llama"


def measured(environment: Mapping[str, str], arguments: Sequence[str], told: str, figures: str) -> None:
    """The main function of a process: run the command line, and write its CPU seconds to the file ``figures``."""
    (note_evaluation if arguments[0] == "eval" else note_job)(Path(figures))
    run_rank(environment, arguments, told)


def note_job(figures: Path) -> None:
    """Write what a job takes from its claim on."""
    run: Any = importlib.import_module("bigq.sched.run")
    claimed = run.claimed
    # Phases in CPU seconds: while a process waits for another one, it takes none.
    importlib.import_module("bigq.progress.clock").time = types.SimpleNamespace(perf_counter=time.thread_time)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def noted(*args: object, **named: object) -> Iterator[Any]:
        began = time.process_time()
        with claimed(*args, **named) as claim:
            yield claim
        seconds = time.process_time() - began
        write_figures(figures, seconds, claim.clock.seconds)

    run.claimed = noted


def note_evaluation(figures: Path) -> None:
    """Write what the sums of this process's rows take."""
    run: Any = importlib.import_module("bigq.infer.evaluate")
    sums, begin = run._sums, run.Stream.__init__
    phases = {"blocks": 0.0, "head": 0.0}

    def passed(*args: object) -> None:
        began = time.thread_time()
        begin(*args)
        phases["blocks"] += time.thread_time() - began

    def noted(*args: object) -> object:
        began, of_thread = time.process_time(), time.thread_time()
        found = sums(*args)
        phases["head"] = time.thread_time() - of_thread - phases["blocks"]
        write_figures(figures, time.process_time() - began, phases)
        return found

    run._sums, run.Stream.__init__ = noted, passed


def write_figures(file: Path, seconds: float, phases: Mapping[str, float]) -> None:
    rounded = {name: round(spent, 3) for name, spent in sorted(phases.items())}
    file.write_text(json.dumps({"cpu_seconds": round(seconds, 3), "by_phase": rounded}))


def run_job(count: int, command: str, options: Sequence[str], work: Path) -> list[dict[str, Any]]:
    """The figures of each process of one job."""
    work.mkdir()
    processes = []
    for rank, place in enumerate(places(count) if count > 1 else [{}]):
        environment = {**place, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        arguments = [command, str(MODEL), *([str(work / "out")] if command == "quantize" else []), *options]
        args = (environment, arguments, str(work / f"{rank}.txt"), str(work / f"{rank}.json"))
        processes.append(multiprocessing.get_context("forkserver").Process(target=measured, args=args))
        processes[-1].start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("\n".join((work / f"{rank}.txt").read_text() for rank in range(count)))
    return [json.loads((work / f"{rank}.json").read_text()) for rank in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="how many processes share the job (default: %(default)s)")
    parser.add_argument("--samples", type=int, nargs="+", help="rows of each job (default: 64 512; of evaluations 64 312, which is all)")
    parser.add_argument("--seqlen", type=int, default=256, help="their tokens (default: %(default)s)")
    parser.add_argument("--method", default="gptq", help="(default: %(default)s)")
    parser.add_argument("--eval", action="store_true", help="measure evaluations of the model")
    parser.add_argument("--repeat", type=int, default=3, help="jobs of each number of processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}  # the server that processes are forked from imports torch
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    command = "eval" if args.eval else "quantize"
    text = "--data builtin" if args.eval else f"--calibration builtin --method {args.method}"
    jobs = []
    for samples in args.samples or ([64, 312] if args.eval else [64, 512]):
        options = f"{text} --samples {samples} --seqlen {args.seqlen} --device cpu --quiet"
        jobs.append({"options": options, **measured_job(args.ranks, command, options.split(), args.repeat)})
    result = {
        "command": " ".join(["python", "scripts/rank_shares.py", *sys.argv[1:]]),
        "revision": revision(),
        "versions": versions(),
        "model": MODEL.name,
        "jobs": jobs,
    }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measured_job(ranks: int, command: str, options: Sequence[str], repeat: int) -> dict[str, Any]:
    """The figures of one process, and of each of several."""
    best: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(repeat):
            for count in (1, ranks):
                found = run_job(count, command, options, Path(folder) / f"{count}-{attempt}")
                if count not in best or _most(found) < _most(best[count]):
                    best[count] = found
    alone = _most(best[1])
    shared = [{**rank, "of_one_process": round(rank["cpu_seconds"] / alone, 3)} for rank in best[ranks]]
    print(command, *options)
    for name, figures in [("one process", best[1][0]), *((f"rank {i} of {ranks}", each) for i, each in enumerate(shared))]:
        print(f"{name:14} {figures['cpu_seconds']:>7.2f} s {figures['cpu_seconds'] / alone:>5.0%}  {figures['by_phase']}")
    return {"one_process": best[1][0], "shared": shared}


def _most(found: Sequence[Mapping[str, Any]]) -> float:
    """CPU seconds of the process that takes most."""
    return max(float(rank["cpu_seconds"]) for rank in found)


if __name__ == "__main__":
    sys.exit(main())
