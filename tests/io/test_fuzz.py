"""Mutated shards, indexes, configs and texts: whatever they hold, bigq's own errors and memory in proportion.

``scripts/fuzz.py`` has the readers, what they are fed and what they promise. Files in ``tests/corpus/KIND`` once broke one.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Child
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(ROOT / "scripts"))

from fuzz import KINDS, Kind, Tally, feed, fuzz, mutated
from mutate import mutate_bytes, mutate_json

CORPUS = sorted((ROOT / "tests" / "corpus").glob("*/*"))
#: Inputs that one example of hypothesis feeds; examples of each kind; both make 3,000 inputs over all kinds.
INPUTS, EXAMPLES = 10, 3000 // 10 // len(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files_break_no_reader(name: str) -> None:
    counted = 0

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**32 - 1))
    def run(seed: int) -> None:
        nonlocal counted
        tally = fuzz(KINDS[name], INPUTS, seed)
        assert tally.broken == []
        counted += tally.inputs

    run()
    assert counted >= INPUTS * EXAMPLES // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_hundred_thousand_mutated_files_break_no_reader(name: str) -> None:
    tally = fuzz(KINDS[name], 100_000 // len(KINDS), 1)
    assert tally.broken == []
    assert 0 < tally.accepted < tally.inputs and sum(tally.errors.values()) + tally.accepted == tally.inputs
    assert tally.inputs / tally.seconds > 1000


@pytest.mark.parametrize("name", KINDS)
def test_the_files_that_are_mutated_are_valid(name: str, tmp_path: Path) -> None:
    kind, tally = KINDS[name], Tally()
    kind.prepare(tmp_path)
    for seed in kind.seeds:
        assert feed(kind, tmp_path / kind.name, seed, tally) is None
        assert feed(kind, tmp_path / kind.name, kind.pack(kind.unpack(seed), seed), tally) is None
    assert tally.accepted == 2 * len(kind.seeds) and not tally.errors


@pytest.mark.parametrize("file", CORPUS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_that_once_broke_a_reader_are_refused(file: Path, tmp_path: Path) -> None:
    kind, tally = KINDS[file.parent.name], Tally()
    kind.prepare(tmp_path)
    assert feed(kind, tmp_path / kind.name, file.read_bytes(), tally) is None
    assert tally.accepted == 0


def broken_by(read: object) -> list[str]:
    config = KINDS["config"]
    return fuzz(Kind(config.seeds, read, config.name, config.pack, config.unpack), 50, 0).broken  # type: ignore[arg-type]


def test_the_fuzzer_detects_each_kind_of_violation() -> None:
    """A reader that raises another exception, one with an unprintable message, one that allocates too much memory."""
    from bigq.errors import CheckpointError

    def says(path: Path) -> None:
        raise CheckpointError(f"{path}: \x1b[31m")

    def hides_the_name(path: Path) -> None:
        raise CheckpointError("something is wrong")

    assert any("JSONDecodeError" in b or "UnicodeDecodeError" in b for b in broken_by(lambda path: json.loads(path.read_text())))
    assert len(broken_by(says)) == len(broken_by(hides_the_name)) == 50
    assert len(broken_by(lambda path: bytearray(2**23))) == 50
    assert broken_by(lambda path: path.read_bytes()) == []


def test_a_seed_gives_the_same_inputs_again() -> None:
    def some(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [mutated(rng, kind) for kind in KINDS.values() for _ in range(50)]

    assert some(1) == some(1) != some(2)


def test_mutations_change_what_they_are_given_and_keep_the_original() -> None:
    rng = random.Random(0)
    value = {"a": [1, 2, {"b": "text"}], "c": None}
    copies = [json.dumps(mutate_json(rng, value)) for _ in range(300)]
    assert value == {"a": [1, 2, {"b": "text"}], "c": None}
    assert len(set(copies)) > 150
    data = bytes(range(100))
    assert len({mutate_bytes(rng, data) for _ in range(300)}) > 250
    assert all(isinstance(mutate_bytes(rng, b""), bytes) for _ in range(100))


def test_the_script_writes_its_figures(child: Child, tmp_path: Path) -> None:
    done = child(ROOT / "scripts/fuzz.py", "--inputs", "200", "--out", tmp_path / "fuzz.json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "fuzz.json").read_text())
    assert result["inputs"] >= 200 and result["broken"] == 0 and set(result["kinds"]) == set(KINDS)
    assert "kinds / header / peak_bytes" in done.stdout
