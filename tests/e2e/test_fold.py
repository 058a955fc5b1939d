"""Jobs that fold scales into a model: the output computes what the original does, and a resumed job makes the same bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, logits_of, make_checkpoint, random_ids, reference_model, rewrite, save_ids, stored_tensors, streamed_logits
from moe_families import DISTINCT, MOE_FAMILIES
from test_experts_end_to_end import hashes, small_groups, streamed, whole
from test_experts_end_to_end import job as expert_job
from test_experts_end_to_end import saved as save_experts
from transformers import AutoModelForCausalLM

import bigq
from bigq.config import JobConfig
from bigq.errors import Stopped, UnsupportedModelError, UsageError
from bigq.job.stop import Stop
from bigq.model.folding import around
from bigq.progress.progress import Progress
from bigq.sched.solve import bank
from bigq.sched.solve import fold as folding
from bigq.sched.units import experts as units
from bigq.scheme import QuantScheme, Rule
from bigq.solver.scaling import LEAST_TOKENS

SCHEME = QuantScheme(group_size=16)
#: 8 bits change so little that what is left of an error shows a wrong fold.
FINE = QuantScheme(bits=8, group_size=16)
DENSE = ("llama", "bloom", "gemma2")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def job(folder: Path, **changes: Any) -> JobConfig:
    given: dict[str, Any] = {"method": "gptq", "fold": "awq", "scheme": SCHEME, "samples": 8, "seqlen": 24, "batch": 3, "device": "cpu"}
    return JobConfig(**{**given, "calibration": str(folder / "ids.safetensors"), "quiet": True, **changes})


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """A tiny checkpoint beside its calibration rows."""

    def make(family: str, **changes: Any) -> Path:
        if family in MOE_FAMILIES:
            return save_experts(family, tmp_path, **changes)
        save_ids(tmp_path / "ids.safetensors", random_ids(16, 24, seed=1))
        return make_checkpoint(tmp_path / "model", family, **changes)

    return make


def distance(family: str, out: Path, source: Path) -> float:
    """Of a token's logits, relative to the original's: the median, since a few tokens may have other experts."""
    ids = random_ids(2, 24, seed=5)
    if family in MOE_FAMILIES:
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, experts_implementation="eager").eval()
        expected, found = whole(original, ids, 2), streamed(out, ids, 2)
    else:
        expected, found = logits_of(reference_model(source), ids, 2), streamed_logits(out, ids, 2)
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def of(family: str, folder: Path, **changes: Any) -> JobConfig:
    if family in MOE_FAMILIES:
        return expert_job(folder, **{"method": "gptq", "fold": "awq", "scheme": SCHEME, **changes})
    return job(folder, **changes)


def families(quick: Sequence[str], long: Sequence[str]) -> list[Any]:
    """All families; those that are neither quick nor long do not run in continuous integration, where model/test_folding.py has them."""
    marks = dict.fromkeys(quick, ()) | {f: pytest.mark.long for f in long if f not in quick}
    return [pytest.param(f, marks=marks.get(f, pytest.mark.slow)) for f in (*FAMILIES, *MOE_FAMILIES)]


@pytest.mark.parametrize("family", families(("llama", "mixtral"), (*DENSE, *DISTINCT)))
def test_the_output_computes_what_the_original_does(family: str, made: Callable[..., Path]) -> None:
    """At 8 bits, where scales differ from 1 by more than that changes."""
    model = made(family)
    plain, folded = model.parent / "plain", model.parent / "folded"
    bigq.quantize(str(model), plain, of(family, model.parent, fold="none", scheme=FINE))
    bigq.quantize(str(model), folded, of(family, model.parent, scheme=FINE))
    assert bigq.verify(folded) == []
    assert distance(family, folded, model) < 2 * distance(family, plain, model)
    assert hashes(plain) != hashes(folded), "nothing was folded"


@pytest.mark.parametrize("family", families(("llama", "mixtral"), ("gemma2", "bloom", "gpt_oss", "deepseek_v3")))
@pytest.mark.parametrize(
    "settings",
    [{"method": "awq", "fold": None}, {"fold": "smoothquant"}, {"method": "gptaq", "fold": "awq"}],
    ids=["awq", "smoothquant", "gptaq"],
)
def test_a_model_with_holes_is_made_again_with_the_same_bytes(
    family: str, settings: dict[str, Any], made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was folded into a committed block is read from its shard; so is by what experts that are missing are multiplied."""
    model = made(family)
    if family in MOE_FAMILIES:
        small_groups(monkeypatch, model)
    out = model.parent / "out"
    bigq.quantize(str(model), out, of(family, model.parent, **settings))
    expected = hashes(out)
    names = [name for name in expected if name.endswith(".safetensors")]
    for lost in ([names[-1]], names[1::2], names[2:4]):
        for name in lost:
            (out / name).unlink()
        bigq.quantize(str(model), out, of(family, model.parent, **settings))
        assert hashes(out) == expected, lost


