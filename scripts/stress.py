#!/usr/bin/env python3
"""Kill jobs at every named step and at random instants, resume them, and compare the output with a run that was never killed.

    python scripts/stress.py --work DIR [--seconds S] [--kills N] [--seed K] [--json docs/results/stress.json]

Each job is a separate process that runs the command line as a user does: ``bigq quantize MODEL OUT …``. It is forked from a
parent that has imported everything, because imports take seconds and a job of this size takes half a second. A job is killed
with SIGKILL (by a fault point, or from outside after a random time) or stopped with SIGTERM. A resumed job may be killed again.
At the end, every file of the output must have the same hash as without kills, and ``bigq verify`` must find no problem. Until
then, no committed shard may be lost, and no unfinished output may be loadable.

Prints a table at the end. Exit status: 1 if any output is wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
os.environ["OMP_NUM_THREADS"] = "1"  # threads do not speed up tensors of this size: they wait for each other

from facts import revision, versions

#: Name → (family, options). Together they cover every tier, order and kind of rule, with and without prefetch and write-behind.
JOBS: dict[str, tuple[str, str]] = {
    "llama, host": ("llama", "--activations host --checkpoint-every 0"),
    "llama, disk, act-order, read-ahead": (
        "llama",
        "--activations disk --order activation --read-ahead 1 --checkpoint-every 0 --format gptq_v2 --bits 3 --asym",
    ),
    "llama, rules, bf16, read-ahead 2": (
        "llama",
        r"--read-ahead 2 --dtype bfloat16 --skip .*\.o_proj$ --rule .*\.down_proj:bits=8 --checkpoint-every never",
    ),
    "bloom, disk, mse": ("bloom", "--activations disk --scales search --checkpoint-every 0"),
    "gpt2, together, read-ahead": ("gpt2", "--no-true-sequential --read-ahead 1 --bits 2 --group-size -1"),
    "gemma2, act-order": ("gemma2", "--order activation --checkpoint-every 0"),
    "llama, gptaq, disk, act-order": ("llama", "--method gptaq --activations disk --order activation --bits 3 --checkpoint-every 0"),
    "bloom, gptaq, read-ahead": ("bloom", "--method gptaq --read-ahead 1 --checkpoint-every never"),
    "llama, rtn, read-ahead": ("llama", "--method rtn --read-ahead 1"),
    "llama, gguf, head, asym": ("llama", "--format gguf --asym --lm-head --checkpoint-every 0"),
    "llama, compressed-tensors, head": ("llama", "--format compressed-tensors --lm-head --read-ahead 1"),
    "qwen3_moe, groups": ("qwen3_moe", "--format compressed-tensors --checkpoint-every 0"),
    "deepseek_v3, groups, disk, read-ahead": (
        "deepseek_v3",
        "--format compressed-tensors --activations disk --read-ahead 1 --checkpoint-every never --dtype bfloat16 --bits 3",
    ),
    "mixtral, groups, experts only": ("mixtral", "--format compressed-tensors --skip .*self_attn.* --checkpoint-every 0 --order natural"),
    "qwen3_moe, groups, two experts at once": ("qwen3_moe", "--format compressed-tensors --experts-at-once 2 --checkpoint-every 0"),
    "llama, method awq, disk": ("llama", "--method awq --asym --format awq --activations disk --checkpoint-every 0"),
    "llama, method awq scales before gptaq": ("llama", "--method gptaq --fold awq --checkpoint-every 0"),
    "qwen3_moe, method awq scales": ("qwen3_moe", "--fold awq --format compressed-tensors --checkpoint-every 0"),
    "mixtral, method awq inside experts": ("mixtral", "--method awq --format compressed-tensors --experts-at-once 2 --checkpoint-every 0"),
    "bloom, method smoothquant, int8": ("bloom", "--fold smoothquant --format w8a8-int8 --group-size -1 --bits 8 --checkpoint-every 0"),
    "llama, method fp8": ("llama", "--format fp8 --group-size -1 --read-ahead 1 --checkpoint-every 0"),
    "llama, method int8, static inputs": (
        "llama",
        "--format w8a8-int8 --group-size -1 --bits 8 --input-scales static --lm-head --activations disk --checkpoint-every 0",
    ),
    "qwen3_moe, method nvfp4": ("qwen3_moe", "--format nvfp4 --group-size 16 --checkpoint-every 0"),
    "llama, method mxfp4, nearest": ("llama", "--format mxfp4 --group-size 32 --method rtn"),
    "llama, method nf4": ("llama", "--format bnb-nf4 --group-size 64 --checkpoint-every 0"),
    "llama, method rotated": ("llama", "--rotate --checkpoint-every 0"),
    "llama, method tuned": ("llama", "--tune-steps 4 --method gptaq --activations disk --checkpoint-every 0"),
    "llama, method mixed bits": ("llama", "--bits-per-weight 4.5 --format gptq_v2 --asym --checkpoint-every 0"),
    "llama, memory ends": ("llama", "--activations disk --checkpoint-every 0"),
}
#: The fault of the job "llama, memory ends": out of memory at the first batch, unless batches.json already records it.
MEMORY_ENDS = "batch.begun:1:OOM"
#: Models with experts, and experts in a group: a bank becomes several shards.
EXPERTS, GROUPED = ("qwen3_moe", "deepseek_v3", "mixtral"), 3
LAYERS = {"llama": "num_hidden_layers", "gemma2": "num_hidden_layers", "bloom": "n_layer", "gpt2": "n_layer"}
BLOCKS = 5
GGUF = "model.gguf"
#: Kills of one job; after that it runs to its end.
KILLS_PER_JOB = 4
#: The probability that a resumed job is killed again.
AGAIN = 0.5
#: Seconds after which a job counts as hung.
PATIENCE = 120.0


@dataclass(slots=True)
class Tally:
    """The jobs of one kind. kills: how often, by fault point or signal."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    stopped: int = 0
    runs: int = 0
    outputs: int = 0
    wrong: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "kills": sum(self.kills.values()),
            "kills_by": dict(sorted(self.kills.items())),
            "stopped_by_sigterm": self.stopped,
            "runs": self.runs,
            "outputs_compared": self.outputs,
            "wrong": self.wrong,
        }


