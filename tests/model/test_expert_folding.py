"""Folds inside experts are found on one expert of few units: scales there change nothing, and a wrong fold does not pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from form_families import form_model
from moe_families import MOE_FAMILIES, call_of, moe_model, random_tokens
from torch import Tensor, nn
from torch.nn.functional import linear, relu, silu
from transformers import AutoModelForCausalLM

from bigq.errors import UnsupportedModelError
from bigq.model.experts.bank import Bank, bank_modules, find_bank
from bigq.model.experts.call import BankCall
from bigq.model.experts.flat import gather_banks
from bigq.model.experts.proof import prove_bank
from bigq.model.folding import experts
from bigq.model.folding.around import model_folds
from bigq.model.folding.experts import find_expert_fold, is_proven, require_expert_fold
from bigq.model.folding.fold import BlockFolds, ExpertFold
from bigq.model.pager import Pager

CPU = torch.device("cpu")
#: The largest relative difference of logits in fp32.
SAME = 1e-5
#: Families whose experts have no fold: gpt-oss adds 1 behind a clamp, Nemotron-H squares what a ReLU lets through.
NONE = {"gpt_oss": "mlp.experts.down_proj", "nemotron_h": "mixer.experts.down_proj"}
WIDTH, UNITS, EXPERTS = 16, 24, 4


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def folds_of(folder: Path) -> tuple[BlockFolds, ...]:
    return model_folds(Pager(folder, device=CPU))


def fold_all(bank: nn.Module, fold: ExpertFold) -> None:
    """Random scales, other ones for each expert."""
    producer, reader = bank.get_parameter(fold.producer.parameter), bank.get_parameter(fold.reader.parameter)
    for e in range(len(producer)):
        scales = torch.rand(len(fold.rows), generator=torch.Generator().manual_seed(e)) * 3 + 0.3
        divided, multiplied = producer[e], reader[e]
        (divided.T if fold.producer.transposed else divided)[fold.rows] /= scales[:, None]
        (multiplied.T if fold.reader.transposed else multiplied).mul_(scales)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_folded_experts_compute_the_same(family: str, tmp_path: Path) -> None:
    """In fp32, by transformers, with scales that are no powers of two. With the rows in another order logits differ."""
    moe_model(family).save_pretrained(tmp_path)  # type: ignore[operator]
    folds, pager = folds_of(tmp_path), Pager(tmp_path, device=CPU)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager").eval()
    ids = random_tokens(2, 24)
    expected = model(ids).logits
    found = [(i, fold) for i, block in enumerate(folds) for fold in block.experts]
    if family in NONE:
        assert not found and any(NONE[family] in block.without for block in folds)
        return
    assert {i for i, _ in found} == {i for i, block in enumerate(pager.blocks) if bank_modules(block)}
    for i, fold in found:
        fold_all(model.get_submodule(f"{pager.blocks_path}.{i}.{fold.bank}"), fold)
    assert 0 < float((model(ids).logits - expected).norm() / expected.norm()) < SAME
    i, fold = found[0]
    bank = model.get_submodule(f"{pager.blocks_path}.{i}.{fold.bank}")
    fold_all(bank, dataclasses.replace(fold, rows=fold.rows.roll(1)))
    assert float((model(ids).logits - expected).norm() / expected.norm()) > 100 * SAME


def test_banks_with_a_module_within_are_folded(tmp_path: Path) -> None:
    """DBRX: three matrices, the last one stored as [inputs, outputs]. The bank's own attributes say how many units an expert has."""
    model = form_model("dbrx")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    (fold,) = folds_of(tmp_path)[1].experts
    assert str(fold) == "ffn.experts.v1 → ffn.experts.w2" and fold.reader.transposed and not fold.producer.transposed
    ids = random_tokens(2, 24)
    expected = model(ids).logits
    gather_banks(model)
    fold_all(model.transformer.blocks[1].ffn.experts, fold)
    assert 0 < float((model(ids).logits - expected).norm() / expected.norm()) < SAME


def test_banks_with_spare_experts_are_folded(tmp_path: Path) -> None:
    form_model("longcat_flash").save_pretrained(tmp_path)  # type: ignore[operator]
    assert [len(fold.rows) for block in folds_of(tmp_path) for fold in block.experts] == [32, 32]


