"""What --calibration names: files, patterns and texts by name, mixes by weight; and the same rows as before for what there was."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from models import save_ids
from texts import ids_of, save_lines, tokenizer_folder, words
from torch import Tensor

from bigq.calibration import calibration_rows, evaluation_rows, foretell, read_calibration
from bigq.data import spec
from bigq.data.spec import HUB_TEXTS, Part, absolute, is_named, parts_of, shares, without_folders
from bigq.errors import CalibrationError, UsageError

TINY = ROOT / "bigq/assets/tiny-llama"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of documents, each of tokens of one kind: a: 20, b: 21, c: 22 and 23."""
    monkeypatch.chdir(tmp_path)
    for name, token in (("a.jsonl", 20), ("b.txt", 21), ("c-1.jsonl", 22), ("c-2.jsonl", 23)):
        save_lines(tmp_path / name, [{"text": words([token] * 40)}] * 50)
    return tmp_path


def counts(source: str, model: Path, samples: int = 10, **changes: Any) -> dict[int, int]:
    """How many rows hold each token."""
    rows = calibration_rows(source, model, samples=samples, seqlen=16, seed=changes.pop("seed", 0), **changes)
    assert len(rows) == samples
    return dict(Counter(rows[:, 0].tolist()))


# The rows of what could be named before are those of before: hashes of what the code made then.

OLD = {
    ("builtin", 0): "90e688099f258708",
    ("builtin", 7): "663c0af4bb9cdbca",
    ("text", 0): "064265e5c41f16d4",
    ("text", 7): "85239ec01ed46ef7",
    ("jsonl", 0): "a122d6fd4204be48",
    ("jsonl", 7): "9d5b1733ec892a0f",
}
OLD_EVALUATION = {
    "builtin": ("91bed36ff78dcdcb", "42e80645a28c3676"),
    "text": ("dd7adaaf8a767f40", "d3872e9cb51e9c66"),
    "jsonl": ("028c1ed1d667fa06", "3c63413609de2a8c"),
}


def digest(rows: Tensor) -> str:
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def old_texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("old")
    lines = [line for line in (ROOT / "bigq/assets/calibration.txt").read_text().splitlines() if line.strip()]
    documents = ["\n".join(lines[i : i + 6]) for i in range(0, len(lines), 6)]
    save_lines(folder / "t.jsonl", [{"text": text, "n": i} for i, text in enumerate(documents)])
    (folder / "t.txt").write_text("\n".join(lines[::-1]))
    return {"builtin": "builtin", "text": str(folder / "t.txt"), "jsonl": str(folder / "t.jsonl")}


@pytest.mark.parametrize(("name", "seed"), OLD)
def test_the_rows_are_those_of_before(name: str, seed: int, old_texts: dict[str, str]) -> None:
    assert digest(calibration_rows(old_texts[name], TINY, samples=24, seqlen=64, seed=seed)) == OLD[name, seed]


@pytest.mark.parametrize("name", OLD_EVALUATION)
def test_the_rows_of_evaluation_are_those_of_before(name: str, old_texts: dict[str, str]) -> None:
    whole, first = (evaluation_rows(old_texts[name], TINY, seqlen=96, samples=samples) for samples in (None, 5))
    assert (digest(whole), digest(first)) == OLD_EVALUATION[name]


# Several.


def test_several_texts_give_rows_in_equal_numbers(folder: Path, model: Path) -> None:
    assert counts("a.jsonl,b.txt", model) == {20: 5, 21: 5}
    assert counts("a.jsonl, b.txt,c-1.jsonl", model) == {20: 4, 21: 3, 22: 3}
    assert counts(f"{folder}/a.jsonl,{folder}/b.txt", model) == {20: 5, 21: 5}


def test_weights_decide_how_many_rows_each_gives(folder: Path, model: Path) -> None:
    assert counts("a.jsonl:0.7,b.txt:0.3", model) == {20: 7, 21: 3}
    assert counts("a.jsonl:70,b.txt:30", model) == {20: 7, 21: 3}
    assert counts("a.jsonl:1e3,b.txt:1e3,c-1.jsonl:1000", model, 128) == {20: 43, 21: 43, 22: 42}


