"""The math of tuned scales, on small cases."""

from __future__ import annotations

import pytest
import torch

from bigq.kernels.dequantize import dequantize_reference
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.tuning.scales import LARGEST, TunedScales, order_of, rate_at, relative_loss, rounded_scales, scale_gradient

M, N, GROUPS = 6, 32, 4


def weight(scale_bits: int = 8, *, largest: bool = False) -> QuantizedWeight:
    make = torch.Generator().manual_seed(0)
    scheme = QuantScheme(bits=3, group_size=N // GROUPS, symmetric=False, scale_bits=scale_bits)
    scales = rounded_scales(torch.rand(M, GROUPS, generator=make) * 0.1 + 0.01, scheme)
    return QuantizedWeight(
        codes=torch.randint(0, 8, (M, N), generator=make).to(torch.uint8),
        scales=(torch.full_like(scales, LARGEST) if largest else scales).half(),
        zeros=torch.randint(0, 8, (M, GROUPS), generator=make).to(torch.uint8),
        scheme=scheme,
        loss=0.0,
        energy=1.0,
        damping=0.01,
    )


def test_gradient_is_that_of_autograd_through_the_plain_formula() -> None:
    one, direction = weight(), torch.randn(M, N, generator=torch.Generator().manual_seed(1))
    scales = one.scales.float().requires_grad_()
    plain = (scales[..., None] * (one.codes.float().view(M, GROUPS, -1) - one.zeros.float()[..., None])).view(M, N)
    (expected,) = torch.autograd.grad((plain * direction).sum(), scales)
    torch.testing.assert_close(scale_gradient(direction, one.codes, one.zeros), expected)


def test_gradient_of_a_tuned_scale_is_that_of_its_logarithm() -> None:
    one, direction = weight(), torch.randn(M, N, generator=torch.Generator().manual_seed(1))
    tuned = TunedScales(one)
    (found,) = torch.autograd.grad((tuned.value(torch.float32) * direction).sum(), tuned.tuned)
    torch.testing.assert_close(found, one.scales.float() * scale_gradient(direction, one.codes, one.zeros))


def test_start_is_the_given_weight() -> None:
    one = weight()
    tuned = TunedScales(one)
    assert torch.equal(tuned.best(), one.scales)
    with torch.no_grad():
        value = tuned.value(torch.float32)
    assert torch.equal(value, dequantize_reference(one.codes, one.scales, one.zeros, torch.float32))


@pytest.mark.parametrize("bits", [7, 8, 11])
def test_kept_scales_have_the_significant_bits_of_the_format(bits: int) -> None:
    one = weight(bits)
    tuned = TunedScales(one)
    for number in range(1, 20):
        tuned.step(torch.randn(M, GROUPS, generator=torch.Generator().manual_seed(number)), number, 0.05)
    assert torch.equal(tuned.best(), one.scales)
    tuned.keep()
    kept = tuned.best()
    assert not torch.equal(kept, one.scales)
    assert torch.equal(rounded_scales(kept.float(), one.scheme).half(), kept)


def test_scales_stay_finite_and_above_0() -> None:
    for sign in (-1.0, 1.0):
        tuned = TunedScales(weight(7, largest=True))
        for number in range(1, 60):
            tuned.step(torch.full((M, GROUPS), sign), number, 0.5)
        tuned.keep()
        assert torch.isfinite(tuned.best()).all()
        assert (tuned.best() > 0).all()


def test_group_without_a_gradient_stays() -> None:
    tuned = TunedScales(weight())
    gradient = torch.ones(M, GROUPS)
    gradient[2, 1] = 0
    tuned.step(gradient, 1, 0.01)
    assert tuned.tuned[2, 1] == 0
    assert (tuned.tuned[gradient > 0] < 0).all()


def test_loss_counts_each_token_relative_to_its_size_and_leaves_out_what_is_not_finite() -> None:
    target = torch.tensor([[3.0, 4.0], [300.0, 400.0], [1.0, torch.nan], [1.0, 1.0]])
    output = torch.tensor([[3.0, 5.0], [300.0, 500.0], [1.0, 1.0], [torch.inf, 1.0]])
    total, tokens = relative_loss(output, target)
    assert total.item() == pytest.approx(2 / 25)
    assert tokens.item() == 2


def test_every_batch_comes_once_before_any_comes_again() -> None:
    order = order_of(5, 12, 3)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert len(order) == 12
    assert order == order_of(5, 12, 3)
    assert order != order_of(5, 12, 4)


def test_rate_falls_to_0() -> None:
    assert [rate_at(step, 4, 0.8) for step in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
