"""What the output calls the matrices of experts that are stored as one tensor for all, and the proof that the names are right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_families import MOE_FAMILIES, call_of, moe_model
from torch import Tensor, nn

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.index import Checkpoint, TensorInfo
from bigq.io.sources.plain import PlainSource
from bigq.model.experts.bank import bank_modules, find_bank
from bigq.model.experts.call import RoutedCall
from bigq.model.experts.naming import ExpertLinear, Naming, base_name, packed_parts
from bigq.model.experts.pages import StoredBank, nominal_linears, stored_banks
from bigq.model.experts.proof import require_layout
from bigq.model.experts.source import ExpertSource, expert_sources, joined
from bigq.model.experts.stored import Part
from bigq.model.skeleton import map_names


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Experts(nn.Module):
    """A bank of 3 experts of width 8 and 6 inner values. interleaved: gate and up are every other output. transposed: as stored."""

    def __init__(self, *, interleaved: bool = False, transposed: bool = False, bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        first, second = ((3, 8, 12), (3, 6, 8)) if transposed else ((3, 12, 8), (3, 8, 6))
        self.gate_up_proj = nn.Parameter(torch.randn(first, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(second, generator=generator))
        if bias:
            self.down_proj_bias = nn.Parameter(torch.randn(3, 8, generator=generator))
        self.num_experts, self.interleaved, self.transposed = 3, interleaved, transposed

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for e in range(self.num_experts):
            tokens, slots = torch.where(experts == e)
            if not len(tokens):
                continue
            y = self._product(x[tokens], self.gate_up_proj[e])
            gate, up = (y[:, ::2], y[:, 1::2]) if self.interleaved else y.chunk(2, dim=-1)
            y = self._product(nn.functional.silu(gate) * up, self.down_proj[e])
            total.index_add_(0, tokens, y * weights[tokens, slots, None])
        return total

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight if self.transposed else nn.functional.linear(x, weight)


def call() -> RoutedCall:
    generator = torch.Generator().manual_seed(2)
    weights, experts = torch.rand(10, 3, generator=generator).topk(2)
    found = RoutedCall.of((torch.randn(10, 8, generator=generator), experts, weights), {})
    assert found is not None
    return found


def require(module: nn.Module) -> None:
    made = call()
    bank = find_bank("mlp.experts", module, made, module(made.tokens, made.experts, made.weights))
    require_layout("mlp.experts", module, bank, made, {key: p[0].clone() for key, p in module.named_parameters()})


def test_names_of_halves() -> None:
    naming = Naming.of(Experts())
    assert naming.parts == {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    assert (naming.linear("gate_up_proj", (3, 12, 8)), naming.linear("down_proj", (3, 8, 6))) == (ExpertLinear(6, 8), ExpertLinear(8, 6))


@pytest.mark.parametrize("given", [{"is_concatenated": False}, {"bias": True}])
def test_gate_and_up_stay_one_matrix(given: dict[str, bool]) -> None:
    module = Experts(bias="bias" in given)
    module.is_concatenated = given.get("is_concatenated", True)
    naming = Naming.of(module)
    assert naming.joined and naming.parts == {"gate_up_proj": ("w13",), "down_proj": ("w2",)}
    assert naming.linear("gate_up_proj", (3, 12, 8)) == ExpertLinear(12, 8, joined=True)


def test_parameters_of_other_names_keep_them() -> None:
    module = nn.Module()
    module.a, module.b = nn.Parameter(torch.zeros(3, 4, 5)), nn.Parameter(torch.zeros(3, 5, 4))
    assert Naming.of(module).parts == {"a": ("a",), "b": ("b",)}
    module.is_concatenated = False
    assert Naming.of(module) == Naming({"a": ("a",), "b": ("b",)}, transposed=frozenset(), joined=False)


def test_transposed_parameters() -> None:
    module = Experts(transposed=True)
    module.is_transposed = True
    assert Naming.of(module).linear("gate_up_proj", (3, 8, 12)) == ExpertLinear(6, 8)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_layout_is_that_of_the_computation(transposed: bool) -> None:
    module = Experts(transposed=transposed)
    module.is_transposed = transposed
    require(module)
    module.is_transposed = not transposed
    with pytest.raises(UnsupportedModelError, match=r"^mlp\.experts: its matrices are stored in another layout"):
        require(module)


def test_halves_that_are_none() -> None:
    """A class that does not say that its gate and up are every other output."""
    module = Experts(interleaved=True)
    with pytest.raises(UnsupportedModelError, match="in another layout"):
        require(module)
    module.is_concatenated = False
    require(module)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_classes_of_transformers_say_how_they_compute(family: str) -> None:
    """For every family, not only for those whose checkpoints need it."""
    model = moe_model(family)
    name, module = next(iter(bank_modules(model).items()))
    calls: list[tuple[Any, Any]] = []
    module.register_forward_hook(lambda m, args, kwargs, out: calls.append((call_of(module, args, kwargs), out)), with_kwargs=True)
    model(input_ids=torch.arange(3, 67).view(2, 32), use_cache=False)
    made, output = calls[0]
    bank = find_bank(name, module, made, output)
    require_layout(name, module, bank, made, {key: p[0].clone() for key, p in module.named_parameters(recurse=False)})
    assert Naming.of(module).joined == (family == "gpt_oss")


@pytest.mark.parametrize(
    ("path", "stored", "base"),
    [
        ("model.layers.3.mlp.experts", "model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts"),
        ("model.layers.3.block_sparse_moe.experts", "model.layers.3.block_sparse_moe.input_linear.weight", None),
        ("model.layers.3.mlp.experts", "language_model.model.layers.3.mlp.experts.fc1.weight", "language_model.model.layers.3.mlp.experts"),
        ("model.layers.3.mlp.experts", "blocks.3.moe.w1", None),
    ],
)
def test_what_names_begin_with(path: str, stored: str, base: str | None) -> None:
    assert base_name(path, stored) == (base or path)


def packed_names(family: str) -> list[str]:
    """Names of weights as they are packed, two experts of one block."""
    bank, last = {
        "gpt_oss": ("model.layers.1.mlp.experts", ("w13", "w2")),
        "granitemoe": ("model.layers.1.block_sparse_moe.experts", ("gate_proj", "up_proj", "down_proj")),
    }[family]
    return [f"{bank}.{e}.{name}.weight" for e in (0, 3) for name in last]


def test_packed_weights_find_their_parameters() -> None:
    found = packed_parts(
        moe_model("granitemoe"), [*packed_names("granitemoe"), "model.layers.1.self_attn.q_proj.weight", "a.1.gate_proj.weight"]
    )
    bank = "model.layers.1.block_sparse_moe.experts"
    assert len(found) == 6
    assert found[f"{bank}.3.up_proj.weight"] == Part(f"{bank}.gate_up_proj", 3, 1, 2)
    assert found[f"{bank}.0.down_proj.weight"] == Part(f"{bank}.down_proj", 0, 0, 1)
    found = packed_parts(moe_model("gpt_oss"), [*packed_names("gpt_oss"), *packed_names("granitemoe")])
    assert found["model.layers.1.mlp.experts.3.w13.weight"] == Part("model.layers.1.mlp.experts.gate_up_proj", 3, 0, 1)
    assert set(found) == set(packed_names("gpt_oss"))


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_names_with_and_without_a_checkpoint(family: str, tmp_path: Path) -> None:
    """A config alone gives the same names and shapes."""
    model = moe_model(family)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    tensors = Checkpoint.open(tmp_path).tensors
    sources = {name: PlainSource(info) for name, info in tensors.items()}
    banks = stored_banks(model, expert_sources(model, sources, map_names(model, tensors)))
    assert {path: bank.linears() for path, bank in banks.items()} == nominal_linears(model)
    for bank in banks.values():
        assert bank.is_whole and bank.is_joined == (family == "gpt_oss")
        assert bank.stored([1, 2]) == bank.stored([0])
        assert sorted(bank.stored([0])) == [name for name in tensors if _is_of(bank, name)]
        assert sum(info.nbytes for info in bank.tensors(range(4))) == sum(tensors[name].nbytes for name in bank.stored([0]))


def _is_of(bank: StoredBank, name: str) -> bool:
    return name.startswith(bank.path.removesuffix(".experts")) and name.endswith(("_linear.weight", "_proj"))


def test_a_bank_that_is_stored_in_both_ways() -> None:
    """One parameter as one tensor, the other matrix by matrix."""

    def info(name: str, *shape: int) -> TensorInfo:
        return TensorInfo(name=name, dtype=torch.float32, shape=shape, file=Path("f"), start=0, stop=4 * torch.Size(shape).numel())

    whole = info("m.experts.gate_up_proj", 2, 12, 8)
    sources = {
        "gate_up_proj": tuple(ExpertSource((PlainSource(info(f"{whole.name}[{e}]", 12, 8)),), whole=whole) for e in range(2)),
        "down_proj": tuple(ExpertSource((PlainSource(info(f"m.experts.{e}.down_proj.weight", 8, 6)),)) for e in range(2)),
    }
    naming = Naming.of(Experts())
    bank = StoredBank("m.experts", sources, {"gate_up_proj": ExpertLinear(6, 8), "down_proj": ExpertLinear(8, 6)}, naming)
    assert bank.stored(range(2)) == [whole.name, "m.experts.0.down_proj.weight", "m.experts.1.down_proj.weight"]
    assert bank.matrices("gate_up_proj", 1) == ("m.experts.1.gate_proj", "m.experts.1.up_proj")
    assert bank.matrices("down_proj", 1) == ("m.experts.1.down_proj",)


def test_matrices_become_the_parameter_as_it_is_in_memory() -> None:
    gate, up = torch.randn(2, 6, 8)
    value = joined([gate, up], transposed=True)
    assert value.is_contiguous() and torch.equal(value, torch.cat([gate, up]).T)
    assert torch.equal(joined([gate, up], transposed=False), torch.cat([gate, up]))


def test_a_packed_expert_without_one_of_its_matrices() -> None:
    """Its parameter cannot be made. source: a stand-in for a packed one, of 32 × 8."""
    model = moe_model("granitemoe", num_hidden_layers=1)
    bank = "model.layers.0.block_sparse_moe.experts"

    def source(name: str) -> Any:
        def check(shape: tuple[int, ...]) -> None:
            if shape != (96, 64):
                raise CheckpointError(f"{name}: not {shape}")

        return SimpleNamespace(is_plain=False, tensors=[SimpleNamespace(file="f")], check=check, shape=(96, 64))

    names = [f"{bank}.{e}.{part}.weight" for e in range(4) for part in ("gate_proj", "up_proj")]
    assert len(expert_sources(model, {name: source(name) for name in names}, {})[f"{bank}.gate_up_proj"]) == 4
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight: not \(192, 64\)"):
        expert_sources(model, {name: source(name) for name in names if name != f"{bank}.2.up_proj.weight"}, {})
