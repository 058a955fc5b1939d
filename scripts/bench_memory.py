#!/usr/bin/env python3
"""Quantizes a model of 13.5 GB within 3 GB of host memory, and proves it: the system itself keeps the limit.

A checkpoint with the shape of Llama-2-7B (32 blocks, random bf16 weights; see shapes.py) is made once. Then the real job
runs in a child that cannot have more memory than --limit (see memory_limit.py: a control group where possible, whose
limit includes page cache), with activations on disk, on the CPU. The output is opened afterwards. The exit status is 0
only if the child did it all within the limit, its resident set at the peak (VmHWM, with shared libraries) included.

    python scripts/bench_memory.py --work /tmp/bench --json docs/results/bench_memory.json
    python scripts/bench_memory.py --work /tmp/bench --shape tiny --limit 700000000      # in seconds

Killed, it goes on when it is run again: bigq takes up its job, and times are summed over the runs. ``--fresh`` begins anew.
CPU times compare only with other programs' on the same machine, taken in turn; memory does not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from facts import drop_from_cache, host, print_table, revision, status_bytes, versions
from memory_limit import LIMITERS, Limiter, make_limiter

#: The child: the command line's own job, and its report as JSON in a file. It ends when its parent does (PR_SET_PDEATHSIG).
PROGRAM = """
import ctypes, dataclasses, json, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
from pathlib import Path
import bigq
from bigq.cli.commands import build_parser
from bigq.cli.job import job_config
from bigq.errors import BigqError
args = build_parser().parse_args(sys.argv[2:])
try:
    report = bigq.quantize(args.model, args.out, job_config(args))