def make_inputs(work: Path) -> None:
    """Write a tiny model of each family, and token ids."""
    sys.path.insert(0, str(ROOT / "tests"))
    from models import make_checkpoint, random_ids, save_ids
    from moe_families import moe_model

    from bigq.model.skeleton import silence_transformers

    silence_transformers()
    for family in sorted({family for family, _ in JOBS.values()}):
        if family in EXPERTS:
            moe_model(family, num_hidden_layers=BLOCKS - 2).save_pretrained(work / family)  # type: ignore[operator]
            continue
        make_checkpoint(work / family, family, **{LAYERS[family]: BLOCKS})
    save_ids(work / "ids.safetensors", random_ids())


def start(arguments: Sequence[str], log: Path, fault: str | None = None, modules: Path | None = None) -> int:
    """Fork a process that runs the command line. Returns its pid. modules: a file that gets the names of the imported modules."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.pop("BIGQ_FAULT", None)
        if fault is not None:
            os.environ["BIGQ_FAULT"] = fault
        from bigq.cli.main import main

        code = main(arguments)
        if modules is not None:
            modules.write_text("\n".join(sys.modules))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, until: float) -> int | None:
    """The exit code of a process, −N for signal N; None if it still runs at the time ``until``."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every file in an output folder, without the job's own records."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def committed(out: Path) -> set[str]:
    """The units that the journal names as committed."""
    from bigq.job.journal import read_commits

    return {commit.unit for commit in read_commits(out)[0]} if out.is_dir() else set()


def passed_points() -> list[str]:
    """The fault points that these jobs pass: none of them uploads."""
    from bigq.faults import POINTS

    return [point for point in POINTS if not point.startswith("push.")]


