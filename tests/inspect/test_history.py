"""What is read of a job's record: never more than bigq's own errors, and nothing out of bounds, whatever the record says."""

from __future__ import annotations

import os
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
from bigq.infer.evaluate import EvalConfig
from bigq.inspect.bounds import MAX_NUMBER, MAX_TEXT, text
from bigq.inspect.evaluations import record_evaluation
from bigq.inspect.history import read_history
from bigq.inspect.linear_results import MAX_BLOCKS
from bigq.io.checksum import save_record, seal, unseal
from bigq.reports.html import render
from bigq.reports.html_quality import MOST_ROWS, Pictures
from bigq.reports.model_card import model_card
from bigq.reports.write import MAX_SQUARES, pictures_of
from bigq.scheme import QuantScheme, Rule

pytestmark = pytest.mark.usefixtures("one_thread")

LINES = ("runs.jsonl", "journal.jsonl", "evaluations.jsonl")
NASTY = "</title><script>alert(1)</script>&\x00\x1b[31m\ud800$x^{"


@pytest.fixture(scope="module")
def finished(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    values: dict[str, Any] = {"scheme": QuantScheme(group_size=32), "calibration": str(ids_file), "samples": 4, "seqlen": 16, "quiet": True}
    bigq.quantize(str(checkpoint("llama")), out, JobConfig(**values, rules=(Rule(".*o_proj", None),)), command=["quantize"])
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
                save_record(out / ".bigq" / name, values[0])
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


@pytest.mark.parametrize("absurd", [10**400, 1e308, float("inf"), float("nan"), -1, True, "1", None, [1]], ids=str)
def test_numbers_that_cannot_be_are_unknown(absurd: Any, out: Path) -> None:
    """And are told as such, by page, pictures and card."""
    (run,), (evaluation,) = lines(out, "runs.jsonl"), lines(out, "evaluations.jsonl")
    run["ended"] |= {"seconds_by_phase": {"solve": absurd, "load": absurd, "write": 1.0}, "waiting": {"x": absurd}}
    write_lines(out, "runs.jsonl", [run, {**run, "ended": {**run["ended"], "seconds": absurd}}])
    write_lines(out, "evaluations.jsonl", [{**evaluation, **dict.fromkeys(("kl", "baseline_perplexity", "top1_agreement"), absurd)}])
    history = read_history(out)
    assert [set(each.by_phase) for each in history.runs] == [{"write"}] * 2 and history.runs[1].seconds is None
    (judged,) = history.evaluations
    assert judged.kl is judged.baseline_perplexity is judged.top1_agreement is None and judged.perplexity == evaluation["perplexity"]
    assert render(history, pictures_of(history)) and model_card(history, "")


@pytest.mark.parametrize(
    ("perplexity", "told"),
    [
        (10**400, "over 1e12"),
        (1e308, "over 1e12"),
        (float("inf"), "over 1e12"),
        (MAX_NUMBER, "1e+12"),
        (-1.0, None),
        ("5", None),
        (True, None),
    ],
    ids=str,
)
def test_a_perplexity_may_be_beyond_all_bounds_but_must_be_one(perplexity: Any, told: str | None, out: Path) -> None:
    (evaluation,) = lines(out, "evaluations.jsonl")
    write_lines(out, "evaluations.jsonl", [{**evaluation, "perplexity": perplexity, "baseline": "x", "baseline_perplexity": 5.0}])
    history = read_history(out)
    page, card = render(history, Pictures(None, None)), model_card(history, "")
    assert len(history.evaluations) == (told is not None)
    assert ("Not evaluated" in page) == ("## Results" not in card) == (told is None)
    assert told is None or (told in page and told in card)


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
    assert "Not all blocks" in page and 0 < page.count("skipped by --skip") < MOST_ROWS + MAX_BLOCKS


def test_without_what_newer_runs_record_there_is_a_page_all_the_same(out: Path) -> None:
    """As written before runs told how they ended."""
    kept = ("at", "host", "pid", "versions", "machine", "choice", "committed", "notes")
    write_lines(out, "runs.jsonl", [{name: run[name] for name in kept} for run in lines(out, "runs.jsonl")])
    history = read_history(out)
    assert history.runs[0].seconds is None and history.source_bytes is None and history.all_bits is None
    assert len(history.names) == 6, "those that were quantized"
    page = render(history, pictures_of(history))
    assert "No run has recorded its time yet." in page and "not recorded" in page


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


def test_the_baseline_is_the_source_only_where_records_say_so(out: Path, tmp_path: Path) -> None:
    (run,), (evaluation,) = lines(out, "runs.jsonl"), lines(out, "evaluations.jsonl")
    write_lines(out, "runs.jsonl", [{**run, "model": "owner/name", "folder": "/cache/snapshot"}])

    def of_source(**told: str) -> bool:
        write_lines(out, "evaluations.jsonl", [{**evaluation, **told}])
        return read_history(out).evaluations[0].of_source

    assert of_source(baseline="owner/name") and of_source(baseline="/cache/snapshot/")
    assert of_source(baseline="../snapshot", baseline_folder="/cache/snapshot")
    assert not of_source(baseline="owner/name", baseline_folder="/here/owner/name"), "a folder that is called like it"
    assert not of_source(baseline="snapshot") and not of_source(baseline="owner/other") and not of_source()


def test_the_place_of_a_baseline_is_recorded(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "m").mkdir(parents=True)
    os.symlink(tmp_path / "models" / "m", tmp_path / "link")
    monkeypatch.chdir(tmp_path / "models")
    for baseline in ("m", str(tmp_path / "link"), "owner/name", None):
        record_evaluation(out, {"baseline": baseline})
    told = [line.get("baseline_folder") for line in lines(out, "evaluations.jsonl")[1:]]
    assert told == [str((tmp_path / "models" / "m").resolve())] * 2 + [None] * 2
