"""Shortcuts: modules that need not run again once a Linear in them is solved. They are found only where that is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bigq.model.forward.block_call import BlockCall
from bigq.model.structure import BlockPlan, Shortcut, plan_block
from bigq.model.tracers import GradientTracer

D = 32


class Inner(nn.Module):
    """Two Linears, and a function of the second's output y."""

    def __init__(self, made: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.last, self.made = nn.Linear(D, D), nn.Linear(D, D), made

    def forward(self, x: Tensor, residual: Tensor, *, other: Tensor | None = None) -> Any:
        return self.made(self.last(torch.tanh(self.first(x))), residual, other)


class Block(nn.Module):
    def __init__(self, made: Callable[..., Any], after: Callable[..., Tensor], by_name: bool = False) -> None:
        super().__init__()
        self.norm, self.inner, self.out = nn.LayerNorm(D), Inner(made), nn.Linear(D, D)
        self.after, self.by_name = after, by_name

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        result = self.inner(x, x * 3, other=hidden) if self.by_name else self.inner(x, hidden)
        return self.out(self.after(result, hidden))


def plan(made: Callable[..., Any], after: Callable[..., Tensor] = lambda result, hidden: result, by_name: bool = False) -> BlockPlan:
    torch.manual_seed(0)
    with torch.no_grad():
        return plan_block(Block(made, after, by_name), torch.randn(2, 5, D), BlockCall((), {}))


def shortcut(found: BlockPlan) -> Shortcut | None:
    return next((s for s in found.shortcuts if s.module == "inner"), None)


def test_a_linear_s_own_output() -> None:
    found = shortcut(plan(lambda y, r, o: y))
    assert found is not None
    assert (found.module, found.linear, found.added) == ("inner", "inner.last", None)


def test_with_a_residual_added_by_position_or_by_name() -> None:
    found = shortcut(plan(lambda y, r, o: r + y))
    assert found is not None
    assert found.added == 1
    found = shortcut(plan(lambda y, r, o: y + o, by_name=True))
    assert found is not None
    assert found.added == "other"
    y, args, kwargs = torch.ones(D), (torch.zeros(D), torch.zeros(D)), {"other": torch.full((D,), 4.0)}
    assert torch.equal(found.returns(y, args, kwargs), torch.full((D,), 5.0))


def test_an_extra_output_that_nobody_uses() -> None:
    found = shortcut(plan(lambda y, r, o: (y, r), after=lambda result, hidden: result[0]))
    assert found is not None
    assert found.form.extras == (True,)


@pytest.mark.parametrize(
    ("made", "after"),
    [
        (lambda y, r, o: 2 * y, lambda result, hidden: result),
        (lambda y, r, o: y + 2 * r, lambda result, hidden: result),
        (lambda y, r, o: y + r + r, lambda result, hidden: result),
        (lambda y, r, o: y.add_(1), lambda result, hidden: result),
        (lambda y, r, o: y.add_(r), lambda result, hidden: result),
        (lambda y, r, o: (y, r * 2), lambda result, hidden: result[0] + result[1]),
        (lambda y, r, o: y + r.mul_(2), lambda result, hidden: result),
        (lambda y, r, o: (r.mul_(2), y)[1], lambda result, hidden: result + hidden),
    ],
    ids=[
        "scaled",
        "residual scaled",
        "residual twice",
        "shifted in place",
        "sum in place",
        "extra used",
        "residual changed",
        "side effect",
    ],
)
def test_a_module_that_does_anything_else_runs_again(made: Callable[..., Any], after: Callable[..., Tensor]) -> None:
    found = shortcut(plan(made, after))
    if found is not None:
        # An in-place sum is still a sum, if it changed the Linear's output.
        torch.manual_seed(0)
        block, hidden = Block(made, after), torch.randn(2, 5, D)
        with torch.no_grad():
            expected = block(hidden.clone())
            y = block.inner.last(torch.tanh(block.inner.first(block.norm(hidden))))
            block.inner.forward = lambda *args, **kwargs: found.returns(y.clone(), args, kwargs)  # type: ignore[method-assign]
            assert torch.equal(block(hidden.clone()), expected)


def test_modules_without_a_shortcut() -> None:
    assert shortcut(plan(lambda y, r, o: 2 * y)) is None
    assert shortcut(plan(lambda y, r, o: y.add_(1))) is None
    assert shortcut(plan(lambda y, r, o: (y, r * 2), after=lambda result, hidden: result[0] + result[1])) is None


def test_the_same_is_found_without_values() -> None:
    for made, added in ((lambda y, r, o: y, None), (lambda y, r, o: r + y, 1), (lambda y, r, o: y - r, "none")):
        with torch.enable_grad():
            block = Block(made, lambda result, hidden: result).to("meta").requires_grad_(False)
            found = shortcut(plan_block(block, torch.empty(2, 5, D, device="meta"), BlockCall((), {}), GradientTracer()))
        assert ("none" if found is None else found.added) == added


class Attention(nn.Module):
    """The block of a decoder whose attention is torch's fused function."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = (linear(hidden).unflatten(-1, (2, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return hidden + self.out(mixed.transpose(1, 2).flatten(2))


FUSED = ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "cudnn_sdp_enabled")


def test_probes_do_not_depend_on_what_a_fused_attention_makes_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel of this test drops NaN. Without the plain one, all four Linears would be on one level."""
    real = functional.scaled_dot_product_attention

    def fused() -> bool:
        return any(getattr(torch.backends.cuda, name)() for name in FUSED)

    def attention(*args: Tensor, **how: Any) -> Tensor:
        y = real(*args, **how)
        return y.nan_to_num() if fused() else y

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    torch.manual_seed(0)
    block, hidden = Attention(), torch.randn(2, 5, D)
    assert fused(), "torch's default"
    with torch.no_grad():
        found = plan_block(block, hidden, BlockCall((), {}))
    assert [(group.names, group.level) for group in found.groups] == [(("q", "k", "v"), 0), (("out",), 1)]
    assert fused(), "the caller's choice is kept"
