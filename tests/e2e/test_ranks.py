"""Jobs of several processes: the bytes depend on their number alone, a dead one ends them all, and the job goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from models import make_checkpoint, random_ids, save_ids
from rank_processes import LIMIT, start

from bigq.infer.evaluate import EvalConfig, evaluate

BLOCKS = 3
#: Seconds in which all processes end once one is gone.
MOST = 60.0


class Case:
    """A small model and its rows, and what undisturbed jobs make of them."""

    def __init__(self, folder: Path, family: str = "llama") -> None:
        self.folder = folder
        self.model = make_checkpoint(folder / "m", family, num_hidden_layers=BLOCKS)
        self.ids = save_ids(folder / "ids.safetensors", random_ids())

    def words(self, out: Path, *more: str) -> list[object]:
        rows = ["--calibration", self.ids, "--samples", "8", "--seqlen", "24", "--batch", "3"]
        return ["quantize", self.model, out, *rows, "--group-size", "32", "--device", "cpu", "--quiet", "--checkpoint-every", "0", *more]

    def whole(self, count: int, *more: str) -> Path:
        """The output of an undisturbed job."""
        out = self.folder / "-".join(["whole", str(count), *(word.strip("-") for word in more)])
        if not out.exists():
            made = start(count, self.words(out, *more), self.folder / f"logs-{out.name}")
            assert made.ended() == [0] * count, made.texts
        return out


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("experts"), "mixtral")


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def journal(out: Path) -> list[dict[str, object]]:
    path = out / ".bigq/journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("method", ["gptq", pytest.param("gptaq", marks=pytest.mark.long)])
def test_the_bytes_depend_on_the_number_of_processes_alone(count: int, method: str, case: Case, tmp_path: Path) -> None:
    more = ["--method", method, "--activations", "disk", "--lm-head"]
    out = case.whole(count, *more)
    again = start(count, case.words(tmp_path / "again", *more), tmp_path / "logs")
    assert again.ended() == [0] * count
    assert hashes(tmp_path / "again") == hashes(out)
    assert not any(again.texts), "quiet jobs say nothing"
    alone = case.whole(1, *more)
    assert hashes(alone).keys() == hashes(out).keys()
    assert [line["tensors"] for line in journal(alone)] == [line["tensors"] for line in journal(out)]
    how = EvalConfig(data=str(case.ids), seqlen=24, samples=8, dtype="float32", device="cpu", quiet=True)
    kl = [evaluate(str(folder), how, baseline=str(case.model)).kl for folder in (alone, out)]
    assert kl[1] == pytest.approx(kl[0], rel=0.1)


@pytest.mark.parametrize("method", ["gptq", pytest.param("gptaq", marks=pytest.mark.long)])
def test_experts_are_dealt_out(method: str, experts: Case, tmp_path: Path) -> None:
    """Three at once of four, so one of two processes has nothing to do in every second batch. One of them is killed among them."""
    more = ["--method", method, "--order", "natural", "--scales", "minmax", "--sweeps", "0", "--experts-at-once", "3"]
    more += ["--skip", ".*self_attn"]  # else a code that a last bit decides moves the inputs of experts
    out, whole = tmp_path / "out", experts.whole(2, *more)
    made = start(2, experts.words(out, *more), tmp_path / "logs", {1: "expert.solved:5"})
    assert sorted(made.ended(MOST)) == [-signal.SIGKILL, 75], made.texts
    done = start(2, experts.words(out, *more), tmp_path / "again")
    assert done.ended() == [0, 0], done.texts
    assert hashes(out) == hashes(whole)
    alone, shared = ([one for line in journal(folder) for one in line["linears"]] for folder in (experts.whole(1, *more), whole))  # type: ignore[attr-defined]
    assert [one["name"] for one in alone] == [one["name"] for one in shared]
    of_first = [pair for pair in zip(alone, shared, strict=True) if "layers.0.block_sparse_moe.experts" in pair[0]["name"]]
    assert len(of_first) == 12
    for a, b in of_first:
        assert a["tokens"] == b["tokens"]
        if not a["name"].endswith("w2"):  # whose inputs depend on the codes of the others
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_sums_over_processes_are_those_of_one(case: Case) -> None:
    """Without a search, whose choices hang on the last bit: losses of the first Linears, whose inputs are the same."""
    more = ["--order", "natural", "--scales", "minmax", "--sweeps", "0"]
    losses = []
    for count in (1, 2):
        found = [linear for line in journal(case.whole(count, *more)) for linear in line["linears"]]  # type: ignore[attr-defined]
        losses.append([linear["loss"] for linear in found[:3]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("point", ["linear.solved:9", pytest.param("batch.begun:20", marks=pytest.mark.long)])
def test_a_killed_process_ends_the_others_and_the_job_goes_on(killed: int, point: str, case: Case, tmp_path: Path) -> None:
    out, began = tmp_path / "out", time.monotonic()
    made = start(2, case.words(out), tmp_path / "logs", {killed: point})
    codes = made.ended(MOST)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 75, made.texts
    assert time.monotonic() - began < MOST
    text = made.texts[1 - killed]
    assert f"rank {killed} of 2 on {os.uname().nodename} " in text or "rank 0 of 2 cannot be reached" in text
    assert "run the same command again" in text and "Traceback" not in text
    assert not (out / "config.json").exists()
    done = start(2, case.words(out), tmp_path / "again")
    assert done.ended() == [0, 0], done.texts
    assert hashes(out) == hashes(case.whole(2))


def test_the_first_process_is_killed_while_it_finishes_the_folder(case: Case, tmp_path: Path) -> None:
    """The others have nothing left to do, but wait for it."""
    out = tmp_path / "out"
    made = start(2, case.words(out), tmp_path / "logs", {0: "finish.index"})
    assert made.ended(MOST) == [-signal.SIGKILL, 75], made.texts
    assert "rank 0 of 2 cannot be reached any more" in made.texts[1] and not (out / "config.json").exists()
    done = start(2, case.words(out), tmp_path / "again")
    assert done.ended() == [0, 0], done.texts
    assert hashes(out) == hashes(case.whole(2))


def test_an_error_of_the_first_process_is_that_of_all(case: Case, tmp_path: Path) -> None:
    """It is where the others read of it."""
    made = start(2, case.words(tmp_path / "out"), tmp_path / "logs", {0: "journal.half:2:ENOSPC"})
    assert made.ended(MOST) == [4, 4], made.texts
    assert "No space left" in made.texts[0] and "rank 0 of 2 on " in made.texts[1] and "has ended" in made.texts[1]


@pytest.mark.long
def test_a_suspended_process_ends_the_others(case: Case, tmp_path: Path) -> None:
    """The first one holds the store: it does not answer any more."""
    made = start(2, case.words(tmp_path / "out"), tmp_path / "logs", {0: "linear.solved:9:sleep=3"})
    until = time.monotonic() + LIMIT
    while "block-0" not in [line["unit"] for line in journal(tmp_path / "out")]:
        assert time.monotonic() < until, made.texts
        time.sleep(0.02)
    pid = made.processes[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    made.processes[1].join(MOST)
    os.kill(pid, signal.SIGKILL)
    assert made.ended(MOST) == [-signal.SIGKILL, 75]
    assert "rank 0 of 2 cannot be reached any more" in made.texts[1]


@pytest.mark.long
def test_who_has_saved_first_waits_for_the_others(case: Case, tmp_path: Path) -> None:
    """A rank that ends ends the others within some seconds, and a checkpoint is of use only if all ranks have it."""
    out = tmp_path / "out"
    made = start(
        2, case.words(out, "--checkpoint-every", "1000"), tmp_path / "logs", {1: "linear.solved:10:sleep=3,checkpoint.begun:1:sleep=13"}
    )
    until = time.monotonic() + LIMIT
    while "block-0" not in [line["unit"] for line in journal(out)]:
        assert time.monotonic() < until, made.texts
        time.sleep(0.02)
    for process in made.processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
    assert made.ended(MOST) == [75, 75], made.texts
    assert all([*(out / f".bigq/rank-{rank}-of-2").glob("activations-*")] for rank in range(2))


def test_all_stop_where_one_is_asked_to(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = start(2, case.words(out), tmp_path / "logs", {1: "linear.solved:10:sleep=3"})
    until = time.monotonic() + LIMIT
    while [line["unit"] for line in journal(out)][-1:] != ["block-0"]:
        assert time.monotonic() < until, made.texts
        time.sleep(0.02)
    second = made.processes[1].pid
    assert second is not None
    os.kill(second, signal.SIGTERM)
    assert made.ended(MOST) == [75, 75], made.texts
    assert "another rank was asked to stop" in made.texts[0] and "SIGTERM" in made.texts[1]
    assert all([*(out / f".bigq/rank-{rank}-of-2").glob("activations-*")] for rank in range(2))
    done = start(2, case.words(out), tmp_path / "again")
    assert done.ended() == [0, 0], done.texts
    assert hashes(out) == hashes(case.whole(2))
    assert not [*out.rglob("activations-*")] and not [*out.rglob("rank-*")]


def test_another_number_of_processes_is_refused_unless_allowed(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = start(2, case.words(out), tmp_path / "logs", {0: "linear.solved:9"})
    assert made.ended(MOST)[1] == 75
    alone = start(1, case.words(out), tmp_path / "alone")
    assert alone.ended() == [2]
    assert "was begun with 2 processes, now there is 1" in alone.texts[0] and "--allow-ranks" in alone.texts[0]
    allowed = start(1, case.words(out, "--allow-ranks"), tmp_path / "allowed")
    assert allowed.ended() == [0], allowed.texts
    assert "the number of processes was 2" in (out / ".bigq/runs.jsonl").read_text()
    assert torch.isfinite(torch.tensor(evaluate(str(out), EvalConfig(data=str(case.ids), seqlen=24, samples=8, quiet=True)).perplexity))


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", ["--method", "awq"]),
        pytest.param("llama", ["--method", "gptaq", "--fold", "awq"], marks=pytest.mark.long),
        ("mixtral", ["--method", "awq", "--experts-at-once", "3"]),
        pytest.param("mixtral", ["--fold", "smoothquant"], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_scaled_inputs(family: str, more: list[str], case: Case, experts: Case, tmp_path: Path) -> None:
    """Scales come from the tokens of all. One process is killed, and the job goes on to the bytes of an undisturbed one."""
    made, out = case if family == "llama" else experts, tmp_path / "out"
    whole = made.whole(2, *more)
    killed = start(2, made.words(out, *more), tmp_path / "logs", {1: "block.loaded:2"})
    assert sorted(killed.ended(MOST)) == [-signal.SIGKILL, 75], killed.texts
    done = start(2, made.words(out, *more), tmp_path / "again")
    assert done.ended() == [0, 0], done.texts
    assert hashes(out) == hashes(whole)
    how = EvalConfig(data=str(made.ids), seqlen=24, samples=8, dtype="float32", device="cpu", quiet=True)
    kl = [evaluate(str(folder), how, baseline=str(made.model)).kl for folder in (made.whole(1, *more), whole)]
    assert kl[1] == pytest.approx(kl[0], rel=0.1)


@pytest.mark.parametrize(
    "more", [["--method", "rtn"], ["--method", "gptaq", "--tune-steps", "4"], ["--bits-per-weight", "4"]], ids=" ".join
)
def test_jobs_that_processes_do_not_share_are_refused(more: list[str], case: Case, tmp_path: Path) -> None:
    made = start(2, case.words(tmp_path / "out", *more), tmp_path / "logs")
    assert made.ended(MOST) == [2, 2], made.texts
    assert "2 processes cannot share such a job; start it in one process" in made.texts[0]
    assert not (tmp_path / "out").exists()


def test_each_process_needs_a_row(case: Case, tmp_path: Path) -> None:
    made = start(2, [*case.words(tmp_path / "out"), "--samples", "1"], tmp_path / "logs")
    assert made.ended(MOST) == [2, 2], made.texts
    assert "--samples 1: 2 processes share the calibration rows" in made.texts[0]