def test_each_part_of_a_mix_gives_the_rows_that_it_gives_alone(folder: Path, model: Path) -> None:
    save_lines(folder / "a.jsonl", [{"text": words(ids_of(30, 30 * i))} for i in range(60)])
    mixed, alone = (
        calibration_rows(source, model, samples=n, seqlen=16, seed=5) for source, n in (("a.jsonl:3,b.txt:1", 8), ("a.jsonl", 6))
    )
    assert torch.equal(mixed[:6], alone) and mixed[6:].unique().tolist() == [21]
    again, other = (calibration_rows("a.jsonl:3,b.txt:1", model, samples=8, seqlen=16, seed=seed) for seed in (5, 6))
    assert torch.equal(mixed, again) and not torch.equal(mixed, other)


def test_a_pattern_is_one_text_of_all_its_files(folder: Path, model: Path) -> None:
    found = counts("c-*.jsonl", model, 40)
    assert set(found) == {22, 23} and min(found.values()) > 8
    assert counts("a.jsonl:0.5,c-*.jsonl:0.5", model)[20] == 5
    for name in ("x-1.txt", "x-2.txt"):
        (folder / name).write_text(words([30 + int(name[2])] * 48))
    assert evaluation_rows("x-*.txt", model, seqlen=16, samples=None)[:, 0].tolist() == [31] * 3 + [32] * 3
    save_ids(folder / "x-3.txt", torch.full((4, 16), 9))
    with pytest.raises(CalibrationError, match=r"x-\*\.txt: matches files of text and of token ids; name them apart"):
        counts("x-*.txt", model)


@pytest.mark.parametrize("name", ["a,b.jsonl", "a.jsonl:0.7", "c4:0.7,builtin:0.3", "*.jsonl", "[x].txt", "c4,"])
def test_an_existing_file_of_exactly_that_name_comes_first(name: str, folder: Path, model: Path) -> None:
    save_lines(folder / name, [{"text": words([40] * 40)}] * 50)
    assert counts(name, model) == {40: 10}
    assert counts(f"{name},b.txt", model) == {40: 5, 21: 5}
    assert counts(f"b.txt:0.2,{name}:0.8", model) == {40: 8, 21: 2}
    assert absolute(name) == str(folder / name)


def test_token_ids_in_a_mix(folder: Path, model: Path) -> None:
    save_ids(folder / "ids", torch.full((8, 20), 9))
    assert counts("ids:1,a.jsonl:1", model) == {9: 5, 20: 5}


def test_evaluation_takes_all_rows_of_several(folder: Path, model: Path) -> None:
    rows = evaluation_rows("a.jsonl,b.txt", model, seqlen=100, samples=None)
    assert Counter(rows[:, 0].tolist()) == {20: 20, 21: 20}
    assert Counter(evaluation_rows("a.jsonl,b.txt", model, seqlen=100, samples=23)[:, 0].tolist()) == {20: 20, 21: 3}
    assert len(evaluation_rows("a.jsonl,b.txt", model, seqlen=100, samples=3)) == 3
    with pytest.raises(UsageError, match="takes no weights, since all rows count equally"):
        evaluation_rows("a.jsonl:1,b.txt:2", model, seqlen=100, samples=3)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a.jsonl:0.5,b.txt", "gives weights to some texts only"),
        ("a.jsonl:0,b.txt:1", "the weight 0 of a.jsonl must be a number above 0"),
        ("a.jsonl:-1,b.txt:1", "the weight -1 of a.jsonl must be"),
        ("a.jsonl:nan,b.txt:1", "the weight nan of a.jsonl must be"),
        ("a.jsonl:1e999,b.txt:1", "the weight 1e999 of a.jsonl must be"),
        ("a.jsonl,,b.txt", "has an empty name"),
        ("a.jsonl,b.txt,", "has an empty name"),
        ("a.jsonl,a.jsonl", "names a.jsonl twice"),
        (",".join(["x"] * 200), "names more than 100 texts"),
    ],
)
def test_a_mix_that_means_nothing_is_refused(source: str, said: str, folder: Path, model: Path) -> None:
    with pytest.raises(UsageError, match=said):
        counts(source, model)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a.jsonl,absent.txt", "--calibration absent.txt: no such file; give a text, JSONL, parquet or safetensors file, or one of c4, "),
        ("a.jsonl:0.5,wikitext:0.5", "--calibration wikitext: no such file.* did you mean wikitext2?"),
        ("d-*.jsonl", r"--calibration d-\*\.jsonl: no such file"),
        ("sub", r"--calibration sub: no such file \(it is a folder\)"),
    ],
)
def test_what_is_missing_is_named(source: str, said: str, folder: Path, model: Path) -> None:
    (folder / "sub").mkdir()
    with pytest.raises(CalibrationError, match=said):
        counts(source, model)