def test_experts_behind_a_norm_with_zeros_are_made_again_with_the_same_bytes(made: Callable[..., Path]) -> None:
    """By what they are multiplied there is not to be seen in the norm that a committed block holds."""
    model = made("mixtral", num_hidden_layers=1)
    name = "model.layers.0.post_attention_layernorm.weight"
    rewrite(model, name, stored_tensors(model)[name] * (torch.arange(64) % 5 != 0))
    out, config = model.parent / "out", of("mixtral", model.parent, scheme=dataclasses.replace(SCHEME, scales="minmax", sweeps=0))
    bigq.quantize(str(model), out, config)
    expected = hashes(out)
    names = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    (out / next(file for tensor, file in names.items() if ".experts." in tensor)).unlink()
    bigq.quantize(str(model), out, config)
    assert hashes(out) == expected


def test_a_stopped_job_ends_in_the_same_bytes(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the pass that collects, and after it, in every block."""
    model = made("llama")
    once = model.parent / "once"
    bigq.quantize(str(model), once, job(model.parent))
    expected = hashes(once)
    run = folding.FoldWork.run
    calls = 0

    def stop_at(number: int, *, behind: bool) -> Callable[..., None]:
        def stopping(self: folding.FoldWork, store: Any) -> None:
            nonlocal calls
            calls += 1
            if behind:
                run(self, store)
            if calls == number:
                stop.request("test")
            if not behind:
                run(self, store)

        return stopping

    for number in (1, 2, 3):
        for behind in (False, True):
            out = model.parent / f"out-{number}-{behind}"
            calls, stop = 0, Stop(grace=1e-3)
            monkeypatch.setattr(folding.FoldWork, "run", stop_at(number, behind=behind))
            with pytest.raises(Stopped):
                bigq.quantize(str(model), out, job(model.parent), stop=stop)
            monkeypatch.setattr(folding.FoldWork, "run", run)
            bigq.quantize(str(model), out, job(model.parent))
            assert hashes(out) == expected


def test_what_stays_unquantized_keeps_its_bits(made: Callable[..., Path]) -> None:
    """Its scales are powers of two, so that no product of it is rounded in another way: a producer that is skipped, and a router."""
    llama = made("llama")
    out, name = llama.parent / "out", "model.layers.1.mlp.up_proj.weight"
    rewrite(llama, name, stored_tensors(llama)[name] * (1.0 + 31 * (torch.arange(96) % 8 == 0))[:, None])
    bigq.quantize(str(llama), out, job(llama.parent, rules=(Rule(r".*\.(gate|up)_proj", None),)))
    require_powers_of_two(llama, out, "model.layers.1.mlp.up_proj.weight")


def test_a_router_keeps_its_bits(made: Callable[..., Path]) -> None:
    mixtral = made("mixtral")
    bigq.quantize(str(mixtral), mixtral.parent / "out", of("mixtral", mixtral.parent, fold="smoothquant"))
    for name in ("block_sparse_moe.gate", "post_attention_layernorm"):
        require_powers_of_two(mixtral, mixtral.parent / "out", f"model.layers.1.{name}.weight")


def require_powers_of_two(source: Path, out: Path, name: str) -> None:
    ratio = torch.log2(stored_tensors(out)[name] / stored_tensors(source)[name])
    assert torch.equal(ratio, ratio.round()) and ratio.abs().max() > 0


def test_a_block_without_anything_quantized_is_not_scaled(made: Callable[..., Path]) -> None:
    model = made("llama")
    out = model.parent / "out"
    bigq.quantize(str(model), out, job(model.parent, rules=(Rule(r".*\.layers\.1\.", None),)))
    before, after = stored_tensors(model), stored_tensors(out)
    assert all(torch.equal(before[name], after[name]) for name in before if ".layers.1." in name)
    assert not torch.equal(before["model.layers.0.input_layernorm.weight"], after["model.layers.0.input_layernorm.weight"])


def test_the_plan_names_what_is_folded(made: Callable[..., Path]) -> None:
    model = made("bloom")
    plan = bigq.plan(str(model), model.parent / "out", job(model.parent))
    text = " ".join(plan.brief().split())
    assert "scales: into input_layernorm, self_attention.query_key_value, post_attention_layernorm; no module divides the inputs of" in text
    (first, *_) = plan.to_json()["folds"]
    assert first["without"] == ["mlp.dense_4h_to_h"]
    assert {"scale", "replay"} <= {phase.name for phase in plan.cost.phases}
    assert bigq.plan(str(model), model.parent / "out", job(model.parent, fold="none")).to_json()["folds"] is None


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_scales_inside_experts_are_the_same_wherever_a_job_stops(
    method: str, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped behind an expert whose group is committed, and in the middle of a group. The experts' shards are not those of a job that
    scales norms only; one of too few tokens is solved as there, which a warning says."""
    model = made("qwen3_moe")
    settings: dict[str, Any] = {"method": method, "fold": "awq", "samples": 5}
    small_groups(monkeypatch, model, experts=2)
    once, said = model.parent / "once", list[str]()
    monkeypatch.setattr(Progress, "warn_once", lambda self, about, line: said.append(line))
    report = bigq.quantize(str(model), once, of("qwen3_moe", model.parent, **settings))
    expected = hashes(once)
    few = [each for each in report.linears if each.get("tokens") is not None and each["tokens"] < LEAST_TOKENS]
    assert few and any(f"fewer than {LEAST_TOKENS} calibration tokens" in line for line in said)
    take = units.BankWork.take
    for number in (2, 5, 13):
        out, stop, taken = model.parent / f"out-{number}", Stop(grace=1e-3), list[int]()

        def stopping(self: Any, solved: Any, number: int = number, stop: Stop = stop, taken: list[int] = taken) -> Any:
            taken.append(solved.number)
            if len(taken) == number:
                stop.request("test")
            return take(self, solved)

        with monkeypatch.context() as patched:
            patched.setattr(units.BankWork, "take", stopping)
            with pytest.raises(Stopped):
                bigq.quantize(str(model), out, of("qwen3_moe", model.parent, **settings), stop=stop)
        bigq.quantize(str(model), out, of("qwen3_moe", model.parent, **settings))
        assert hashes(out) == expected, number
    monkeypatch.setattr(bank, "is_scaled", lambda fold, scaling, tokens: False)
    bigq.quantize(str(model), model.parent / "norms", of("qwen3_moe", model.parent, **settings))
    scaled, norms = (stored_tensors(folder) for folder in (once, model.parent / "norms"))
    changed = {name.removesuffix(".weight_packed") for name in scaled if not torch.equal(scaled[name], norms[name])}
    first = {name for name in changed if ".layers.0." in name}
    assert first and all(".experts." in name for name in first)
    assert not {each["name"] for each in few if ".layers.0." in each["name"]} & first


def test_a_wrong_fold_inside_experts_is_refused(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's rows in place of those that it multiplies. A real expert shows it, before a block is written."""
    model, find = made("mixtral"), around.bank_fold

    def planted(*given: Any) -> Any:
        fold = find(*given)
        return dataclasses.replace(fold, rows=fold.rows - len(fold.rows))

    monkeypatch.setattr(around, "bank_fold", planted)
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.0\.mlp\.experts: an expert does not compute .*; use --fold none$"):
        bigq.quantize(str(model), model.parent / "out", of("mixtral", model.parent))
    assert '"block-0"' not in (model.parent / "out/.bigq/journal.jsonl").read_text().partition("\n")[2]
    bigq.quantize(str(model), model.parent / "none", of("mixtral", model.parent, fold="none"))


def test_the_plan_says_what_is_scaled_inside_experts(made: Callable[..., Path]) -> None:
    model = made("mixtral")
    plan = bigq.plan(str(model), model.parent / "out", of("mixtral", model.parent))
    inside = f"; inside each expert of {LEAST_TOKENS} tokens or more into mlp.experts.gate_up_proj"
    assert inside in " ".join(plan.brief().split())
    (first, *_) = plan.to_json()["folds"]
    assert {"producer": "mlp.experts.gate_up_proj", "readers": ["mlp.experts.down_proj"]} in first["folds"] and not first["without"]
    smooth = bigq.plan(str(model), model.parent / "out", of("mixtral", model.parent, fold="smoothquant"))
    text = " ".join(smooth.brief().split())
    assert inside in text and "self_attn.v_proj" not in text.partition("scales:")[2].partition(";")[0]
    assert smooth.to_json()["folds"][0]["without"] == ["self_attn.o_proj"]


def test_rounding_to_nearest_folds_nothing(made: Callable[..., Path]) -> None:
    model = made("llama")
    with pytest.raises(UsageError, match=r"--fold awq: no effect with --method rtn"):
        bigq.quantize(str(model), model.parent / "out", job(model.parent, method="rtn"))


def test_scales_are_folded_into_a_rotated_model(made: Callable[..., Path]) -> None:
    """Its norms have the weight 1 then. A job with holes ends in the same bytes."""
    model = made("llama")
    plain, out = model.parent / "plain", model.parent / "out"
    bigq.quantize(str(model), plain, job(model.parent, scheme=FINE, fold="none", rotate=True))
    bigq.quantize(str(model), out, job(model.parent, scheme=FINE, rotate=True))
    assert hashes(out) != hashes(plain)
    assert distance("llama", out, model) < 2 * distance("llama", plain, model)
    expected = hashes(out)
    for name in [name for name in expected if name.endswith(".safetensors")][1::2]:
        (out / name).unlink()
    bigq.quantize(str(model), out, job(model.parent, scheme=FINE, rotate=True))
    assert hashes(out) == expected
