"""Blocks of BLOOM-176B and Llama-2-70B by ``scripts/bench_176b``, one of them under torch's profiler."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from gpu_steps.setting import ROOT, Findings, Setting

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
)
#: Limit of the peak of device memory, relative to the plan's.
OVER_PLAN = 1.1
#: Exit statuses of bench_176b: all blocks are done, some are.
DONE, MORE = 0, 75


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Arguments of bench_176b. vocabulary: BLOOM's has 250880 words; that embedding takes long to write and does not affect blocks.

    profiled_block: neither the first one, which compiles kernels, nor the last: a profile ends when the next block is loaded.
    """

    shape: str
    blocks: int
    seconds: float
    vocabulary: int | None = None
    profiled_block: int = 2
    samples: int = 128
    seqlen: int = 2048

    @property
    def arguments(self) -> list[str]:
        """Of bench_176b, for the same inputs."""
        words = ["--shape", self.shape, "--samples", str(self.samples), "--seqlen", str(self.seqlen)]
        return words if self.vocabulary is None else [*words, "--vocabulary", str(self.vocabulary)]


SLICES = {
    "bloom": Slice(shape="bloom-176b", blocks=8, seconds=140, vocabulary=8192),
    "llama": Slice(shape="llama-2-70b", blocks=12, seconds=90),
}
SMOKE = {
    "bloom": Slice(shape="tiny", blocks=2, seconds=140, vocabulary=512, profiled_block=0, samples=4, seqlen=64),
    "llama": Slice(shape="tiny", blocks=2, seconds=90, profiled_block=0, samples=4, seqlen=64),
}


def slice_of(setting: Setting, name: str) -> Slice:
    return (SMOKE if setting.smoke else SLICES)[name]


def bench(setting: Setting, one: Slice, *arguments: str) -> list[str]:
    """A command line of bench_176b."""
    command = [sys.executable, str(ROOT / "scripts/bench_176b.py"), *one.arguments, "--device", setting.device]
    return [*command, "--work", str(setting.work), "--out", str(setting.work / f"bench-{one.shape}"), *arguments]


def run(setting: Setting, found: Findings) -> None:
    one = slice_of(setting, setting.step)
    command = bench(setting, one, "--blocks", str(one.blocks), "--seconds", str(one.seconds), "--profile-block", str(one.profiled_block))
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
    found["commits_at_s"] = [round(line["seconds"], 2) for line in lines_of(written) if line["unit"].startswith("block-")]
    profile = out / f"bench_{one.shape}.profile.json"
    if profile.exists():
        found["kernels_of_one_block"] = json.loads(profile.read_text())
    if result["blocks_done"]:
        check_peaks(found, result["peaks"], result["planned"])


def lines_of(written: dict[str, Any]) -> list[dict[str, Any]]:
    """progress.jsonl of all slices."""
    return [line for one in written["slices"] for line in one["lines"]]


def check_peaks(found: Findings, peaks: dict[str, int], planned: dict[str, int]) -> None:
    """Peaks relative to the plan's. The host's is not checked, since the profiler's own memory is in it."""
    if planned.get("device"):
        found.check("device peak over plan", peaks["device_bytes"] / planned["device"], OVER_PLAN)
    if planned.get("host"):
        found["host peak over plan, with the profiler"] = peaks["host_resident_bytes"] / planned["host"]