# Advice, followed.


def advised(message: str) -> dict[str, int]:
    """The values of --samples and --seqlen that a message ends with."""
    end = message.rpartition("use ")[2]
    return {name: int(value) for name, value in re.findall(r"--(samples|seqlen) (\d+)", end)}


@pytest.mark.parametrize("tokens", [*range(24), 100, 1000])
@pytest.mark.parametrize("kind", ["text", "documents", "ids", "long ids", "given"])
def test_advice_about_short_texts_works(kind: str, tokens: int, folder: Path, model: Path) -> None:
    ids = ids_of(tokens)
    source: Any = str(folder / "t")
    if kind == "text":
        (folder / "t").write_text(words(ids))
    elif kind == "documents":
        save_lines(folder / "t", [{"text": words(ids[:9])}, {"text": words(ids[9:])}])
    elif kind == "given":
        from bigq.data.given import calibration_source

        source = calibration_source([words(ids)], "calibration")
    else:
        save_ids(folder / "t", torch.tensor([ids] if kind == "long ids" else [ids, ids], dtype=torch.int64))
    settings: dict[str, Any] = {"samples": 6, "seqlen": 512, "seed": 0}
    for _ in range(2):
        with pytest.raises(CalibrationError) as error:
            calibration_rows(source, model, **settings)
        change = advised(str(error.value))
        if not change:
            assert tokens < 2 and "give more" in str(error.value)
            return
        if tokens < 512:
            assert change.get("seqlen", 0) >= 1, "fewer rows than one do not help"
            assert re.search(rf"\b{tokens}\b", str(error.value)), "says how many tokens there are"
        assert min(change.values()) > 0
        settings |= change
        if len(calibration_rows(source, model, **settings)) == settings["samples"]:
            return
    raise AssertionError("the advice does not work")


@pytest.mark.parametrize("tokens", [1, 2, 9, 99])
def test_advice_about_short_texts_works_for_evaluation(tokens: int, folder: Path, model: Path) -> None:
    (folder / "t").write_text(words(ids_of(tokens)))
    with pytest.raises(CalibrationError, match=rf"has {tokens} tokens, which is less than one row of 512") as error:
        evaluation_rows(str(folder / "t"), model, seqlen=512, samples=None)
    change = advised(str(error.value))
    assert change.get("seqlen") == (tokens if tokens > 1 else None)
    if change:
        assert len(evaluation_rows(str(folder / "t"), model, seqlen=change["seqlen"], samples=None)) == 1


@pytest.mark.parametrize("weights", [(1, 1), (4, 1), (1, 9)])
@pytest.mark.parametrize("documents", [0, 1, 2, 10])
def test_advice_about_a_short_part_of_a_mix_works(documents: int, weights: tuple[int, int], folder: Path, model: Path) -> None:
    save_lines(folder / "few", [{"text": words([30] * 16)}] * documents)
    (folder / "few").write_text((folder / "few").read_text() or "w3")
    source = f"a.jsonl:{weights[0]},few:{weights[1]}"
    with pytest.raises(CalibrationError, match=r"few: has .* as its share of 100") as error:
        counts(source, model, 100)
    change = advised(str(error.value))
    if not change:
        assert documents < 3 and str(error.value).endswith("or leave it out")
        assert counts("a.jsonl", model, 100) == {20: 100}
        return
    settings: dict[str, Any] = {"samples": 100, "seqlen": 16, "seed": 0, **change}
    assert len(calibration_rows(source, model, **settings)) == settings["samples"]


def test_a_part_without_rows_is_refused_with_advice_that_works(folder: Path, model: Path) -> None:
    with pytest.raises(CalibrationError, match=r"b\.txt gets none of the 10 rows; use --samples (\d+)") as error:
        counts("a.jsonl:0.97,b.txt:0.03", model)
    assert counts("a.jsonl:0.97,b.txt:0.03", model, advised(str(error.value))["samples"])[21] == 1


