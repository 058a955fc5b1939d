#!/usr/bin/env python3
"""Run the files in scripts/slurm on an emulated Slurm of two nodes, disturb their jobs, and compare the outputs with undisturbed ones.

    python scripts/slurm_check.py --work DIR [--only NAME …] [--schemas PYTHON] [--json docs/results/slurm.json]

Needs root and Debian's packages of Slurm (see emulated_slurm.py), and says so. DIR must be empty. The model is tiny and random. A fault
point makes each job sleep in its third block, so that it is disturbed there. Undisturbed jobs of one process run without Slurm, those
of two processes under srun. schemas: a Python with kubernetes-validate and skypilot, which checks scripts/k8s and scripts/sky.yaml.

Exit status: 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import emulated_slurm
from emulated_slurm import Cluster, until
from facts import host, revision, said, versions

FILES = ROOT / "scripts/slurm"
#: What a job is asked to do besides MODEL and OUT.
SIZES = ["--samples", "8", "--seqlen", "24", "--batch", "3", "--group-size", "32"]
OPTIONS = [*SIZES, "--device", "cpu", "--quiet", "--checkpoint-every", "0"]
#: The lines of the array's table: model and options.
TABLE = (("llama", ("--bits", "4")), ("llama", ("--bits", "3", "--skip", r".*\.o_proj")), ("bloom", ("--bits", "4")))
BLOCKS = 4
#: Committed blocks when a job is disturbed: it sleeps in the next one.
DISTURBED_AFTER = 2
#: bigq's --grace, above the time of a step here.
GRACE = 80
#: Seconds within which any job here begins, goes on and ends.
PATIENCE = 300.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@dataclass
class Check:
    """The cluster, the models, and what was found. expected: the hashes of undisturbed outputs."""

    work: Path
    cluster: Cluster
    expected: dict[str, dict[str, str]] = field(default_factory=dict)

    def options(self, *more: str) -> list[str]:
        return ["--calibration", str(self.work / "ids.safetensors"), *OPTIONS, *more]

    def submit(self, file: str, *arguments: object, sleep: float = 0.0, more: tuple[str, ...] = ()) -> str:
        """One of the shipped files, as it is. more: options of sbatch."""
        environment = {
            "BIGQ": str(self.work / "bigq"),
            "INTERFACE": "lo",
            "GRACE": str(GRACE),
            **({"BIGQ_FAULT": fault(sleep)} if sleep else {}),
        }
        log = self.work / "logs" / f"{file}-%j.log"
        options = ["--cpus-per-task=1", f"--output={log}", *more]
        return self.cluster.submit(*options, FILES / f"{file}.sbatch", *arguments, environment=environment)

    def whole(self, model: str, *more: str) -> dict[str, str]:
        """The hashes of an undisturbed output of one process."""
        name = "-".join([model, *(word.strip("-.*\\") for word in more)])
        if name not in self.expected:
            out = self.work / f"whole-{name}"
            command = [str(self.work / "bigq"), "quantize", str(self.work / model), str(out), *self.options(*more)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.expected[name] = hashes(out)
        return self.expected[name]

    def whole_of_two(self) -> dict[str, str]:
        """The hashes of an undisturbed output of two processes on two nodes."""
        if "two" not in self.expected:
            out = self.work / "whole-two"
            job = self.two(out)
            self.ended(job)
            self.expected["two"] = hashes(out)
        return self.expected["two"]

    def one(self, out: Path, sleep: float, *more: str) -> str:
        return self.submit("one", self.work / "llama", out, *self.options(), sleep=sleep, more=more)

    def two(self, out: Path, sleep: float = 0.0) -> str:
        nodes = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
        return self.submit("multinode", self.work / "llama", out, *self.options(), sleep=sleep, more=nodes)

    def in_the_middle(self, out: Path) -> None:
        """Wait until a job is where it is to be disturbed."""
        until(lambda: committed(out) >= DISTURBED_AFTER, PATIENCE, f"{out.name} in its middle")

    def goes_on(self, out: Path, runs: int = 1) -> float:
        """Seconds until another run of a job has claimed its folder."""
        return round(until(lambda: len(lines(out / ".bigq/runs.jsonl")) > runs, PATIENCE, f"{out.name} goes on"), 1)

    def ended(self, job: str, state: str = "COMPLETED") -> dict[str, str]:
        """Wait for the end of a job. Raises RuntimeError unless it ends so."""
        until(lambda: self.cluster.job(job)["JobState"] in ENDED, PATIENCE, f"job {job}")
        found = self.cluster.job(job)
        if found["JobState"] != state:
            raise RuntimeError(f"job {job} ended as {found['JobState']}, not {state}: {self.log()}")
        return found

    def log(self) -> str:
        """The ends of all logs, for errors."""
        return "".join(f"\n== {path.name}\n{path.read_text()[-2000:]}" for path in sorted((self.work / "logs").glob("*.log")))


def fault(sleep: float) -> str:
    """BIGQ_FAULT of a job that sleeps where it is to be disturbed. When it goes on, it has fewer blocks left."""
    return f"block.solved:{DISTURBED_AFTER + 1}:sleep={sleep:g}"


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def committed(out: Path) -> int:
    """Blocks in a job's journal."""
    return sum('"unit":"block-' in line.replace(" ", "") for line in lines(out / ".bigq/journal.jsonl"))


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every file in an output folder, without the job's own records."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def outcome(check: Check, job: dict[str, str], out: Path, expected: dict[str, str], seconds: float) -> dict[str, Any]:
    return {
        "requeued": int(job["Restarts"]),
        "runs": len(lines(out / ".bigq/runs.jsonl")),
        "seconds_until_it_went_on": seconds,
        "equal": hashes(out) == expected,
    }


