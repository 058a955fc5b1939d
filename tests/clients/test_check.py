"""The driver that has other programs read bigq's output, with a reader that is no program's: what it keeps, and what it calls a failure."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from models import decode, stored_tensors
from safetensors.torch import load_file

sys.path.append(str(ROOT / "scripts" / "clients"))

import check
import client_gptqmodel
from cases import Case, Client, dequantized, prepare

from bigq.io.formats.gptq import Gptq, GptqV2

READER = """
import json, sys
results, *folders = sys.argv[1:]
for folder in folders:
    name = folder.rpartition("/")[2]
    for route in json.load(open(folder + "/case.json"))["routes"]:
        open(results, "a").write(json.dumps({"case": name, "route": route, "bad": name in BAD}) + "\\n")
print("chatter")
print(json.dumps({"versions": {"reader": "1"}}))
"""


def case(name: str, *flags: str) -> Case:
    return Case(name=name, family="llama", flags=("--group-size", "32", *flags), reader={"routes": ["a", "b"]})


@pytest.fixture
def venvs(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--clients")
    if folder is None:
        pytest.skip("needs --clients DIR")
    return Path(folder).resolve()


@pytest.fixture
def make_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(check, "HERE", tmp_path)
    (tmp_path / "venvs/fake/bin").mkdir(parents=True)
    (tmp_path / "venvs/fake/bin/python").symlink_to(sys.executable)
    (tmp_path / "work").mkdir()

    def make(bad: tuple[str, ...] = (), limits: dict[str, str] | None = None) -> Client:
        (tmp_path / "reader.py").write_text(READER.replace("BAD", repr(bad)))
        cases = (case("one"), case("two", "--asym", "--format", "gptq_v2"))
        return Client(name="fake", reader="reader.py", cases=cases, fails=lambda row: "bad" if row["bad"] else None, limits=limits or {})

    return make


def run(client: Client, tmp_path: Path) -> dict[str, Any]:
    return check.check(client, client.cases, tmp_path / "venvs", tmp_path / "work")


def test_rows_are_kept_and_what_was_read_is_not_read_again(make_client: Any, tmp_path: Path) -> None:
    result = run(make_client(), tmp_path)
    assert [(row["case"], row["route"]) for row in result["rows"]] == [("one", "a"), ("one", "b"), ("two", "a"), ("two", "b")]
    assert result["unexpected"] == [] and result["versions"] == {"reader": "1"} and result["read_as_they_should_be"] == 4
    made = (tmp_path / "work/one/out/config.json").stat().st_mtime_ns
    (tmp_path / "reader.py").write_text("raise SystemExit(1)")
    assert run(make_client(), tmp_path)["rows"] == result["rows"]
    assert (tmp_path / "work/one/out/config.json").stat().st_mtime_ns == made
    assert len((tmp_path / "work/rows.jsonl").read_text().splitlines()) == 4


def test_a_failure_is_unexpected_unless_it_is_a_known_limit_and_so_is_a_limit_that_is_none(make_client: Any, tmp_path: Path) -> None:
    assert run(make_client(bad=("two",)), tmp_path)["unexpected"] == ["a/two", "b/two"]
    assert run(make_client(bad=("two",), limits={"^a/two$": "why"}), tmp_path)["unexpected"] == ["b/two"]
    result = run(make_client(bad=("two",), limits={"two": "why", "^a/one$": "no longer"}), tmp_path)
    assert result["unexpected"] == ["a/one"] and result["limits_of_the_reader"] == 2


def test_a_reader_that_ends_badly_ends_the_check(make_client: Any, tmp_path: Path) -> None:
    client = make_client()
    (tmp_path / "reader.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="status 3"):
        run(client, tmp_path)


def test_what_a_client_must_find_is_what_the_format_says(tmp_path: Path) -> None:
    """expected.safetensors comes from bigq's own reading; the tests' independent decoder must say the same."""
    folder = prepare(case("one", "--bits", "3", "--asym"), tmp_path)
    tensors, expected = stored_tensors(folder / "out"), load_file(folder / "expected.safetensors")
    names = [name for name, _ in dequantized(folder / "out")]
    assert len(names) == 21 and sorted(names) == json.loads((folder / "case.json").read_text())["packed"]
    for name in names:
        assert torch.equal(expected[f"weight.{name}"], decode(tensors, name, 3).weight(torch.float32)), name
    assert expected["logits"].shape == (*expected["ids"].shape, 128) and torch.isfinite(expected["logits"]).all()


def test_a_mistake_that_packing_and_reading_share_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero points packed as they are into v1 are one more for every reader, bigq and clients alike."""
    store = Gptq.store
    monkeypatch.setattr(Gptq, "store", lambda _, *arguments: store(GptqV2(), *arguments))
    with pytest.raises(SystemExit, match=r"q_proj is read back \d\.\d times as far from its source"):
        prepare(case("one", "--asym"), tmp_path)


