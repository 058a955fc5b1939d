#!/usr/bin/env python3
"""Benchmark bigq on published shapes with random weights on one GPU: time per block, rates against the machine's ceilings, memory.

For machines whose disk holds neither the model nor its output, and that are available for minutes at a time.

    scripts/bench_176b --shape bloom-176b --work /tmp/bench --out docs/results --seconds 540
    scripts/bench_176b --shape llama-2-70b --work /tmp/bench --out docs/results -- --batch 4      # options of bigq quantize
    scripts/bench_176b --shape deepseek-v3 --blocks 3 --vocabulary 8192 --work /tmp/bench --out docs/results    # layers with experts
    scripts/bench_176b --shape tiny --device cpu --work /tmp/bench --out /tmp/results             # does this script work?
    scripts/bench_176b --shape tiny-experts --device cpu --work /tmp/bench --out /tmp/results     # 64 experts of 512 × 256

Differences from quantizing a real checkpoint (the result file names them too):

* The disk holds the shard of one block and the shards of the tensors outside the blocks. All blocks share the bytes of
  that one shard (bench_slice.py maps them; bigq's own reader reads them). With ``--cold`` the shard is dropped from the
  page cache twice a second. Without it, reads after the first may come from memory; the disk's own rate is reported.
* A run consists of slices, one per call. bigq's own resume replays finished blocks from their shards, which do not fit
  the disk here. So each slice is a new job of a model with the missing number of blocks, starting at the embedding.
  All blocks have one shape, so the work is the same. A block counts when its shard is on disk and in the journal; time
  after a slice's last commit does not count. Phases that run once per job (copying the tensors outside the blocks,
  probing, embedding) count in the first slice only; ``wall_s`` holds the sum over all slices.
* Of a layer with experts, the disk holds 32; the others share their bytes. Each has its own tokens, Hessian and codes. Token ids are
  distributed more evenly than words, since a random router knows little but the token.
* Committed shards are deleted when disk space runs short.

WORK/…/slice-N/progress.jsonl gets a line at every commit, so a call can be killed at any moment. Run the same command
again to resume. If WORK is lost, ``--continue-from`` takes the slices from an earlier result file. Exit status: 0 when all
blocks are done, 75 when blocks remain, 1 when the job failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import psutil
import torch
from expert_shapes import EXPERT_SHAPES, ExpertShape, block_bytes, expert_flops, expert_layout, expert_tensor
from facts import print_table, status_bytes
from flops import block_flops, groups_of
from shapes import SHAPES, Layout, Shape, ensure_shard, layout_of, random_tensor, rest_shards, write_config, write_ids, zipf_ids
from slice_results import Workload, blocks_in, earlier_slices, read_lines, read_slice, result_of, slice_folders

DONE, FAILED, MORE = 0, 1, 75
POLL_SECONDS = 0.5
ALL_SHAPES = {**SHAPES, **EXPERT_SHAPES}
#: Exponents of the distribution of token ids. A random model's router sees little but the token: with that of words, the experts of the
#: most frequent tokens would get most of all tokens, as no trained router does.
WORD_EXPONENT, EXPERT_EXPONENT = 1.1, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The files that a job reads. block_bytes, rest_bytes: of the tensors of one block, and of all tensors outside the blocks.

    experts: of a block.
    """

    layout: Layout
    block: Path
    rest: tuple[Path, ...]
    ids: Path
    block_bytes: int
    rest_bytes: int
    experts: int = 0


def ensure_inputs(shape: Shape, folder: Path, samples: int, seqlen: int) -> Inputs:
    """Write the missing shards and token ids."""
    write_config(shape, folder)
    layout = expert_layout(shape, folder) if isinstance(shape, ExpertShape) else layout_of(folder)
    block, ids = folder / "block.safetensors", folder / f"ids-{samples}x{seqlen}.safetensors"
    rest = {folder / f"rest-{i}.safetensors": tensors for i, tensors in enumerate(rest_shards(layout.rest))}
    experts = shape.experts if isinstance(shape, ExpertShape) else 0
    written = ensure_shard(block, layout.of_block(0), make=expert_tensor if experts else random_tensor)
    nbytes = block_bytes(shape, layout) if isinstance(shape, ExpertShape) else sum(t.nbytes for t in written.values())
    rest_bytes = sum(t.nbytes for path, tensors in rest.items() for t in ensure_shard(path, tensors).values())
    if not ids.exists():
        exponent = EXPERT_EXPONENT if experts else WORD_EXPONENT
        write_ids(ids, zipf_ids(samples, seqlen, shape.vocabulary, exponent=exponent))
    return Inputs(layout=layout, block=block, rest=tuple(rest), ids=ids, block_bytes=nbytes, rest_bytes=rest_bytes, experts=experts)


