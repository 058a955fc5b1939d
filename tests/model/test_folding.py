"""Folds are found by experiment and proven: scales in a model change nothing in what it computes; a wrong fold does not pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import FAMILIES, make_checkpoint, random_ids
from moe_families import MOE_FAMILIES, moe_model
from torch import nn
from transformers import AutoModelForCausalLM

from bigq.model.experts.bank import bank_modules
from bigq.model.folding import around
from bigq.model.folding.apply import factors_of, fold_, matrices
from bigq.model.folding.around import model_folds
from bigq.model.folding.find import BlockExperiments
from bigq.model.folding.fold import BlockFolds, Fold
from bigq.model.pager import Pager

CPU = torch.device("cpu")
#: The largest relative difference of logits in fp32.
SAME = 1e-5
#: Families of which most Linears have a module before them that can divide; the others are looked at by hand.
LATENT = ("deepseek_v2", "deepseek_v3")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def saved(family: str, folder: Path) -> Path:
    if family in FAMILIES:
        return make_checkpoint(folder, family)
    moe_model(family).save_pretrained(folder)
    return folder


def folds_of(folder: Path) -> tuple[BlockFolds, ...]:
    return model_folds(Pager(folder, device=CPU))


def fold_banks(block: nn.Module, fold: Fold, factors: torch.Tensor) -> None:
    """Multiply the inputs of all experts of a bank: whatever matrix has them, whichever way it is stored."""
    for name in fold.readers:
        if name not in bank_modules(block):
            continue
        matrices = [p for p in block.get_submodule(name).parameters(recurse=False) if p.ndim == 3]
        for matrix in matrices[: max(1, len(matrices) - 1)]:
            transposed = block.get_submodule(name).__dict__.get("is_transposed", matrix.shape[1] == len(factors))
            matrix.mul_(factors[:, None] if transposed else factors)


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_a_folded_model_computes_the_same(family: str, tmp_path: Path) -> None:
    """In fp32, by transformers, with scales that are no powers of two. Every Linear's input but those listed here has a fold."""
    folder = saved(family, tmp_path / "model")
    folds = folds_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    ids = random_ids(2, 24, seed=5)
    expected = model(ids).logits
    pager = Pager(folder, device=CPU)
    count = 0
    for i, block in enumerate(model.get_submodule(pager.blocks_path)):
        for fold in folds[i].folds:
            scales = torch.rand(fold.count, generator=torch.Generator().manual_seed(count)) * 3 + 0.3
            before = block.get_submodule(fold.producer).weight.clone()
            factors = fold_(block, fold, scales)
            assert not torch.equal(block.get_submodule(fold.producer).weight, before)
            fold_banks(block, fold, factors)
            count += 1
    assert count
    found = model(ids).logits
    assert float((found - expected).norm() / expected.norm()) < SAME


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]),
        ("bloom", ["input_layernorm", "self_attention.query_key_value", "post_attention_layernorm"]),
        ("opt", ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"]),
        ("mixtral", ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm"]),
        ("deepseek_v3", ["input_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "self_attn.kv_b_proj",
                         "post_attention_layernorm", "mlp.up_proj"]),
    ],
)  # fmt: skip
def test_the_modules_that_divide(family: str, expected: list[str], tmp_path: Path) -> None:
    found = folds_of(saved(family, tmp_path / "model"))[0]
    assert {fold.producer for fold in found.folds} == set(expected)
    assert found.without == (("mlp.dense_4h_to_h",) if family == "bloom" else ())


def test_values_of_shared_heads_share_scales(tmp_path: Path) -> None:
    """Four heads read two heads of values: input j of o_proj takes the scale of what v_proj returns for its head's pair."""
    (fold,) = [f for f in folds_of(saved("llama", tmp_path / "model"))[0].folds if f.producer.endswith("v_proj")]
    head = torch.arange(64) // 16
    assert torch.equal(fold.channels, head // 2 * 16 + torch.arange(64) % 16)


def test_values_among_queries_and_keys_are_found(tmp_path: Path) -> None:
    """BLOOM's query_key_value returns query, key and value head by head."""
    (fold,) = [f for f in folds_of(saved("bloom", tmp_path / "model"))[0].folds if f.producer.endswith("query_key_value")]
    assert fold.rows is not None and torch.equal(fold.rows, torch.arange(4)[:, None].mul(48).add(torch.arange(32, 48)).flatten())


def test_a_router_reads_what_experts_read(tmp_path: Path) -> None:
    fold = folds_of(saved("mixtral", tmp_path / "model"))[0].folds[-1]
    assert set(fold.readers) == {"mlp.gate", "mlp.experts"}
    assert [name for name, _ in matrices(Pager(tmp_path / "model", device=CPU).blocks[0], fold)] == ["mlp.gate.weight"]


WRONG = {
    "a reader is missing": ("mixtral", -1, lambda f: dataclasses.replace(f, readers=f.readers[:1])),
    "the router is missing": ("mixtral", -1, lambda f: dataclasses.replace(f, readers=("mlp.experts",))),
    "one of three projections is missing": ("llama", 0, lambda f: dataclasses.replace(f, readers=f.readers[:-1])),
    "another norm": ("llama", 0, lambda f: dataclasses.replace(f, producer="post_attention_layernorm")),
    "an offset that the norm does not add": ("llama", 0, lambda f: dataclasses.replace(f, offset=1.0)),
    "no offset though the norm adds one": ("gemma2", 0, lambda f: dataclasses.replace(f, offset=0.0)),
    "inputs in another order": ("llama", 1, lambda f: dataclasses.replace(f, channels=f.channels.flip(0))),
    "queries instead of values": ("bloom", 1, lambda f: dataclasses.replace(f, rows=f.rows - 32)),
    "the gate instead of what it multiplies": ("llama", 3, lambda f: dataclasses.replace(f, producer="mlp.gate_proj")),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_fold_is_not_proven(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, number, spoil = WRONG[case]
    proven: list[tuple[bool, bool]] = []
    find = BlockExperiments.find

    def look(self: BlockExperiments) -> BlockFolds:
        found = find(self)
        fold = found.folds[number]
        proven.append((self.proven(fold), self.proven(spoil(fold))))
        return found

    monkeypatch.setattr(around.BlockExperiments, "find", look)
    folds_of(saved(family, tmp_path / "model"))
    assert proven and all(right and not wrong for right, wrong in proven)


def test_factors_are_what_a_rounded_norm_was_divided_by() -> None:
    """bf16 weights: what the readers are multiplied by is the quotient of the weights that the checkpoint and the output hold."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(64, dtype=torch.bfloat16)
    norm.weight.copy_(torch.randn(64))
    norm.weight[3] = 0
    before = norm.weight.clone()
    block = nn.ModuleDict({"norm": norm, "linear": nn.Linear(64, 32, dtype=torch.bfloat16)})
    weight = block["linear"].weight.clone()
    scales = torch.rand(64) + 0.5
    fold = Fold(producer="norm", readers=("linear",), channels=torch.arange(64))
    factors = fold_(block, fold, scales)
    assert torch.equal(factors, factors_of(before, norm.weight, 0.0))
    product = norm.weight.float() * factors
    assert torch.allclose(product, before.float(), rtol=1e-6)
    assert factors[3] == 1, "where the weight is 0, the checkpoint and the output do not tell"
    assert torch.equal(block["linear"].weight, (weight.float() * factors).bfloat16())
