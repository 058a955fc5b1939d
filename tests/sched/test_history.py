"""What is read of a job's record: never more than bigq's own errors, and nothing out of bounds, whatever the record says."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutate import mutate_json

import bigq
from bigq.config import JobConfig
from bigq.errors import BigqError
from bigq.html_report import MOST_ROWS, Pictures, render
from bigq.io.sealed import seal, unseal, write_sealed
from bigq.make_report import MAX_SQUARES, pictures_of
from bigq.model_card import model_card
from bigq.sched.evaluate import EvalConfig
from bigq.sched.history import MAX_BLOCKS, MAX_TEXT, read_history, text
from bigq.scheme import QuantScheme, Rule

pytestmark = pytest.mark.usefixtures("one_thread")

LINES = ("runs.jsonl", "journal.jsonl", "evaluations.jsonl")
NASTY = "</title><script>alert(1)</script>&\x00\x1b[31m\ud800$x^{"


@pytest.fixture(scope="module")
def finished(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    values: dict[str, Any] = {"scheme": QuantScheme(group_size=32), "calibration": str(ids_file), "samples": 4, "seqlen": 16, "quiet": True}
    bigq.quantize(str(checkpoint("llama")), out, JobConfig(**values, rules=(Rule(".*q_proj", None),)), command=["quantize"])
    bigq.evaluate(str(out), EvalConfig(data=str(ids_file), seqlen=16, samples=2, quiet=True))
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("*.safetensors")))


def lines(out: Path, name: str) -> list[dict[str, Any]]:
    found = [unseal(line, line=True) for line in (out / ".bigq" / name).read_bytes().splitlines(keepends=True)]
    return [value for value in found if value is not None]


def write_lines(out: Path, name: str, values: list[dict[str, Any]]) -> None:
    (out / ".bigq" / name).write_bytes(b"".join(seal(value, line=True) for value in values))


def change(value: Any, how: Callable[[Any], Any]) -> Any:
    """A JSON value with ``how`` done to its leaves."""
    if isinstance(value, dict):
        return {name: change(inner, how) for name, inner in value.items()}
    return [change(inner, how) for inner in value] if isinstance(value, list) else how(value)


@pytest.mark.parametrize("name", [*LINES, "job.json"])
def test_records_may_hold_anything(name: str, out: Path) -> None:
    """Sealed as they should be, by somebody who means ill."""
    rng = random.Random(f"history {name}")
    read = 0
    original = lines(out, name) if name in LINES else [unseal((out / ".bigq" / name).read_bytes()) or {}]
    for _ in range(120):
        values = [value if isinstance(value := mutate_json(rng, line), dict) else {"x": value} for line in original]
        try:
            if name in LINES:
                write_lines(out, name, values)
            else:
                write_sealed(out / ".bigq" / name, values[0])
        except (UnicodeEncodeError, ValueError, RecursionError):  # no JSON that a file could hold
            continue
        history = read_history(out)
        page = render(history, Pictures(None, None))
        assert page.endswith("</html>\n") and page.encode("utf-8", "replace")
        model_card(history, "")
        read += 1
    assert read > 90


@pytest.mark.parametrize("name", LINES)
def test_texts_from_records_stay_texts(name: str, out: Path) -> None:
    values = change(lines(out, name), lambda leaf: leaf + NASTY if isinstance(leaf, str) and leaf not in ("block-0", "finished") else leaf)
    for value in values:
        if name == "journal.jsonl":
            value["unit"], value["left_out"] = "block-0", [f"model.layers.0.{NASTY}"]
        if name == "evaluations.jsonl":
            value["weights"] = lines(out, name)[0]["weights"]
    write_lines(out, name, values)
    history = read_history(out)
    page = render(history, pictures_of(history))
    assert "alert(1)" in page and "\\x1b[31m" in page
    assert "<script" not in page and "\x00" not in page and "\x1b" not in page
    assert page.encode("utf-8"), "surrogates would stop it from being written"


def test_what_is_long_is_cut(out: Path) -> None:
    (run,) = lines(out, "runs.jsonl")
    small = {name: run[name] for name in ("at", "ended")}
    write_lines(out, "runs.jsonl", [*[small] * 1500, {**run, "notes": ["n" * 10**5] * 3, "model": "m" * 10**5}])
    history = read_history(out)
    assert len(history.runs) == 1000 and [len(note) for note in history.runs[-1].notes] == [MAX_TEXT] * 3
    page = render(history, Pictures(None, None))
    assert len(page) < 2_000_000 and "… and 800 more" in page
    assert len(text("\x00" * MAX_TEXT)) == MAX_TEXT


def test_more_blocks_than_any_model_has_are_cut(out: Path) -> None:
    commits = [line for line in lines(out, "journal.jsonl") if line["unit"] == "block-0"]
    many = [{**commits[0], "unit": f"block-{i}"} for i in range(MAX_BLOCKS + 50)]
    write_lines(out, "journal.jsonl", many)
    history = read_history(out)
    assert max(linear.block for linear in history.linears) == MAX_BLOCKS - 1
    pictures = pictures_of(history)
    assert pictures.cut and pictures.errors is not None and pictures.errors.count('<g id="heat-cell-') <= MAX_SQUARES
    page = render(history, pictures)
    assert "Not all blocks" in page and page.count("left as it is by --skip") < MOST_ROWS + MAX_BLOCKS


def test_without_what_newer_runs_record_there_is_a_page_all_the_same(out: Path) -> None:
    """As written before runs told how they ended."""
    kept = ("at", "host", "pid", "versions", "machine", "choice", "committed", "notes")
    write_lines(out, "runs.jsonl", [{name: run[name] for name in kept} for run in lines(out, "runs.jsonl")])
    history = read_history(out)
    assert history.runs[0].seconds is None and history.source_bytes is None and history.all_bits is None
    assert len(history.names) == 6, "those that were quantized"
    page = render(history, pictures_of(history))
    assert "No run has ended with a word on its time." in page and "not recorded" in page


@pytest.mark.parametrize("name", ["job.json", "runs.jsonl", "journal.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize("how", ["gone", "damaged", "huge", "folder"])
def test_records_that_are_not_there_or_not_sound(name: str, how: str, out: Path) -> None:
    path = out / ".bigq" / name
    data = path.read_bytes()
    path.unlink()
    if how == "damaged":
        path.write_bytes(re.sub(rb"\d", b"7", data))
    elif how == "huge":
        with open(path, "wb") as file:
            file.truncate(2**40)
    elif how == "folder":
        path.mkdir()
    error = None
    try:
        history = read_history(out)
    except BigqError as raised:
        error = str(raised)
    if error is not None:
        assert str(path) in error and "; " in error
    else:
        assert render(history, Pictures(None, None))
        assert history.damaged or how == "gone" or name == "evaluations.jsonl"
