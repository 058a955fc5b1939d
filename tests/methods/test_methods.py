"""The seam of methods: what each one promises, and a method of the test's own in a whole job."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES
from torch import Tensor

import bigq
from bigq.inspect.verify import verify
from bigq.methods import METHODS, method_of
from bigq.methods.base import CalibratedMethod, DataFreeMethod, Method
from bigq.methods.gptaq import Gptaq
from bigq.methods.gptq import Gptq
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme
from bigq.solver.gptq import quantize_linear
from bigq.solver.hessian import Reduction
from bigq.solver.rtn import round_to_nearest
from bigq.vocabulary import METHODS as NAMES

CPU = torch.device("cpu")


def made(name: Any) -> Method:
    return method_of(bigq.JobConfig(method=name))


def test_every_name_has_its_method() -> None:
    assert tuple(METHODS) == NAMES
    for name in NAMES:
        method = made(name)
        assert method.name == name and method.title and method.error_meaning
        assert isinstance(method, CalibratedMethod if method.calibrated else DataFreeMethod)


def test_gptq_solves_as_quantize_linear_does() -> None:
    """Two batches through the seam, against one Hessian by hand."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 50, 64, generator=generator), torch.randn(24, 64, generator=generator)
    collector = Gptq().collector(64, CPU, finite_only=False)
    for batch in x:
        collector.add(batch)
    scheme = QuantScheme(bits=4, group_size=32)
    got = collector.finish("l").factor(scheme, "l", last=True).solve([w], scheme, "l")[0]
    rows = x.reshape(-1, 64)
    expected = quantize_linear(w, 2 / len(rows) * rows.T @ rows, scheme)
    assert (got.codes == expected.codes).float().mean() > 0.999
    assert got.loss == pytest.approx(expected.loss, rel=1e-3)


def test_a_factor_that_is_not_the_last_leaves_the_sums_whole() -> None:
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    plain, act_order = QuantScheme(group_size=32), QuantScheme(group_size=32, act_order=True)

    def codes(schemes: list[QuantScheme]) -> Tensor:
        collector = Gptq().collector(32, CPU, finite_only=False)
        collector.add(x)
        solver = collector.finish("l")
        kinds: list[Hashable] = [solver.kind(scheme) for scheme in schemes]
        assert len(set(kinds)) == len(schemes)
        for scheme in schemes:
            weight = solver.factor(scheme, "l", last=scheme is schemes[-1]).solve([w], scheme, "l")[0]
        return weight.codes

    assert torch.equal(codes([plain]), codes([act_order, plain]))


def test_gptaq_wants_the_inputs_of_the_unquantized_model() -> None:
    collector = Gptaq(0.5).collector(32, CPU, finite_only=False)
    with pytest.raises(TypeError, match="unquantized"):
        collector.add(torch.ones(2, 32))
    assert isinstance(Gptaq(0.5).for_head(), Gptq)


class Shares(Reduction):
    """Two processes in one: what the first one brings waits for the second."""

    def __init__(self, other: list[Tensor], numbers: list[int]) -> None:
        self._other, self._numbers = other, numbers

    def tensor_(self, share: Tensor) -> None:
        share += self._other.pop(0)

    def number(self, share: int) -> int:
        return share + self._numbers.pop(0)


class Recorder(Reduction):
    """Notes one process's shares."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.numbers: list[int] = []

    def tensor_(self, share: Tensor) -> None:
        self.tensors.append(share.clone())

    def number(self, share: int) -> int:
        self.numbers.append(share)
        return share


@pytest.mark.parametrize("method", [Gptq(), Gptaq(0.5)], ids=lambda m: m.name)
def test_rows_shared_by_two_processes_solve_as_all_rows_do(method: CalibratedMethod) -> None:
    generator = torch.Generator().manual_seed(3)
    x, drift = torch.randn(6, 40, 64, generator=generator), 0.1 * torch.randn(6, 40, 64, generator=generator)
    w, scheme = torch.randn(24, 64, generator=generator), QuantScheme(bits=4, group_size=32)

    def collected(rows: list[int]) -> Any:
        collector = method.collector(64, CPU, finite_only=False)
        for row in rows:
            collector.add(x[row], x[row] + drift[row] if method.passes > 1 else None)
        return collector

    def solved(collector: Any) -> QuantizedWeight:
        weight: QuantizedWeight = collector.finish("l").factor(scheme, "l", last=True).solve([w], scheme, "l")[0]
        return weight

    whole = solved(collected([0, 1, 2, 3, 4, 5]))
    second = Recorder()
    collected([3, 4, 5]).reduce(second)
    first = collected([0, 1, 2])
    first.reduce(Shares(second.tensors, second.numbers))
    shared = solved(first)
    assert (shared.codes == whole.codes).float().mean() > 0.999
    assert shared.loss == pytest.approx(whole.loss, rel=1e-4)


class Halves(DataFreeMethod):
    """A method of the test's own: rounds half the weight."""

    name = "rtn"
    title = "half of the weight"
    error_meaning = "nothing"

    def quantize(self, weight: Tensor, scheme: QuantScheme, label: str) -> QuantizedWeight:
        return round_to_nearest(weight / 2, scheme, label)


@pytest.mark.parametrize("family", [next(iter(FAMILIES)), "llama"])
def test_a_new_method_is_one_class_and_one_line(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bigq.methods

    config = bigq.JobConfig(scheme=QuantScheme(group_size=32), method="rtn", device="cpu", quiet=True)
    bigq.quantize(str(checkpoint(family)), tmp_path / "plain", config)
    monkeypatch.setattr(bigq.methods, "METHODS", {**METHODS, "rtn": lambda config: Halves()})
    report = bigq.quantize(str(checkpoint(family)), tmp_path / "out", config)
    assert report.linears and verify(tmp_path / "out") == []
    plain, halved = (path.read_bytes() for path in ((tmp_path / name / "model-00002-of-00004.safetensors") for name in ("plain", "out")))
    assert plain != halved
