"""An evaluation by several processes: its figures are the bits of one process, one that dies ends them all, and the first one speaks."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from models import make_checkpoint, random_ids, save_ids
from rank_processes import LIMIT, Together, start
from rank_threads import ThreadRanks, together

import bigq
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.infer.options import EvalConfig
from bigq.infer.together import Share, share_of
from bigq.scheme import QuantScheme

#: Seven rows in batches of two: two and two for two processes, one and one and two for three, and the last batch has one row.
ROWS, BATCH = 7, 2
#: Seconds in which all processes end once one is gone.
MOST = 60.0


class Case:
    """A small model, what round-to-nearest makes of it, and rows."""

    def __init__(self, folder: Path, family: str) -> None:
        self.model = make_checkpoint(folder / "m", family, num_hidden_layers=2)
        self.ids = save_ids(folder / "ids.safetensors", random_ids())
        self.out = folder / "out"
        config = JobConfig(method="rtn", scheme=QuantScheme(bits=3, group_size=32), device="cpu", quiet=True)
        bigq.quantize(str(self.model), self.out, config)

    def words(self, *more: object) -> list[object]:
        """Of an evaluation of the quantized model against the original."""
        rows = ["--data", self.ids, "--samples", ROWS, "--seqlen", 24, "--batch", BATCH]
        return ["eval", self.out, *rows, "--baseline", self.model, "--device", "cpu", *more]

    def records(self) -> list[dict[str, object]]:
        path = self.out / ".bigq/evaluations.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("dense"), "llama")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("experts"), "mixtral")


def result(made: Together) -> dict[str, float]:
    """What the first process prints with --json --quiet, alone."""
    assert made.ended() == [0] * len(made.processes), made.texts
    first, *others = made.texts
    assert first.count("\n") == 1 and not any(others), made.texts
    found: dict[str, float] = json.loads(first)
    return found


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_figures_are_those_of_one_process(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Bit for bit, with a baseline: the batches are those of one process, and sums are by row."""
    case: Case = request.getfixturevalue(kind)
    words = case.words("--json", "--quiet")
    alone = result(start(1, words, tmp_path / "alone"))
    before = case.records()
    for count in (2, 3):
        assert result(start(count, words, tmp_path / str(count))) == alone
    assert alone["tokens"] == ROWS * 23 and alone["kl"] > 0 and alone["kl_stderr"] > 0
    added = case.records()[len(before) :]
    assert [record["processes"] for record in added] == [2, 3] and "processes" not in before[-1]
    assert [{name: record[name] for name in alone} for record in added] == [alone, alone]


def test_perplexity_alone_and_what_is_shown(dense: Case, tmp_path: Path) -> None:
    """An original model, in bf16. The first process alone speaks."""
    words = ["eval", dense.model, "--data", dense.ids, "--seqlen", 24, "--batch", 5, "--device", "cpu", "--dtype", "bfloat16"]
    alone, shared = (start(count, words, tmp_path / str(count)) for count in (1, 2))
    assert alone.ended() == [0] and shared.ended() == [0, 0], (alone.texts, shared.texts)
    assert shared.texts == [*alone.texts, ""]
    assert "perplexity" in shared.texts[0] and "reading" in shared.texts[0]


def test_a_killed_process_ends_the_evaluation(dense: Case, tmp_path: Path) -> None:
    before, began = dense.records(), time.monotonic()
    made = start(2, dense.words("--json"), tmp_path / "logs", {1: "batch.begun:3"})
    assert made.ended(MOST) == [75, -signal.SIGKILL], made.texts
    assert time.monotonic() - began < MOST
    line = made.texts[0].splitlines()[-1]
    assert f"rank 1 of 2 on {os.uname().nodename} " in line and line.endswith("; run the same command again")
    assert "{" not in made.texts[0] and "Traceback" not in made.texts[0]
    assert dense.records() == before


