#!/usr/bin/env python3
"""Quantize a model that stays on a bad server, kill the job again and again, and compare the output with that of a local job.

    python scripts/stress_remote.py --work DIR [--gigabytes 2] [--cache 300MB] [--kills 50] [--json docs/results/stress_remote.json]

The model is random, in shards of 500 MB. The server runs here, in the process of this script, over real HTTP: a hub for
huggingface_hub's client. Of the requests for parts of shards, a tenth goes wrong: cut, short, too long, another part, 429, 503, or
stalled. Jobs take turns: one writes its output to a folder, the next uploads each shard with --push and drops it with --push-drop. Each
run of a job is a process that runs the command line, killed with SIGKILL after a random time. When a job ends, every file of its output,
on the disk or on the hub, must have the hash of the local job's, and the disk space beside it must have stayed within the cache.

Exit status: 1 if an output or the space is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

from facts import host, revision, version_of, versions
from fake_hub.server import KINDS, Faults, Hub, running_hub

from bigq.progress.sizes import parse_size

HIDDEN, INTERMEDIATE, VOCABULARY, SEQLEN, ROWS = 2048, 5632, 8192, 64, 4
#: Bytes of a block in bf16.
BLOCK_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
SOURCE, TARGET = "owner/model", "owner/output"
#: Seconds after which a stalled connection of the server ends.
STALL = 3.0
#: The share of requests that go wrong.
SHARE = 0.1


def make_model(folder: Path, ids: Path, size: int) -> None:
    """A random Llama of about ``size`` bytes, and token ids."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=max(1, round((size - 4 * VOCABULARY * HIDDEN) / BLOCK_BYTES)),
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=SEQLEN,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    save_file({"input_ids": torch.randint(3, VOCABULARY, (ROWS, SEQLEN))}, ids)


class Space:
    """Watches the disk space that a job uses beside its output: the cache, and whatever the hub's client keeps."""

    def __init__(self, *folders: Path) -> None:
        self._folders, self.peak = folders, 0

    def look(self) -> None:
        total = 0
        for folder in self._folders:
            for path in folder.rglob("*"):
                try:
                    total += path.lstat().st_blocks * 512
                except OSError:
                    continue  # removed meanwhile
        self.peak = max(self.peak, total)

    @contextmanager
    def watched(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.02):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def environment(**more: str) -> dict[str, str]:
    """Of all jobs: the number of threads decides how sums are rounded."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", **more}


def command(model: str, out: Path, ids: Path, *more: str) -> list[str]:
    flags = ["--samples", str(ROWS), "--seqlen", str(SEQLEN), "--device", "cpu", "--quiet", "--checkpoint-every", "0"]
    return [sys.executable, "-m", "bigq", "quantize", model, str(out), "--calibration", str(ids), *flags, *more]


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def pushed_hashes(hub: Hub) -> dict[str, str]:
    """The files of the repository that the output was pushed to."""
    files = hub.uploads.repositories[TARGET].files
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items()) if name != ".gitattributes"}


def run_killed(job: list[str], kills: int, draw: random.Random, args: argparse.Namespace, hub: Hub, space: Space) -> tuple[int, int]:
    """Run a job until it ends, killed at most ``kills`` times. Returns how often it was killed and run."""
    killed = runs = 0
    while True:
        runs += 1
        process = subprocess.Popen(job, env=environment(**hub.environment(args.work / "hf")))
        # From the start-up on to some blocks' time.
        deadline = time.monotonic() + draw.uniform(args.shortest, args.longest) if killed < kills else float("inf")
        with space.watched():
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
        if process.poll() is None:
            process.kill()
            process.wait()
            killed += 1
        elif process.returncode == 0:
            return killed, runs
        else:
            raise SystemExit(f"a job ended with status {process.returncode}")


def run_job(args: argparse.Namespace, model: Path, ids: Path, kills: int, draw: random.Random, *, pushes: bool) -> dict[str, Any]:
    """One job on a bad server, from its beginning to its end. pushes: whether shards are uploaded and dropped."""
    out = args.work / "out"
    for folder in (out, args.work / "hf"):
        shutil.rmtree(folder, ignore_errors=True)
    space, started = Space(out / ".bigq" / "fetched", args.work / "hf"), time.monotonic()
    shards = Space(*([out] if pushes else []))
    more = ("--push", TARGET, "--push-drop") if pushes else ()
    with running_hub() as hub, shards.watched():
        hub.repositories[SOURCE] = model
        hub.faults = Faults(kinds=KINDS, share=SHARE, stall=STALL)
        job = command(SOURCE, out, ids, "--fetch", "stream", "--fetch-cache", args.cache, *more)
        killed, runs = run_killed(job, max(kills, 0), draw, args, hub, space)
        found = pushed_hashes(hub) if pushes else hashes(out)
        return {
            "output": "pushed and dropped" if pushes else "in a folder",
            "kills": killed,
            "runs": runs,
            "faults": dict(hub.faults.seen),
            "bytes_sent": sum(hub.ranges),
            "peak_bytes_beside_output": space.peak,
            "small_files_bytes": sum(path.lstat().st_blocks * 512 for path in (args.work / "hf").rglob("*")),
            "peak_bytes_of_out": shards.peak if pushes else None,
            "seconds": round(time.monotonic() - started),
            "hashes": found,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--cache", default="300MB")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--shortest", type=float, default=8.0, metavar="SECONDS", help="least time before a kill")
    parser.add_argument("--longest", type=float, default=35.0, metavar="SECONDS", help="most time before a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, ids, local = args.work / "model", args.work / "ids.safetensors", args.work / "local"
    if not ids.exists():
        make_model(model, ids, int(args.gigabytes * 10**9))
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    if not (local / "config.json").exists():
        subprocess.run(command(str(model), local, ids), env=environment(), check=True)
    expected, limit, draw = hashes(local), parse_size(args.cache, "--cache"), random.Random(args.seed)
    jobs: list[dict[str, Any]] = []
    while sum(job["kills"] for job in jobs) < args.kills or len(jobs) < 2:
        jobs.append(run_job(args, model, ids, args.kills - sum(job["kills"] for job in jobs), draw, pushes=len(jobs) % 2 == 1))
        jobs[-1]["same_hashes"] = jobs[-1].pop("hashes") == expected
        print(json.dumps(jobs[-1]), flush=True)
    good = all(job["same_hashes"] and job["peak_bytes_beside_output"] <= limit + job["small_files_bytes"] for job in jobs)
    result = {
        "model_bytes": size,
        "output_files": len(expected),
        "cache_bytes": limit,
        "kills": sum(job["kills"] for job in jobs),
        "jobs": jobs,
    }
    if args.json is not None:
        facts = {"revision": revision(), "host": host(), "versions": {**versions(), "huggingface-hub": version_of("huggingface-hub")}}
        command_line = f"python scripts/stress_remote.py --gigabytes {args.gigabytes:g} --cache {args.cache} --kills {args.kills}"
        args.json.write_text(json.dumps({"command": command_line, **facts, **result}, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
