"""``--method gptaq`` on models with experts: a token at an expert is seen as it is in both models, and a job goes on to the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import DISTINCT, MOE_FAMILIES
from test_expert_codes import FAMILIES, InputsOf, at_bank
from test_experts_end_to_end import hashes, small_groups
from test_experts_end_to_end import job as expert_job
from test_experts_end_to_end import saved as save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import bigq
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.infer.load import load_model
from bigq.model.experts.bank import bank_modules
from bigq.scheme import QuantScheme
from bigq.solver.gptq import quantize_linear

CPU = torch.device("cpu")
SCHEME = QuantScheme(bits=3, group_size=16, order="activation", scales="minmax", sweeps=0)
ALPHA = 0.5


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    return lambda family, dtype=torch.float32: save_model(family, tmp_path, dtype)


def job(folder: Path, **changes: Any) -> JobConfig:
    return expert_job(folder, **{"method": "gptaq", "alpha": ALPHA, "scheme": SCHEME, **changes})


def with_rows_of(rows: tuple[tuple[Any, ...], dict[str, Any]], routed: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The arguments ``routed`` of a bank, with the hidden states of ``rows``: its first argument."""
    args, kwargs = routed
    if args:
        return (rows[0][0], *args[1:]), kwargs
    first = next(iter(kwargs))
    return (), {**kwargs, first: rows[1][first]}


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in DISTINCT else pytest.mark.long) for f in FAMILIES])
def test_experts_are_solved_for_what_the_original_gives_on_tokens_routed_to_them(family: str, saved: Callable[..., Path]) -> None:
    """Of the last bank. X is what a matrix receives in the original model for the tokens that the quantized model routes to its expert,
    X̂ in the quantized one; the rest in fp64. The original's own routing shows in the hidden states before the bank.
    """
    model = saved(family)
    out = model.parent / "out"
    bigq.quantize(str(model), out, job(model.parent))
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager").eval()
    solved = load_model(out, device="cpu")
    name = list(bank_modules(solved))[-1]
    before, after = source.get_submodule(name), solved.get_submodule(name)
    now = at_bank(solved, name)
    were = with_rows_of(at_bank(source, name), now)
    same = plain = total = 0
    for key in [key for key, parameter in after.named_parameters(recurse=False) if parameter.ndim == 3]:
        with InputsOf(after.get_parameter(key)) as quantized:
            after(*now[0], **now[1])
        with InputsOf(before.get_parameter(key)) as original:
            before(*were[0], **were[1])
        assert set(original.inputs) == set(quantized.inputs)
        for e, found in ((e, after.get_parameter(key)[e]) for e in quantized.inputs):
            x, xq = original.inputs[e].double(), quantized.inputs[e].double()
            h, d = 2 / len(x) * xq.T @ xq, 2 / len(x) * (x - xq).T @ xq
            weight = before.get_parameter(key)[e].double()
            same += agreeing(weight, h, d, found)
            plain += agreeing(weight, h, None, found)
            total += found.numel()
    assert same > 0.99 * total
    assert plain < 0.97 * total


def agreeing(weight: Tensor, h: Tensor, d: Tensor | None, found: Tensor) -> int:
    """How many weights are those found. Numbers of experts without enough tokens have a singular h, which damping mends."""
    solved = quantize_linear(weight, h, SCHEME, d, ALPHA) if d is not None else quantize_linear(weight, h, SCHEME)
    return int(torch.isclose(solved.dequantize().float(), found, rtol=1e-4, atol=1e-7).sum())


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(pytest.param(f, torch.float32, marks=() if f in DISTINCT else pytest.mark.long) for f in MOE_FAMILIES),
        pytest.param("qwen3_moe", torch.bfloat16, marks=pytest.mark.long),
    ],
)
def test_a_model_with_holes_is_made_again_with_the_same_bytes(
    family: str, dtype: torch.dtype, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the shard of a block is there and shards of its experts are not: the original model's rows then need weights that the
    committed ones have replaced. Without true_sequential too."""
    model = saved(family, dtype)
    small_groups(monkeypatch, model, experts=3)
    for number, settings in enumerate(({}, {"true_sequential": False})[: 1 + (family in DISTINCT)]):
        out = model.parent / f"out-{number}"
        bigq.quantize(str(model), out, job(model.parent, **settings))
        assert bigq.verify(out) == []
        made = hashes(out)
        names = [name for name in made if name.endswith(".safetensors")]
        for lost in ([names[-1]], names[1::2], names[2:5])[: 3 - 2 * number]:
            for name in lost:
                (out / name).unlink()
            bigq.quantize(str(model), out, job(model.parent, **settings))
            assert hashes(out) == made, lost


def test_experts_side_by_side_and_on_disk_have_the_same_bytes(saved: Callable[..., Path]) -> None:
    model = saved("qwen3_moe")
    made = {}
    for number, settings in enumerate(({}, {"experts_at_once": 3}, {"activations": "disk"})):
        bigq.quantize(str(model), model.parent / str(number), job(model.parent, **settings))
        made[number] = {n: digest for n, digest in hashes(model.parent / str(number)).items() if n.endswith(".safetensors")}
    assert made[0] == made[1] == made[2]


def test_with_strength_0_experts_are_those_of_gptq(saved: Callable[..., Path]) -> None:
    model = saved("mixtral")
    for method in ("gptaq", "gptq"):
        bigq.quantize(str(model), model.parent / method, job(model.parent, method=method, alpha=0.0 if method == "gptaq" else 0.5))
    ours, gptq = (
        {n: digest for n, digest in hashes(model.parent / method).items() if n.endswith(".safetensors")} for method in ("gptaq", "gptq")
    )
    assert ours == gptq


def test_tuning_is_refused_for_experts(saved: Callable[..., Path]) -> None:
    model = saved("qwen3_moe")
    with pytest.raises(UsageError, match="--tune-steps 4: tunes no models with experts; leave it out"):
        bigq.quantize(str(model), model.parent / "out", job(model.parent, tune_steps=4))
    assert not (model.parent / "out").exists()
