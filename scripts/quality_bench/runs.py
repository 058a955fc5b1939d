"""Making runs: a program quantizes in a process of its own, the judge compares, and a small JSON file keeps the result."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import facts
from safetensors.torch import load_file

from quality_bench import subjects
from quality_bench.judge import Judge, dense_from_gptq, write_dense
from quality_bench.settings import PEERS, Run

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ROOT / "scripts/clients"
TIMEOUT = 4 * 3600.0


class FailedRun(Exception):
    """A program ended with an error. The message names the run and the program's output."""


@dataclass(kw_only=True)
class Bench:
    """models: prepared models and texts. work: for outputs and records. tree: the source tree whose bigq is measured."""

    models: Path
    work: Path
    tree: Path
    venvs: Path | None = None
    keep: bool = False
    _judges: dict[str, Judge] = field(default_factory=dict)

    def record_of(self, run: Run) -> Path:
        return self.work / "runs" / f"{run.name}.json"

    def make(self, runs: Iterable[Run]) -> list[str]:
        """Make those that have no record. Returns what went wrong, one line per run; others go on."""
        (self.work / "runs").mkdir(parents=True, exist_ok=True)
        known, problems = known_flags(self.tree), []
        for run in runs:
            if self.record_of(run).exists() or not self._can(run, known):
                continue
            try:
                record = self._made(run)
            except FailedRun as error:
                problems.append(str(error))
                print(f"quality: {error}", file=sys.stderr, flush=True)
                continue
            partial = self.record_of(run).with_suffix(f".{os.getpid()}.tmp")
            partial.write_text(json.dumps(record) + "\n")
            os.replace(partial, self.record_of(run))
            figures = f"KL {record['kl']:.5f}, perplexity {record['perplexity']:.4f}, {record['cpu_s']} s of CPU time"
            print(f"{run.name}: {figures}", file=sys.stderr, flush=True)
        return problems

    def _can(self, run: Run, known: set[str]) -> bool:
        if run.contestant.tool != "bigq":
            return self.venvs is not None and (self.venvs / run.contestant.tool).exists()
        return all(word.partition("=")[0] in known for word in run.contestant.words if word.startswith("--"))

    def _made(self, run: Run) -> dict[str, Any]:
        revision = facts.revision(self.tree if run.contestant.tool == "bigq" else ROOT)
        model = subjects.prepare(self.models, run.subject)
        out = self.work / "out" / f"{run.name}-{os.getpid()}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        try:
            said = self._bigq(run, model, out) if run.contestant.tool == "bigq" else self._peer(run, model, out)
            found = self._judge(run, model).judge(out / "dense")
        except ValueError as error:
            raise FailedRun(f"{run.name}: {error}") from None
        finally:
            if not self.keep:
                shutil.rmtree(out)
        return {**identity(run), **figures(found), **said, "revision": revision}

    def _judge(self, run: Run, model: Path) -> Judge:
        if run.subject.name not in self._judges:
            rows, kept = subjects.windows(self.models, run.subject), subjects.original_file(self.models, run.subject)
            self._judges[run.subject.name] = Judge(model, rows, kept)
        return self._judges[run.subject.name]

    def _bigq(self, run: Run, model: Path, out: Path) -> dict[str, Any]:
        arguments = bigq_arguments(run, subjects.ids_file(self.models, run.subject, run.draw))
        command = [sys.executable, CLIENTS / "quantize_bigq.py", out / "used.json", "quantize", model, out / "packed", *arguments]
        self._call(run, command, {"PYTHONPATH": str(self.tree)}, out)
        linears = dense_from_gptq(model, out / "packed", out / "dense")
        packed = [t for path in (out / "packed").glob("*.safetensors") for t in packed_sizes(path)]
        bits = 8 * sum(size for size, _ in packed) / sum(weights for _, weights in packed)
        return {"linears": linears, "bits_per_weight": round(bits, 4), **json.loads((out / "used.json").read_text())}

    def _peer(self, run: Run, model: Path, out: Path) -> dict[str, Any]:
        """Another program, in its own environment: its dequantized weights in the place of the original's."""
        tool = run.contestant.tool
        assert self.venvs is not None
        ids = subjects.ids_file(self.models, run.subject, run.draw)
        told = json.dumps(PEERS[tool](run))
        command = [self.venvs / tool / "bin/python", CLIENTS / f"quantize_{tool}.py", model, ids, out / "made", told]
        self._call(run, command, {"GPTQMODEL_CPU_WORKERS": "2", "OMP_WAIT_POLICY": "PASSIVE"}, out)
        said: dict[str, Any] = json.loads((out / "made/used.json").read_text())
        weights = load_file(out / "made/weights.safetensors")
        if len(weights) != said["linears"]:
            raise FailedRun(f"{run.name}: {len(weights)} weights of {said['linears']} Linears")
        write_dense(model, weights, out / "dense")
        return said

    def _call(self, run: Run, command: Sequence[object], environment: dict[str, str], out: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | kept | environment
        log = self.work / "out" / f"{run.name}.log"
        with log.open("w") as stream, contextlib.suppress(subprocess.TimeoutExpired):
            words = list(map(str, command))
            done = subprocess.run(words, env=environment, cwd=out, stdout=stream, stderr=stream, timeout=TIMEOUT, check=False)
            if done.returncode == 0:
                log.unlink()
                return
        last = " / ".join(log.read_text(errors="replace").strip().splitlines()[-1:])
        raise FailedRun(f"{run.name}: {run.contestant.tool} failed ({last}); see {log}")


def known_flags(tree: Path) -> set[str]:
    """The options in the help of ``bigq quantize``: a contestant with an option that this bigq has not is left out."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "bigq", "quantize", "--help"]
    return set(re.findall(r"--[\w-]+", subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout))


def bigq_arguments(run: Run, ids: Path) -> list[str]:
    setting, subject = run.setting, run.subject
    shape = ["--bits", setting.bits, "--group-size", setting.group_size, "--sym" if setting.symmetric else "--asym"]
    rows = ["--calibration", ids, "--samples", subject.rows, "--seqlen", subject.seqlen]
    how = ["--dtype", "float32", "--device", "cpu", "--format", "gptq_v2", "--quiet"]
    return [*map(str, shape + rows + how), *run.contestant.words]


def packed_sizes(path: Path) -> list[tuple[int, int]]:
    """(bytes, weights) of the packed tensors of a shard; only qweight has weights. Groups' numbers need no bytes: they are natural."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    sizes = []
    for name, info in header.items():
        part = name.rpartition(".")[2]
        if part in ("qweight", "qzeros", "scales"):
            sizes.append((info["data_offsets"][1] - info["data_offsets"][0], 0))
        elif part == "g_idx":
            outputs = header[f"{name.removesuffix('g_idx')}qweight"]["shape"][1]
            sizes.append((0, info["shape"][0] * outputs))
    return sizes


def identity(run: Run) -> dict[str, Any]:
    setting = {"bits": run.setting.bits, "group_size": run.setting.group_size, "symmetric": run.setting.symmetric}
    return {"subject": run.subject.name, "contestant": run.contestant.name, "flags": run.contestant.flags, **setting, "draw": run.draw}


def figures(found: dict[str, list[float]]) -> dict[str, Any]:
    """Of windows: KL and negative log likelihood, to six digits."""
    mean = {name: statistics.fmean(values) for name, values in found.items()}
    kept = {f"{name}_of_windows": [float(f"{value:.6g}") for value in found[name]] for name in ("kl", "nll")}
    perplexities = {"perplexity": math.exp(mean["nll"]), "original_perplexity": math.exp(mean["original_nll"])}
    return {"kl": mean["kl"], "top1_agreement": mean["top1"], **perplexities, **kept}
