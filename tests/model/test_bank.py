"""Banks of experts: found by shape and by a call, run expert by expert, with the bits of the family's own forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from moe_families import MOE_FAMILIES, call_of, moe_model, random_tokens
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bigq.errors import UnsupportedModelError
from bigq.model.experts.bank import Expert, Product, bank_modules, find_bank, routed, run_bank
from bigq.model.experts.call import BankCall, RoutedCall

DTYPES = [torch.float32, torch.bfloat16]


@dataclass
class Seen:
    """A bank as the model called it, and what it returned."""

    name: str
    module: nn.Module
    call: BankCall
    output: Tensor


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def seen_banks(family: str, dtype: torch.dtype) -> list[Seen]:
    model, found = moe_model(family, dtype), []

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            found.append(Seen(name, module, call_of(module, args, kwargs), output.clone()))

        return after

    for name, module in bank_modules(model).items():
        module.register_forward_hook(hook(name), with_kwargs=True)
    model(input_ids=random_tokens(), use_cache=False)
    return found


class Experts(nn.Module):
    """A bank whose experts add what ``rule`` makes of their output."""

    def __init__(self, count: int = 4, width: int = 64, rule: str = "plain") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.up = nn.Parameter(torch.randn(count, 32, width, generator=generator) / 8, requires_grad=False)
        self.down = nn.Parameter(torch.randn(count, width, 32, generator=generator) / 8, requires_grad=False)
        self.num_experts, self.rule = count, rule

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        order = range(self.num_experts)
        for e in reversed(order) if self.rule == "backwards" else order:
            tokens, slots = torch.where(experts == e)
            if not len(tokens):
                continue
            weight = weights[tokens, slots, None]
            given = x[tokens] * weight if self.rule == "weights come first" else x[tokens]
            y = nn.functional.linear(torch.relu(nn.functional.linear(given, self.up[e])), self.down[e]) * weight
            if self.rule == "knows the others":
                y = y * self.up.amax()
            if self.rule == "divides by their number":
                y = y / self.num_experts
            if self.rule == "up twice":
                y = y + nn.functional.linear(torch.relu(nn.functional.linear(x[tokens], self.up[e])), self.down[e])
            if self.rule == "assigns":
                total[tokens] = total[tokens] + y
            else:
                total.index_add_(0, tokens, y)
            if self.rule == "adds twice":
                total.index_add_(0, tokens, y)
        return total


class Overwriting(Experts):
    """Experts that overwrite what the first product returned."""

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for e in range(self.num_experts):
            tokens, slots = torch.where(experts == e)
            if len(tokens):
                y = nn.functional.linear(x[tokens], self.up[e]).mul_(3)
                total.index_add_(0, tokens, nn.functional.linear(y, self.down[e]) * weights[tokens, slots, None])
        return total


class Heads(nn.Module):
    """A layer with two matrices for each of its heads, as Mamba in Zamba."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.dt = nn.Parameter(torch.zeros(4, 2, 2)), nn.Parameter(torch.zeros(4, 2, 2))

    def forward(self, x: Tensor, cache: Any = None, mask: Any = None) -> Tensor:
        return x


def made_call(count: int = 4, k: int = 3) -> RoutedCall:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(20, 64, generator=generator, dtype=torch.float32)
    weights, experts = torch.rand(20, count, generator=generator).topk(k)
    call = RoutedCall.of((x, experts, weights), {})
    assert call is not None
    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_single_experts_add_up_to_the_bits_of_the_bank(family: str, dtype: torch.dtype) -> None:
    banks = seen_banks(family, dtype)
    assert banks
    for seen in banks:
        bank = find_bank(seen.name, seen.module, seen.call, seen.output)
        assert bank.experts == seen.module.num_experts
        assert [p.parameter for p in bank.products] == (
            ["up_proj", "down_proj"] if family == "nemotron_h" else ["gate_up_proj", "down_proj"]
        )
        assert {p.transposed for p in bank.products} == {family in ("gpt_oss", "llama4_text")}
        assert bank.total == (torch.float32 if family == "nemotron_h" else dtype)
        assert torch.equal(run_bank(seen.module, bank, seen.call), seen.output)