def measured_ceilings(device: str, file: Path, log: Path) -> dict[str, Any]:
    """The best rates of the machine, and its description. Measured in a separate process, so that the GPU is empty afterwards."""
    command = [sys.executable, str(ROOT / "scripts/ceilings.py"), "--device", device, "--file", str(file)]
    with open(log, "wb") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench_176b: measuring the ceilings failed:\n{_tail(log)}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_slice(folder: Path, spec: Mapping[str, Any], on_progress: Callable[[], object]) -> int:
    """Run the job of a slice until it ends, or until ``stop_at``. Returns its exit status; 0 if it was stopped.

    FOLDER/samples.json gets the memory peaks: of the process, and of the memory missing from the machine's.
    on_progress: called after every commit.
    """
    spec_path = folder / "spec.json"
    spec_path.write_text(json.dumps({**spec, "launched_at": time.time()}, indent=2) + "\n")
    log = folder / "log.txt"
    with open(log, "wb") as output:
        command = [sys.executable, str(ROOT / "scripts/bench_slice.py"), str(spec_path)]
        child = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    free_before = psutil.virtual_memory().available
    peaks = {"resident_bytes": 0, "taken_from_host_bytes": 0}
    seen, stopped = 0, False
    try:
        while child.poll() is None:
            peaks["resident_bytes"] = max(peaks["resident_bytes"], status_bytes(child.pid, "VmRSS"))
            peaks["taken_from_host_bytes"] = max(peaks["taken_from_host_bytes"], free_before - psutil.virtual_memory().available)
            if len(lines := read_lines(folder)) > seen:
                seen = len(lines)
                (folder / "samples.json").write_text(json.dumps(peaks) + "\n")
                on_progress()
            if time.time() > spec["stop_at"]:
                stopped = True
                child.send_signal(signal.SIGINT)
                with_grace(child, 20)
            time.sleep(POLL_SECONDS)
    finally:
        child.kill()
        child.wait()
    return 0 if stopped else int(child.returncode)


