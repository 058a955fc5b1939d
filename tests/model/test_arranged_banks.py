"""Banks that the skeleton arranges: matrices in a module within, and what parameters have for spare experts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from form_families import KNOWN, form_model
from torch import Tensor, nn

from bigq.errors import UnsupportedModelError
from bigq.model.blocks import find_blocks
from bigq.model.experts.bank import bank_modules, find_bank, run_bank
from bigq.model.experts.call import BankCall, RoutedCall, SortedCall
from bigq.model.experts.cut import called_banks
from bigq.model.experts.flat import gather_banks, moved_names
from bigq.model.experts.naming import Naming, base_name, experts_of
from bigq.model.experts.proof import prove_bank, require_layout
from bigq.model.experts.spare import spare_experts, trim_banks
from bigq.model.forward.capture import split_call
from bigq.model.structure import plan_block


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def only(kind: str) -> Any:
    return pytest.mark.parametrize("kind", [param for param in KNOWN if param.values[0] == kind])


def arranged(kind: str) -> tuple[nn.Module, nn.Module]:
    """A model as transformers builds it, and one that is arranged, with the same weights."""
    built = form_model(kind)
    made = copy.deepcopy(built)
    gather_banks(made)
    trim_banks(made)
    return built, made


def seen(model: nn.Module) -> tuple[str, nn.Module, BankCall, Tensor]:
    """The first bank of block 1 of a model: its name, the module, its call for a few tokens, and what it returns."""
    path, blocks = find_blocks(model)
    name, bank = next(iter(bank_modules(blocks[1]).items()))
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(4))
    call = called_banks(blocks[1], lambda: model(input_ids=ids, use_cache=False))[name]
    return f"{path}.1.{name}", bank, call, call.run(bank.forward)


@only("dbrx")
def test_matrices_move_to_their_bank(kind: str) -> None:
    built, made = arranged(kind)
    ids = torch.randint(3, 128, (2, 12))
    assert torch.equal(made(input_ids=ids, use_cache=False).logits, built(input_ids=ids, use_cache=False).logits)
    names = moved_names(made)
    assert len(names) == 9
    for old, new in names.items():
        assert torch.equal(made.get_parameter(new).flatten(0, 1), built.get_parameter(old))
        assert made.get_parameter(new).shape == (4, 96, 64)
    assert type(made.transformer.blocks[0].ffn.experts) is type(made.transformer.blocks[2].ffn.experts)
    assert not moved_names(built)


@only("longcat_flash")
def test_spare_experts_are_trimmed(kind: str) -> None:
    built, made = arranged(kind)
    ids = torch.randint(3, 128, (2, 12))
    assert torch.equal(made(input_ids=ids, use_cache=False).logits, built(input_ids=ids, use_cache=False).logits)
    bank = made.model.layers[0].mlp.experts
    assert spare_experts(bank) == 2 and {p.shape[0] for p in bank.parameters()} == {4}
    assert spare_experts(built.model.layers[0].mlp.experts) == 0


@pytest.mark.parametrize("kind", ["dbrx", "jetmoe", "longcat_flash"])
def test_single_experts_add_up_to_the_bits_of_the_bank(kind: str) -> None:
    name, module, call, output = seen(arranged(kind)[1])
    parameters = dict(module.named_parameters(recurse=False))
    bank = find_bank(name, module, call, output)
    assert torch.equal(run_bank(module, bank, call), output)
    assert (bank.spare, bank.idle) == ((2, True) if kind == "longcat_flash" else (0, False))
    proven = prove_bank(name, module, call, lambda e: {key: p[e].clone() for key, p in parameters.items()})
    assert proven == bank
    require_layout(name, module, bank, call, {key: p[0].clone() for key, p in parameters.items()})


@only("longcat_flash")
def test_some_tokens_go_to_spare_experts(kind: str) -> None:
    """The comparison above would be empty otherwise."""
    _, module, call, _ = seen(arranged(kind)[1])
    assert isinstance(call, RoutedCall) and bool((call.experts >= 4).any())
    lost = RoutedCall(call.tokens, call.experts, call.weights * (call.experts < 4), call.places)
    assert not torch.equal(lost.run(module.forward), call.run(module.forward))


@only("dbrx")
def test_only_the_last_matrix_is_stored_the_other_way_round(kind: str) -> None:
    name, module, call, output = seen(arranged(kind)[1])
    bank = find_bank(name, module, call, output)
    assert {product.parameter: product.transposed for product in bank.products} == {"w1": False, "v1": False, "w2": True}
    assert Naming.of(module).transposed == {"w2"}
    module.is_transposed = False
    with pytest.raises(UnsupportedModelError, match=r"stored in another layout than its class in transformers says"):
        require_layout(name, module, bank, call, {key: p[0].clone() for key, p in module.named_parameters(recurse=False)})


def test_a_bank_of_one_matrix_says_what_its_inputs_are() -> None:
    module = nn.Module()
    module.weight, module.in_features, module.out_features = nn.Parameter(torch.zeros(3, 8, 6)), 8, 6
    assert Naming.of(module).transposed == {"weight"}
    module.in_features, module.out_features = 6, 8
    assert not Naming.of(module).transposed


def test_names_of_experts_say_that_they_are_some() -> None:
    assert experts_of("model.layers.0.mlp.experts") == "model.layers.0.mlp.experts"
    assert experts_of("experts") == "experts"
    assert base_name("layers.0.mlp.input_linear", "model.layers.0.mlp.input_linear.weight") == "model.layers.0.mlp.input_linear.experts"


def test_other_modules_are_left_alone() -> None:
    class Experts(nn.Module):
        def __init__(self, rows: int, count: int) -> None:
            super().__init__()
            self.num_experts, self.mlp = count, nn.Module()
            self.mlp.a, self.mlp.b = nn.Parameter(torch.zeros(rows, 3)), nn.Parameter(torch.zeros(rows, 3))

    model = nn.ModuleList([Experts(8, 3), Experts(9, 3), nn.Linear(3, 3)])
    gather_banks(model)
    trim_banks(model)
    assert [name for name, _ in model.named_parameters()] == ["0.mlp.a", "0.mlp.b", "1.a", "1.b", "2.weight", "2.bias"]
    assert model[1].a.shape == (3, 3, 3)


@only("jetmoe")
def test_tokens_are_sorted_by_expert(kind: str) -> None:
    _, _, call, output = seen(arranged(kind)[1])
    assert isinstance(call, SortedCall) and isinstance(call.sizes, list) and sum(call.sizes) == len(call.tokens) == 48
    assert (call.choices, call.slots(), call.sums, call.repeats, call.returned) == (4, 1, False, True, output.shape[1])
    experts = call.routing(1).experts[:, 0]
    assert experts.bincount(minlength=4).tolist() == call.sizes and bool((experts.diff() >= 0).all())
    one = call.run_one(lambda x, sizes: (x, sizes), call.tokens[:5], torch.ones(5))
    assert torch.equal(one[0], call.tokens[:5]) and one[1] == [5]
    anew = call.chosen_anew(torch.tensor([[2], [0]] * 24), 3)
    assert isinstance(anew, SortedCall) and anew.sizes == [24, 0, 24]
    assert torch.equal(anew.tokens, torch.cat([call.tokens[1::2], call.tokens[::2]]))
    assert SortedCall.of((call.tokens, [1, 2, 3, 4]), {}, (4, 64, 64)) is None, "these are not all tokens"
    assert SortedCall.of((call.tokens[:10], [1, 2, 3, 4]), {}, (4, 8, 8)) is None, "no matrix is so wide"
    assert SortedCall.of((), {"x": call.tokens[:10], "n": torch.tensor([1, 2, 3, 4])}, (4, 8, 64)) is not None


@only("jetmoe")
def test_routers_of_sorted_tokens_choose_experts(kind: str) -> None:
    """They are found by the choice of the largest of as many values; the projection of keys and values is none, although it reaches the
    second choice too."""
    model = form_model(kind, num_local_experts=32)
    path, blocks = find_blocks(model)
    given: list[tuple[Any, Any]] = []
    handle = blocks[0].register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    model(input_ids=torch.randint(3, 128, (1, 12)), use_cache=False)
    handle.remove()
    hidden, call = split_call(*given[0])
    plan = plan_block(blocks[0], hidden, call)
    assert plan.routers == {"mlp.router.layer", "self_attention.experts.router.layer"}
    assert [group.names for group in plan.groups] == [("self_attention.kv_proj",)]
    assert {bank.name: bank.level for bank in plan.banks} == {
        "self_attention.experts.input_linear": 0,
        "self_attention.experts.output_linear": 1,
        "mlp.input_linear": 1,
        "mlp.output_linear": 1,
    }
    assert path == "model.layers"


@only("git")
def test_the_blocks_are_those_of_the_language_model(kind: str) -> None:
    """The tower is as deep in the model, and larger."""
    model = form_model(kind)
    tower, path = "git.image_encoder.vision_model.encoder.layers", "git.encoder.layer"
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in (tower, path)}
    assert sizes[tower] > sizes[path] and find_blocks(model)[0] == path


@only("inkling_text")
def test_shared_experts_are_no_bank(kind: str) -> None:
    assert list(bank_modules(form_model(kind).model.layers[1])) == ["mlp.experts"]