def array_preempted(check: Check) -> dict[str, Any]:
    """array.sbatch: three jobs on two models; a job of a partition with priority needs both nodes, and preempts all of them"""
    outs = [check.work / f"array-{i}" for i in range(len(TABLE))]
    table = check.work / "table.txt"
    quoted = [" ".join(f"'{word}'" if "\\" in word else word for word in options) for _, options in TABLE]
    rows = [f"{check.work / model} {out} {words}" for (model, _), out, words in zip(TABLE, outs, quoted, strict=True)]
    table.write_text("# MODEL OUT OPTIONS\n\n" + "\n".join(rows) + "\n")
    first = check.submit("array", table, *check.options(), sleep=25, more=(f"--array=1-{len(TABLE)}",))
    for out in outs:
        check.in_the_middle(out)
    began = time.monotonic()
    urgent = check.cluster.submit("-p", "urgent", "-N2", "--exclusive", f"--output={os.devnull}", "--wrap", "sleep 2")
    check.ended(urgent)
    for out in outs:
        check.goes_on(out)
    seconds = round(time.monotonic() - began, 1)
    jobs = [check.cluster.job(f"{first}_{i + 1}")["JobId"] for i in range(len(TABLE))]
    found = [
        outcome(check, check.ended(job), out, check.whole(model, *options), seconds)
        for job, out, (model, options) in zip(jobs, outs, TABLE, strict=True)
    ]
    return {
        "requeued": sum(each["requeued"] for each in found),
        "runs": sum(each["runs"] for each in found),
        "seconds_until_it_went_on": seconds,
        "equal": all(each["equal"] for each in found),
        "outputs": len(found),
    }


def disturbed(check: Check, two: bool, what: Callable[[str], object], sleep: float = 12.0) -> dict[str, Any]:
    """A job that is disturbed in its third block, goes on by itself, and ends."""
    out = check.work / f"disturbed-{time.monotonic_ns()}"
    job = check.two(out, sleep) if two else check.one(out, sleep)
    check.in_the_middle(out)
    began = time.monotonic()
    what(job)
    check.goes_on(out)
    seconds = round(time.monotonic() - began, 1)
    return outcome(check, check.ended(job), out, check.whole_of_two() if two else check.whole("llama"), seconds)