def test_experts_too_large_for_an_experiment_have_no_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of mixtral with units as many as the hidden states are wide, where shapes do not tell which is which, all units run."""
    moe_model("mixtral", intermediate_size=64).save_pretrained(tmp_path)  # type: ignore[operator]
    assert all(len(block.experts) == 1 for block in folds_of(tmp_path))
    monkeypatch.setattr(experts, "MOST_WEIGHTS", 3 * 64 * 64 - 1)
    assert all(not block.experts and "mlp.experts.down_proj" in block.without for block in folds_of(tmp_path))


def test_sorted_banks_have_one_matrix_and_no_fold(tmp_path: Path) -> None:
    form_model("jetmoe").save_pretrained(tmp_path)  # type: ignore[operator]
    found = folds_of(tmp_path)
    assert all(not block.experts and {"mlp.input_linear", "mlp.output_linear"} <= set(block.without) for block in found)


class MadeUp(nn.Module):
    """Experts that are one of ``ACTS``."""

    def __init__(self, act: Callable[[Tensor], Tensor], outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.num_experts, self.act = EXPERTS, act
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(EXPERTS, outputs, WIDTH, generator=generator))
        self.last = nn.Parameter(torch.randn(EXPERTS, WIDTH, UNITS, generator=generator))
        self.bias = nn.Parameter(torch.randn(EXPERTS, outputs, generator=generator)) if bias else None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        final = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            at, slot = torch.where(top_k_index == e)
            y = linear(hidden_states[at], self.first[e])
            y = self.act(y if self.bias is None else y + self.bias[e])
            final.index_add_(0, at, linear(y, self.last[e]) * top_k_weights[at, slot, None])
        return final


def halves(y: Tensor) -> tuple[Tensor, Tensor]:
    return y[:, :UNITS], y[:, UNITS:]


FIRST, LAST = torch.arange(UNITS), UNITS + torch.arange(UNITS)
#: What an expert does between its matrices → the rows that divide.
ACTS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor | None]] = {
    "up behind gate": (lambda y: silu(halves(y)[0]) * halves(y)[1], LAST),
    "up before gate": (lambda y: silu(halves(y)[1]) * halves(y)[0], FIRST),
    "in turns": (lambda y: silu(y[:, 0::2]) * y[:, 1::2], 1 + 2 * FIRST),
    "relu without a gate": (relu, FIRST),
    "units in another order": (lambda y: silu(halves(y)[0]) * halves(y)[1].flip(-1), None),
    "silu without a gate": (silu, None),
    "squared": (lambda y: relu(y) ** 2, None),
    "clamped": (lambda y: silu(halves(y)[0]) * halves(y)[1].clamp(-1000, 1000), None),
    "1 is added": (lambda y: silu(halves(y)[0]) * (halves(y)[1] + 1), None),
    "nonlinear on both sides": (lambda y: silu(halves(y)[0]) * torch.tanh(halves(y)[1]), None),
}  # fmt: skip


def made_up(act: str, *, bias: bool = False) -> tuple[nn.Module, Bank, BankCall, dict[str, Tensor]]:
    module = MadeUp(ACTS[act][0], UNITS if "without" in act or act == "squared" else 2 * UNITS, bias=bias)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(48, WIDTH, generator=generator)
    args = (tokens, torch.rand(48, EXPERTS, generator=generator).topk(2).indices, torch.rand(48, 2, generator=generator))
    call = call_of(module, args, {})
    parameters = dict(module.named_parameters())
    bank = prove_bank("experts", module, call, lambda e: {key: p[e].clone() for key, p in parameters.items()})
    return module, bank, call, {key: p[0].clone() for key, p in parameters.items()}


def found_in(act: str, **more: bool) -> ExpertFold | None:
    module, bank, call, parameters = made_up(act, **more)
    return find_expert_fold(module, bank, call, parameters)


@pytest.mark.parametrize("act", ACTS)
def test_what_divides_is_found_by_experiment(act: str) -> None:
    fold, rows = found_in(act), ACTS[act][1]
    assert (fold is None) == (rows is None)
    assert rows is None or (fold is not None and torch.equal(fold.rows, rows) and fold.producer.parameter == "first")


def test_a_bias_that_would_have_to_be_divided_too_is_no_fold() -> None:
    assert found_in("up behind gate") is not None and found_in("up behind gate", bias=True) is None


@pytest.mark.parametrize("rows", [FIRST, 2 * FIRST, LAST.flip(0), LAST.roll(1)], ids=["gate", "in turns", "reversed", "rolled"])
def test_a_planted_wrong_fold_is_refused(rows: Tensor) -> None:
    module, bank, call, parameters = made_up("up behind gate")
    fold = found_in("up behind gate")
    assert fold is not None and is_proven(module, bank, call, parameters, fold)
    require_expert_fold("experts", module, bank, call, fold, parameters)
    wrong = dataclasses.replace(fold, rows=rows)
    assert not is_proven(module, bank, call, parameters, wrong)
    with pytest.raises(UnsupportedModelError, match=r"^experts: an expert does not compute the same .*; use --fold none$"):
        require_expert_fold("experts", module, bank, call, wrong, parameters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_proof_holds_in_narrow_dtypes(dtype: torch.dtype) -> None:
    """It runs in fp32, so that numbers that are small in fp16 do not break it."""
    model, seen = moe_model("qwen3_moe", dtype), []
    name, module = next(iter(bank_modules(model).items()))
    module.register_forward_hook(lambda m, args, kwargs, out: seen.append((args, kwargs)), with_kwargs=True)
    model(input_ids=random_tokens(4, 16), use_cache=False)
    args, kwargs = seen[0]
    call = call_of(module, (args[0] * 1e-4, *args[1:]), kwargs)
    bank = find_bank(name, module, call, call.run(module.forward))
    fold = ExpertFold(bank=name, producer=bank.products[0], reader=bank.products[1], rows=32 + torch.arange(32))
    parameters = {key: p[0] for key, p in module.named_parameters(recurse=False)}
    assert is_proven(module, bank, call, parameters, fold)
    assert not is_proven(module, bank, call, parameters, dataclasses.replace(fold, rows=torch.arange(32)))