class Products(TorchFunctionMode):
    """Counts products that are computed."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += func in (nn.functional.linear, torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_products_are_computed_once_for_the_same_tokens(family: str, dtype: torch.dtype) -> None:
    """An expert that gives the inputs of its products and then runs has the bits of one that only runs, after a change of weights too."""
    seen = seen_banks(family, dtype)[0]
    bank = find_bank(seen.name, seen.module, seen.call, seen.output)
    tokens = seen.call.routing(seen.call.slots()).inputs[:40]
    weights = torch.rand(len(tokens), generator=torch.Generator().manual_seed(7)).to(tokens.dtype)
    held = {name: getattr(seen.module, name)[1].clone() for name in bank.parameters}
    expert = Expert(seen.module, bank, seen.call, {name: value.clone() for name, value in held.items()})
    with Products() as products:
        for product in bank.products:
            before = expert.input_of(product, tokens).clone()
            assert torch.equal(expert.input_of(product, tokens), before)
            expert.weight(product).mul_(0.5)
        output = expert.run(tokens, weights)
    assert products.count == len(bank.products)
    for product in bank.products:
        held[product.parameter] *= 0.5
    assert torch.equal(output, Expert(seen.module, bank, seen.call, held).run(tokens, weights))
    expert.weight(bank.products[0]).mul_(2)
    assert not torch.equal(expert.run(tokens, weights), output)
    expert.input_of(bank.products[-1], tokens)
    expert.weight(bank.products[0]).mul_(0.5)
    assert torch.equal(expert.run(tokens, weights), output), "a changed weight is used"
    assert torch.equal(expert.run(tokens.clone(), weights), output)


def test_results_that_are_overwritten_are_computed_again() -> None:
    module, call = Overwriting(), made_call()
    bank = find_bank("experts", module, call, module(call.tokens, call.experts, call.weights))
    expert = Expert(module, bank, call, {name: getattr(module, name)[0] for name in bank.parameters})
    once = expert.run(call.tokens, call.weights[:, 0])
    expert.input_of(bank.products[1], call.tokens)
    assert torch.equal(expert.run(call.tokens, call.weights[:, 0]), once)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_a_changed_expert_changes_the_sum(family: str) -> None:
    seen = seen_banks(family, torch.float32)[0]
    bank = find_bank(seen.name, seen.module, seen.call, seen.output)
    used = int(seen.call.experts[0, 0])
    getattr(seen.module, bank.products[-1].parameter)[used] *= 1.01
    assert not torch.equal(run_bank(seen.module, bank, seen.call), seen.output)
    with pytest.raises(UnsupportedModelError, match="other bits than its own output"):
        find_bank(seen.name, seen.module, seen.call, seen.output)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_inputs_of_products(family: str) -> None:
    """Those of the first are the tokens; those of the last give, times the weight and with the bias, what the expert adds."""
    seen = seen_banks(family, torch.float32)[0]
    bank = find_bank(seen.name, seen.module, seen.call, seen.output)
    tokens = seen.call.tokens[:5]
    expert = Expert(seen.module, bank, seen.call, {name: getattr(seen.module, name)[1] for name in bank.parameters})
    first, last = bank.products
    assert torch.equal(expert.input_of(first, tokens), tokens)
    inner = expert.input_of(last, tokens)
    assert inner.shape == (5, expert.weight(last).shape[1])
    y = inner @ expert.weight(last).T
    if family == "gpt_oss":
        y = y + seen.module.down_proj_bias[1]
    assert torch.allclose(expert.run(tokens, torch.full((5,), 0.5)), 0.5 * y, atol=1e-6)


def test_a_weight_can_be_replaced() -> None:
    seen = seen_banks("gpt_oss", torch.float32)[0]
    bank = find_bank(seen.name, seen.module, seen.call, seen.output)
    expert = Expert(seen.module, bank, seen.call, {name: getattr(seen.module, name)[0].clone() for name in bank.parameters})
    before = expert.run(seen.call.tokens[:4], torch.ones(4))
    expert.weight(bank.products[0]).mul_(2)
    assert not torch.equal(expert.run(seen.call.tokens[:4], torch.ones(4)), before)
    assert torch.equal(run_bank(seen.module, bank, seen.call), seen.output), "the bank itself is unchanged"


def test_a_plain_bank_is_found() -> None:
    module, call = Experts(), made_call()
    bank = find_bank("mlp.experts", module, call, module(call.tokens, call.experts, call.weights))
    assert bank.products == (Product("up", False), Product("down", False)) and bank.counts == ("num_experts",)


@pytest.mark.parametrize(("rule", "counts"), [("plain", ("num_experts",)), ("divides by their number", ())])
def test_which_attributes_hold_the_number_of_experts(rule: str, counts: tuple[str, ...]) -> None:
    """Other attributes of that value stay, and so does the number itself where it is part of the arithmetic."""
    module, call = Experts(rule=rule), made_call()
    module.width_of_something = 4
    assert find_bank("bank", module, call, module(call.tokens, call.experts, call.weights)).counts == counts


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("backwards", "the sum over single experts has other bits"),
        ("knows the others", "the sum over single experts has other bits"),
        ("adds twice", "adds to the output 2 times instead of once"),
        ("assigns", "adds to the output 0 times instead of once"),
        ("up twice", "multiplies by up more than once"),
        ("weights come first", "what its matrices multiply depends on the weights of the experts"),
    ],
)
def test_what_is_refused(rule: str, reason: str) -> None:
    module, call = Experts(rule=rule), made_call()
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        find_bank("layers.3.mlp.experts", module, call, module(call.tokens, call.experts, call.weights))
    assert str(caught.value).startswith("layers.3.mlp.experts: a bank of 4 experts that cannot be run expert by expert: ")


def test_only_modules_of_that_shape_are_banks() -> None:
    block = nn.Module()
    block.experts, block.linear, block.conv = Experts(), nn.Linear(4, 4), nn.Conv1d(4, 4, 3)
    block.odd = nn.Module()
    block.odd.a, block.odd.b = nn.Parameter(torch.zeros(4, 2, 2)), nn.Parameter(torch.zeros(3, 2, 2))
    block.heads = Heads()
    assert list(bank_modules(block)) == ["experts"]


def test_routes() -> None:
    """As ``where`` finds them; numbers that are no expert's are left out."""
    experts = torch.randint(0, 6, (50, 3), generator=torch.Generator().manual_seed(5))
    for e, tokens, slots in routed(experts, 5):
        expected = torch.where(experts == e)
        assert torch.equal(tokens, expected[0]) and torch.equal(slots, expected[1])
    assert e == 4
