#!/usr/bin/env python3
"""Kill, suspend and stop single processes of jobs that several share, resume the jobs, and compare the output with undisturbed ones.

    python scripts/stress_ranks.py --work DIR [--kills N] [--seed K] [--beside N] [--json docs/results/stress_ranks.json]

Each job runs in 2 or 3 processes on this host, forked from a server that has imported everything. One of them gets SIGKILL at a random
instant or at a named step of the program, SIGSTOP (which counts as silence), or SIGTERM. Then all others must end within a minute, with
exit code 75, or with 0 if the job was complete. The job is resumed, perhaps disturbed again, until it is complete: its files must be
those of an undisturbed job in as many processes, byte for byte. A suspended process continues once the others have ended, and must end
too. If one is killed before it has met the others, they get SIGTERM, as from a launcher: nobody else can know that it will not come.

Prints a table at the end. Exit status: 1 if a process hangs or ends with another code, or if any output is wrong.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

from facts import revision, versions
from rank_processes import PRELOADED, run_rank

#: Name → (family, options).
JOBS: dict[str, tuple[str, str]] = {
    "llama, gptq, host": ("llama", "--activations host"),
    "llama, gptaq": ("llama", "--method gptaq"),
    "llama, disk, head": ("llama", "--activations disk --lm-head"),
    "gemma2, act-order": ("gemma2", "--order activation"),
    "mixtral": ("mixtral", "--activations disk"),
    "mixtral, gptaq": ("mixtral", "--method gptaq --experts-at-once 3"),
    "mixtral, awq": ("mixtral", "--method awq"),
}
COUNTS = (2, 3)
BLOCKS = 3
#: Steps that every rank passes, and those that only the first one does.
ALL = (
    *("rows.embedded", "block.loaded", "batch.begun", "linear.solved", "expert.solved", "block.solved", "block.replayed"),
    *("checkpoint.begun", "checkpoint.written", "checkpoint.recorded", "file.opened", "file.written", "file.synced", "file.renamed"),
)
FIRST = (
    *("lock.taken", "owner.written", "job.written", "run.recorded", "shard.piece"),
    *("journal.opened", "journal.half", "journal.written", "journal.synced"),
    *("finish.begun", "finish.side", "finish.index", "finish.manifest", "finish.config"),
)
#: Disturbances of one job; after that it runs to its end.
MOST = 4
#: The probability that a resumed job is disturbed again.
AGAIN = 0.6
#: Seconds in which all processes must end, after one was disturbed.
LIMIT = 60.0
#: Seconds after which an undisturbed job counts as hung: many run beside each other.
PATIENCE = 300.0


@dataclass(slots=True)
class Tally:
    """The jobs of one kind. kills: SIGKILL, by step or "instant". longest: seconds from a disturbance until all had ended, by way."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    stops: int = 0
    terms: int = 0
    runs: int = 0
    outputs: int = 0
    hangs: int = 0
    wrong: list[str] = field(default_factory=list)
    longest: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "kills": sum(self.kills.values()),
            "kills_by": dict(sorted(self.kills.items())),
            "suspended_by_sigstop": self.stops,
            "stopped_by_sigterm": self.terms,
            "runs": self.runs,
            "outputs_compared": self.outputs,
            "hangs": self.hangs,
            "wrong": self.wrong,
            "longest_seconds_until_all_had_ended": {way: round(seconds, 1) for way, seconds in sorted(self.longest.items())},
        }

    def add(self, other: Tally) -> None:
        self.kills += other.kills
        for name in ("stops", "terms", "runs", "outputs", "hangs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.wrong += other.wrong
        for way, seconds in other.longest.items():
            self.longest[way] = max(seconds, self.longest.get(way, 0.0))


def make_inputs(work: Path) -> None:
    """Write a tiny model of each family, and token ids."""
    from models import make_checkpoint, random_ids, save_ids

    from bigq.model.skeleton import silence_transformers

    silence_transformers()
    for family in sorted({family for family, _ in JOBS.values()}):
        make_checkpoint(work / family, family, num_hidden_layers=BLOCKS)
    save_ids(work / "ids.safetensors", random_ids())


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every file in an output folder, without the job's own records."""
    from stress import hashes

    return hashes(out)


class Run:
    """The processes of one run of a job."""

    def __init__(self, arguments: list[str], count: int, logs: Path, port: int, fault: tuple[int, str] | None = None) -> None:
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        self.logs = logs
        self.processes: list[ForkServerProcess] = []
        self.began = time.monotonic()
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(count):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            if fault is not None and fault[0] == rank:
                environment["BIGQ_FAULT"] = fault[1]
            told, met = str(logs / f"{rank}.txt"), str(logs / f"{rank}.met")
            args = (environment, arguments, told, met)
            process = multiprocessing.get_context("forkserver").Process(target=run_rank, args=args, kwargs={"small": True})
            process.start()
            self.processes.append(process)

    def signal(self, rank: int, number: int) -> None:
        process = self.processes[rank]
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, number)

    def met(self, rank: int) -> bool:
        return (self.logs / f"{rank}.met").exists()

    def wait(self, ranks: list[int], until: float) -> bool:
        """Wait until these have ended, or until the time. Returns whether they have."""
        for rank in ranks:
            self.processes[rank].join(max(0.0, until - time.monotonic()))
        return all(self.processes[rank].exitcode is not None for rank in ranks)

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def texts(self) -> str:
        files = [self.logs / f"{rank}.txt" for rank in range(len(self.processes))]
        return " | ".join(file.read_text()[-300:].strip() if file.exists() else "" for file in files)


