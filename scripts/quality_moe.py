#!/usr/bin/env python3
"""Quantize a model with experts with bigq, llm-compressor and GPTQModel on the same tokens, and compare them window by window.

    python scripts/train_moe.py --out DIR/silu                        # once: 10 to 15 minutes
    python scripts/quality_moe.py --work DIR --gptqmodel VENV --llmcompressor VENV --json docs/results/quality_moe.json

All compute in fp32, on the same rows of the shipped calibration text (one draw for each seed): 4 and 3 bits, symmetric, groups of 32,
act-order with static groups. A peer's weights are dequantized by its own code and put in the place of the original's. The figure is the KL
divergence from the original on windows of the shipped held-out text, streamed as ``bigq eval --baseline`` does.

Other rules than bigq's are put in its place here; bigq has no options for them. DIR/relu is the same model with ReLU, trained on for some
steps: only there experts have inputs that are 0 in all of their tokens. A run that is done is kept as DIR/runs/NAME.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch
from dead_inputs import usual_rule
from facts import host, revision, versions
from safetensors.torch import load_file, save_file
from torch import Tensor

import bigq
from bigq.calibration import calibration_rows, evaluation_rows
from bigq.infer.evaluate import Stream
from bigq.methods.base import CalibratedMethod, Collector
from bigq.model.experts.bank import Product
from bigq.model.pager import Pager
from bigq.sched.rows.routed import RoutedRows
from bigq.sched.solve import bank
from bigq.sched.solve.bank import BankJob

BITS, GROUP, SEEDS = (4, 3), 32, (0, 1, 2)
SAMPLES, SEQLEN, WINDOWS = 16, 256, 128
#: Rows with which many experts have no token or few.
FEW_ROWS = 2
DAMPING = 0.01
RELU_STEPS = 150
TIMEOUT = 1800.0
COMMAND = "python scripts/quality_moe.py --work DIR --gptqmodel VENV --llmcompressor VENV --json docs/results/quality_moe.json"

#: The tokens of an expert's Hessian, from its rows, the tokens that are routed to it, and the inputs of the matrix.
Choice = Callable[[RoutedRows, Tensor, int], Tensor]
#: Solves a product of an expert. From bigq's own way, given a job; the job; the expert, a member of a batch; and the product's inputs.
Rule = Callable[[Callable[[BankJob], None], BankJob, Any, int], None]


def solving(rule: Rule) -> AbstractContextManager[Any]:
    """Let a rule solve every product of every expert, one expert after the other."""
    own = bank._solve

    def one_by_one(job: BankJob, method: CalibratedMethod, members: Sequence[Any], product: Product) -> None:
        for member in members:
            assert member.before is None and job.ranks.count == 1, "rules know the quantized model alone, in one process"
            rule(partial(own, method=method, members=[member], product=product), job, member, member.now.expert.weight(product).shape[1])

    return mock.patch.object(bank, "_solve", one_by_one)


@contextlib.contextmanager
def given(member: Any, tokens: Tensor) -> Iterator[None]:
    """Let an expert's Hessian have these tokens. How many are routed to it, and what it returns for them, stays as it is."""
    now, count = member.now, member.tokens
    member.now, member.tokens = dataclasses.replace(now, tokens=tokens, inputs=None), len(tokens)
    try:
        yield
    finally:
        member.now, member.tokens = now, count


def hessian_tokens(choose: Choice) -> AbstractContextManager[Any]:
    """Let Hessians of experts have other tokens. No tokens: the matrix is rounded to nearest. What experts return stays as it is."""

    def chosen(solve: Callable[[BankJob], None], job: BankJob, member: Any, inputs: int) -> None:
        with given(member, choose(member.now.rows, member.now.tokens, inputs)):
            solve(job)

    return solving(chosen)


def everyone(rows: RoutedRows, tokens: Tensor, inputs: int) -> Tensor:
    return torch.arange(len(rows.experts))


def all_if_none(rows: RoutedRows, tokens: Tensor, inputs: int) -> Tensor:
    return tokens if len(tokens) else everyone(rows, tokens, inputs)


