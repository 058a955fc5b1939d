"""The product that corrects a block of columns for the errors of all columns before it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import ORDERS, distance, same_bytes, stored, untouched
from torch import Tensor

from bigq.kernels.feedback import feedback
from bigq.kernels.precision import fp32_products, product

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")


def operands(a: int, s: int, m: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(a * s * m)
    return tuple(torch.randn(a, width, dtype=torch.float64, generator=gen).to(device, dtype) for width in (s, m))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (128, 64, 7), (300, 129, 33)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_out_is_overwritten_by_the_product(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int], order: str, device: torch.device
) -> None:
    """``out`` is NaN before; r is part of a larger factor. TF32 has its own tolerance."""
    a, s, m = shape
    r, errors = operands(a, s, m, dtype, device)
    out = stored(torch.full((s, m), float("nan"), dtype=dtype, device=device), order)
    feedback(stored(r, "within a larger one"), stored(errors, order), out)
    exact = r.double().T @ errors.double()
    tolerance = 1e-3 if r.is_cuda and dtype == torch.float32 else tolerance
    assert distance(out, exact) < tolerance < distance(1.01 * out, exact)
    assert order != "within a larger one" or untouched(out)


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_has_the_products_of_single_ones(order: str, device: torch.device) -> None:
    """The same bytes on a CPU. On a GPU the library may choose another product for a batch."""
    pairs = [operands(130, 64, 20, torch.float32, device) for _ in range(3)]
    r, errors = (torch.stack([(1 + i) * pair[k] for i, pair in enumerate(pairs)]) for k in range(2))
    out = stored(torch.full((3, 64, 20), float("nan"), device=device), order)
    feedback(stored(r, "within a larger one"), stored(errors, order), out)
    for one, a, b in zip(out, r, errors, strict=True):
        single = stored(torch.full((64, 20), float("nan"), device=device), order)
        feedback(stored(a, "within a larger one"), stored(b, order), single)
        assert same_bytes(one, single) if not r.is_cuda else distance(one, single.double()) < 1e-3
    assert order != "within a larger one" or untouched(out)


@pytest.mark.parametrize("shape", [(3,), (1,), ()], ids=str)
@pytest.mark.parametrize("beta", [None, 0.0, 1.0, 0.5])
def test_products_are_added_to_a_matrix(beta: float | None, shape: tuple[int, ...], device: torch.device) -> None:
    """With ``beta`` 0 what they are added to is not read; it may be the result itself."""
    a, b, add = (torch.randn(*shape, *size, dtype=torch.float64, device=device) for size in ((4, 7), (7, 5), (4, 5)))
    if beta == 0:
        add.fill_(float("nan"))
    exact = a @ b if beta is None else a @ b + (beta * add if beta else 0)
    given: dict[str, Any] = {} if beta is None else {"add": add, "beta": beta}
    assert torch.allclose(product(a, b, torch.empty_like(add), **given), exact, rtol=1e-13, atol=1e-13)
    if beta is not None:
        assert product(a, b, add, **given) is add and torch.allclose(add, exact, rtol=1e-13, atol=1e-13)


def test_the_same_input_gives_the_same_bytes(device: torch.device) -> None:
    r, errors = operands(300, 129, 33, torch.float32, device)
    first, second = (torch.empty(129, 33, device=device) for _ in range(2))
    feedback(r, errors, first)
    feedback(r, errors, second)
    assert same_bytes(first, second)


@pytest.fixture
def precision() -> Iterator[Any]:
    """torch's settings for the precision of fp32 products, restored after the test."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


@pytest.mark.parametrize("is_cuda", [False, True], ids=["cpu", "cuda"])
@pytest.mark.parametrize("before", ["ieee", "tf32"])
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_tf32_is_on_only_for_this_product(is_cuda: bool, before: str, fails: bool, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def mm(*_: Any, **__: Any) -> None:
        seen.append(precision.fp32_precision)
        if fails:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "mm", mm)
    precision.fp32_precision = before
    try:
        feedback(torch.eye(2), SimpleNamespace(is_cuda=is_cuda), torch.eye(2))  # type: ignore[arg-type]
    except RuntimeError:
        assert fails
    assert seen == ["tf32" if is_cuda else before] and precision.fp32_precision == before


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_products_are_exact_where_they_must_be(before: str, precision: Any) -> None:
    """Whatever the calling program has set. The two kinds of contexts nest."""
    gpu: Any = SimpleNamespace(is_cuda=True)
    precision.fp32_precision = before
    with fp32_products(gpu, tf32=False):
        assert precision.fp32_precision == "ieee"
        with fp32_products(gpu, tf32=True):
            assert precision.fp32_precision == "tf32"
        assert precision.fp32_precision == "ieee"
    assert precision.fp32_precision == before


def test_the_older_flag_of_the_calling_program_is_respected(precision: Any) -> None:
    precision.allow_tf32 = True
    with fp32_products(SimpleNamespace(is_cuda=True), tf32=False):  # type: ignore[arg-type]
        assert precision.fp32_precision == "ieee"
    assert precision.fp32_precision == "tf32"
