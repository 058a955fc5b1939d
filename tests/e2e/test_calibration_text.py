"""Calibration text in whole jobs: what plans and records say of it, what a resumed job may change, evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from texts import ids_of, save_lines, tokenizer_folder, words
from tinyjob import hashes

from bigq.cli.main import main
from bigq.inspect.history import read_history
from bigq.job.journal import read_job

SIZES = ["--samples", "8", "--seqlen", "16", "--group-size", "32", "--device", "cpu"]
CONVERSATIONS = [
    [{"role": "user", "content": words(ids_of(9, 20 * i))}, {"role": "assistant", "content": words(ids_of(11, 70 * i))}] for i in range(20)
]


@pytest.fixture
def chat_model(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny llama with a tokenizer that has a chat template."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    tokenizer_folder(folder, bos=True, chat=True)
    return folder


@pytest.fixture
def mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path / "texts")
    save_lines(Path("chat.jsonl"), [{"messages": each, "body": words(ids_of(30, i))} for i, each in enumerate(CONVERSATIONS)])
    Path("plain.txt").write_text(words(ids_of(900)))
    return "chat.jsonl:0.75,plain.txt:0.25"


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_the_plan_and_the_records_say_what_was_made(
    chat_model: Path, mix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [("chat.jsonl", 6, 20, 20), ("plain.txt", 2, None, 0)]

    def said(text: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        assert [each["chat_template"] for each in text] == [True, False]
        return [(each["label"], each["rows"], each["documents"] and 20, each["conversations"] and 20) for each in text]

    out = tmp_path / "out"
    assert run("plan", chat_model, out, "--calibration", mix, "--json", *SIZES) == 0
    planned = json.loads(capsys.readouterr().out)["text"]
    assert said(planned) == expected
    assert run("plan", chat_model, out, "--calibration", mix, *SIZES) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"text: chat.jsonl: 6 rows from {planned[0]['tokens']} tokens of {planned[0]['conversations']} conversations by the chat template"
        in shown
    )
    assert "plain.txt: 2 rows from 900 tokens of one text" in shown.replace("901", "900")
    assert run("quantize", chat_model, out, "--calibration", mix, *SIZES) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "text: chat.jsonl: 6 rows from" in shown and "conversations by the chat template" in shown
    (line,) = (out / ".bigq/runs.jsonl").read_text().splitlines()[:1]
    assert json.loads(line)["text"] == planned
    # Elsewhere, and by the records alone, it is the same job; the card names no folder of this machine.
    monkeypatch.chdir("/")
    before = hashes(out)
    assert run("quantize", chat_model, out, "--device", "cpu") == 0
    assert "is finished already" in capsys.readouterr().err and hashes(out) == before
    assert run("report", out, "--model-card") == 0
    card = (out / "README.md").read_text()
    assert f"`{mix}`" in card and f"--calibration {mix}" in card and str(tmp_path) not in card
    assert read_history(out).config is not None


def test_a_job_resumes_with_its_text_and_refuses_another(
    chat_model: Path, mix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed field, mix, weight or template changes the rows, whose hash is kept."""
    out = tmp_path / "out"
    command = ["quantize", chat_model, out, *SIZES]
    assert run(*command, "--calibration", "chat.jsonl", "--text-field", "body") == 0
    job = read_job(out)
    assert job is not None and job["settings"]["text_field"] == "body"
    whole = hashes(out)

    def broken() -> None:
        """The job, with its last shard to be made again."""
        for path in sorted(out.glob("model-*"))[-1:]:
            path.unlink()

    broken()
    monkeypatch.chdir("/")
    assert run("quantize", chat_model, out, "--device", "cpu") == 0
    assert hashes(out) == whole
    monkeypatch.chdir(tmp_path / "texts")
    broken()
    capsys.readouterr()
    for changed in (
        ["--calibration", "chat.jsonl", "--text-field", "messages"],
        ["--calibration", "chat.jsonl:1,plain.txt:1"],
        ["--calibration", "plain.txt"],
    ):
        assert run(*command, *changed) == 2
        assert "--calibration: the hash of the text's tokens was" in capsys.readouterr().err
    save_lines(Path("same.txt"), [json.loads(line) for line in Path("chat.jsonl").read_text().splitlines()])
    assert run(*command, "--calibration", "same.txt", "--text-field", "body") == 0
    assert hashes(out) == whole


def test_a_changed_chat_template_is_refused(chat_model: Path, mix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["quantize", chat_model, out, *SIZES, "--calibration", mix]
    assert run(*command) == 0
    sorted(out.glob("model-*"))[-1].unlink()
    template = chat_model / "chat_template.jinja"
    template.write_text(template.read_text().replace("w11", "w14"))
    capsys.readouterr()
    assert run(*command) == 2
    assert "--calibration: the hash of the text's tokens was" in capsys.readouterr().err


def test_evaluation_reads_the_same_formats(chat_model: Path, mix: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    command = ["eval", chat_model, "--seqlen", "16", "--device", "cpu", "--json"]
    Path("array.txt").write_text(json.dumps([{"conversations": each} for each in CONVERSATIONS]))
    for data in (["chat.jsonl"], ["array.txt"], ["chat.jsonl", "--text-field", "messages"]):
        assert run(*command, "--data", *data) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2]
    assert run(*command, "--data", "chat.jsonl", "--text-field", "body") == 0
    assert json.loads(capsys.readouterr().out) != found[0]
    assert run(*command, "--data", "chat.jsonl,plain.txt") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == found[0]["tokens"] + 900 // 16 * 15


def test_a_missing_text_is_refused_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigq.sched.resolve.plan_before_fetch", lambda *_: pytest.fail("the hub was asked"))
    assert run("quantize", "owner/name", tmp_path / "out", "--calibration", tmp_path / "absent.txt", *SIZES) == 3
    assert "absent.txt: no such file" in capsys.readouterr().err


def test_a_field_has_no_effect_on_texts_by_name(chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", chat_model, tmp_path / "out", "--text-field", "body", *SIZES) == 0
    assert "note: --text-field: no effect on texts by name" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [20, 30])
def test_advice_about_a_short_text_works_in_a_job(
    chat_model: Path, tokens: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t").write_text(words(ids_of(tokens - 1)))
    command = ["quantize", chat_model, tmp_path / "out", "--calibration", tmp_path / "t", "--group-size", "32", "--device", "cpu"]
    assert run(*command, "--samples", "10", "--seqlen", "64") == 3
    error = capsys.readouterr().err
    assert f"({tokens} tokens in all)" in error and error.strip().endswith(f"use --seqlen {tokens // 10}")
    assert run(*command, "--samples", "10", "--seqlen", tokens // 10) == 0
