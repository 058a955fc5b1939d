"""The Python API: what ``bigq`` offers, arguments checked before anything is written, progress as a callback, data from Python."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_ids, save_ids
from tinyjob import hashes

import bigq
from bigq.config import JobConfig
from bigq.data.given import CalibrationData
from bigq.errors import BigqError, CalibrationError, UsageError
from bigq.infer.evaluate import EvalConfig
from bigq.job.journal import read_job
from bigq.progress.callback import CallbackDisplay, ProgressEvent
from bigq.progress.display import Display, Moment
from bigq.scheme import QuantScheme

pytestmark = pytest.mark.usefixtures("one_thread")

FUNCTIONS = (
    "convert",
    "evaluate",
    "generate",
    "load_model",
    "model_card",
    "plan",
    "quantize",
    "quantize_linear",
    "report",
    "status",
    "verify",
)


def job(calibration: Any, **changes: Any) -> JobConfig:
    values = {"scheme": QuantScheme(group_size=32), "samples": 4, "seqlen": 16, "batch": 4, "quiet": True, "device": "cpu"}
    return JobConfig(**{**values, "calibration": calibration, **changes})


# What the package offers.


def test_dir_shows_the_public_names_and_every_one_is_there() -> None:
    assert {*FUNCTIONS, "JobConfig", "QuantScheme", "EvalConfig", "ProgressEvent", "__version__"} <= {*dir(bigq)}
    assert {name for name in dir(bigq) if not name.startswith("__")} | {"__version__"} == {*bigq.__all__}
    for name in bigq.__all__:
        assert getattr(bigq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        bigq.quantise  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_documented(name: str) -> None:
    """With its arguments, what it returns, the errors that it raises, and an example."""
    function = getattr(bigq, name)
    text = inspect.getdoc(function) or ""
    assert "Returns " in text and "Raises " in text and ">>> " in text and f"bigq.{name}(" in text
    for argument in inspect.signature(function).parameters:
        assert argument in text or argument in ("out", "model", "trust_remote_code"), argument


def test_importing_and_listing_needs_no_torch() -> None:
    code = (
        "import sys, bigq; dir(bigq); bigq.quantize; bigq.status; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Arguments are checked before anything is written.


BAD: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "model": (lambda model, out: bigq.quantize(3, out), "model: must be a folder or a hub id, as a string or Path, not 3"),  # type: ignore[arg-type]
    "empty model": (lambda model, out: bigq.quantize("", out), "model: must be a folder"),
    "out": (lambda model, out: bigq.quantize(model, None), "out: must be a path, as a string or Path, not None"),  # type: ignore[arg-type]
    "config": (lambda model, out: bigq.quantize(model, out, {"bits": 4}), "config: must be a JobConfig, not dict"),  # type: ignore[arg-type]
    "progress": (lambda model, out: bigq.quantize(model, out, progress=True), "progress: must be a function, not True"),  # type: ignore[arg-type]
    "two displays": (lambda model, out: bigq.quantize(model, out, progress=print, display=Display()), "give one of them"),
    "command": (lambda model, out: bigq.quantize(model, out, command="quantize"), "command: must be a list of strings"),
    "calibration": (lambda model, out: bigq.quantize(model, out, job(3)), "calibration: an int is not calibration data; give a path"),
    "no such text": (lambda model, out: bigq.quantize(model, out, job(Path("/missing.txt"))), "--calibration /missing.txt: no such file"),
    "tokens": (lambda model, out: bigq.quantize(model, out, job(torch.rand(4, 16))), r"token ids must be integers \[N, T\] or \[T\]"),
    "plan": (lambda model, out: bigq.plan(model, out, on=3), "on: must be a string, not 3"),  # type: ignore[arg-type]
    "convert": (lambda model, out: bigq.convert(model, out, "gptq3"), "--to gptq3: must be one of"),
    "convert say": (lambda model, out: bigq.convert(model, out, "gptq", say="x"), "say: must be a function, not 'x'"),  # type: ignore[arg-type]
    "evaluate": (lambda model, out: bigq.evaluate(model, JobConfig()), "config: must be a EvalConfig, not JobConfig"),  # type: ignore[arg-type]
    "baseline": (lambda model, out: bigq.evaluate(model, baseline=b"x"), "baseline: must be a folder"),  # type: ignore[arg-type]
    "generate": (lambda model, out: bigq.generate(model, ["x"]), "prompt: must be a string, not list"),  # type: ignore[arg-type]
    "verify": (lambda model, out: bigq.verify(out, trust_remote_code=1), "trust_remote_code: must be True or False, not 1"),  # type: ignore[arg-type]
    "verify nothing": (lambda model, out: bigq.verify(out), "holds no job of bigq"),
    "status": (lambda model, out: bigq.status(out), "holds no job of bigq"),
    "report": (lambda model, out: bigq.report(out), "holds no job of bigq"),
    "card": (lambda model, out: bigq.model_card(out), "holds no job of bigq"),
    "load": (lambda model, out: bigq.load_model(model, packed="yes"), "packed: must be True or False, not 'yes'"),  # type: ignore[arg-type]
    "weight": (
        lambda model, out: bigq.quantize_linear([[1.0]], torch.eye(1), QuantScheme()),
        "weight: must be a matrix of a floating type",
    ),  # type: ignore[arg-type]
    "hessian": (
        lambda model, out: bigq.quantize_linear(torch.rand(8, 8), torch.eye(8).int(), QuantScheme()),
        r"hessian: must be a matrix of a floating type, not a Tensor of torch\.int32 \[8, 8\]",
    ),
    "scheme": (lambda model, out: bigq.quantize_linear(torch.rand(8, 8), torch.eye(8), 4), "scheme: must be a QuantScheme, not 4"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "said"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named_and_leave_nothing(
    call: Callable[[Any, Any], object], said: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(BigqError, match=said) as raised:
        call(checkpoint("llama"), tmp_path / "deep" / "out")
    assert "\n" not in str(raised.value) and not [*tmp_path.iterdir()]


def test_paths_are_strings_or_paths_and_the_home_is_expanded(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").symlink_to(checkpoint("llama"))
    config = job(ids_file, method="rtn")
    assert isinstance(config.calibration, str)
    bigq.quantize(Path("~/m"), "~/out", config)
    assert (tmp_path / "out" / "config.json").exists()
    assert bigq.plan("~/m", Path("~/out"), config).shortages == ()
    assert bigq.status("~/out").state == "finished" and bigq.verify(Path("~/out")) == []
    assert bigq.convert("~/out", Path("~/converted"), "gptq_v2").format_before == "gptq"
    assert bigq.verify("~/converted") == [] and bigq.status(Path("~/converted")).state == "finished"
    assert bigq.report("~/out") == tmp_path / "out-report.html" and bigq.report("~/converted", "~/r.html") == tmp_path / "r.html"
    assert bigq.model_card("~/out") == tmp_path / "out" / "README.md"
    assert bigq.evaluate(Path("~/out"), EvalConfig(data=ids_file, seqlen=16, samples=2, quiet=True), baseline="~/m").kl is not None  # type: ignore[arg-type]
    assert bigq.load_model(Path("~/out"), device="cpu") is not None
    codes = bigq.quantize_linear(torch.randn(16, 32), torch.eye(32), QuantScheme(group_size=32)).codes
    assert codes.shape == (16, 32)


# Progress as a callback.


def test_the_callback_gets_every_step(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[ProgressEvent] = []
    report = bigq.quantize(checkpoint("llama"), tmp_path / "out", job(ids_file, quiet=False), progress=seen.append)
    assert capfd.readouterr() == ("", ""), "nothing is printed beside it"
    kinds = [event.kind for event in seen if event.kind != "tick"]
    assert kinds[:2] == ["plan", "start"] and kinds[-1] == "done" and {"phase", "block"} <= {*kinds}
    assert seen[0].values["blocks"] == 3 and "plan" not in seen[0].values and seen[1].values["resumed_blocks"] == 0
    blocks = [event for event in seen if event.kind == "block"]
    assert [(event.block, event.blocks) for event in blocks] == [(1, 3), (2, 3), (3, 3)]
    assert blocks[0].values["worst_error"] > 0 and isinstance(blocks[0].values["worst_name"], str)
    assert [event.fraction for event in blocks] == sorted(event.fraction for event in blocks) and blocks[-1].fraction == 1.0
    assert blocks[-1].bytes_read == report.source_bytes and blocks[-1].host_bytes > 2**20 and blocks[-1].eta_seconds == 0
    assert seen[-1].values["output_bytes"] == report.output_bytes
    assert {event.phase for event in seen if event.kind == "phase" and event.block == 2} >= {"load", "solve"}
    with pytest.raises(AttributeError):
        seen[0].kind = "done"  # type: ignore[misc]
    with pytest.raises(TypeError):
        seen[0].values["x"] = 1  # type: ignore[index]


def test_the_callback_of_an_evaluation(checkpoint: Callable[[str], Path], ids_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[ProgressEvent] = []
    bigq.evaluate(checkpoint("llama"), EvalConfig(data=str(ids_file), seqlen=16, samples=2, device="cpu"), progress=seen.append)
    assert [event.block for event in seen if event.kind == "phase"] == [1, 2, 3] and capfd.readouterr() == ("", "")


def test_a_callback_that_raises_ends_no_job(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    calls: list[str] = []

    def failing(event: ProgressEvent) -> None:
        calls.append(event.kind)
        raise ValueError("mine")

    with pytest.warns(RuntimeWarning, match=r"progress callback raised ValueError\('mine'\)"):
        bigq.quantize(checkpoint("llama"), tmp_path / "out", job(ids_file), progress=failing)
    assert calls == ["plan"] and (tmp_path / "out" / "config.json").exists()


def test_ticks_come_from_another_thread_while_a_block_takes_long() -> None:
    from bigq.progress.progress import Progress

    threads = []
    display = CallbackDisplay(lambda event: threads.append(threading.get_ident()) if event.kind == "tick" else None)
    display.period = 0.01
    waited = threading.Event()
    with Progress(3, torch.device("cpu"), display=display):
        waited.wait(0.3)
    assert threads and threading.get_ident() not in threads


def test_warnings_and_notes_are_events() -> None:
    seen: list[ProgressEvent] = []
    display = CallbackDisplay(seen.append)
    display.open(Moment(blocks=5))
    display.say("warning: careful")
    display.say("by the way")
    display.event("checkpoint", block=2, blocks=5)
    display.event("unknown to this version")
    display.error(3, "DataError", "is raised too")
    assert [(event.kind, event.message, event.block) for event in seen] == [
        ("warning", "careful", None),
        ("note", "by the way", None),
        ("checkpoint", "", 2),
    ]
    assert all(event.blocks == 5 for event in seen)


def test_an_interrupt_in_the_callback_stops_the_job(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    def interrupting(event: ProgressEvent) -> None:
        if event.kind == "block" and event.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bigq.quantize(checkpoint("llama"), tmp_path / "out", job(ids_file), progress=interrupting)
    assert bigq.status(tmp_path / "out").state == "stopped"
    seen: list[ProgressEvent] = []
    bigq.quantize(checkpoint("llama"), tmp_path / "out", job(ids_file), progress=seen.append)
    assert next(event for event in seen if event.kind == "start").values["resumed_blocks"] == 1


# Calibration data from Python: the bytes are those of the same data in a file.


@pytest.fixture(scope="module")
def from_file(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("file")
    save_ids(folder / "ids.safetensors", random_ids())
    bigq.quantize(checkpoint("llama"), folder / "out", job(folder / "ids.safetensors"))
    return hashes(folder / "out")


class Rows:
    """As a ``datasets.Dataset`` is used: it has a length and gives a mapping per row, as often as it is asked."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows, self.passes = rows, 0

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.passes += 1
        yield from self._rows