except BigqError as error:
    print(f"bigq: error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
print(report.summary(), file=sys.stderr)
Path(sys.argv[1]).write_text(json.dumps(dataclasses.asdict(report)))
"""

SAMPLE_SECONDS = 0.25


def ensure_inputs(shape: str, model: Path, ids: Path, samples: int, seqlen: int) -> None:
    """Make what is missing of the checkpoint and the token ids, in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts/shapes.py"), shape, str(model)]
    command += ["--ids", str(ids), "--samples", str(samples), "--seqlen", str(seqlen)]
    if not ids.exists() and (status := subprocess.run(command, check=False).returncode):
        sys.exit(f"bench_memory: the checkpoint was not made (status {status})")


def job_arguments(model: Path, out: Path, ids: Path, args: argparse.Namespace) -> list[str]:
    """The command line that the child runs."""
    arguments = ["quantize", str(model), str(out), "--calibration", str(ids), "--samples", str(args.samples)]
    return [*arguments, "--seqlen", str(args.seqlen), "--activations", "disk", "--device", "cpu"]


def run_limited(limiter: Limiter, command: Sequence[str], record: Path, log: Path, threads: int) -> dict[str, Any]:
    """Run the child to its end. What is known of the run is in ``record`` all the time, so that being killed loses little."""
    begun = time.monotonic()
    with open(log, "wb") as errors:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        child = limiter.start(command, stderr=errors, stdout=errors, cwd=ROOT, env=environment)
    run: dict[str, Any] = {"ended": False, "revision": revision(), "limiter": limiter.name, "limit_bytes": limiter.limit}
    written, resident = float("-inf"), 0
    try:
        while True:
            # Before waiting: once the child is waited for, its last figures are gone.
            limiter.sample(child.pid)
            resident = max(resident, status_bytes(child.pid, "VmHWM"))
            cpu = cpu_seconds(child.pid)
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            run |= {"wall_s": time.monotonic() - begun, "vmhwm_bytes": resident} | limiter.figures()
            if pid:
                break
            run["cpu_s"] = max(cpu, run.get("cpu_s", 0.0))
            if run["wall_s"] - written > 5:
                write_json(record, run)
                written = run["wall_s"]
            time.sleep(SAMPLE_SECONDS)
    except BaseException:
        child.kill()
        raise
    child.returncode = os.waitstatus_to_exitcode(status)
    run |= {
        "ended": True,
        "status": child.returncode,
        "exceeded": limiter.exceeded(),
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "maxrss_bytes": usage.ru_maxrss * 1024,
    }
    write_json(record, run)
    return run


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def write_json(path: Path, value: object) -> None:
    """Appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.rename(path)


def verify(out: Path, shape: str) -> dict[str, int]:
    """Open the output as a reader would, every shard's header included. Raises what bigq raises for a bad checkpoint."""
    from shapes import SHAPES

    from bigq.io.index import Checkpoint, read_json_object

    checkpoint = Checkpoint.open(out)
    config = read_json_object(out / "config.json")
    wanted = SHAPES[shape]
    linears = sum(name.endswith(".qweight") for name in checkpoint)
    expected = wanted.linears_per_block * wanted.blocks
    if linears != expected:
        raise ValueError(f"{out}: holds {linears} packed Linears instead of {expected}")
    if config["quantization_config"]["quant_method"] != "gptq":
        raise ValueError(f"{out}: config.json names no GPTQ")
    return {"packed_linears": linears, "tensors": len(checkpoint.tensors), "shards": len({t.file for t in checkpoint.tensors.values()})}


def failure(run: Mapping[str, Any], log: Path) -> str:
    """Why a run is no success; "" where it is one."""
    if run["status"] == 0 and not run["exceeded"]:
        # Pages of shared libraries may be charged to a group that had them in memory before; here they count.
        above = run["vmhwm_bytes"] > run["limit_bytes"]
        return f"{run['vmhwm_bytes']} resident bytes at the peak, {run['limit_bytes']} allowed" if above else ""
    last = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
    if run["exceeded"]:
        return f"killed by the limit of {run['limit_bytes']} bytes, after: {last or 'nothing'}"
    return f"the child ended with status {run['status']}: {last}"


def summary(runs: Sequence[Mapping[str, Any]], report: Mapping[str, Any] | None) -> dict[str, Any]:
    """The figures of all runs together. Times are sums, peaks the largest; phases are told by the run that ended the job."""
    peaks = ("vmhwm_bytes", "maxrss_bytes", "group_peak_bytes", "anonymous_peak_bytes", "resident_peak_bytes")
    found: dict[str, Any] = {
        "runs": len(runs),
        "wall_s": sum(run["wall_s"] for run in runs),
        "cpu_s": sum(run.get("cpu_s", 0.0) for run in runs),
        "limit_bytes": runs[-1]["limit_bytes"],
        "limiter": runs[-1]["limiter"],
    }
    found |= {name: max(run[name] for run in runs if name in run) for name in peaks if any(name in run for run in runs)}
    counts = {name: sum(run.get(name, 0) for run in runs) for name in ("times_full", "kills")}
    found |= {name: count for name, count in counts.items() if count or (name == "kills" and name in runs[-1])}
    if report is not None:
        phases = report["seconds_by_phase"]
        found |= {
            "blocks": report["blocks"],
            "source_bytes": report["source_bytes"],
            "output_bytes": report["output_bytes"],
            "told_peak_bytes": report["host_peak_bytes"],
            "seconds_by_phase": {name: round(s, 3) for name, s in sorted(phases.items(), key=lambda item: -item[1])},
            "phases_are_of": "all blocks" if not report["resumed_blocks"] else f"the last run, from block {report['resumed_blocks']} on",
            "source_over_limit": report["source_bytes"] / runs[-1]["limit_bytes"],
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint and the output, 18 GB for the real one")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--shape", default="llama-2-7b", help="one of those in shapes.py (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=3 * 10**9, help="bytes of host memory (default: %(default)s)")
    parser.add_argument("--limiter", default="auto", choices=("auto", *LIMITERS), help="how to keep it; auto takes the first that works")
    parser.add_argument("--samples", type=int, default=8, help="calibration rows (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens in each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="the child's OMP_NUM_THREADS (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run of the same measurement")
    args = parser.parse_args()
    model, ids = args.work / args.shape, args.work / f"ids-{args.shape}-{args.samples}x{args.seqlen}.safetensors"
    job = args.work / f"job-{args.shape}-{args.samples}x{args.seqlen}-{args.limit}"
    if args.fresh:
        shutil.rmtree(job, ignore_errors=True)
    job.mkdir(parents=True, exist_ok=True)
    ensure_inputs(args.shape, model, ids, args.samples, args.seqlen)
    records = sorted(job.glob("run-*.json"))
    runs = [json.loads(path.read_text()) for path in records]
    report_path, out = job / "report.json", job / "out"
    problem = "an earlier run was killed by the limit; --fresh begins anew" if any(run.get("exceeded") for run in runs) else ""
    if not problem and not report_path.exists():
        for shard in model.glob("*.safetensors"):
            drop_from_cache(shard)  # or the child would read what was cached on another group's account
        record = job / f"run-{len(runs):03d}.json"
        log = record.with_suffix(".log")
        command = [sys.executable, "-c", PROGRAM, str(report_path), *job_arguments(model, out, ids, args)]
        try:
            limiter = make_limiter(args.limit, args.limiter)
        except OSError as error:
            sys.exit(f"bench_memory: {error}")
        try:
            runs.append(run_limited(limiter, command, record, log, args.threads))
        finally:
            limiter.close()
        problem = failure(runs[-1], log)
    report = json.loads(report_path.read_text()) if report_path.exists() else None
    figures = summary(runs, report)
    verified = {} if problem else verify(out, args.shape)
    result = {
        "command": f"python scripts/bench_memory.py {' '.join(shown_arguments(args))}",
        "ok": not problem,
        "problem": problem,
        "shape": args.shape,
        "tokens": f"{args.samples} × {args.seqlen}",
        "threads": args.threads,
        **figures,
        "output": verified,
        "revision": ", ".join(dict.fromkeys(run["revision"] for run in runs)),
        "versions": versions(),
        "machine": host(),
    }
    if args.json:
        write_json(args.json, result)
    print_table(result)
    return 1 if problem else 0


def shown_arguments(args: argparse.Namespace) -> list[str]:
    """The arguments that make the same measurement elsewhere."""
    return [
        "--work",
        "DIR",
        "--shape",
        args.shape,
        "--limit",
        str(args.limit),
        "--samples",
        str(args.samples),
        "--seqlen",
        str(args.seqlen),
    ]


if __name__ == "__main__":
    sys.exit(main())