def test_the_settings_cover_every_pair() -> None:
    for runs, levels in ((client_gptqmodel.full(), 3), (client_gptqmodel.covering((-1, 32)), 2)):
        assert len(runs) == len(set(runs))
        for i, j in itertools.combinations((0, 2, 3, 4), 2):
            values = [set(column) for column in zip(*runs, strict=True)]
            assert {(run[i], run[j]) for run in runs} == set(itertools.product(values[i], values[j]))
        assert len({run[1] for run in runs}) == levels


GOOD = {"route": "transformers", "missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "linears": 21, "linears_expected": 21}
GOOD |= {"weights_equal": 21, "logits_rel_diff": 1e-7}
TRAINED = {"route": "peft", "losses": [2.0, 1.0], "lora_parameters": 4, "lora_parameters_with_gradient": 4, "base_unchanged": True}


@pytest.mark.parametrize(
    "change",
    [
        {"error": "ValueError: no"},
        {"missing_keys": ["a"]},
        {"unexpected_keys": ["a"]},
        {"mismatched_keys": ["a"]},
        {"linears": 20},
        {"weights_equal": 20},
        {"logits_rel_diff": 1e-3},
        {"logits_rel_diff": float("nan")},
        {"losses": [1.0, 1.0]},
        {"losses": [1.0, float("nan"), 0.5]},
        {"lora_parameters_with_gradient": 3},
        {"base_unchanged": False},
    ],
    ids=str,
)
def test_every_way_of_reading_wrongly_is_a_failure(change: dict[str, Any]) -> None:
    assert client_gptqmodel.fails(GOOD) is None and client_gptqmodel.fails(GOOD | TRAINED) is None
    assert client_gptqmodel.fails(GOOD | TRAINED | change)


def test_the_table_in_the_docs_is_of_all_cases_and_holds_nothing_unexpected() -> None:
    result = json.loads((ROOT / "docs/results/clients_gptqmodel.json").read_text())
    rows = {(row["case"], row["route"]): row for row in result["rows"]}
    client = client_gptqmodel.CLIENT
    assert set(rows) == {(c.name, route) for c in client.cases for route in c.reader["routes"]}
    assert len({c.name for c in client.cases}) == len(client.cases) and result["unexpected"] == []
    for c in client.cases:
        for route in c.reader["routes"]:
            row = rows[c.name, route]
            assert row["flags"] == " ".join(c.flags) and client.fails(row) == row["fails"] and check.limit_of(client, row) == row["limit"]
            assert (row["fails"] is None) == (row["limit"] is None)


@pytest.mark.clients
@pytest.mark.parametrize("name", sorted(check.find_clients()))
def test_a_client_reads_what_bigq_writes(name: str, venvs: Path, tmp_path: Path) -> None:
    """A few of its cases, each with all their routes; ``scripts/clients/check.py`` goes through all of them."""
    client = check.find_clients()[name]
    chosen = client.cases[:: max(1, len(client.cases) // 12)]
    result = check.check(dataclasses.replace(client, cases=chosen), chosen, venvs, tmp_path)
    assert result["rows"] and result["unexpected"] == [], [row for row in result["rows"] if row["fails"] and not row["limit"]]
    assert "bigq" not in os.listdir(next((venvs / client.home / "lib").glob("python*")) / "site-packages")