TOKENS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda ids: ids,
    "int32": lambda ids: ids.int(),
    "array": lambda ids: ids.numpy(),
    "lists": lambda ids: ids.tolist(),
    "list of tensors": lambda ids: [*ids],
    "mapping": lambda ids: {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    "dataset": lambda ids: Rows([{"input_ids": row} for row in ids.tolist()]),
    "iterator": lambda ids: ({"input_ids": row} for row in ids),
    "longer rows": lambda ids: torch.cat([ids, ids], 1),
}


@pytest.mark.parametrize("given", TOKENS.values(), ids=TOKENS)
def test_the_same_tokens_make_the_same_bytes(
    given: Callable[[torch.Tensor], Any], from_file: dict[str, str], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    bigq.quantize(checkpoint("llama"), tmp_path / "out", job(given(random_ids())))
    assert hashes(tmp_path / "out") == from_file
    record = read_job(tmp_path / "out")
    assert record is not None and record["settings"]["calibration"] == "(given in Python)" and len(record["calibration_tokens"]) == 64
    assert bigq.verify(tmp_path / "out") == []


def test_such_a_job_resumes_with_the_same_data_only(checkpoint: Callable[[str], Path], tmp_path: Path, from_file: dict[str, str]) -> None:
    def interrupting(event: ProgressEvent) -> None:
        if event.kind == "block":
            raise KeyboardInterrupt

    out, ids = tmp_path / "out", random_ids()
    with pytest.raises(KeyboardInterrupt):
        bigq.quantize(checkpoint("llama"), out, job(ids), progress=interrupting)
    with pytest.raises(
        UsageError, match=r"was given in Python, and no file holds it; resume it in Python, by bigq\.quantize with"
    ) as raised:
        bigq.quantize(checkpoint("llama"), out)
    assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match=r"calibration.*tokens"):
        bigq.quantize(checkpoint("llama"), out, job(ids.flip(0)))
    bigq.quantize(checkpoint("llama"), out, job(ids))
    assert hashes(out) == from_file


