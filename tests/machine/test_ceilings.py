"""Measured rates, and what measuring them leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from bigq.machine import ceilings
from bigq.machine.ceilings import measure


def test_rates_of_a_cpu_are_above_zero_and_of_the_host_s_memory() -> None:
    found = measure(torch.device("cpu"), torch.bfloat16)
    assert min(found.products, found.correcting, found.single, found.hessian, found.copy) > 0 and found.memory == 0
    assert found.correcting == found.single, "a CPU has no TF32"


@dataclass
class FakeCpu:
    """Products take operations / rate seconds, on a clock that only they move."""

    rate: dict[torch.dtype, float]
    now: float = 0.0
    sides: list[int] = field(default_factory=list)

    def mm(self, a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        self.sides.append(len(a))
        self.now += 2 * len(a) ** 3 / self.rate[a.dtype]
        return out

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.mark.parametrize(("rate", "largest"), [(1e12, 1024), (3e10, 1024), (1e9, 256), (5e7, 64)])
def test_a_cpu_without_fp16_products_is_measured_quickly(rate: float, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is that of the largest products that are quick enough."""
    cpu = FakeCpu({torch.float16: rate, torch.float32: 1e11})
    monkeypatch.setattr(torch, "mm", cpu.mm)
    monkeypatch.setattr(ceilings.time, "perf_counter", cpu.perf_counter)
    slow = ceilings._products(torch.device("cpu"), torch.float16, 1024)
    assert slow == pytest.approx(rate, rel=0.1) and max(cpu.sides) == largest
    assert cpu.now < 0.5
    assert measure(torch.device("cpu"), torch.float16).single == pytest.approx(1e11, rel=0.1)


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
