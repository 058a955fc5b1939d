"""The seam of methods: what each one promises, and a method of the test's own in a whole job."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import FAMILIES
from torch import Tensor

import bigq
import bigq.methods
import bigq.options
import bigq.scheme
from bigq.cli.main import main
from bigq.inspect.history import read_history
from bigq.inspect.verify import verify
from bigq.methods import METHODS, method_of
from bigq.methods.base import CalibratedMethod, DataFreeMethod, Method
from bigq.methods.gptaq import Gptaq
from bigq.methods.gptq import Gptq
from bigq.options import table
from bigq.quantized_weight import QuantizedWeight
from bigq.reports.html import render
from bigq.reports.html_quality import Pictures
from bigq.reports.markdown import plain
from bigq.reports.model_card import model_card
from bigq.scheme import QuantScheme
from bigq.solver.gptq import quantize_linear
from bigq.solver.hessian import Reduction
from bigq.solver.rtn import round_to_nearest
from bigq.vocabulary import DATA_FREE_METHODS
from bigq.vocabulary import METHODS as NAMES

CPU = torch.device("cpu")


def made(name: Any) -> Method:
    return method_of(bigq.JobConfig(method=name))


def test_every_name_has_its_method() -> None:
    assert tuple(METHODS) == NAMES
    assert tuple(name for name in NAMES if not made(name).calibrated) == DATA_FREE_METHODS
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
    plain, act_order = QuantScheme(group_size=32, order="natural"), QuantScheme(group_size=32, order="activation")

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

    triangle_ = tensor_

    def number(self, share: int) -> int:
        return share + self._numbers.pop(0)


class Recorder(Reduction):
    """Notes one process's shares."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.numbers: list[int] = []

    def tensor_(self, share: Tensor) -> None:
        self.tensors.append(share.clone())

    triangle_ = tensor_

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

    name: ClassVar[Any] = "halves"
    title = "half of the *weight*"
    error_meaning = "How far half of a weight is from the weight."
    formats = ("gptq", "gptq_v2")

    def quantize(self, weight: Tensor, scheme: QuantScheme, label: str) -> QuantizedWeight:
        return round_to_nearest(weight / 2, scheme, label)


class Again(Gptq):
    """A calibrated method of the test's own."""

    name: ClassVar[Any] = "again"
    title = "GPTQ under another name"
    error_meaning = "What GPTQ calls the error."


@pytest.fixture
def new_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both methods of the test's own, where a new one is entered: its name and its line."""
    options = table(bigq.JobConfig)
    method = dataclasses.replace(options["method"], choices=(*NAMES, "halves", "again"))
    monkeypatch.setitem(bigq.options._tables, bigq.JobConfig, {**options, "method": method})
    monkeypatch.setattr(bigq.methods, "METHODS", {**METHODS, "halves": lambda config: Halves(), "again": lambda config: Again()})
    monkeypatch.setattr(bigq.scheme, "DATA_FREE_METHODS", (*DATA_FREE_METHODS, "halves"))


def weights(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(out.glob("*.safetensors"))]


@pytest.mark.usefixtures("new_methods")
@pytest.mark.parametrize("family", [next(iter(FAMILIES)), "llama"])
def test_a_new_method_is_one_class_and_one_line(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, page = str(checkpoint(family)), tmp_path / "out", tmp_path / "page.html"
    words = ["--group-size", "32", "--device", "cpu", "--samples", "4"]
    bigq.quantize(source, tmp_path / "plain", bigq.JobConfig(scheme=QuantScheme(group_size=32), method="rtn", device="cpu", quiet=True))
    assert main(["quantize", source, str(out), "--method", "halves", *words]) == 0
    told = capsys.readouterr().err
    assert "--samples: no effect with --method" in told and "no calibration" in told and Halves.title in told
    assert verify(out) == [] and weights(out) != weights(tmp_path / "plain")

    assert main(["report", str(out), "--out", str(page), "--model-card"]) == 0
    text, card = page.read_text(), (out / "README.md").read_text()
    assert Halves.error_meaning in text and "tokens of" not in text and "more damping" not in text
    assert f"| method | {plain(Halves.title)} |" in card and Halves.error_meaning in card
    assert "--method halves" in card and "calibration" not in card and "damping" not in card

    capsys.readouterr()
    assert main(["plan", source, "--method", "halves", "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 0
    assert main(["plan", source, "--method", "halves", *words]) == 0
    assert "no calibration" in (shown := capsys.readouterr().out) and Halves.title in shown


@pytest.mark.usefixtures("new_methods")
def test_a_new_calibrated_method_is_reported_as_one(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    out, scheme = tmp_path / "out", QuantScheme(group_size=32)
    method: Any = "again"
    config = bigq.JobConfig(
        scheme=scheme, calibration=str(ids_file), samples=4, seqlen=16, batch=4, device="cpu", quiet=True, method=method
    )
    bigq.quantize(str(checkpoint("llama")), out, config)
    bigq.quantize(str(checkpoint("llama")), tmp_path / "gptq", dataclasses.replace(config, method="gptq"))
    assert weights(out) == weights(tmp_path / "gptq")
    history = read_history(out)
    text, card = render(history, Pictures(errors=None, time=None)), model_card(history, "")
    assert "again, true-sequential, damping 0.01" in text and "4 × 16 tokens" in text and Again.error_meaning in text
    assert f"| method | {Again.title} |" in card and "| damping | 0.01 |" in card and Again.error_meaning in card
    assert "--method again" in card and "--alpha" not in card


@pytest.mark.usefixtures("new_methods")
@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_a_format_that_a_method_cannot_fill_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the model is opened: this folder holds a config alone."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    folders = [str(tmp_path / "m"), *([str(tmp_path / "out")] if command == "quantize" else [])]
    assert main([command, *folders, "--method", "halves", "--format", "compressed-tensors", "--device", "cpu"]) == 2
    message = "--format compressed-tensors: halves writes gptq, gptq_v2; use --format gptq\n"
    assert capsys.readouterr().err.endswith(message) and not (tmp_path / "out").exists()


def test_a_record_of_a_method_that_is_gone_is_reported_with_its_name(
    checkpoint: Callable[[str], Path], tmp_path: Path, new_methods: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, method = tmp_path / "out", "halves"
    config = bigq.JobConfig(scheme=QuantScheme(group_size=32), method=method, device="cpu", quiet=True)  # type: ignore[arg-type]
    bigq.quantize(str(checkpoint("llama")), out, config)
    monkeypatch.setattr(bigq.methods, "METHODS", METHODS)  # the name is still known
    history = read_history(out)
    assert history.config is not None and "halves" in render(history, Pictures(errors=None, time=None))
    assert "| method | halves |" in model_card(history, "")
    monkeypatch.undo()  # the name is not known either, as in another version
    history = read_history(out)
    assert history.config is None and "--method halves" in render(history, Pictures(errors=None, time=None))
    assert "quantized with bigq" in model_card(history, "")
