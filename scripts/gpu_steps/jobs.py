"""Small models end to end: the GPU against the CPU, tiers, kills and resume, packed inference.

python -m gpu_steps.jobs SPEC.json     # in scripts/: one job with a fault, in a process that may be killed
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import bigq
from bigq import faults
from bigq.cli.demo import MODEL
from gpu_steps.setting import ROOT, Findings, Setting

#: Options of every job, unless given: QuantScheme's under ``scheme``, the others JobConfig's.
COMMON = {"samples": 8, "seqlen": 32, "batch": 4, "dtype": "bfloat16", "quiet": True, "checkpoint_every": None}
GROUPS_OF_32 = {"group_size": 32}
#: Options that must not change a byte of the output.
SAME_BYTES: Mapping[str, Mapping[str, Any]] = {
    "again": {},
    "activations on the host": {"activations": "host"},
    "activations on disk": {"activations": "disk"},
    "no prefetch, no write-behind": {"read_ahead": 0},
}
#: (fault, seconds between checkpoints): killed with and without a checkpoint to resume from, and inside a pass.
KILLS = (("block.solved:2:kill", 0.0), ("block.solved:2:kill", None), ("batch.begun:7:kill", None))
#: Family → options: formats, bits, methods, tiers and data types.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "bloom": {},
    "llama": {"scheme": {**GROUPS_OF_32, "order": "activation"}, "method": "gptaq", "activations": "host", "lm_head": True},
    "qwen2": {"scheme": {"bits": 3, "group_size": 32, "symmetric": False}, "format": "compressed-tensors"},
    "gpt2": {"scheme": {"bits": 2, "group_size": -1, "scales": "search"}, "on_nonfinite": "skip"},
    "opt": {"scheme": {"bits": 8, "group_size": 32}, "format": "gptq_v2", "dtype": "float16"},
}
#: The mean error of the Linears may differ so much between GPU and CPU, relatively; perplexity; logits of packed and dense weights.
ERROR_LIMIT, PERPLEXITY_LIMIT, LOGITS_LIMIT = 0.15, 0.01, 0.05
PROMPT = "def main():"


def run(setting: Setting, found: Findings) -> None:
    from models import random_ids, save_ids

    folder = setting.work / "jobs"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "models").mkdir(parents=True)
    jobs = Jobs(found=found, folder=folder, ids=str(save_ids(folder / "ids.safetensors", random_ids())), device=setting.device)
    with found.attempt("bytes"):
        check_bytes(jobs, KILLS[1:2] if setting.smoke else KILLS)
    for family in list(FAMILIES)[:2] if setting.smoke else FAMILIES:
        with found.attempt(family):
            check_against_cpu(jobs, family)
    with found.attempt("inference"):
        check_inference(jobs, samples=2 if setting.smoke else 16)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """folder: of the models and the outputs. ids: the calibration file."""

    found: Findings
    folder: Path
    ids: str
    device: str

    def model(self, family: str) -> Path:
        from models import make_checkpoint

        path = self.folder / "models" / family
        return path if path.exists() else make_checkpoint(path, family)

    def options(self, **more: Any) -> dict[str, Any]:
        return {**COMMON, "scheme": GROUPS_OF_32, "calibration": self.ids, "device": self.device, **more}

    def quantize(self, name: str, model: Path, **more: Any) -> bigq.Report:
        report = bigq.quantize(str(model), self.folder / name, config_of(self.options(**more)))
        self.found[f"{name}: seconds"] = round(report.seconds, 1)
        return report

    def hashes(self, name: str) -> dict[str, str]:
        """SHA-256 of every shard of an output."""
        shards = sorted((self.folder / name).glob("*.safetensors"))
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


def config_of(options: Mapping[str, Any]) -> bigq.JobConfig:
    return bigq.JobConfig(**{**options, "scheme": bigq.QuantScheme(**options["scheme"])})


def check_bytes(jobs: Jobs, kills: tuple[tuple[str, float | None], ...]) -> None:
    """One job run in several ways, killed ones among them: the same bytes always."""
    model = jobs.model("llama")
    jobs.quantize("llama", model)
    first = jobs.hashes("llama")
    jobs.found.require("the job wrote shards", bool(first))
    for name, options in SAME_BYTES.items():
        with jobs.found.attempt(name):
            jobs.quantize(f"llama, {name}", model, **options)
            jobs.found.require(f"{name}: same bytes", jobs.hashes(f"llama, {name}") == first)
    for fault, every in kills:
        name = f"killed at {fault.removesuffix(':kill')}, {'no checkpoints' if every is None else 'checkpoints'}"
        with jobs.found.attempt(name):
            spec = jobs.folder / "killed.json"
            out, options = jobs.folder / name, jobs.options(checkpoint_every=every)
            spec.write_text(json.dumps({"model": str(model), "out": str(out), "fault": fault, "options": options}))
            killed = subprocess.run([sys.executable, "-m", "gpu_steps.jobs", str(spec)], cwd=ROOT / "scripts", check=False)
            jobs.found.require(f"{name}: the process was killed", killed.returncode == -signal.SIGKILL)
            report = jobs.quantize(name, model, checkpoint_every=every)
            jobs.found[f"{name}: blocks resumed"] = report.resumed_blocks
            jobs.found.require(f"{name}: same bytes", jobs.hashes(name) == first)


def check_against_cpu(jobs: Jobs, family: str) -> None:
    """The same job on the device and on the CPU: errors of all Linears alike."""
    options = FAMILIES[family]
    reports = [jobs.quantize(f"{family} on {where}", jobs.model(family), **{**options, "device": where}) for where in (jobs.device, "cpu")]
    ours, on_cpu = (sum(float(linear["relative_error"]) for linear in report.linears) / len(report.linears) for report in reports)
    jobs.found[f"{family}: mean relative error"] = ours
    jobs.found.check(f"{family}: mean relative error over the CPU's", abs(ours / on_cpu - 1), ERROR_LIMIT)


def check_inference(jobs: Jobs, samples: int) -> None:
    """The shipped model: perplexity on the device and on the CPU, packed weights against dense ones, generated text."""
    jobs.quantize("shipped model", MODEL, calibration="builtin", samples=samples, seqlen=128)
    out = str(jobs.folder / "shipped model")
    how = {"samples": samples, "seqlen": 128, "quiet": True}
    ours, on_cpu = (bigq.evaluate(out, bigq.EvalConfig(device=where, **how)).perplexity for where in (jobs.device, "cpu"))
    jobs.found["perplexity"] = ours
    jobs.found.check("perplexity over the CPU's", abs(ours / on_cpu - 1), PERPLEXITY_LIMIT)
    logits = []
    for packed in (True, True, False):
        model = bigq.load_model(out, device=jobs.device, dtype="bfloat16", packed=packed)
        with torch.no_grad():
            logits.append(model(torch.arange(3, 11, device=jobs.device)[None]).logits.float())
    one, again, dense = logits
    jobs.found.require("packed logits repeat", torch.equal(one, again))
    jobs.found.check("packed logits against dense ones", float((one - dense).norm() / dense.norm()), LOGITS_LIMIT)
    config = bigq.GenerateConfig(max_new_tokens=4 if jobs.device == "cpu" else 64, device=jobs.device)
    generated = bigq.generate(out, PROMPT, config)
    jobs.found["generated"] = {"text": generated.text, "tokens": generated.new_tokens, "seconds": generated.seconds}
    jobs.found.require("text was generated", generated.new_tokens > 0)


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    faults.arm(given["fault"])
    bigq.quantize(given["model"], given["out"], config_of(given["options"]))