class Stress:
    """Runs jobs of all kinds in turn and kills each of them up to KILLS_PER_JOB times."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.random = work, random.Random(seed)
        self.tallies = {name: Tally() for name in JOBS}
        self.whole: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.number = 0
        self.points = self._points()

    def _points(self) -> Iterator[str]:
        """Fault points in random order, each with a random count: the fault acts when the point is passed for the count-th time."""
        while True:
            for point in self.random.sample(points := passed_points(), len(points)):
                yield f"{point}:{1 + int(self.random.expovariate(0.4))}"

    def _point(self) -> str:
        """The next fault point; every second time, one at which no job was killed yet."""
        missed = [point for point in passed_points() if not any(tally.kills[point] for tally in self.tallies.values())]
        return f"{self.random.choice(missed)}:1" if missed and self.random.random() < 0.5 else next(self.points)

    def arguments(self, name: str, out: Path) -> list[str]:
        family, options = JOBS[name]
        common = f"--calibration {self.work / 'ids.safetensors'} --samples 8 --seqlen 24 --batch 3 --device cpu --quiet"
        size = "" if "--group-size" in options else " --group-size 32"
        return ["quantize", str(self.work / family), str(out), *f"{common}{size} {options}".split()]

    def faults(self, name: str, out: Path, point: str | None = None) -> str | None:
        """The value of BIGQ_FAULT for a run of a job."""
        ends = MEMORY_ENDS if name == "llama, memory ends" and not (out / ".bigq" / "batches.json").exists() else None
        return ",".join(filter(None, (ends, point))) or None

    def warm_up(self, name: str) -> None:
        """Import the modules that a job imports."""
        modules = self.work / "modules"
        wait(start(self.arguments(name, self.work / "out"), self.work / "log", modules=modules), time.monotonic() + PATIENCE)
        for module in modules.read_text().split():
            with contextlib.suppress(ImportError):
                importlib.import_module(module)

    def reference(self, name: str) -> None:
        """Run a job twice without kills. Keeps its hashes and its duration."""
        for attempt in ("a", "b"):
            out = self.work / "whole" / name.replace(", ", "-").replace(" ", "_") / attempt
            began = time.monotonic()
            code = wait(start(self.arguments(name, out), self.work / "log", self.faults(name, out)), began + PATIENCE)
            if code != 0:
                raise SystemExit(f"{name}: the job fails without a kill (exit code {code}); see {self.work / 'log'}")
            self.seconds[name] = time.monotonic() - began
            found = hashes(out)
            if self.whole.setdefault(name, found) != found:
                raise SystemExit(f"{name}: two runs without kills give different bytes")

    def one(self, name: str) -> None:
        """Run one job, killed up to KILLS_PER_JOB times, to its end, and check it."""
        tally = self.tallies[name]
        self.number += 1
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        history: list[str] = []
        before: set[str] = set()
        kills = 0
        while True:
            killing = kills < KILLS_PER_JOB and (not history or self.random.random() < AGAIN)
            said, code = self._run(name, out, tally, killing)
            history.append(said)
            now = committed(out)
            if not before <= now:
                tally.wrong.append(f"job {self.number}: {sorted(before - now)} was committed and is missing after {history}")
            before = now
            if code == 0:
                break
            if (out / "config.json").exists() and not self._loads(hashes(out), name):
                tally.wrong.append(f"job {self.number}: has a config.json although it is unfinished, after {history}")
            if code == -signal.SIGKILL:
                kills += 1
                tally.kills[said] += 1
            elif code == -signal.SIGTERM:  # it came before or after the program handles it: the same as a kill
                kills += 1
                tally.kills["SIGTERM not handled"] += 1
            elif code == 75 or (code == 4 and self._too_short()):
                tally.stopped += 1
            else:
                tally.wrong.append(f"job {self.number}: exit code {code} after {history}")
                return
        tally.outputs += 1
        if hashes(out) != self.whole[name]:
            tally.wrong.append(f"job {self.number}: other bytes after {history}")
        from bigq.inspect.verify import verify

        tally.wrong += [f"job {self.number}: {problem} after {history}" for problem in verify(out)]

    def _too_short(self) -> bool:
        """Whether the last run ended as the third in a row that finished nothing."""
        lines = (self.work / "log").read_text(errors="replace").splitlines()
        return bool(lines) and "runs ended before they finished a unit" in lines[-1]

    def _loads(self, found: dict[str, str], name: str) -> bool:
        """Whether the output of a job killed after it became loadable is right. The GGUF file is written last, from the folder."""
        whole = self.whole[name]
        if GGUF not in whole:
            return found == whole
        found = {file: value for file, value in found.items() if not (file.startswith(GGUF + ".") and file.endswith(".bigq-tmp"))}
        return found | {GGUF: whole[GGUF]} == whole and found.get(GGUF, whole[GGUF]) == whole[GGUF]

    def _run(self, name: str, out: Path, tally: Tally, killing: bool) -> tuple[str, int]:
        """Run the job once. Returns (what killed it, exit code)."""
        tally.runs += 1
        way = self.random.choice(("point", "point", "instant", "SIGTERM")) if killing else "nothing"
        point = self._point() if way == "point" else None
        began = time.monotonic()
        pid = start(self.arguments(name, out), self.work / "log", self.faults(name, out, point))
        if way in ("instant", "SIGTERM"):
            code = wait(pid, began + self.random.uniform(0, 1.1) * self.seconds[name])
            if code is not None:
                return way, code
            os.kill(pid, signal.SIGKILL if way == "instant" else signal.SIGTERM)
        code = wait(pid, began + PATIENCE)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            tally.wrong.append(f"job {self.number}: hung after {way} {point or ''}")
            return way, -signal.SIGKILL
        return point.partition(":")[0] if point else way, code

    def run(self, seconds: float, kills: int) -> None:
        """Run jobs for that many seconds, or until that many kills."""
        for name in JOBS:
            self.warm_up(name)
            self.reference(name)
        began = time.monotonic()
        while time.monotonic() - began < seconds and sum(sum(t.kills.values()) for t in self.tallies.values()) < kills:
            for name in JOBS:
                self.one(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs; its content is deleted")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this time")
    parser.add_argument("--kills", type=int, default=1000, help="stop after this number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="TEXT", help="only jobs whose name contains this")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--inputs-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.inputs_only:
        make_inputs(args.work)
        return 0
    for leftover in args.work.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    # In a separate process: a parent that has computed anything with torch must not fork.
    subprocess.run([sys.executable, __file__, "--work", args.work, "--inputs-only"], check=True)
    from transformers import AutoModelForCausalLM  # noqa: F401  for all jobs at once

    from bigq.sched.units import experts

    experts.GROUP_WEIGHTS = GROUPED * 3 * 64 * 32  # mixtral's are larger: one a group
    for name in [name for name in JOBS if args.only not in name]:
        del JOBS[name]

    began = time.monotonic()
    stress = Stress(args.work, args.seed)
    stress.run(args.seconds, args.kills)
    tallies = stress.tallies
    total = Tally(*(sum((getattr(t, part) for t in tallies.values()), start) for part, start in _PARTS))
    result = {
        "command": " ".join(["python", "scripts/stress.py", *sys.argv[1:]]).replace(str(args.work), "DIR"),
        "revision": revision(),
        "versions": versions(),
        "seed": args.seed,
        "seconds": round(time.monotonic() - began, 1),
        "total": total.to_json(),
        "jobs": {name: {"family": JOBS[name][0], "options": JOBS[name][1], **tally.to_json()} for name, tally in tallies.items()},
    }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'job':38} {'kills':>6} {'SIGTERM':>8} {'runs':>6} {'outputs':>8} {'wrong':>6}")
    for name, tally in [*tallies.items(), ("all", total)]:
        print(f"{name:38} {sum(tally.kills.values()):>6} {tally.stopped:>8} {tally.runs:>6} {tally.outputs:>8} {len(tally.wrong):>6}")
    print("killed at: " + ", ".join(f"{name} {count}" for name, count in sorted(total.kills.items())))
    for wrong in total.wrong:
        print(f"WRONG: {wrong}")
    return 1 if total.wrong else 0


_PARTS: tuple[tuple[str, Any], ...] = (("kills", collections.Counter()), ("stopped", 0), ("runs", 0), ("outputs", 0), ("wrong", []))


if __name__ == "__main__":
    sys.exit(main())