def none_below(share: float, rows: RoutedRows, tokens: Tensor, inputs: int) -> Tensor:
    """Round to nearest below this share of all tokens."""
    return tokens if len(tokens) >= share * len(rows.experts) else tokens[:0]


def none_below_inputs(rows: RoutedRows, tokens: Tensor, inputs: int) -> Tensor:
    """Round to nearest where there are fewer tokens than inputs."""
    return tokens if len(tokens) >= inputs else tokens[:0]


def filled(times: float, rows: RoutedRows, tokens: Tensor, inputs: int) -> Tensor:
    """With other tokens, evenly from all rows, up to this many times the inputs of the matrix."""
    others = without(tokens, len(rows.experts))
    missing = min(max(0, int(times * inputs) - len(tokens)), len(others))
    return torch.cat([tokens, others[torch.arange(missing) * len(others) // max(missing, 1)]])


def without(tokens: Tensor, count: int) -> Tensor:
    """All numbers below count but these."""
    kept = torch.ones(count, dtype=torch.bool)
    kept[tokens] = False
    return kept.nonzero().flatten()


class Scaled:
    """A collector that multiplies the inputs of each token. scale: of every token [T], in the order in which they are added."""

    def __init__(self, collector: Collector, scale: Tensor) -> None:
        self._collector, self._parts = collector, iter(scale.split(bank.CHUNK_TOKENS))

    def add(self, x: Tensor, reference: None = None) -> None:
        self._collector.add(x * next(self._parts)[:, None])


def scaling(scale: Tensor) -> AbstractContextManager[Any]:
    """Multiply the inputs of each token of one expert's Hessian. scale: see ``Scaled``."""
    collect = bank._collect

    def scaled(job: BankJob, member: Any, product: Product, collector: Collector) -> None:
        collect(job, member, product, Scaled(collector, scale))  # type: ignore[arg-type]

    return mock.patch.object(bank, "_collect", scaled)


def weighted() -> AbstractContextManager[Any]:
    """Weigh each token of an expert's Hessian by the square of the router's weight."""

    def by_router(solve: Callable[[BankJob], None], job: BankJob, member: Any, inputs: int) -> None:
        with scaling(member.now.rows.weights[member.now.tokens, member.slots].float()):
            solve(job)

    return solving(by_router)


def shrunk(share: float) -> AbstractContextManager[Any]:
    """Add the mean over all other tokens to an expert's Hessian, as if it were that of so many tokens: a share of the inputs."""

    def mixed(solve: Callable[[BankJob], None], job: BankJob, member: Any, inputs: int) -> None:
        tokens = member.now.tokens
        others = without(tokens, len(member.now.rows.experts))
        weight = share * inputs / max(len(others), 1)
        scale = torch.cat([torch.ones(len(tokens)), torch.full((len(others),), math.sqrt(weight))])
        with given(member, torch.cat([tokens, others])), scaling(scale):
            solve(job)

    return solving(mixed)


def damped(factor: float) -> AbstractContextManager[Any]:
    """Let the damping of an expert's matrix be at least factor · inputs / tokens, and at most 0.9."""

    def more(solve: Callable[[BankJob], None], job: BankJob, member: Any, inputs: int) -> None:
        least = min(0.9, factor * inputs / max(member.tokens, 1))
        schemes = {name: dataclasses.replace(s, damping=max(s.damping, least)) for name, s in job.schemes.items()}
        solve(dataclasses.replace(job, schemes=schemes))

    return solving(more)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """settings: of bigq's job, or what the peer's script is told beside bits and groups. rule: what is put in bigq's place."""

    name: str
    tool: str = "bigq"
    model: str = "silu"
    rows: int = SAMPLES
    settings: Mapping[str, Any]
    rule: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    compared_with: str = "bigq"


def ours(name: str, rule: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext, **settings: Any) -> Way:
    return Way(name=f"bigq{name}", settings=settings, rule=rule)


def starved(name: str, rule: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext, **settings: Any) -> Way:
    """bigq with few tokens."""
    return Way(name=f"bigq, few tokens{name}", rows=FEW_ROWS, settings=settings, rule=rule, compared_with="bigq, few tokens")


#: GPTQModel's own default, which quantize_gptqmodel.py switches off.
FALLBACK = {"strategy": "rtn", "threshold": "0.5%"}
WAYS = (
    ours(""),
    ours(", all tokens to all experts", partial(hessian_tokens, everyone)),
    Way(name="rounding to nearest", settings={"method": "rtn"}),
    Way(name="llm-compressor", tool="llmcompressor", settings={}),
    Way(name="llm-compressor, routed", tool="llmcompressor", settings={"moe_calibrate_all_experts": False}),
    Way(name="GPTQModel", tool="gptqmodel", settings={"fallback": FALLBACK}),
    ours(", damping 0.001", damping=0.001),
    ours(", damping 0.1", damping=0.1),
    ours(", all tokens for an expert without any", partial(hessian_tokens, all_if_none)),
    ours(", nearest below 0.5 % of tokens", partial(hessian_tokens, partial(none_below, 0.005))),
    ours(", nearest below as many tokens as inputs", partial(hessian_tokens, none_below_inputs)),
    ours(", tokens weighted by the router", weighted),
    ours(", filled up to as many tokens as inputs", partial(hessian_tokens, partial(filled, 1))),
    ours(", mixed with a quarter of the inputs of the mean", partial(shrunk, 0.25)),
    ours(", damping of experts at least 0.05 inputs / tokens", partial(damped, 0.05)),
    starved(""),
    starved(", damping 0.1", damping=0.1),
    starved(", damping of experts at least 0.05 inputs / tokens", partial(damped, 0.05)),
    starved(", filled up to as many tokens as inputs", partial(hessian_tokens, partial(filled, 1))),
    starved(", filled up to four times the inputs", partial(hessian_tokens, partial(filled, 4))),
    starved(", mixed with a quarter of the inputs of the mean", partial(shrunk, 0.25)),
    starved(", all tokens for an expert without any", partial(hessian_tokens, all_if_none)),
    starved(", nearest below as many tokens as inputs", partial(hessian_tokens, none_below_inputs)),
    starved(", all tokens to all experts", partial(hessian_tokens, everyone)),
    Way(name="bigq, ReLU", model="relu", settings={}, compared_with="bigq, ReLU"),
    Way(name="bigq, ReLU, 0 for dead inputs", model="relu", settings={}, rule=usual_rule, compared_with="bigq, ReLU"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    way: Way
    bits: int
    seed: int

    @property
    def name(self) -> str:
        words = re.findall(r"[\w.-]+", self.way.name.lower().replace("%", "percent").replace("/", "by"))
        return f"{'-'.join(words)}.{self.bits}.{self.seed}"


def all_runs(seeds: Iterable[int]) -> list[Run]:
    """Every run, seed by seed. Rounding to nearest has no draw of tokens, but is there for each, so that all are compared alike."""
    return [Run(way=way, bits=bits, seed=seed) for seed in seeds for way in WAYS for bits in BITS]


def prepare(work: Path, seeds: Iterable[int]) -> None:
    """WORK/relu from WORK/silu, both in fp32 as WORK/NAME-fp32, and WORK/ids-SEED.safetensors."""
    if not (work / "silu/training.json").exists():
        sys.exit(f"quality_moe: {work / 'silu'} has no model; run: python scripts/train_moe.py --out {work / 'silu'}")
    if not (work / "relu/model.safetensors").exists():
        make_relu(work / "silu", work / "relu")
    for name in ("silu", "relu"):
        source, model = work / name, work / f"{name}-fp32"
        model.mkdir(exist_ok=True)
        save_file({k: t.float() for k, t in load_file(source / "model.safetensors").items()}, model / "model.safetensors", {"format": "pt"})
        for path in source.glob("tokenizer*"):
            shutil.copy(path, model)
        config = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
        (model / "config.json").write_text(json.dumps(config))
    for seed in seeds:
        rows = calibration_rows("builtin", work / "silu", samples=SAMPLES, seqlen=SEQLEN, seed=seed)
        save_file({"input_ids": rows}, work / f"ids-{seed}.safetensors")
    (work / "runs").mkdir(exist_ok=True)


def make_relu(source: Path, out: Path) -> None:
    """The same model with ReLU in its experts, trained on."""
    from train_moe import train
    from train_tiny import byte_tokenizer, corpus
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, hidden_act="relu", dtype=torch.float32, experts_implementation="eager")
    data = torch.frombuffer(bytearray(corpus()[0]), dtype=torch.uint8)
    train(model, data, steps=RELU_STEPS, rate=lambda step: 1e-3 * (1 - step / RELU_STEPS), output_router_logits=True)
    model.to(torch.bfloat16).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)


def run_bigq(run: Run, work: Path, out: Path) -> dict[str, Any]:
    settings = dict(run.way.settings)
    scheme = bigq.QuantScheme(
        bits=run.bits, group_size=GROUP, damping=settings.pop("damping", DAMPING), order="activation", scales="minmax", sweeps=0
    )
    ids = str(work / f"ids-{run.seed}.safetensors")
    how: dict[str, Any] = {
        "samples": run.way.rows,
        "seqlen": SEQLEN,
        "format": "compressed-tensors",
        "device": "cpu",
        "quiet": True,
    } | settings
    with run.way.rule():
        report = bigq.quantize(
            str(work / f"{run.way.model}-fp32"), out, bigq.JobConfig(scheme=scheme, calibration=ids, dtype="float32", **how)
        )
    experts = [record for record in report.linears if ".experts." in record["name"]]
    gates = [record for record in experts if record["name"].endswith(".gate_proj")]
    downs = [record for record in experts if record["name"].endswith(".down_proj")]
    return {
        "linears": len(report.linears),
        "rounded_matrices": sum(bool(record.get("rounded")) for record in experts),
        "damping_raised": sum(record["damping"] > 1.001 * scheme.damping for record in report.linears),
        "tokens_of_experts": spread([record["tokens"] for record in gates]) if run.way.settings.get("method") != "rtn" else None,
        "dead_inputs": sum(record["dead_inputs"] for record in downs),
        "matrices_with_dead_inputs": sum(record["dead_inputs"] > 0 for record in downs),
    }


def spread(tokens: Sequence[int]) -> dict[str, float]:
    """Tokens of an expert over all layers."""
    return {"min": min(tokens), "median": statistics.median(tokens), "max": max(tokens), "without": sum(n == 0 for n in tokens)}


def peer_settings(run: Run) -> dict[str, Any]:
    """What scripts/clients/quantize_*.py are told."""
    if run.way.tool == "gptqmodel":
        order = {"desc_act": True, "static_groups": True, "act_group_aware": False, "damp_percent": DAMPING, "offload_to_disk": False}
        return {"bits": run.bits, "group_size": GROUP, "sym": True, "format": "gptq_v2", **order, **run.way.settings}
    weights = {"num_bits": run.bits, "symmetric": True, "strategy": "group", "group_size": GROUP}
    return {"weights": weights, "modifier": {"actorder": "static"}, "oneshot": dict(run.way.settings)}


def run_peer(run: Run, work: Path, out: Path, venv: Path) -> dict[str, Any]:
    """A dense checkpoint in OUT, by a process in the peer's environment."""
    model = work / f"{run.way.model}-fp32"
    script = ROOT / "scripts/clients" / {"gptqmodel": "quantize_gptqmodel.py", "llmcompressor": "quantize_llmc.py"}[run.way.tool]
    command = [venv.absolute() / "bin/python", script, model, work / f"ids-{run.seed}.safetensors", out, json.dumps(peer_settings(run))]
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = kept | {"HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    log = work / f"log-{run.name}.txt"
    with log.open("w") as stream:
        done = subprocess.run(
            list(map(str, command)), env=environment, cwd=work, stdout=stream, stderr=stream, timeout=TIMEOUT, check=False
        )
    if done.returncode:
        sys.exit(f"quality_moe: {run.way.tool} ended with status {done.returncode}; see {log}")
    for path in model.glob("*.json"):
        shutil.copy(path, out)
    said: dict[str, Any] = json.loads((out / "used.json").read_text())
    original, weights = (load_file(folder / f"{name}.safetensors") for folder, name in ((model, "model"), (out, "weights")))
    require_replaced(original, original | weights, said["linears"])
    save_file(original | weights, out / "model.safetensors", {"format": "pt"})
    (out / "weights.safetensors").unlink()
    return said


def require_replaced(original: Mapping[str, Tensor], made: Mapping[str, Tensor], linears: int) -> None:
    """A peer's names must be the checkpoint's, or its weights would be beside the original's and not in their place."""
    changed = sum(not torch.equal(tensor, made[name]) for name, tensor in original.items() if name in made)
    if made.keys() != original.keys() or changed != linears:
        sys.exit(f"quality_moe: {linears} Linears were quantized, {changed} tensors of {len(original)} changed, {len(made)} are there")


class Judge:
    """The KL divergence from the original and the negative log likelihood on each window, in nats per token."""

    def __init__(self, model: Path) -> None:
        self._rows = evaluation_rows("builtin", model, seqlen=SEQLEN, samples=WINDOWS)
        self._original = list(self._log_probabilities(model))

    def _log_probabilities(self, folder: Path) -> Iterator[Tensor]:
        pager = Pager(folder, device=torch.device("cpu"), dtype="float32")
        stream = Stream(pager, self._rows, 8)
        with stream.tail_ready():
            for lo in range(0, len(self._rows), 8):
                yield from stream.logits(lo, lo + 8)[:, :-1].log_softmax(-1)

    def original_perplexity(self) -> float:
        return math.exp(statistics.fmean(self._likelihood(row, q) for row, q in zip(self._rows, self._original, strict=True)))

    @staticmethod
    def _likelihood(row: Tensor, log_probabilities: Tensor) -> float:
        return float(-log_probabilities.gather(1, row[1:, None]).double().mean())

    @torch.no_grad()
    def judge(self, folder: Path) -> dict[str, Any]:
        kl, nll = [], []
        for row, p, q in zip(self._rows, self._log_probabilities(folder), self._original, strict=True):
            kl.append(float((q.exp() * (q - p)).sum(-1).double().mean()))
            nll.append(self._likelihood(row, p))
        return {"perplexity": math.exp(statistics.fmean(nll)), "kl": statistics.fmean(kl), "kl_of_windows": kl}


def make(runs: Iterable[Run], work: Path, venvs: Mapping[str, Path | None]) -> None:
    judges: dict[str, Judge] = {}
    for run in runs:
        record, out = work / "runs" / f"{run.name}.json", work / "out"
        if record.exists() or (run.way.tool != "bigq" and venvs[run.way.tool] is None):
            continue
        shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        venv = venvs.get(run.way.tool)
        said = run_bigq(run, work, out) if venv is None else run_peer(run, work, out, venv)
        said["seconds"] = round(time.monotonic() - began, 1)
        if run.way.model not in judges:
            with torch.no_grad():
                judges[run.way.model] = Judge(work / f"{run.way.model}-fp32")
        judge = judges[run.way.model]
        said |= {"original_perplexity": judge.original_perplexity(), **judge.judge(out)}
        said = {"way": run.way.name, "model": run.way.model, "bits": run.bits, "seed": run.seed} | said
        record.with_suffix(".tmp").write_text(json.dumps(said) + "\n")
        os.replace(record.with_suffix(".tmp"), record)
        print(f"{run.name}: perplexity {said['perplexity']:.4f}, KL {said['kl']:.6f}, {said['seconds']} s", file=sys.stderr, flush=True)
    shutil.rmtree(work / "out", ignore_errors=True)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The mean of theirs − ours over windows, and its standard error, in parts of the mean of ours."""
    found = [b - a for a, b in zip(ours, theirs, strict=True)]
    scale = statistics.fmean(ours)
    return statistics.fmean(found) / scale, statistics.stdev(found) / math.sqrt(len(found)) / scale


def comparisons(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each way against bigq's own: KL by seed, and how much higher than bigq's.

    stderr: the larger of the standard errors over the windows and over the draws; by_seed: differences with those over the windows. The
    verdict is "higher" or "lower" where the difference exceeds twice its standard error over the windows in every seed.
    """
    found = {(record["way"], record["bits"], record["seed"]): record for record in records}
    seeds = sorted({seed for _, _, seed in found})
    rows = []
    for way in WAYS:
        for bits in BITS:
            both = [s for s in seeds if (way.name, bits, s) in found and (way.compared_with, bits, s) in found]
            if not both:
                continue
            theirs = [found[way.name, bits, seed] for seed in both]
            row: dict[str, Any] = {"way": way.name, "bits": bits, "seeds": both, "kl": [record["kl"] for record in theirs]}
            row["perplexity"] = [record["perplexity"] for record in theirs]
            if way.name != way.compared_with:
                mine = [found[way.compared_with, bits, seed] for seed in both]
                each = [difference(a["kl_of_windows"], b["kl_of_windows"]) for a, b in zip(mine, theirs, strict=True)]
                means = [[statistics.fmean(w) for w in zip(*(r["kl_of_windows"] for r in rs), strict=True)] for rs in (mine, theirs)]
                row["higher_by"], over_windows = difference(means[0], means[1])
                over_draws = statistics.stdev(found for found, _ in each) / math.sqrt(len(each)) if len(each) > 1 else 0.0
                row["stderr"] = max(over_windows, over_draws)
                row |= {"compared_with": way.compared_with, "by_seed": each, "verdict": verdict(each)}
            rows.append(row)
    return rows


def verdict(each: Sequence[tuple[float, float]]) -> str:
    """each: (difference, standard error) of every seed."""
    if all(found > 2 * stderr for found, stderr in each):
        return "higher"
    return "lower" if all(found < -2 * stderr for found, stderr in each) else "within noise"


def collect(work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """The content of quality_moe.json."""
    wanted = all_runs(seeds)
    records = [json.loads(path.read_text()) for run in wanted if (path := work / "runs" / f"{run.name}.json").exists()]
    peers = {k: v for record in records for k, v in record.get("versions", {}).items() if k not in ("torch", "transformers")}
    compared = comparisons(records)
    for record in records:
        del record["kl_of_windows"]
    return {
        "command": COMMAND,
        "revision": revision(),
        "versions": versions() | peers,
        "host": host(),
        "model": json.loads((work / "silu/training.json").read_text()),
        "settings": {"group_size": GROUP, "symmetric": True, "act_order": True, "damping": DAMPING, "relu_steps": RELU_STEPS},
        "calibration": {"rows": SAMPLES, "few_rows": FEW_ROWS, "tokens_per_row": SEQLEN, "seeds": list(seeds)},
        "held_out": {"windows": WINDOWS, "tokens_per_window": SEQLEN - 1},
        "runs_missing": [run.name for run in wanted if not (work / "runs" / f"{run.name}.json").exists()],
        "comparisons": compared,
        "runs": records,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the trained model, for outputs and records of runs")
    parser.add_argument("--gptqmodel", type=Path, metavar="VENV")
    parser.add_argument("--llmcompressor", type=Path, metavar="VENV")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="draws, separated by commas (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only runs whose name has it")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work, seeds = args.work.resolve(), list(map(int, args.seeds.split(",")))
    prepare(work, seeds)
    venvs = {"gptqmodel": args.gptqmodel, "llmcompressor": args.llmcompressor}
    make([run for run in all_runs(seeds) if args.only in run.name], work, venvs)
    args.json.write_text(json.dumps(collect(work, seeds), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