class Stress:
    """Runs jobs of all kinds, several beside each other, until enough processes were killed."""

    def __init__(self, work: Path, seed: int, kills: int) -> None:
        self.work, self.seed, self.most = work, seed, kills
        self.tallies = {(name, count): Tally() for name in JOBS for count in COUNTS}
        self.whole: dict[tuple[str, int], dict[str, str]] = {}
        self.seconds: dict[tuple[str, int], float] = {}
        self.ports = self._ports()
        self.guard = threading.Lock()

    @staticmethod
    def _ports() -> Iterator[int]:
        """Free ports, below those that the system hands out."""
        for port in itertools.cycle(range(20000, 30000)):
            with socket.socket() as found:
                try:
                    found.bind(("127.0.0.1", port))
                except OSError:
                    continue
            yield port

    def port(self) -> int:
        with self.guard:
            return next(self.ports)

    def arguments(self, name: str, out: Path) -> list[str]:
        family, options = JOBS[name]
        common = f"--calibration {self.work / 'ids.safetensors'} --samples 8 --seqlen 24 --batch 3 --device cpu --quiet --group-size 32"
        return ["quantize", str(self.work / family), str(out), *f"{common} --checkpoint-every 0 {options}".split()]

    def reference(self, name: str, count: int) -> None:
        """Run a job twice undisturbed. Keeps its hashes and its duration."""
        for attempt in ("a", "b"):
            out = self.work / "whole" / name.replace(", ", "-") / f"{count}{attempt}"
            run = Run(self.arguments(name, out), count, self.work / "logs" / "whole", self.port())
            ended = run.wait(list(range(count)), run.began + PATIENCE)
            if not ended or any(run.codes):
                raise SystemExit(f"{name}, {count} processes: fails undisturbed, exit codes {run.codes}: {run.texts()}")
            self.seconds[name, count] = time.monotonic() - run.began
            found = hashes(out)
            if self.whole.setdefault((name, count), found) != found:
                raise SystemExit(f"{name}, {count} processes: two undisturbed runs give different bytes")

    @property
    def kills(self) -> int:
        return sum(sum(tally.kills.values()) for tally in self.tallies.values())

    def work_on(self, worker: int) -> None:
        """Run jobs of all kinds in turn until enough processes were killed."""
        chance = random.Random(self.seed * 1000 + worker)
        kinds = list(self.tallies)
        chance.shuffle(kinds)
        for kind in itertools.cycle(kinds):
            if self.kills >= self.most:
                return
            found = self.one(*kind, chance, self.work / f"worker-{worker}")
            with self.guard:
                self.tallies[kind].add(found)
                print(f"{self.kills} kills; {kind[0]}, {kind[1]} processes: {found.to_json()}", flush=True)

    def one(self, name: str, count: int, chance: random.Random, folder: Path) -> Tally:
        """Run one job, disturbed up to MOST times, to its end, and check it."""
        tally, history, out = Tally(), list[str](), folder / "out"
        shutil.rmtree(folder, ignore_errors=True)
        complete = False
        while not complete:
            disturbing = len(history) < MOST and (not history or chance.random() < AGAIN)
            history.append(self._run(name, count, out, chance if disturbing else None, tally, folder / "logs"))
            if tally.wrong:
                tally.wrong = [f"{name}, {count} processes: {wrong}, after {history}" for wrong in tally.wrong]
                return tally
            complete = (out / "config.json").exists() and not disturbing
        tally.outputs += 1
        if hashes(out) != self.whole[name, count]:
            tally.wrong.append(f"{name}, {count} processes: other bytes after {history}")
        if left := [path.name for path in out.rglob("*") if path.name.startswith(("activations-", "rank-"))]:
            tally.wrong.append(f"{name}, {count} processes: {left} are left after {history}")
        from bigq.inspect.verify import verify

        with self.guard:  # models are built by one thread at a time
            problems = verify(out)
        tally.wrong += [f"{name}, {count} processes: {problem} after {history}" for problem in problems]
        return tally

    def _run(self, name: str, count: int, out: Path, chance: random.Random | None, tally: Tally, logs: Path) -> str:
        """Run the job once, and disturb it if there is chance. Returns how."""
        tally.runs += 1
        everyone = list(range(count))
        if chance is None:
            run = Run(self.arguments(name, out), count, logs, self.port())
            if not run.wait(everyone, run.began + PATIENCE):
                self._hung(run, "undisturbed", tally)
            elif any(run.codes):
                tally.wrong.append(f"exit codes {run.codes} although undisturbed: {run.texts()}")
            return "nothing"
        way = chance.choices(("point", "instant", "SIGSTOP", "SIGTERM"), (5, 4, 1.5, 1.5))[0]
        victim = chance.randrange(count)
        point = chance.choice(FIRST if victim == 0 and chance.random() < 0.5 else ALL)
        often = 0.12 if point in ("batch.begun", "linear.solved") else 1.0
        fault = (victim, f"{point}:{1 + int(chance.expovariate(often))}") if way == "point" else None
        run = Run(self.arguments(name, out), count, logs, self.port(), fault)
        others = [rank for rank in everyone if rank != victim]
        if way == "point":
            run.wait([victim], run.began + PATIENCE)
        else:
            run.wait([victim], run.began + chance.uniform(0, 1) * self.seconds[name, count])
            run.signal(victim, {"instant": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP, "SIGTERM": signal.SIGTERM}[way])
        at = time.monotonic()
        said = f"{point if way == 'point' else way} of rank {victim}"
        if not run.met(victim):
            said += " before it met the others"
            for rank in others:
                run.signal(rank, signal.SIGTERM)
        if not run.wait(everyone if way == "SIGTERM" else others, at + LIMIT):
            self._hung(run, said, tally)
            return said
        took = time.monotonic() - at
        if way == "SIGSTOP":
            if not run.met(victim):  # it would wait for the others, as they have for it
                run.signal(victim, signal.SIGTERM)
            run.signal(victim, signal.SIGCONT)
        if not run.wait([victim], time.monotonic() + LIMIT):
            self._hung(run, f"{said}, which continued", tally)
            return said
        self._check(run, way, said, victim, tally, took, point if way == "point" else "instant", (name, count), out)
        return said

    def _check(
        self, run: Run, way: str, said: str, victim: int, tally: Tally, took: float, step: str, kind: tuple[str, int], out: Path
    ) -> None:
        """Exit codes of all, and whether a folder that loads is complete."""
        codes = run.codes
        disturbed = way != "point" or codes[victim] == -signal.SIGKILL
        complete = (out / "config.json").exists()
        allowed = {75, 0} if complete else {75}
        # A signal that comes before the program handles it ends it.
        own = allowed | {"point": {-signal.SIGKILL}, "instant": {-signal.SIGKILL}, "SIGSTOP": set(), "SIGTERM": {-signal.SIGTERM}}[way]
        early = {-signal.SIGTERM} if "before it met" in said else set()
        bad = [rank for rank, code in enumerate(codes) if code not in (own if rank == victim else allowed) | early]
        if bad:
            tally.wrong.append(f"{said}: exit codes {codes}: {run.texts()}")
        if complete and hashes(out) != self.whole[kind]:
            tally.wrong.append(f"{said}: config.json is there, but files are not those of an undisturbed job")
        if "Traceback" in (texts := run.texts()):
            tally.wrong.append(f"{said}: {texts}")
        if not disturbed or all(code == 0 for code in codes):
            return
        if way == "SIGSTOP":
            tally.stops += 1
        elif way == "SIGTERM":
            tally.terms += 1
        elif codes[victim] == -signal.SIGKILL:
            tally.kills[step] += 1
        label = "SIGKILL" if way in ("point", "instant") else way
        tally.longest[label] = max(took, tally.longest.get(label, 0.0))

    def _hung(self, run: Run, said: str, tally: Tally) -> None:
        tally.hangs += 1
        tally.wrong.append(f"{said}: hangs, exit codes {run.codes}: {run.texts()}")
        for process in run.processes:
            process.kill()
        run.wait(list(range(len(run.processes))), time.monotonic() + 10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs; its content is deleted")
    parser.add_argument("--kills", type=int, default=100, help="stop after this number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside", type=int, default=6, help="jobs that run beside each other (default: %(default)s)")
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
    subprocess.run([sys.executable, __file__, "--work", args.work, "--inputs-only"], check=True)
    for name in [name for name in JOBS if args.only not in name]:
        del JOBS[name]
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line does, before torch is imported in the server
    families = [f"transformers.models.{family}.modeling_{family}" for family in sorted({family for family, _ in JOBS.values()})]
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED, *families])

    began = time.monotonic()
    stress = Stress(args.work, args.seed, args.kills)
    for name, count in stress.tallies:
        stress.reference(name, count)
    print(f"undisturbed: {stress.seconds}", flush=True)
    workers = [threading.Thread(target=stress.work_on, args=(worker,)) for worker in range(args.beside)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    total = Tally()
    for tally in stress.tallies.values():
        total.add(tally)
    result = {
        "command": " ".join(["python", "scripts/stress_ranks.py", *sys.argv[1:]]).replace(str(args.work), "DIR"),
        "revision": revision(),
        "versions": versions(),
        "seed": args.seed,
        "seconds": round(time.monotonic() - began, 1),
        "total": total.to_json(),
        "jobs": {
            f"{name}, {count} processes": {"family": JOBS[name][0], "options": JOBS[name][1], **tally.to_json()}
            for (name, count), tally in stress.tallies.items()
        },
    }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'job':32} {'kills':>6} {'SIGSTOP':>8} {'SIGTERM':>8} {'runs':>6} {'outputs':>8} {'hangs':>6} {'wrong':>6}")
    for label, tally in [*((f"{name}, {count}", tally) for (name, count), tally in stress.tallies.items()), ("all", total)]:
        figures = f"{sum(tally.kills.values()):>6} {tally.stops:>8} {tally.terms:>8} {tally.runs:>6} {tally.outputs:>8} {tally.hangs:>6}"
        print(f"{label:32} {figures} {len(tally.wrong):>6}")
    for wrong in total.wrong:
        print(f"WRONG: {wrong}")
    return 1 if total.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
