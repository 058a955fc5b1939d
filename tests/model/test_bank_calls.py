"""The two ways in which blocks call a bank of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_families import moe_model, random_tokens
from torch import Tensor, nn

from bigq.errors import UnsupportedModelError
from bigq.model.experts.bank import bank_modules, find_bank, run_bank
from bigq.model.experts.call import DenseCall, RoutedCall, bank_call
from bigq.model.experts.cut import called_banks, chosen_experts


def test_routed_calls() -> None:
    x, experts, weights = torch.zeros(5, 64), torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2)
    call = RoutedCall.of((x,), {"weights": weights, "experts": experts, "mask": None})
    assert call is not None and call.places == (0, "experts", "weights")
    assert call.run(lambda a, weights, experts: (a, experts, weights))[2] is weights
    assert RoutedCall.of((x, experts), {}) is None
    assert RoutedCall.of((x, weights, experts[:, :1]), {}) is None
    assert RoutedCall.of((x, experts, weights, 7), {}) is None
    assert RoutedCall.of((x[:4], experts, weights), {}) is None


def test_dense_calls() -> None:
    x = torch.zeros(12, 8)
    assert DenseCall.of((x,), {}, 4) == DenseCall(x, 4, 0)
    assert DenseCall.of((None,), {"hidden_states": x}, 4) == DenseCall(x, 4, "hidden_states")
    assert DenseCall.of((x,), {}, 5) is None, "12 is not a multiple of 5"
    assert DenseCall.of((x, x), {}, 4) is None
    assert DenseCall.of((x[None],), {}, 4) is None
    assert DenseCall.of((x.long(),), {}, 4) is None
    assert isinstance(bank_call((x,), {}, (4, 8, 8)), DenseCall)


def dense(chosen: Tensor) -> DenseCall:
    """A call in which every token [8] is scaled for the experts [T, E] that it chooses."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(chosen), 8, generator=generator)
    scales = torch.rand(chosen.shape, generator=generator) + 0.5
    given = (x[None] * (scales * chosen).T[:, :, None]).flatten(0, 1)
    call = DenseCall.of((given,), {}, chosen.shape[1])
    assert call is not None
    return call


CHOSEN = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])


def test_inputs_of_a_dense_call() -> None:
    """Each token is two inputs, by ascending expert; 4 stands for none. What is put back is the call itself."""
    call = dense(CHOSEN)
    assert call.slots() == 2
    routing = call.routing(2)
    assert routing.experts.tolist() == [[1], [3], [0], [1], [2], [4], [4], [4], [0], [3]]
    given = call.tokens.view(4, 5, 8)
    for i, (e,) in enumerate(routing.experts.tolist()):
        assert torch.equal(routing.inputs[i], given[e, i // 2] if e < 4 else torch.zeros(8)), i
    assert torch.equal(call.output(routing.inputs, routing.experts, 5), call.tokens)
    part = call.output(routing.inputs[2:6], routing.experts[2:6], 2)
    assert torch.equal(part, given[:, 1:3].flatten(0, 1)), "of two tokens among them"
    whole, places = call.together(routing.inputs[[1, 9]], torch.tensor([0, 4]), 5)
    assert places is not None and torch.equal(whole, given[3])


def test_tokens_that_are_not_finite() -> None:
    """Times 0 they are not 0, so they reach every expert. They keep as many experts as others have."""
    call = dense(CHOSEN)
    call.tokens.view(4, 5, 8)[:, 2] = float("nan")
    assert call.slots() == 2 and call.routing(2).experts[4:6].tolist() == [[0], [1]]
    more = dense(CHOSEN | torch.tensor([[0], [0], [0], [0], [1]]))
    assert more.slots() == 4
    with pytest.raises(UnsupportedModelError, match="goes to more than 2 experts"):
        more.routing(2)


def test_a_smaller_dense_call() -> None:
    call = dense(CHOSEN)
    small = call.chosen_anew(torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [1, 2]]), 3)
    assert isinstance(small, DenseCall) and small.copies == 3 and small.slots() == 2
    kept = small.tokens.view(3, 5, 8).ne(0).any(-1).T
    assert kept.tolist() == [[True, False, True], [True, True, False], [False, True, True], [False, False, False], [False, True, True]]
    one = call.shortened()
    assert isinstance(one, DenseCall) and torch.equal(one.tokens, call.tokens[::5])


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_dense_bank_has_the_bits_of_its_own_output(dtype: torch.dtype, slots: int) -> None:
    model, seen = moe_model("llama4_text", dtype, num_experts_per_tok=slots), []
    name, module = next(iter(bank_modules(model).items()))
    module.register_forward_hook(lambda m, args, kwargs, out: seen.append((args, kwargs, out.clone())), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=random_tokens(4, 32), use_cache=False)
        call = bank_call(*seen[0][:2], (4,))
        assert isinstance(call, DenseCall) and call.slots() == slots
        bank = find_bank(name, module, call, seen[0][2])
        assert [(p.parameter, p.transposed) for p in bank.products] == [("gate_up_proj", True), ("down_proj", True)]
        module.get_parameter("down_proj")[2, 5, 7] += 1
        assert not torch.equal(run_bank(module, bank, call), seen[0][2])


class Biased(nn.Module):
    """Experts that return something for 0: a token's other experts cannot be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 16)), nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.bmm(x.view(self.up.shape[0], -1, 8), self.up) + 0.5
        return torch.bmm(inner, self.down).view(-1, 8)


def test_experts_that_return_something_for_0_are_refused() -> None:
    call = dense(CHOSEN)
    module = Biased().requires_grad_(False)
    output = module(call.tokens)
    with pytest.raises(UnsupportedModelError, match="has other bits than its own output"):
        find_bank("experts", module, call, output)


@pytest.mark.parametrize(("family", "changes", "expected"), [
    ("llama4_text", {}, (1, 1)),
    ("llama4_text", {"num_experts_per_tok": 3}, (3, 3)),
    ("qwen3_moe", {}, (2, 1)),
])  # fmt: skip
def test_how_many_experts_a_token_has_is_known_without_values(family: str, changes: dict[str, Any], expected: tuple[int, int]) -> None:
    model = moe_model(family, **changes).to("meta")
    name = next(iter(bank_modules(model)))
    parent = model.get_submodule(name.rpartition(".")[0])

    def run() -> None:
        parent(torch.zeros(2, 8, 64, device="meta"))

    assert dict(chosen_experts(model, run)) == {name: expected}
    assert list(called_banks(model, run)) == [name]
