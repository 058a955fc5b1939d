#!/usr/bin/env python3
"""Measure how several processes share a job: the CPU seconds of each, from the claim of the folder to its end.

    python scripts/rank_shares.py [--ranks N] [--samples N] [--seqlen N] [--repeat N] [--json docs/results/rank_shares.json]

The model is the one that is shipped with bigq. CPU seconds are those of all threads of a process; imports, planning and the reading of
the calibration text come before and are left out, since each process does them whatever their number. Of several repetitions the one
with the fewest CPU seconds counts: another program on the machine only adds to them. By phase there are the CPU seconds of the computing
thread. ``packing`` and ``writing`` are the first rank's alone, so it takes more than the others.
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
        phases = {name: round(spent, 3) for name, spent in sorted(claim.clock.seconds.items())}
        Path(figures).write_text(json.dumps({"cpu_seconds": round(seconds, 3), "by_phase": phases}))

    run.claimed = noted
    run_rank(environment, arguments, told)


def run_job(count: int, options: Sequence[str], work: Path) -> list[dict[str, Any]]:
    """The figures of each process of one job."""
    work.mkdir()
    processes = []
    for rank, place in enumerate(places(count) if count > 1 else [{}]):
        environment = {**place, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        arguments = ["quantize", str(MODEL), str(work / "out"), *options]
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
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 512], help="calibration rows of each job (default: 64 512)")
    parser.add_argument("--seqlen", type=int, default=256, help="their tokens (default: %(default)s)")
    parser.add_argument("--method", default="gptq", help="(default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="jobs of each number of processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    jobs = []
    for samples in args.samples:
        options = f"--calibration builtin --samples {samples} --seqlen {args.seqlen} --method {args.method} --device cpu --quiet"
        jobs.append({"options": options, **measured_job(args.ranks, options.split(), args.repeat)})
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


def measured_job(ranks: int, options: Sequence[str], repeat: int) -> dict[str, Any]:
    """The figures of one process, and of each of several."""
    best: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(repeat):
            for count in (1, ranks):
                found = run_job(count, options, Path(folder) / f"{count}-{attempt}")
                if count not in best or _most(found) < _most(best[count]):
                    best[count] = found
    alone = _most(best[1])
    shared = [{**rank, "of_one_process": round(rank["cpu_seconds"] / alone, 3)} for rank in best[ranks]]
    print(" ".join(options))
    for name, figures in [("one process", best[1][0]), *((f"rank {i} of {ranks}", each) for i, each in enumerate(shared))]:
        print(f"{name:14} {figures['cpu_seconds']:>7.2f} s {figures['cpu_seconds'] / alone:>5.0%}  {figures['by_phase']}")
    return {"one_process": best[1][0], "shared": shared}


def _most(found: Sequence[Mapping[str, Any]]) -> float:
    """CPU seconds of the process that takes most."""
    return max(float(rank["cpu_seconds"]) for rank in found)


if __name__ == "__main__":
    sys.exit(main())
