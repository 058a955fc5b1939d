"""Measured rates, and what measuring them leaves behind."""

from __future__ import annotations

import pytest
import torch

from bigq.machine.ceilings import measure


def test_rates_of_a_cpu_are_above_zero_and_of_the_host_s_memory() -> None:
    found = measure(torch.device("cpu"), torch.bfloat16)
    assert min(found.products, found.correcting, found.single, found.copy) > 0 and found.memory == 0
    assert found.correcting == found.single, "a CPU has no TF32"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_caller_s_precision_of_fp32_products_is_kept(precision: str) -> None:
    """And torch refuses to read its older flag once the caller has set the newer one."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        found = measure(torch.device("cuda:0"), torch.bfloat16)
        assert matmul.fp32_precision == precision
        assert found.correcting > found.single, "one of the two was measured with the other's precision"
    finally:
        matmul.fp32_precision = before