def one_requeued(check: Check) -> dict[str, Any]:
    """one.sbatch: scontrol requeue while it computes"""
    return disturbed(check, False, lambda job: said("scontrol", "requeue", job))


def one_asked(check: Check) -> dict[str, Any]:
    """one.sbatch: scancel --signal=TERM, which bigq answers with code 75"""
    return disturbed(check, False, lambda job: said("scancel", "--signal=TERM", job))


def one_out_of_time(check: Check) -> dict[str, Any]:
    """one.sbatch --time=3, of which Slurm leaves 30 to 60 s until the signal 120 s before the end; bigq answers with code 75"""
    out = check.work / "out-of-time"
    job = check.one(out, 70, "--time=3")
    check.in_the_middle(out)
    seconds = check.goes_on(out)
    return outcome(check, check.ended(job), out, check.whole("llama"), seconds)


def one_wrong(check: Check) -> dict[str, Any]:
    """one.sbatch with options and models that end with code 2 or 3: no requeue"""
    codes = []
    for arguments in ((check.work / "llama", check.work / "wrong", "--bits", "5"), (check.work / "logs", check.work / "wrong")):
        job = check.ended(check.submit("one", *arguments), "FAILED")
        codes.append((job["ExitCode"], job["Restarts"]))
    return {"requeued": sum(int(restarts) for _, restarts in codes), "as_expected": [code for code, _ in codes] == ["2:0", "3:0"]}


def one_cancelled(check: Check) -> dict[str, Any]:
    """one.sbatch: scancel; the job does not come back, though bigq ends with code 75"""
    out = check.work / "cancelled"
    job = check.one(out, 5)
    check.in_the_middle(out)
    said("scancel", job)
    found = check.ended(job, "CANCELLED")
    time.sleep(10)
    found = check.cluster.job(job)
    return {"requeued": int(found["Restarts"]), "as_expected": found["JobState"] == "CANCELLED"}


def node_lost(node: str, *, soon_back: bool = False) -> Callable[[Check], dict[str, Any]]:
    """soon_back: Slurm does not miss the node, only what ran there is gone."""

    def lost(check: Check) -> dict[str, Any]:
        def kill(_: str) -> None:
            check.cluster.kill_node(node)
            if not soon_back:
                until(lambda: "DOWN" in check.cluster.node(node), PATIENCE, f"{node} counts as lost")
            check.cluster.start_node(node)

        return disturbed(check, True, kill, 60)

    return lost


def two_asked(check: Check) -> dict[str, Any]:
    """multinode.sbatch, two nodes: scancel --signal=TERM; both processes end with code 75"""
    return disturbed(check, True, lambda job: said("scancel", "--signal=TERM", job))


def two_requeued(check: Check) -> dict[str, Any]:
    """multinode.sbatch, two nodes: scontrol requeue"""
    return disturbed(check, True, lambda job: said("scontrol", "requeue", job))


def two_one_killed(check: Check) -> dict[str, Any]:
    """multinode.sbatch, two nodes: kill -9 of the second process alone; the first ends with code 75, srun returns 137; scontrol requeue"""
    codes = []

    def kill(job: str) -> None:
        for pid in check.cluster.pids("n2", "quantize"):
            os.kill(pid, signal.SIGKILL)
        codes.append(check.ended(job, "FAILED")["ExitCode"])
        said("scontrol", "requeue", job)

    return {**disturbed(check, True, kill, 60), "exit_code": codes[0], "as_expected": codes == ["137:0"]}