def with_grace(child: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for a process that was asked to stop; kill it if it does not stop in time."""
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()


def slice_spec(request: Mapping[str, Any], inputs: Inputs, folder: Path, layers: int, stop_at: float) -> dict[str, Any]:
    """The spec for bench_slice.py: a job of ``layers`` blocks that stops at ``stop_at``."""
    arguments = ["quantize", str(folder / "model"), str(folder / "out"), "--calibration", str(inputs.ids)]
    arguments += ["--samples", str(request["samples"]), "--seqlen", str(request["seqlen"]), "--device", request["device"]]
    arguments += ["--trace", str(folder / "trace.json"), *request["options"]]
    # Committed shards are deleted, so the output need not fit the disk.
    arguments += ["--disk", "1000TB"]
    return {
        "layers": layers,
        "blocks_path": inputs.layout.blocks_path,
        "block_shard": str(inputs.block),
        "rest_shards": [str(path) for path in inputs.rest],
        "arguments": arguments,
        "cold": request["cold"],
        "profile_block": request["profile_block"],
        "profile_experts": request["profile_experts"],
        "profile_shapes": request["profile_shapes"],
        "experts": inputs.experts,
        "stop_at": stop_at,
    }


def shown_command(request: Mapping[str, Any]) -> str:
    """The command that repeats the measurement on another machine."""
    words = ["scripts/bench_176b"]
    for name in ("shape", "blocks", "samples", "seqlen", "device"):
        words += [f"--{name}", str(request[name])]
    for name in ("vocabulary", "experts", "profile_block", "profile_experts"):
        value = request[name]
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    words += ["--profile-shapes"] * request["profile_shapes"] + ["--cold"] * request["cold"] + ["--work", "DIR", "--out", "DIR"]
    return shlex.join([*words, *(["--", *request["options"]] if request["options"] else [])])


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-15:])


def _write_json(path: Path, value: object) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    partial.rename(path)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the options after ``--``, which belong to ``bigq quantize``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=ALL_SHAPES, default="bloom-176b")
    parser.add_argument("--blocks", type=int, help="number of blocks to quantize; the result then extrapolates the time for all blocks")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--work", type=Path, required=True, help="folder for shards and slices")
    parser.add_argument("--out", type=Path, required=True, help="folder for bench_SHAPE.json and the trace and log of the last slice")
    parser.add_argument("--seconds", type=float, default=540.0, help="time limit of this call (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="drop the block shard from the page cache twice a second")
    parser.add_argument("--continue-from", type=Path, help="result file of an earlier call, if WORK was lost")
    parser.add_argument("--vocabulary", type=int, help="vocabulary size instead of the shape's: the embedding takes time to write")
    parser.add_argument("--experts", type=int, metavar="N", help="experts of a layer, instead of the shape's; a token takes at most half")
    parser.add_argument("--profile-block", type=int, metavar="N", help="profile the device's kernels while block N (from 0) runs")
    parser.add_argument(
        "--profile-experts", type=int, nargs=2, metavar=("FIRST", "N"), help="profile kernels while these experts of block 0 run"
    )
    parser.add_argument("--profile-shapes", action="store_true", help="also by operation and shapes of its inputs, which costs more time")
    parser.add_argument("--inputs-only", action="store_true", help="write the shards and token ids, and stop")
    parser.add_argument("--ceilings", type=Path, help="reuse ceilings from this file, as scripts/ceilings.py prints them")
    own, _, options = [*argv], None, []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here; --shape tiny --device cpu tests the script")
    if (args.experts or args.profile_experts) and args.shape not in EXPERT_SHAPES:
        parser.error(f"--shape {args.shape} has no experts; leave out --experts and --profile-experts")
    if args.profile_experts and args.profile_block is not None:
        parser.error("--profile-block and --profile-experts: one profile a run; leave one out")
    if args.profile_experts and min(args.profile_experts) < 1:
        parser.error("--profile-experts: both numbers must be at least 1")
    return args, options


def workload_of(shape: Shape, inputs: Inputs, samples: int, seqlen: int) -> Workload:
    if isinstance(shape, ExpertShape):
        flops = expert_flops(shape, inputs.layout.block, samples, seqlen)
    else:
        flops = block_flops(groups_of(inputs.layout.block, shape.groups), shape.hidden, samples, seqlen)
    return Workload(
        blocks=shape.blocks,
        flops=flops,
        block_bytes=inputs.block_bytes,
        rest_bytes=inputs.rest_bytes,
        note=shape.honesty if isinstance(shape, ExpertShape) else "",
    )


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape that the arguments ask for."""
    shape = ALL_SHAPES[args.shape]
    if args.experts is not None:
        assert isinstance(shape, ExpertShape)
        shape = shape.with_experts(args.experts)
    return shape if args.vocabulary is None else shape.with_vocabulary(args.vocabulary)


def main() -> int:
    called_at = time.time()
    args, options = parse(sys.argv[1:])
    shape = shape_of(args)
    request = {
        "shape": args.shape,
        "blocks": min(args.blocks or shape.blocks, shape.blocks),
        "samples": args.samples,
        "seqlen": args.seqlen,
        "device": args.device,
        "cold": args.cold,
        "options": options,
        "vocabulary": args.vocabulary,
        "experts": args.experts,
        "profile_block": args.profile_block,
        "profile_experts": args.profile_experts,
        "profile_shapes": args.profile_shapes,
    }
    job = args.work / f"job-{args.shape}-{hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12]}"
    for folder in (job, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    inputs = ensure_inputs(shape, args.work / f"shards-{shape.name}", args.samples, args.seqlen)
    if args.inputs_only:
        return DONE
    work = workload_of(shape, inputs, args.samples, args.seqlen)
    before = earlier_slices(args.continue_from, request, job)
    old = slice_folders(job)
    for folder in old:
        shutil.rmtree(folder / "out", ignore_errors=True)
    own = job / f"slice-{len(old):03d}"

    def save() -> dict[str, Any]:
        """Called at every commit: a call that is killed leaves the figures so far."""
        slices = [*before, *([read_slice(own)] if blocks_in(read_lines(own)) else [])]
        result = result_of(request, work, slices)
        written = {"command": shown_command(request), "result": result, "slices": slices}
        _write_json(args.out / f"bench_{args.shape}.json", written)
        return result

    status, layers = 0, request["blocks"] - sum(blocks_in(one["lines"]) for one in before)
    stop_at = called_at + args.seconds
    if layers and time.time() < stop_at:
        write_config(shape, own / "model", layers)
        known = None if args.ceilings is None else json.loads(args.ceilings.read_text())
        _write_json(own / "ceilings.json", known or measured_ceilings(args.device, inputs.block, own / "ceilings.log"))
        status = run_slice(own, slice_spec(request, inputs, own, layers, stop_at), save)
        for name in ("trace.json", "log.txt", "profile.json"):
            if (own / name).exists():
                shutil.copy(own / name, args.out / f"bench_{args.shape}.{name}")
    result = save()
    print_table(result)
    if status:
        print(f"bench_176b: the job ended with status {status}:\n{_tail(own / 'log.txt')}", file=sys.stderr)
        return FAILED
    return DONE if result["complete"] else MORE


if __name__ == "__main__":
    sys.exit(main())
