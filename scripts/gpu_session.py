#!/usr/bin/env python3
"""Check and measure bigq on one GPU, in one command with a time limit (570 s unless --limit is given).

    scripts/gpu_session --out DIR                          # all steps
    scripts/gpu_session --out DIR --only kernels,jobs      # some steps; --skip leaves steps out
    scripts/gpu_session --out DIR --second                 # 290 s more, after a session whose results are in DIR
    scripts/gpu_session --out DIR --smoke                  # does this script work? every step on a CPU, at tiny sizes

Needs a source tree, torch, triton and transformers; no installation of bigq and no network. Steps, in this order:

    machine     versions, disk and host; the ceilings: best rates of products, copies and transfers
    kernels     every kernel against fp64 or its reference version; the same bytes when it runs twice
    jobs        small models end to end: the GPU against the CPU, tiers, kills and resume, packed inference
    shards      the inputs of bloom, deepseek, llama and qwen3: one block's weights, random
    gpu-tests   ``pytest -m gpu``, then the kernel and solver tests on the GPU
    bloom       blocks of BLOOM-176B: time, rates, waiting, peaks against the plan, allocator, one block's kernels
    deepseek    layers with experts of DeepSeek-V3: the same, with the work on experts by phase
    llama       the same for Llama-2-70B
    qwen3       layers of Qwen3-235B-A22B, as deepseek
    benchmarks  rates of every kernel and of whole Linears
    large       kernels on tensors of more than 2³¹ elements
    sanitizer   the kernels under compute-sanitizer; runs only if --only names it

Every step is a process with a time box. A step that fails, crashes or hangs does not stop the others. kernels, jobs, shards and
gpu-tests run side by side, since none of them measures time; the other steps run alone. After every step DIR gets results.json,
results.md (the same for reading) and logs.txt.gz. A step without time left is marked "not run". Exit status: 0 if every step
passed, 1 otherwise, 2 for a usage error or a missing GPU. A session that is killed leaves what it found so far and no processes.

A second session (``--second``, or ``--second DIR-OF-THE-FIRST``) chooses by itself: first what failed, crashed, was cut off or
was not run, then, with a profile, measurements that missed their aims, then the sanitizer and a longer slice of BLOOM. It writes
results-2.json and results-2.md, which say what it chose and why, and keeps the first session's files.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Where a step and its own processes find bigq, the other scripts and the tests' models: nothing is installed.
PATHS = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]
sys.path[:0] = PATHS

from facts import revision, said, source_hash
from gpu_steps import second
from gpu_steps.runner import DEBUG, LONG, PROFILE, RESERVE_SECONDS, Session, Step
from gpu_steps.setting import NOT_POSSIBLE, Findings, NotPossible, Setting

#: Step → its time box in seconds. Best evidence first, so that a short limit loses the least.
STEPS = (
    Step(name="machine", seconds=60),
    Step(name="kernels", seconds=150, together=True),
    Step(name="jobs", seconds=180, together=True),
    Step(name="shards", seconds=150, together=True),
    Step(name="gpu-tests", seconds=180, together=True),
    Step(name="bloom", seconds=120),
    Step(name="deepseek", seconds=105),
    Step(name="llama", seconds=80),
    Step(name="qwen3", seconds=70),
    Step(name="benchmarks", seconds=130),
    Step(name="large", seconds=60),
)
#: Steps that run only if --only names them.
OPTIONAL = (Step(name="sanitizer", seconds=240),)
#: Step → its module in gpu_steps, if the name differs.
MODULES = {
    "bloom": "slices",
    "deepseek": "expert_layers",
    "llama": "slices",
    "qwen3": "expert_layers",
    "gpu-tests": "gpu_tests",
    "small-kernels": "kernels",
}
LIMIT, SECOND_LIMIT = 570.0, 290.0
#: The work folder lies in memory if that much is free: the steps measure bigq, not the disk, whose rate machine reports.
MEMORY_FOLDER, MEMORY_BYTES = Path("/dev/shm"), 45 * 10**9


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_session", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", help="steps to run, separated by commas (default: all but the optional ones)")
    parser.add_argument("--skip", help="steps to leave out, separated by commas")
    parser.add_argument(
        "--second", type=Path, nargs="?", const=Path(), metavar="DIR", help="choose steps by the results in DIR (default: --out)"
    )
    parser.add_argument("--limit", type=float, help=f"time limit in seconds (default: {LIMIT:g}, or {SECOND_LIMIT:g} with --second)")
    parser.add_argument("--work", type=Path, help="folder for models and logs, which is kept (default: a temporary one)")
    parser.add_argument("--smoke", action="store_true", help="run every step on a CPU at tiny sizes")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # this and the following: how a step's own process is started
    parser.add_argument("--mode", choices=("", DEBUG, PROFILE, LONG), default="", help=argparse.SUPPRESS)
    parser.add_argument("--focus", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    known = {step.name: step for step in (*STEPS, *OPTIONAL)}
    for option, value in (("--only", args.only), ("--skip", args.skip)):
        if unknown := set((value or "").split(",")) - {*known, ""}:
            parser.error(f"{option}: no step {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    only = args.only.split(",") if args.only else [step.name for step in STEPS]
    skipped = (args.skip or "").split(",")
    args.steps = [step for name, step in known.items() if name in only and name not in skipped]
    if not args.steps:
        parser.error("no steps are left to run; change --only or --skip")
    if args.second is not None and (args.only or args.skip):
        parser.error("--second chooses the steps; leave out --only and --skip")
    if not args.smoke and not args.step and (problem := no_device()):
        parser.error(f"{problem}; --smoke tests this script on a CPU")
    args.limit = args.limit or (LIMIT if args.second is None else SECOND_LIMIT)
    args.earlier = None
    if args.second is not None:
        args.second = args.out if args.second == Path() else args.second
        try:
            args.earlier = second.read_earlier(args.second)
        except ValueError as error:
            parser.error(f"--second: {error}; run without --second first")
    return args


def no_device() -> str:
    """Why nothing can be measured here; empty if there is a GPU."""
    try:
        import torch
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    return "" if torch.cuda.is_available() else "no CUDA device here"


def chosen_steps(args: argparse.Namespace, work: Path) -> tuple[list[Step], dict[str, Any]]:
    """The steps to run, and what results say about the choice. Ceilings of an earlier session on such a device are taken over."""
    if args.earlier is None:
        return args.steps, {}
    boxes = {step.name: step.seconds for step in (*STEPS, *OPTIONAL)}
    device = None if args.smoke else said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()[0]
    known = second.ceilings_of(args.earlier, device)
    first = [] if known else [Step(name="machine", seconds=boxes["machine"], reason="the ceilings of this device are not known")]
    if known:
        (work / "ceilings.json").write_text(json.dumps(known))
    seconds = args.limit - RESERVE_SECONDS - sum(step.seconds for step in first)
    chosen, left_out = second.choose(args.earlier, boxes, sources(), seconds)
    return [*first, *chosen], second.about_choice(str(args.second), [*first, *chosen], left_out)


def sources() -> str:
    """Changes with every program that a step runs."""
    return source_hash("bigq", "scripts", "tests")


def run_step(name: str, setting: Setting, parent: int | None) -> int:
    """Run one step in this process. Returns its exit status."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a step ends when the session does
    if parent is not None and os.getppid() != parent:
        return 1  # the session ended before
    if setting.mode == DEBUG:
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # before torch is imported
    faulthandler.enable()  # the session stops a hanging step with SIGABRT: its log then shows where it was
    found = Findings(setting.found(name))
    try:
        importlib.import_module(f"gpu_steps.{MODULES.get(name, name)}").run(setting, found)
    except NotPossible as reason:
        found["not possible"] = str(reason)
        return NOT_POSSIBLE
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if any((Path(path) / package).exists() or (Path(path) / f"{package}.py").exists() for path in PATHS):
            raise
        found["not possible"] = f"{package} is not installed"
        return NOT_POSSIBLE
    return 1 if found.failures else 0


