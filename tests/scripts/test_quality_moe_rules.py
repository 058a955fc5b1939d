"""The rules that the comparison on a model with experts puts in bigq's place, in jobs: every expert against GPTQ in memory.

The Hessians here are made from the inputs of the model's own modules, and are not the script's or the loop's.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from models import aligned
from moe_families import moe_model, random_tokens
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

sys.path.append(str(ROOT / "scripts"))

import quality_moe
from quality_moe import GROUP, WAYS, Run, Way

import bigq
from bigq.io.formats import FORMATS
from bigq.io.index import Checkpoint
from bigq.io.reader import read_tensor
from bigq.kernels.dequantize import dequantize_packed
from bigq.sched.solve import bank
from bigq.scheme import QuantScheme
from bigq.solver.gptq import quantize_linear
from bigq.solver.rtn import round_to_nearest

SEQLEN, BITS, EXPERTS = 96, 4, 8
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": nn.functional.silu, "relu": nn.functional.relu}


@dataclass(frozen=True)
class At:
    """An expert's matrix. x: its inputs for all tokens, fp64 [T, n]. own: bool [T]; weights: of the router, fp64 [own]."""

    x: Tensor
    own: Tensor
    weights: Tensor

    @property
    def count(self) -> int:
        return int(self.own.sum())

    @property
    def routed(self) -> Tensor | None:
        return gram(self.x[self.own]) if self.count else None

    def filled(self, times: int) -> Tensor:
        others = [i for i, own in enumerate(self.own.tolist()) if not own]
        wanted = min(max(0, times * self.x.shape[1] - self.count), len(others))
        return gram(torch.cat([self.x[self.own], self.x[[others[i * len(others) // wanted] for i in range(wanted)]]]))

    def mixed(self) -> Tensor:
        mine, others = self.x[self.own], self.x[~self.own]
        return mine.T @ mine + self.x.shape[1] / 4 * (others.T @ others) / len(others)

    def with_ones(self) -> Tensor | None:
        """1 for dead inputs."""
        return None if self.routed is None else self.routed + (self.routed.diagonal() == 0).double().diag()


def gram(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


#: The end of a way's name → the Hessian of an expert's matrix; None: it is rounded to nearest.
HESSIANS: Mapping[str, Callable[[At], Tensor | None]] = {
    "rounding to nearest": lambda at: None,
    ", all tokens to all experts": lambda at: gram(at.x),
    ", all tokens for an expert without any": lambda at: at.routed if at.count else gram(at.x),
    ", nearest below 0.5 % of tokens": lambda at: at.routed if at.count / len(at.x) >= 0.005 else None,
    ", nearest below as many tokens as inputs": lambda at: at.routed if at.count >= at.x.shape[1] else None,
    ", tokens weighted by the router": lambda at: gram(at.weights[:, None] * at.x[at.own]) if at.count else None,
    ", filled up to as many tokens as inputs": lambda at: at.filled(1),
    ", filled up to four times the inputs": lambda at: at.filled(4),
    ", mixed with a quarter of the inputs of the mean": At.mixed,
    ", damping of experts at least 0.05 inputs / tokens": lambda at: at.routed,
    ", ReLU, 0 for dead inputs": At.with_ones,
}


def end_of_name(way: Way) -> str:
    return way.name.removeprefix("bigq").removeprefix(", few tokens")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose router never chooses expert 7, which has logit 0 beside two positive ones, and rarely expert 6."""
    folder = tmp_path_factory.mktemp("work")
    for name in ACTIVATIONS:
        model: Any = moe_model("qwen3_moe", hidden_act=name)
        with torch.no_grad():
            router = model.model.layers[0].mlp.gate.weight
            router[1], router[3], router[7] = -router[0], -router[2], 0
            router[6] *= 0.08
            model.model.layers[0].mlp.experts.gate_up_proj[:, :3] = 0  # dead inputs after ReLU, or SiLU
        model.save_pretrained(folder / f"{name}-fp32")
    save_file({"input_ids": random_tokens(quality_moe.SAMPLES, SEQLEN)}, folder / "ids-0.safetensors")
    return folder


@dataclass
class Job:
    """One way's job. records: of Linears, by name."""

    way: Way
    out: Path
    records: dict[str, Mapping[str, Any]]

    def dequantized(self, name: str) -> Tensor:
        checkpoint, scheme = Checkpoint.open(self.out), QuantScheme(bits=BITS, group_size=GROUP)
        words, scales, zeros = FORMATS["compressed-tensors"].read(name, lambda key: read_tensor(checkpoint[key]), scheme)
        return dequantize_packed(words, scales, zeros, BITS, torch.float32)


@pytest.fixture
def run(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Way], Job]:
    reports: list[Any] = []
    quantize = bigq.quantize

    def kept(*args: Any) -> Any:
        reports.append(quantize(*args))
        return reports[-1]

    monkeypatch.setattr(bigq, "quantize", kept)
    monkeypatch.setattr(quality_moe, "SEQLEN", SEQLEN)
    monkeypatch.setattr(bank, "CHUNK_TOKENS", 50)

    def one(way: Way) -> Job:
        before = bank._solve, bank._collect
        out = tmp_path / f"out-{len(reports)}"
        quality_moe.run_bigq(Run(way=way, bits=BITS, seed=0), work, out)
        assert (bank._solve, bank._collect) == before, "a rule ends with its job"
        return Job(way, out, {record["name"]: record for record in reports[-1].linears})

    return one


def damping_of(way: Way, at: At) -> float:
    return max(0.01, min(0.9, 0.05 * at.x.shape[1] / max(at.count, 1))) if end_of_name(way).startswith(", damping of experts") else 0.01


def alike(found: Tensor, expected: Tensor) -> bool:
    return bool((found == expected).float().mean() > 0.99)


def quantized(weight: Tensor, hessian: Tensor | None, damping: float) -> Tensor:
    scheme = QuantScheme(bits=BITS, group_size=GROUP, damping=damping, order="activation", scales="minmax", sweeps=0)
    solved = round_to_nearest(weight, scheme) if hessian is None else quantize_linear(weight, hessian.float(), scheme)
    return solved.dequantize()


class InMemory:
    """A way's model with attention's Linears of block 0 as the job left them, on the way's rows."""

    def __init__(self, job: Job, model: Path) -> None:
        self.model: Any = aligned(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager")).eval()
        self._ids = random_tokens(quality_moe.SAMPLES, SEQLEN)[: job.way.rows]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(self.model.model.layers[0].self_attn, name).weight.copy_(job.dequantized(f"model.layers.0.self_attn.{name}"))

    @property
    def experts(self) -> Any:
        return self.model.model.layers[0].mlp.experts

    def given(self, module: nn.Module) -> list[Tensor]:
        """The arguments of a module, in one run of the model."""
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args, kwargs: seen.extend([*args, *kwargs.values()]), with_kwargs=True)
        self.model(input_ids=self._ids, use_cache=False)
        handle.remove()
        return seen


def test_every_rule_has_its_hessian_here() -> None:
    assert {end_of_name(way) for way in WAYS if way.rule is not WAYS[0].rule} == HESSIANS.keys() - {"rounding to nearest"}


# Of ways that are the same but for the number of tokens, the last.
@pytest.mark.parametrize("way", {end_of_name(way): way for way in WAYS if end_of_name(way) in HESSIANS}.values(), ids=lambda way: way.name)
def test_experts_are_solved_by_their_rule(way: Way, work: Path, run: Callable[[Way], Job]) -> None:
    """With the codes of its Hessian and damping, which are not all those of bigq; then they return what they would in any job."""
    job, calibrated = run(way), "method" not in way.settings
    memory = InMemory(job, work / f"{way.model}-fp32")
    inputs, chosen, weights = memory.given(memory.experts)
    changed, counts = 0, []
    for e in range(EXPERTS):
        names = [f"model.layers.0.mlp.experts.{e}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
        gate, up, down = map(job.dequantized, names)
        inside = ACTIVATIONS[way.model](inputs @ gate.T) * (inputs @ up.T)
        own, of_own = (chosen == e).any(-1), (weights * (chosen == e)).sum(-1).double()
        matrices = [*memory.experts.gate_up_proj[e].chunk(2), memory.experts.down_proj[e]]
        for name, found, weight, x in zip(names, (gate, up, down), matrices, (inputs, inputs, inside), strict=True):
            at, record = At(x.double(), own, of_own[own]), job.records[name]
            hessian, damping = HESSIANS[end_of_name(way)](at), damping_of(way, at)
            of_bigq = quantized(weight, at.routed, 0.01)
            if way.name.endswith("0 for dead inputs") and hessian is not None:
                weight = weight.masked_fill((x[own] == 0).all(0), 0)
            # Sums in another order move a code at most here and there.
            assert alike(found, quantized(weight, hessian, damping)), (name, at.count)
            changed += not alike(found, of_bigq)
            assert record["damping"] == pytest.approx(0 if hessian is None else damping), (name, at.count)
            assert record.get("tokens") == (at.count if calibrated else None)
            assert bool(record.get("rounded")) == (hessian is None and calibrated)
        counts.append(int(own.sum()))
        memory.experts.gate_up_proj[e].copy_(torch.cat([gate, up]))
        memory.experts.down_proj[e].copy_(down)
    assert counts[7] == 0 < counts[6] < 0.005 * quality_moe.SAMPLES * SEQLEN < 64 < max(counts)
    assert changed, "or the rule does nothing"
    after = memory.model.model.layers[1].self_attn.q_proj
    (x,) = memory.given(after)
    expected = quantized(after.weight, gram(x.flatten(0, 1).double()) if calibrated else None, 0.01)
    assert alike(job.dequantized("model.layers.1.self_attn.q_proj"), expected), "its inputs are made of what the experts return"


def test_experts_of_a_batch_are_each_solved_by_the_rule(run: Callable[[Way], Job]) -> None:
    (way,) = (way for way in WAYS if way.name == "bigq, few tokens, mixed with a quarter of the inputs of the mean")
    alone, batch = run(way), run(dataclasses.replace(way, settings={"experts_at_once": 3}))
    assert alone.records.keys() == batch.records.keys() and len(alone.records) == 2 * (4 + 3 * EXPERTS)
    assert all(torch.equal(alone.dequantized(name), batch.dequantized(name)) for name in alone.records)
