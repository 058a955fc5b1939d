"""The column loop, against one that works weight by weight in Python's own floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigq.kernels.gptq_block import gptq_block_


def columns(k: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """w [k, m], u [k, k] upper triangular with a positive diagonal, scale [k, m]; fp64."""
    gen = torch.Generator().manual_seed(100 * k + m)
    w = torch.randn(k, m, dtype=torch.float64, generator=gen)
    u = 0.3 * torch.randn(k, k, dtype=torch.float64, generator=gen).triu(1)
    u += torch.diag(0.5 + torch.rand(k, dtype=torch.float64, generator=gen))
    return w, u, 0.1 + 0.2 * torch.rand(k, m, dtype=torch.float64, generator=gen)


def by_hand(w: Tensor, u: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    k, m = w.shape
    steps, errors = [[0.0] * m for _ in range(k)], [[0.0] * m for _ in range(k)]
    for row in range(m):
        values = w[:, row].tolist()
        for j in range(k):
            s = float(scale[j, row])
            step = min(max(float(round(values[j] / s)), float(low[j, row])), float(high[j, row]))
            error = (values[j] - s * step) / float(u[j, j])
            steps[j][row], errors[j][row] = step, error
            for later in range(j + 1, k):
                values[later] -= error * float(u[j, later])
    return steps, errors


@pytest.mark.parametrize("bounds", ["numbers", "tensors"])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 6), (5, 3), (8, 7), (32, 20), (33, 5), (128, 3)])
def test_loop_equals_the_one_by_hand(k: int, m: int, bounds: str) -> None:
    w, u, scale = columns(k, m)
    if bounds == "numbers":
        low, high = torch.full((k, m), -4.0), torch.full((k, m), 3.0)
        steps, errors = gptq_block_(w.clone(), u, scale, -4.0, 3.0)
    else:
        zero = torch.randint(0, 8, (k, m), generator=torch.Generator().manual_seed(k)).double()
        low, high = -zero, 7 - zero
        steps, errors = gptq_block_(w.clone(), u, scale, low, high)
    expected_steps, expected_errors = by_hand(w, u, scale, low, high)
    assert steps.tolist() == expected_steps
    assert torch.allclose(errors, torch.tensor(expected_errors, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert steps.shape == errors.shape == (k, m) and steps.dtype == errors.dtype == torch.float64


def test_result_keeps_the_input_type_and_nothing_but_w_is_spoilt() -> None:
    w, u, scale = (t.float() for t in columns(16, 9))
    before = u.clone(), scale.clone()
    steps, errors = gptq_block_(w, u, scale, -8.0, 7.0)
    assert steps.dtype == errors.dtype == torch.float32
    assert torch.equal(u, before[0]) and torch.equal(scale, before[1])


def test_what_lies_below_the_diagonal_of_u_is_not_used() -> None:
    w, u, scale = columns(12, 4)
    steps, errors = gptq_block_(w.clone(), u, scale, -8.0, 7.0)
    spoilt_steps, spoilt_errors = gptq_block_(w.clone(), u + torch.full((12, 12), 9.0).tril(-1), scale, -8.0, 7.0)
    assert torch.equal(steps, spoilt_steps) and torch.equal(errors, spoilt_errors)


def test_halves_are_rounded_to_even() -> None:
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]])
    steps, errors = gptq_block_(w, torch.ones(1, 1), torch.ones(1, 5), -8.0, 7.0)
    assert steps.tolist() == [[0, 2, 2, 0, -2]]
    assert errors.tolist() == [[0.5, -0.5, 0.5, -0.5, 0.5]]


def test_a_single_error_is_spread_along_its_row_of_u() -> None:
    """Column 0 rounds 0.4 to 0: its error 0.4 / 2 leaves column 1 at 0.9 − 0.2 · 3 = 0.3, which rounds to 0."""
    w, u = torch.tensor([[0.4], [0.9]]), torch.tensor([[2.0, 3.0], [0.0, 1.0]])
    steps, errors = gptq_block_(w, u, torch.ones(2, 1), -8.0, 7.0)
    assert steps.tolist() == [[0], [0]]
    assert errors.flatten().tolist() == pytest.approx([0.2, 0.3])