@contextlib.contextmanager
def work_folder(wanted: Path | None) -> Iterator[Path]:
    """The folder of --work, or a temporary one that is deleted at the end."""
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted.resolve()
        return
    roomy = MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free > MEMORY_BYTES
    place = MEMORY_FOLDER if roomy else None
    with tempfile.TemporaryDirectory(prefix="bigq-gpu-session-", dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def main() -> int:
    args = parse(sys.argv[1:])
    if args.step:
        setting = Setting(step=args.step, work=args.work, smoke=args.smoke, mode=args.mode, focus=tuple(args.focus))
        return run_step(args.step, setting, args.parent)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a killed session ends its steps
    args.out.mkdir(parents=True, exist_ok=True)
    with work_folder(args.work) as work:
        steps, choice = chosen_steps(args, work)
        command = f"scripts/gpu_session {' '.join(sys.argv[1:])}"
        about = {"command": command, "smoke": args.smoke, "revision": revision(), "sources": sources(), **choice}
        own = [sys.executable, str(Path(__file__).resolve()), "--out", str(args.out), "--work", str(work), *["--smoke"] * args.smoke]
        own += ["--parent", str(os.getpid())]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
        stem = "results" if args.earlier is None else second.next_stem(args.out)

        def line(step: Step) -> list[str]:
            return [*own, "--step", step.name, "--mode", step.mode, *(word for part in step.focus for word in ("--focus", part))]

        session = Session(args.out, work, args.limit, line, environment, about, stem=stem, temporary=args.work is None)
        return session.run(steps)


if __name__ == "__main__":
    sys.exit(main())