def test_shares_add_up() -> None:
    for samples in range(1, 60):
        for weights in (("",) * 3, ("1", "2", "4"), ("0.1", "0.1", "0.8"), ("5", "3", "3")):
            found = shares([Part(text=str(i), weight=weight) for i, weight in enumerate(weights)], samples)
            exact = [samples * float(weight or 1) / sum(float(w or 1) for w in weights) for weight in weights]
            assert sum(found) == samples and all(abs(a - b) < 1 for a, b in zip(found, exact, strict=True))


# Names in records.


def test_a_specification_means_the_same_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    source = "a.jsonl:0.7,c-*.jsonl:0.2,builtin:0.1"
    there = absolute(source)
    assert there == f"{folder}/a.jsonl:0.7,{folder}/c-*.jsonl:0.2,builtin:0.1"
    expected = calibration_rows(source, TINY, samples=20, seqlen=16, seed=0)
    monkeypatch.chdir(ROOT)
    assert absolute(there) == there
    assert torch.equal(calibration_rows(there, TINY, samples=20, seqlen=16, seed=0), expected)
    assert without_folders(there) == source
    for name in spec.NAMED_TEXTS:
        assert absolute(name) == name == without_folders(name)
    assert absolute("absent.txt") == os.path.abspath("absent.txt")
    assert without_folders("/a,b/c,d.txt,/e/f.txt:0.5") == "c,d.txt,f.txt:0.5"


def test_names_and_files_are_told_apart(folder: Path) -> None:
    assert is_named("c4") and is_named("c4:0.7,builtin:0.3") and not is_named("a.jsonl") and not is_named("c4,a.jsonl")
    assert not is_named("absent") and not is_named("c4,,") and not is_named(spec.GIVEN)
    (folder / "code").write_text("w3")
    assert [part.files for part in parts_of("code", "")] == [(Path("code"),)] and not is_named("code")


# What a plan says.


def made(source: str, model: Path, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {"samples": 4, "seqlen": 16, "seed": 0, "text_field": None, "vocabulary": 128, **changes}
    return [each.text() for each in foretell(source, model, **settings)]


def test_a_plan_counts_what_is_here(folder: Path, model: Path, tmp_path: Path) -> None:
    assert made("a.jsonl", model) == ["a.jsonl: 4 rows from 280 tokens of 7 documents"]
    assert made("a.jsonl:3,b.txt:1", model) == [
        "a.jsonl: 3 rows from 200 tokens of 5 documents",
        "b.txt: 1 rows from 80 tokens of 2 documents",
    ]
    assert made("builtin", TINY)[0].startswith("builtin: 4 rows from ") and made("builtin", TINY)[0].endswith(" tokens of one text")
    save_ids(folder / "ids", torch.full((8, 20), 9))
    (folder / "no-tokenizer").mkdir()
    assert made("ids", folder / "no-tokenizer") == ["ids: 4 rows of 128 token ids"]
    with pytest.raises(CalibrationError, match="use --samples 125"):
        made("a.jsonl", model, samples=1000)


def test_a_plan_says_what_it_did_not_read(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, text in HUB_TEXTS.items():
        assert made(name, model) == [f"{name}: is not fetched yet; the job fetches {text.file} of {text.repository}"]
    assert made("c4:0.5,a.jsonl:0.5", model)[1] == "a.jsonl: is here; counted when the job begins"
    assert made("absent.txt", model) == ["absent.txt: no such file here"]
    (folder / "empty").mkdir()
    assert made("a.jsonl", folder / "empty") == ["a.jsonl: is here; not counted, as the model's tokenizer is not here"]
    monkeypatch.setattr("bigq.calibration.MAX_FORETOLD", 100)
    assert re.fullmatch(r"a\.jsonl: is here, [\d.]+ \w+; rows are drawn when the job begins", made("a.jsonl", model)[0])


def test_what_was_made_is_json(folder: Path, model: Path) -> None:
    found = read_calibration("a.jsonl,b.txt", model, samples=4, seqlen=16, seed=0).made
    assert json.loads(json.dumps([each.to_json() for each in found]))[1] == {
        "label": "b.txt",
        "kind": "documents",
        "rows": 2,
        "tokens": 160,
        "documents": 4,
        "conversations": 0,
        "note": "",
        "chat_template": False,
    }