def torchrun_asked(check: Check) -> dict[str, Any]:
    """torchrun, two processes, without Slurm: SIGTERM to one of them ends both with code 75, which torchrun turns into 1; the same again"""
    out = check.work / "torchrun"
    launcher = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--no-python"]
    job = [str(check.work / "bigq"), "quantize", str(check.work / "llama"), str(out), *check.options()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(check.work / "logs/torchrun.log", "ab") as log:

        def start(**more: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-m", *launcher, *job], env={**environment, **more}, stdout=log, stderr=log)

        first = start(BIGQ_FAULT=fault(12))
        check.in_the_middle(out)
        workers = [each for each in psutil.Process(first.pid).children() if "quantize" in each.cmdline()]
        workers[-1].terminate()
        code = first.wait(PATIENCE)
        began = time.monotonic()
        second = start()
        check.goes_on(out)
        seconds = round(time.monotonic() - began, 1)
        codes = [code, second.wait(PATIENCE)]
    found = outcome(check, {"Restarts": "0"}, out, check.whole_of_two(), seconds)
    return {**found, "exit_codes": codes, "as_expected": codes == [1, 0] and len(workers) == 2}


SCENARIOS: dict[str, tuple[str, Callable[[Check], dict[str, Any]]]] = {
    **{
        each.__name__: (" ".join((each.__doc__ or "").split()), each)
        for each in (array_preempted, one_requeued, one_asked, one_out_of_time, one_wrong, one_cancelled, two_asked, two_requeued)
    },
    **{each.__name__: (each.__doc__ or "", each) for each in (two_one_killed, torchrun_asked)},
    "two_node_lost": ("multinode.sbatch, two nodes: kill -9 of all processes of the second node, its slurmd too", node_lost("n2")),
    "two_node_soon_back": (
        "multinode.sbatch, two nodes: the same, but a new slurmd is there before Slurm misses the old one",
        node_lost("n2", soon_back=True),
    ),
    "two_first_node_lost": ("multinode.sbatch, two nodes: the same for the first node, where the script itself runs", node_lost("n1")),
}


def make_inputs(work: Path) -> None:
    """Write tiny models, token ids, and a program that runs this source tree."""
    sys.path.insert(0, str(ROOT / "tests"))
    from models import make_checkpoint, random_ids, save_ids

    make_checkpoint(work / "llama", "llama", num_hidden_layers=BLOCKS)
    make_checkpoint(work / "bloom", "bloom", n_layer=BLOCKS)
    save_ids(work / "ids.safetensors", random_ids())
    (work / "logs").mkdir()
    program = work / "bigq"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m bigq "$@"\n')
    program.chmod(0o755)


def schemas(python: str) -> dict[str, Any]:
    """What launcher_schemas.py finds in another Python."""
    done = subprocess.run([python, str(ROOT / "scripts/launcher_schemas.py")], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"launcher_schemas.py: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--schemas", metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (lacks := emulated_slurm.missing()) is not None:
        print(f"slurm_check: {lacks}", file=sys.stderr)
        return 2
    emulated_slurm.enter()
    work = args.work.resolve()
    (work / "slurm").mkdir(parents=True)
    began = time.monotonic()
    result: dict[str, Any] = {"revision": revision(), "versions": {**versions(), "slurm": said("slurmctld", "-V")}, "host": host()}
    if args.schemas:
        result["schemas"] = schemas(args.schemas)
    make_inputs(work)
    check = Check(work, Cluster(work / "slurm"))
    result["node_timeout_seconds"] = emulated_slurm.NODE_TIMEOUT
    result["scenarios"] = found = {}
    for name in args.only:
        what, run = SCENARIOS[name]
        try:
            found[name] = {"what": what, **run(check)}
        except (RuntimeError, TimeoutError) as error:
            found[name] = {"what": what, "as_expected": False}
            print(f"{name}: {error}{check.log()}", file=sys.stderr)
        print(f"{name}: {found[name]}", flush=True)
    result["seconds"] = round(time.monotonic() - began, 1)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(each.get("equal", True) and each.get("as_expected", True) for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
