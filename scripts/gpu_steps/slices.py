"""Blocks of BLOOM-176B and Llama-2-70B by ``scripts/bench_176b``, one of them under torch's profiler."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from expert_shapes import EXPERT_SHAPES
from shapes import SHAPES

from gpu_steps.aims import AIMS, Aim, as_finding
from gpu_steps.runner import LONG, PROFILE
from gpu_steps.setting import ROOT, Findings, Setting, need

#: Findings that are taken from the benchmark's result.
KEPT = (
    "blocks_done",
    "seconds_per_block",
    "once_s",
    "seconds_by_phase",
    "waiting_share",
    "rates",
    "peaks",
    "planned",
    "allocator",
    "gbs_while_reading",
    "gbs_while_committing",
    "ceilings",
    "extrapolated",
    "tokens_of_experts",
)
#: Bounds of a peak relative to the plan's, and of the share of time spent waiting.
LEAST_OF_PLAN, MOST_OF_PLAN, MOST_WAITING = 0.9, 1.1, 0.05
#: Blocks of a slice that explains a measurement, and the factor of a long one.
PROFILED_BLOCKS, LONGER = 4, 2
#: Exit statuses of bench_176b: all blocks are done, some are.
DONE, MORE = 0, 75
#: What bench_176b and its jobs import, besides torch.
PACKAGES = ("psutil", "safetensors", "tqdm", "transformers")
MINUTES = "minutes for all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Arguments of bench_176b. vocabulary: BLOOM's has 250880 words; that embedding takes long to write and does not affect blocks.

    experts: of a layer, instead of the shape's. minutes: the aim for the whole model. profiled_block: neither the first one, which compiles
    kernels, nor the last: a profile ends when the next block is loaded.
    """

    shape: str
    blocks: int
    seconds: float
    minutes: float
    vocabulary: int | None = None
    experts: int | None = None
    profiled_block: int = 2
    samples: int = 128
    seqlen: int = 2048
    profiled: ClassVar[str] = "kernels_of_one_block"

    @property
    def model_blocks(self) -> int:
        """Blocks of the whole model."""
        return {**SHAPES, **EXPERT_SHAPES}[self.shape].blocks

    @property
    def profile(self) -> list[str]:
        """Arguments of bench_176b that ask for a profile."""
        return ["--profile-block", str(self.profiled_block)]

    @property
    def before_profile(self) -> tuple[str, ...]:
        """What is committed before the profile begins."""
        return tuple(f"block-{i}" for i in range(max(1, self.profiled_block - 1)))

    @property
    def arguments(self) -> list[str]:
        """Of bench_176b, for the same inputs."""
        words = ["--shape", self.shape, "--samples", str(self.samples), "--seqlen", str(self.seqlen)]
        for name in ("vocabulary", "experts"):
            value = getattr(self, name)
            words += [] if value is None else [f"--{name}", str(value)]
        return words

    def more_aims(self, result: Mapping[str, Any], steady: float | None) -> list[Aim]:
        """Aims of this kind of slice beyond those of all. steady: seconds of the median block."""
        return []


S = TypeVar("S", bound=Slice)


SLICES = {
    "bloom": Slice(shape="bloom-176b", blocks=6, seconds=112, minutes=15, vocabulary=8192),
    "llama": Slice(shape="llama-2-70b", blocks=10, seconds=72, minutes=5),
}
SMOKE = {
    "bloom": Slice(shape="tiny", blocks=2, seconds=140, minutes=15, vocabulary=512, profiled_block=0, samples=4, seqlen=64),
    "llama": Slice(shape="tiny", blocks=2, seconds=90, minutes=5, profiled_block=0, samples=4, seqlen=64),
}


def slice_of(setting: Setting, name: str) -> Slice:
    return in_mode(setting, (SMOKE if setting.smoke else SLICES)[name])


def in_mode(setting: Setting, one: S) -> S:
    """The slice with as many blocks as the step's mode asks for."""
    if setting.mode == LONG:
        return replace(one, blocks=LONGER * one.blocks, seconds=LONGER * one.seconds)
    return replace(one, blocks=min(one.blocks, PROFILED_BLOCKS)) if setting.mode == PROFILE else one


def bench(setting: Setting, one: Slice, *arguments: str) -> list[str]:
    """A command line of bench_176b."""
    command = [sys.executable, str(ROOT / "scripts/bench_176b.py"), *one.arguments, "--device", setting.device]
    return [*command, "--work", str(setting.work), "--out", str(setting.work / f"bench-{one.shape}"), *arguments]


