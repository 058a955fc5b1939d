"""Scales of inputs: what is collected, what AWQ and SmoothQuant make of it, against plain formulas in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from damping_by_hand import usual_by_hand
from rank_threads import ThreadRanks, together
from torch import Tensor

from bigq.errors import NumericsError
from bigq.scheme import QuantScheme
from bigq.solver import scaling
from bigq.solver.input_products import InputProducts, block_width
from bigq.solver.rtn import round_to_nearest
from bigq.solver.scaling import InputStatistics, Reader, awq_scales, powers_of_two, rounded, smoothquant_scales

CPU = torch.device("cpu")
M, N, TOKENS = 48, 64, 700
SCHEME = QuantScheme(group_size=16, scales="minmax")


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [m, n], and inputs [t, n] of which a few features stand out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, N, generator=generator) * (1 + 30 * (torch.arange(N) % 16 == 3))
    return torch.randn(M, N, generator=generator) * 0.02, x


def collected(x: Tensor, batches: int = 1) -> InputStatistics:
    found = InputStatistics(x.shape[-1], CPU, len(x))
    for part in x.chunk(batches):
        found.add(part)
    return found


def output_error(weight: Tensor, scales: Tensor, x: Tensor, scheme: QuantScheme = SCHEME) -> float:
    found = rounded(weight * scales, scheme).double() / scales.double()
    return float(((found - weight.double()) @ x.double().T).square().sum())


def test_what_is_collected() -> None:
    _, x = problem()
    found = collected(x)
    assert torch.allclose(found.mean.double(), x.double().abs().mean(0), rtol=1e-6)
    assert torch.equal(found.largest, x.abs().amax(0))
    step = -(-TOKENS // scaling.SAMPLED_TOKENS)
    assert torch.equal(found.sample, x[::step])


@pytest.mark.parametrize("batches", [2, 7])
def test_batches_do_not_change_the_sample(batches: int) -> None:
    _, x = problem()
    one, many = collected(x), collected(x, batches)
    assert torch.equal(one.sample, many.sample) and torch.equal(one.largest, many.largest)
    assert torch.allclose(one.mean, many.mean, rtol=1e-6)


def test_processes_put_together_what_they_have_seen() -> None:
    """The largest input, the mean and the number of tokens are those of all; one process has no token, and none sees most of them."""
    _, x = problem()
    parts = [x[:500], x[:0], x[500:]]

    def run(ranks: ThreadRanks) -> InputStatistics:
        found = InputStatistics(N, CPU, len(x))
        found.add(parts[ranks.index])
        found.reduce(ranks)
        return found

    whole, step = collected(x), -(-TOKENS // scaling.SAMPLED_TOKENS)
    for found in together(3, run):
        assert not isinstance(found, Exception), found
        assert torch.allclose(found.mean, whole.mean, rtol=1e-6)
        assert torch.equal(found.largest, whole.largest) and found.tokens == TOKENS
        assert torch.equal(found.sample, torch.cat([part[::step] for part in parts]))


def test_tokens_that_are_not_finite_are_left_out() -> None:
    _, x = problem()
    spoiled = x.clone()
    spoiled[::5, 7], spoiled[3] = torch.nan, torch.inf
    found, sound = collected(spoiled, 3), torch.isfinite(spoiled).all(1)
    assert torch.allclose(found.mean, x[sound].abs().mean(0), rtol=1e-5)
    assert torch.equal(found.largest, x[sound].abs().amax(0))
    assert torch.isfinite(found.sample).all() and len(found.sample) > 100


def test_rounding_in_the_search_is_rounding_to_nearest() -> None:
    weight, _ = problem()
    for scheme in (SCHEME, dataclasses.replace(SCHEME, symmetric=False), dataclasses.replace(SCHEME, group_size=-1, bits=3)):
        assert torch.equal(rounded(weight, scheme), round_to_nearest(weight, scheme).dequantize())


def test_awq_lowers_the_error_of_outputs() -> None:
    """Of all powers that are tried the best one, for both rules; and far better than none."""
    weight, x = problem()
    inputs, channels = collected(x), torch.arange(N)
    scales = awq_scales(inputs, [Reader(weight[:20], SCHEME), Reader(weight[20:], SCHEME)], channels)
    found = output_error(weight, scales, inputs.sample)
    assert found < 0.65 * output_error(weight, torch.ones(N), inputs.sample)
    mean = inputs.mean.double()
    for a in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        power = mean**a
        power = (power / (power.max() * power.min()).sqrt()).float()
        assert found <= output_error(weight, power, inputs.sample) * 1.0001
    assert float((scales.max() * scales.min()).log().abs()) < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_awq_is_never_worse_than_no_scales(seed: int) -> None:
    """Also where no input stands out."""
    weight, _ = problem(seed)
    x = torch.randn(TOKENS, N, generator=torch.Generator().manual_seed(seed))
    inputs = collected(x)
    scales = awq_scales(inputs, [Reader(weight, SCHEME)], torch.arange(N))
    assert output_error(weight, scales, inputs.sample) <= 1.0001 * output_error(weight, torch.ones(N), inputs.sample)


def test_inputs_that_share_a_scale() -> None:
    """Their mean counts: heads of four queries that read one head of values."""
    weight, x = problem()
    channels = torch.arange(N) % 16
    scales = awq_scales(collected(x), [Reader(weight, SCHEME)], channels)
    assert scales.shape == (16,)
    assert output_error(weight, scales[channels], x) < 0.65 * output_error(weight, torch.ones(N), x)


def test_smoothquant_is_its_formula() -> None:
    weight, x = problem()
    x[:, 5] = 0
    for strength in (0.5, 0.8):
        scales = smoothquant_scales(collected(x), [Reader(weight, SCHEME), Reader(weight * 2, SCHEME)], torch.arange(N), strength)
        expected = x.double().abs().amax(0) ** strength / (2 * weight.double().abs().amax(0)) ** (1 - strength)
        expected[5] = 1
        assert torch.allclose(scales.double(), expected, rtol=1e-5)
    shared = smoothquant_scales(collected(x), [Reader(weight, SCHEME)], torch.arange(N) % 8)
    assert torch.allclose(shared[3] ** 2, x[:, 3::8].abs().max() / weight[:, 3::8].abs().max(), rtol=1e-5)


def test_powers_of_two_are_the_nearest() -> None:
    scales = torch.tensor([0.3, 0.7, 1.0, 1.41, 1.42, 100.0])
    assert powers_of_two(scales).tolist() == [0.25, 0.5, 1.0, 1.0, 2.0, 128.0]


def test_scales_are_finite_whatever_the_inputs_are() -> None:
    """No token that is finite, inputs of 0, and inputs of the largest size."""
    weight, x = problem()
    for given in (torch.full_like(x, torch.nan), torch.zeros_like(x), x * 1e36):
        for choose in (awq_scales, smoothquant_scales):
            scales = choose(collected(given), [Reader(weight, SCHEME)], torch.arange(N))
            assert torch.isfinite(scales).all() and (scales > 0).all()


def blocks_of(h: Tensor, width: int) -> Tensor:
    """The matrix [n, n] without products of inputs that do not share a block of ``width``."""
    at = torch.arange(len(h)) // width
    return h * (at[:, None] == at)


def test_products_of_neighbouring_inputs() -> None:
    _, x = problem()
    products = InputProducts(N, CPU, finite_only=True)
    spoiled = x.clone()
    spoiled[::9, 3] = torch.nan
    products.add(spoiled[:300])
    products.add(spoiled[300:].view(4, 100, N))
    sound = torch.isfinite(spoiled).all(1)
    assert products.left_out == int((~sound).sum())
    whole = x[sound].double().T @ x[sound].double() / int(sound.sum())
    found = torch.block_diag(*products.finish().double())
    assert torch.allclose(found, blocks_of(whole, block_width(N)), rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
    broken = InputProducts(N, CPU)
    broken.add(spoiled)
    with pytest.raises(NumericsError, match="not finite"):
        broken.finish("a Linear")


def test_a_batch_of_which_no_token_is_finite_is_left_out() -> None:
    _, x = problem()
    with_it, without = (InputProducts(N, CPU, finite_only=True) for _ in range(2))
    with_it.add(torch.full((5, N), torch.nan))
    for products in (with_it, without):
        products.add(x)
    assert (with_it.left_out, with_it.tokens) == (5, len(x)) and torch.equal(with_it.finish(), without.finish())
    nothing = InputProducts(N, CPU, finite_only=True)
    nothing.add(torch.full((5, N), torch.nan))
    with pytest.raises(NumericsError, match="the calibration inputs of all tokens contain NaN or Inf"):
        nothing.finish("a Linear")


@pytest.mark.parametrize(("n", "width"), [(4096, 128), (576, 64), (1000, 8), (96, 32), (7, 1)])
def test_widths_of_blocks_divide(n: int, width: int) -> None:
    assert block_width(n) == width


@pytest.mark.parametrize(("width", "shared"), [(16, 16), (8, 8), (48, 16), (96, 32)], ids=["16", "8", "48", "96"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_by_products_finds_the_least_error_of_outputs(symmetric: bool, width: int, shared: int) -> None:
    """Of each group in each row: no grid that spans a part of its range is better. The reference multiplies whole matrices in fp64."""
    generator = torch.Generator().manual_seed(3)
    n = 96
    weight = torch.randn(M, n, generator=generator)
    x = torch.randn(500, n, generator=generator) @ torch.randn(n, n, generator=generator)
    products = InputProducts(n, CPU)
    products.add(x)
    scheme = QuantScheme(bits=3, group_size=width, symmetric=symmetric)
    found = round_to_nearest(weight, scheme, products=products.finish())
    h = x.double().T @ x.double() / len(x)
    h = blocks_of(h + scheme.damping * usual_by_hand(h.diagonal()) * torch.eye(n, dtype=h.dtype), shared)

    def errors(q: Tensor) -> Tensor:
        e = (weight - q).double()
        return ((e @ h) * e).view(M, -1, width).sum(-1)

    best = errors(found.dequantize())
    assert found.loss == pytest.approx(float(best.sum()), rel=1e-5)
    assert found.energy == pytest.approx(float(errors(torch.zeros_like(weight)).sum()), rel=1e-5)
    even = errors(round_to_nearest(weight, scheme).dequantize())
    assert bool((best <= even * 1.0001).all()) and best.sum() < 0.97 * even.sum()


def test_rounding_by_inputs_that_were_all_0_is_rounding_to_nearest() -> None:
    weight, _ = problem()
    scheme = QuantScheme(bits=3, group_size=16)
    products = InputProducts(N, CPU)
    products.add(torch.zeros(10, N))
    found = round_to_nearest(weight, scheme, products=products.finish())
    assert torch.equal(found.codes, round_to_nearest(weight, scheme).codes)
