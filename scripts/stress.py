#!/usr/bin/env python3
"""Kill jobs again and again, at every named step and at random instants, and compare what they end with to a run that was never killed.

    python scripts/stress.py --work DIR [--seconds S] [--kills N] [--seed K] [--json docs/results/stress.json]

Each job is a process of its own that runs the command line as a user does: ``bigq quantize MODEL OUT …``. It is forked off a
parent that has imported everything, because importing takes seconds and a job of these sizes half of one. A job is killed
with SIGKILL (by a fault point inside it, or from outside after a random time) or asked to stop with SIGTERM; taken up again, it
may be killed again. In the end every file of its output must have the hash that it has without kills, ``bigq verify`` must find nothing,
and on the way nothing that was committed may be lost and nothing unfinished be loadable.

Ends with 1 where one output differs. A table comes last.
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
os.environ["OMP_NUM_THREADS"] = "1"  # sums of this size gain nothing by threads, and lose much by waiting for each other's

from facts import revision, versions

#: Family, and what the job is run with: between them every tier, order and kind of rule, with files beside the computation and without.
JOBS: dict[str, tuple[str, str]] = {
    "llama, host": ("llama", "--activations host --checkpoint-every 0"),
    "llama, disk, act-order, read-ahead": (
        "llama",
        "--activations disk --act-order --read-ahead 1 --checkpoint-every 0 --format gptq_v2 --bits 3 --asym",
    ),
    "llama, rules, bf16, read-ahead 2": (
        "llama",
        r"--read-ahead 2 --dtype bfloat16 --skip .*\.o_proj$ --rule .*\.down_proj:bits=8 --checkpoint-every never",
    ),
    "bloom, disk, mse": ("bloom", "--activations disk --mse --checkpoint-every 0"),
    "gpt2, together, read-ahead": ("gpt2", "--no-true-sequential --read-ahead 1 --bits 2 --group-size -1"),
    "gemma2, act-order": ("gemma2", "--act-order --checkpoint-every 0"),
    "llama, gptaq, disk, act-order": ("llama", "--method gptaq --activations disk --act-order --bits 3 --checkpoint-every 0"),
    "bloom, gptaq, read-ahead": ("bloom", "--method gptaq --read-ahead 1 --checkpoint-every never"),
    "llama, rtn, read-ahead": ("llama", "--method rtn --read-ahead 1"),
    "llama, gguf, head, asym": ("llama", "--format gguf --asym --lm-head --checkpoint-every 0"),
    "llama, compressed-tensors, head": ("llama", "--format compressed-tensors --lm-head --read-ahead 1"),
    "llama, memory ends": ("llama", "--activations disk --checkpoint-every 0"),
}
#: Of one job the device's memory ends at its first batch, as long as it is not on record that it did.
MEMORY_ENDS = "batch.begun:1:OOM"
LAYERS = {"llama": "num_hidden_layers", "gemma2": "num_hidden_layers", "bloom": "n_layer", "gpt2": "n_layer"}
BLOCKS = 5
GGUF = "model.gguf"
#: How often one job may be killed before it is left to finish.
KILLS_PER_JOB = 4
#: The chance that a job that was killed is killed again.
AGAIN = 0.5
#: A job that takes this long has hung.
PATIENCE = 120.0


@dataclass(slots=True)
class Tally:
    """What happened to the jobs of one kind. kills: by what killed them."""

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
    """A tiny model of each family, and token ids."""
    sys.path.insert(0, str(ROOT / "tests"))
    from models import make_checkpoint, random_ids, save_ids

    from bigq.model.skeleton import silence

    silence()
    for family in sorted({family for family, _ in JOBS.values()}):
        make_checkpoint(work / family, family, **{LAYERS[family]: BLOCKS})
    save_ids(work / "ids.safetensors", random_ids())


def start(arguments: Sequence[str], log: Path, fault: str | None = None, modules: Path | None = None) -> int:
    """Fork a process that runs the command line; its number. modules: where it leaves the names of what it imported."""
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
    """A process's exit code, −N for signal N; None where it still runs at the time ``until``."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def hashes(out: Path) -> dict[str, str]:
    """Of everything in an output folder but the job's own records."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def committed(out: Path) -> set[str]:
    """The units that the journal vouches for."""
    from bigq.job.journal import read_commits

    return {commit.unit for commit in read_commits(out)[0]} if out.is_dir() else set()


class Stress:
    """Jobs of all kinds in turn, each killed some times."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.random = work, random.Random(seed)
        self.tallies = {name: Tally() for name in JOBS}
        self.whole: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.number = 0
        self.points = self._points()

    def _points(self) -> Iterator[str]:
        """Every fault point in turn, with a count that grows from round to round: the first time it is passed, then later ones."""
        from bigq.faults import POINTS

        while True:
            for point in self.random.sample(POINTS, len(POINTS)):
                yield f"{point}:{1 + int(self.random.expovariate(0.4))}"

    def _point(self) -> str:
        """The next fault point; every second time one at which no job was killed yet."""
        from bigq.faults import POINTS

        missed = [point for point in POINTS if not any(tally.kills[point] for tally in self.tallies.values())]
        return f"{self.random.choice(missed)}:1" if missed and self.random.random() < 0.5 else next(self.points)

    def arguments(self, name: str, out: Path) -> list[str]:
        family, options = JOBS[name]
        common = f"--calibration {self.work / 'ids.safetensors'} --samples 8 --seqlen 24 --batch 3 --device cpu --quiet"
        size = "" if "--group-size" in options else " --group-size 32"
        return ["quantize", str(self.work / family), str(out), *f"{common}{size} {options}".split()]

    def faults(self, name: str, out: Path, point: str | None = None) -> str | None:
        """What to arm for a run of a job."""
        ends = MEMORY_ENDS if name == "llama, memory ends" and not (out / ".bigq" / "batches.json").exists() else None
        return ",".join(filter(None, (ends, point))) or None

    def warm_up(self, name: str) -> None:
        """Import what a job imports on its way."""
        modules = self.work / "modules"
        wait(start(self.arguments(name, self.work / "out"), self.work / "log", modules=modules), time.monotonic() + PATIENCE)
        for module in modules.read_text().split():
            with contextlib.suppress(ImportError):
                importlib.import_module(module)

    def reference(self, name: str) -> None:
        """Run a job without kills, twice: its hashes, and how long it takes."""
        for attempt in ("a", "b"):
            out = self.work / "whole" / name.replace(", ", "-").replace(" ", "_") / attempt
            began = time.monotonic()
            code = wait(start(self.arguments(name, out), self.work / "log", self.faults(name, out)), began + PATIENCE)
            if code != 0:
                raise SystemExit(f"{name}: the job fails without any kill (exit code {code}); see {self.work / 'log'}")
            self.seconds[name] = time.monotonic() - began
            found = hashes(out)
            if self.whole.setdefault(name, found) != found:
                raise SystemExit(f"{name}: two runs without kills end in different bytes")

    def one(self, name: str) -> None:
        """A job that is killed up to KILLS_PER_JOB times."""
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
                tally.wrong.append(f"job {self.number}: {sorted(before - now)} was committed and is lost after {history}")
            before = now
            if code == 0:
                break
            if (out / "config.json").exists() and not self._loads(hashes(out), name):
                tally.wrong.append(f"job {self.number}: unfinished, and yet there is a config.json, after {history}")
            if code == -signal.SIGKILL:
                kills += 1
                tally.kills[said] += 1
            elif code == -signal.SIGTERM:  # it came before the program listened, or after: as good as a kill
                kills += 1
                tally.kills["SIGTERM unheard"] += 1
            elif code == 75:
                tally.stopped += 1
            else:
                tally.wrong.append(f"job {self.number}: exit code {code} after {history}")
                return
        tally.outputs += 1
        if hashes(out) != self.whole[name]:
            tally.wrong.append(f"job {self.number}: other bytes after {history}")
        from bigq.inspect.verify import verify

        tally.wrong += [f"job {self.number}: {problem} after {history}" for problem in verify(out)]

    def _loads(self, found: dict[str, str], name: str) -> bool:
        """Whether a folder that was killed after it became loadable is right. A GGUF file comes last, made of the folder."""
        whole = self.whole[name]
        if GGUF not in whole:
            return found == whole
        found = {file: value for file, value in found.items() if not (file.startswith(GGUF + ".") and file.endswith(".bigq-tmp"))}
        return found | {GGUF: whole[GGUF]} == whole and found.get(GGUF, whole[GGUF]) == whole[GGUF]

    def _run(self, name: str, out: Path, tally: Tally, killing: bool) -> tuple[str, int]:
        """(what was done to it, exit code)."""
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
        """Until the time is over or that many kills were made."""
        for name in JOBS:
            self.warm_up(name)
            self.reference(name)
        began = time.monotonic()
        while time.monotonic() - began < seconds and sum(sum(t.kills.values()) for t in self.tallies.values()) < kills:
            for name in JOBS:
                self.one(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs; what is in it goes")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--kills", type=int, default=1000, help="stop after so many kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--inputs-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.inputs_only:
        make_inputs(args.work)
        return 0
    for leftover in args.work.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    # In a process of its own: what is forked off later must not have computed anything.
    subprocess.run([sys.executable, __file__, "--work", args.work, "--inputs-only"], check=True)
    from transformers import AutoModelForCausalLM  # noqa: F401  for all jobs at once

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