def run(setting: Setting, found: Findings) -> None:
    need(*PACKAGES)
    measure(setting, found, slice_of(setting, setting.step))


def measure(setting: Setting, found: Findings, one: Slice) -> None:
    """Run a slice, and record its figures, its aims and its peaks against the plan's."""
    command = bench(setting, one, "--blocks", str(one.blocks), "--seconds", str(one.seconds), *one.profile)
    command += ["--profile-shapes"] * (setting.mode == PROFILE)
    if setting.ceilings.exists():
        command += ["--ceilings", str(setting.ceilings)]
    status = subprocess.run([*command, "--", "--checkpoint-every", "never"], check=False).returncode
    found.require("the job ran", status in (DONE, MORE))
    out = setting.work / f"bench-{one.shape}"
    written = json.loads((out / f"bench_{one.shape}.json").read_text())
    result = written["result"]
    for name in KEPT:
        if name in result:
            found[name] = result[name]
    found.require("blocks were committed", result["blocks_done"] > 0)
    blocks = [line for line in lines_of(written) if line["unit"].startswith("block-")]
    found["commits_at_s"] = [round(line["seconds"], 2) for line in blocks]
    profile = out / f"bench_{one.shape}.profile.json"
    if profile.exists():
        found[one.profiled] = json.loads(profile.read_text())
    if result["blocks_done"]:
        found["fragmentation"] = fragmentation(result["allocator"])
        found[AIMS] = as_finding(aims_of(one, result, steady_seconds(blocks, one.profiled_block)))
        check_peaks(found, result["peaks"], result["planned"], [line for line in lines_of(written) if line["unit"] in one.before_profile])
    for output in setting.work.glob("job-*/slice-*/out"):  # the next slice needs the space
        shutil.rmtree(output)


def lines_of(written: dict[str, Any]) -> list[dict[str, Any]]:
    """progress.jsonl of all slices."""
    return [line for one in written["slices"] for line in one["lines"]]


def steady_seconds(blocks: list[dict[str, Any]], profiled: int) -> float | None:
    """The median time from one commit to the next, without the first block, the profiled one and the one after it."""
    times = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(blocks)]
    kept = [seconds for block, seconds in enumerate(times, 1) if block not in (profiled, profiled + 1)]
    return statistics.median(kept) if kept else None


def fragmentation(allocator: dict[str, int]) -> dict[str, float]:
    """Shares of the reserved memory at its peak: never allocated at once, and lying in parts of blocks that were not in use."""
    reserved = allocator.get("reserved_bytes.all.peak", 0)
    if not reserved:
        return {}
    split = allocator["inactive_split_bytes.all.peak"] / reserved
    return {"reserved beyond allocated": 1 - allocator["allocated_bytes.all.peak"] / reserved, "in unused parts": split}


def aims_of(one: Slice, result: dict[str, Any], steady: float | None) -> list[Aim]:
    """Of time, waiting and memory. Minutes are extrapolated from the blocks that ran."""
    aims = [Aim(name=name, value=value, high=one.minutes) for name, value in result.get("extrapolated", {}).items()]
    if steady is not None:
        value = (result["once_s"] + steady * one.model_blocks) / 60
        aims.append(Aim(name=f"{MINUTES} {one.model_blocks} blocks, from the median block (not measured)", value=value, high=one.minutes))
    aims += one.more_aims(result, steady)
    aims.append(Aim(name="share of time spent waiting", value=result["waiting_share"], high=MOST_WAITING))
    if planned := result["planned"].get("device"):
        value = result["peaks"]["device_bytes"] / planned
        aims.append(Aim(name="device peak over plan", value=value, low=LEAST_OF_PLAN, high=MOST_OF_PLAN))
    return aims


def check_peaks(found: Findings, peaks: dict[str, int], planned: dict[str, int], before: list[dict[str, Any]]) -> None:
    """Peaks relative to the plan's. The host's is not checked, since the profiler's own memory is in it.

    before: the lines of what was committed before the profiler started.
    """
    if planned.get("device"):
        found.check("device peak over plan", peaks["device_bytes"] / planned["device"], MOST_OF_PLAN)
    if planned.get("host"):
        found["host peak over plan, with the profiler"] = peaks["host_resident_bytes"] / planned["host"]
        if before:
            found["host peak over plan, before the profiler"] = max(line["host_peak_bytes"] for line in before) / planned["host"]