def test_reports_say_that_the_data_was_given(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    bigq.quantize(checkpoint("llama"), tmp_path / "out", job(random_ids()))
    card = bigq.model_card(tmp_path / "out").read_text(encoding="utf-8")
    assert "--calibration DATA " in card and "`DATA` stands for the calibration data, which was given in Python" in card
    assert "4 × 16 tokens of data given in Python" in bigq.report(tmp_path / "out").read_text(encoding="utf-8")


def test_an_evaluation_takes_the_same_data(checkpoint: Callable[[str], Path], ids_file: Path) -> None:
    values = {"seqlen": 16, "samples": 3, "device": "cpu", "quiet": True}
    expected = bigq.evaluate(checkpoint("llama"), EvalConfig(data=str(ids_file), **values))  # type: ignore[arg-type]
    for data in (random_ids(), Rows([{"input_ids": row} for row in random_ids()])):
        assert bigq.evaluate(checkpoint("llama"), EvalConfig(data=data, **values)) == expected  # type: ignore[arg-type]


def test_no_warning_of_torch_reaches_the_user() -> None:
    """Read-only arrays make torch warn."""
    array = random_ids().numpy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert job(array).calibration == "(given in Python)"


def test_data_that_changes_afterwards_changes_no_config() -> None:
    ids = random_ids()
    config = job(ids)
    ids.zero_()
    assert isinstance(config.calibration, CalibrationData) and config.calibration.tokens is not None
    assert torch.equal(config.calibration.tokens, random_ids())


def test_data_of_two_kinds_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="item 1 is a text, but the first item holds token ids"):
        bigq.quantize(checkpoint("llama"), tmp_path / "out", job([[5] * 16, "text"]))
    assert not (tmp_path / "out").exists()