@pytest.mark.parametrize("signalled", [1, pytest.param(0, marks=pytest.mark.long)])
def test_all_end_where_one_is_asked_to_stop(signalled: int, dense: Case, tmp_path: Path) -> None:
    """The second process while it computes; or the first one while it waits for the second, which sleeps."""
    before = dense.records()
    seconds = 2 if signalled == 1 else 40
    made = start(2, dense.words("--json"), tmp_path / "logs", {1: f"batch.begun:3:sleep={seconds}"})
    until = time.monotonic() + LIMIT
    while not (tmp_path / f"logs/{signalled}.met").exists():
        assert time.monotonic() < until, made.texts
        time.sleep(0.02)
    if signalled == 0:
        time.sleep(5)  # until it has nothing left to do
    pid = made.processes[signalled].pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    assert made.ended(MOST) == [75, 75], made.texts
    assert "SIGTERM" in made.texts[signalled] and made.texts[signalled].endswith("; run the same command again\n")
    assert f"rank {signalled} of 2 " in made.texts[1 - signalled]
    assert dense.records() == before


def test_an_error_of_one_process_is_that_of_all(dense: Case, tmp_path: Path) -> None:
    """Several processes cannot halve the batch by themselves: the others have other rows."""
    made = start(2, dense.words("--json"), tmp_path / "logs", {1: "batch.begun:2:OOM"})
    assert made.ended(MOST) == [4, 4], made.texts
    assert "rank 1: the device is out of memory with --batch 2" in made.texts[1] and "with --batch 1" in made.texts[1]
    assert "rank 1 of 2 on " in made.texts[0] and "has ended" in made.texts[0] and "{" not in made.texts[0]


def test_processes_that_evaluate_something_else_are_refused(dense: Case, tmp_path: Path) -> None:
    own = ["--seqlen", 16, "--baseline", dense.out]
    made = start(2, dense.words(), tmp_path / "logs", own={1: own})
    assert made.ended(MOST) == [2, 2], made.texts
    for text in made.texts:
        assert "rank 1 of 2: its --baseline and tokens and settings.seqlen differ from those of rank 0; start all" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", 1], "2 processes share its rows, and each needs at least one, but there is 1 of 24 tokens; start at most 1, or"),
        (["--batch", 4, "--samples", 4], "--batch 4: 2 processes share the batches, but 4 rows are only 1; give --batch 2 or less, or"),
    ],
)
def test_each_process_needs_a_batch(more: list[object], message: str, dense: Case, tmp_path: Path) -> None:
    made = start(2, dense.words(*more), tmp_path / "logs")
    assert made.ended(MOST) == [2, 2], made.texts
    assert message in made.texts[0]


def share(ranks: ThreadRanks, rows: int, batch: int | None = None) -> Share:
    return share_of(EvalConfig(batch=batch), "cpu", (rows, 256), ranks)


@pytest.mark.parametrize(("rows", "batch", "given"), [(100, 8, None), (16, 5, None), (9, 3, 3), (3, 1, 1), (1000, 7, 7)])
def test_shares_are_whole_batches(rows: int, batch: int, given: int | None) -> None:
    """The batch is the default one, or as large as leaves one for each process; of 100 rows, four batches of eight fall to each."""
    shares = [found for found in together(3, lambda ranks: share(ranks, rows, given)) if isinstance(found, Share)]
    assert [row for found in shares for row in found.rows] == list(range(rows))
    assert {found.batch for found in shares} == {batch} and all(found.rows.start % batch == 0 for found in shares)
    batches = [-(-len(found.rows) // batch) for found in shares]
    assert min(batches) > 0 and max(batches) - min(batches) <= 1


def test_batches_that_do_not_suffice_and_the_advice() -> None:
    def refused(ranks: ThreadRanks) -> int:
        with pytest.raises(UsageError, match="give --batch 2 or less"):
            share(ranks, 8, 4)
        with pytest.raises(UsageError, match="there are 2 of 256 tokens; start at most 2"):
            share(ranks, 2)
        return len(share(ranks, 8, 2).rows)

    assert together(3, refused) == [2, 2, 4]
    assert together(2, lambda ranks: len(share(ranks, 2).rows)) == [1, 1]
