"""A device that runs out of memory: the job goes on with half the batch, and can still be taken up again to the same bytes.

Errors of the right type are raised at chosen moments where a block is called with too many rows, or where rows are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

import bigq
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import CheckpointError, ResourceError
from bigq.io.checksum import unseal
from bigq.job.batches import Batches, Halving
from bigq.job.journal import Commit, Journal
from bigq.model.forward.block_call import BlockCall
from bigq.progress.records import Report
from bigq.sched import solving as solving_module
from bigq.sched.rows import calibration
from bigq.sched.rows import probe as probe_module
from bigq.sched.rows import shortcut_cache as cache_module
from bigq.sched.rows.store import ActivationStore
from bigq.sched.solve import block as block_module
from bigq.sched.units import base as units_base
from bigq.scheme import QuantScheme

ROWS, BATCH = 16, 8


def job(ids: Path, **changes: Any) -> JobConfig:
    values = {"scheme": QuantScheme(group_size=32), "calibration": str(ids), "samples": ROWS, "seqlen": 24, "batch": BATCH, "quiet": True}
    return JobConfig(**{**values, **changes})


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def journal_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ".bigq" / "journal.jsonl").read_text().splitlines()]


def halvings_of(out: Path) -> list[list[int]]:
    value = unseal((out / ".bigq" / "batches.json").read_bytes())
    assert value is not None and list(value) == ["halvings"]
    halvings: list[list[int]] = value["halvings"]
    return halvings


def losses(report: Report) -> dict[str, float]:
    return {str(r["name"]): float(r["loss"]) for r in report.linears}


def require_close(report: Report, other: Report) -> None:
    """Losses within 0.1 %."""
    expected = losses(other)
    assert losses(report) == {name: pytest.approx(loss, rel=1e-3) for name, loss in expected.items()}


@pytest.fixture(scope="module")
def whole(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Report]]:
    """(family, batch) → output folder and report of a job that never runs out of memory."""
    known: dict[tuple[str, int], tuple[Path, Report]] = {}

    def get(family: str = "llama", batch: int = BATCH) -> tuple[Path, Report]:
        if (family, batch) not in known:
            out = tmp_path_factory.mktemp("whole") / "out"
            known[family, batch] = out, bigq.quantize(str(checkpoint(family)), out, job(ids_file, batch=batch))
        return known[family, batch]

    return get


# A device that never has room for more than a few rows.


def small_device(patch: pytest.MonkeyPatch, rows: int, embedding: bool = False) -> None:
    """No block can be called with more rows; nor the embedding, if ``embedding``."""
    run, first_input = BlockCall.outputs, probe_module.first_input

    def limited_run(self: BlockCall, block: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
        if len(hidden) > rows and not hidden.is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(self, block, hidden)

    def limited_input(model: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> Any:
        if len(ids) > rows and embedding:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return first_input(model, blocks, ids)

    patch.setattr(BlockCall, "outputs", limited_run)
    patch.setattr(probe_module, "first_input", limited_input)


@pytest.mark.parametrize(("rows", "batches"), [(7, (8, 4)), (3, (8, 4, 2)), (1, (8, 4, 2, 1))])
@pytest.mark.parametrize("family", ["llama", "bloom", "falcon_alibi"])
def test_a_small_device_gives_what_its_batch_gives(
    family: str,
    rows: int,
    batches: tuple[int, ...],
    checkpoint: Callable[[str], Path],
    whole: Callable[..., tuple[Path, Report]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bytes of a job that was begun with the batch that it ends up with: ALiBi and masks are recorded anew for it."""
    out = tmp_path / "out"
    small_device(monkeypatch, rows)
    report = bigq.quantize(str(checkpoint(family)), out, job(ids_file))
    assert report.batches == batches
    assert [line["batch"] for line in journal_of(out) if line["unit"].startswith("block")] == [batches[-1]] * 3
    assert [line["batch"] for line in journal_of(out) if line["unit"].startswith("rest")] == [None]
    other, _ = whole(family, batches[-1])
    assert hashes(out) == hashes(other)


def test_a_device_too_small_for_the_embedding(
    checkpoint: Callable[[str], Path],
    whole: Callable[..., tuple[Path, Report]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OPT's projects what it embeds, so that its batch counts too."""
    out = tmp_path / "out"
    small_device(monkeypatch, 3, embedding=True)
    report = bigq.quantize(str(checkpoint("opt")), out, job(ids_file))
    assert report.batches == (8, 4, 2)
    assert hashes(out) == hashes(whole("opt", 2)[0])
    assert halvings_of(out) == [[0, 0, 0, 4], [0, 0, 0, 2]]


def test_one_row_that_does_not_fit_is_an_error(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, out = units_base.plan_block, tmp_path / "out"

    def planned(*args: Any) -> Any:
        """The structure is found on a row; only then memory ends."""
        plan = load(*args)
        small_device(monkeypatch, 0)
        return plan

    monkeypatch.setattr(units_base, "plan_block", planned)
    with pytest.raises(ResourceError, match=r"cpu: out of memory \(CUDA out of memory.*use fewer --samples"):
        bigq.quantize(str(checkpoint("llama")), out, job(ids_file))
    assert [h[3] for h in halvings_of(out)] == [4, 2, 1]
    # With more room, what the message advises is taken.
    monkeypatch.undo()
    for i, advised in enumerate(({"samples": 2}, {"seqlen": 8}, {"activations": "host"})):
        bigq.quantize(str(checkpoint("llama")), tmp_path / str(i), job(ids_file, **advised))


def test_a_smaller_batch_is_told(
    checkpoint: Callable[[str], Path],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small_device(monkeypatch, 3)
    command = ["quantize", str(checkpoint("llama")), str(tmp_path / "out"), "--calibration", str(ids_file), "--samples", "8"]
    assert main([*command, "--seqlen", "24", "--group-size", "32", "--batch", "8", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if not line.startswith(("reading ", "plan: ", "  "))]
    assert lines[:2] == ["out of memory: batch 8 → 4", "out of memory: batch 4 → 2"] and lines[2].startswith("block 1/3")
    assert "batch:   8 → 4 → 2 rows" in told.out


def test_other_errors_are_not_taken_for_it(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: BlockCall, block: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    capture = block_module._collect

    def breaking(*args: Any) -> Any:
        monkeypatch.setattr(BlockCall, "outputs", broken)
        return capture(*args)

    monkeypatch.setattr(block_module, "_collect", breaking)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids_file))
    assert not (tmp_path / "out" / ".bigq" / "batches.json").exists()


@pytest.mark.parametrize("activations", ["host", "disk"])
def test_an_error_of_the_embedding_is_told_as_it_is(
    activations: str, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that the rows that it leaves behind were given up twice."""
    embed = calibration.embed

    def breaking(*args: Any) -> None:
        def broken(*args: Any) -> Any:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        monkeypatch.setattr(probe_module, "first_input", broken)
        embed(*args)

    monkeypatch.setattr(calibration, "embed", breaking)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids_file, activations=activations))


def test_evaluation_goes_on_too(
    checkpoint: Callable[[str], Path], ids_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = bigq.EvalConfig(data=str(ids_file), seqlen=40, batch=8, device="cpu")
    plain = bigq.evaluate(str(checkpoint("bloom")), config)
    capsys.readouterr()
    small_device(monkeypatch, 5)
    small = bigq.evaluate(str(checkpoint("bloom")), config)
    assert "out of memory: batch 8 → 4" in capsys.readouterr().err
    assert small.perplexity == pytest.approx(plain.perplexity, rel=1e-6)


# A device that runs out of memory once.


#: Moment → what fails (a block's call, or the keeping of a shortcut's rows), the which time, and where the job halves:
#: block, step and row. Step 0 brings rows to the block's entrance; a level's capture is 8 steps (as many as Linears, and one) behind
#: the one before. Every level and every propagation of a block calls it twice.
MOMENTS: Mapping[str, tuple[str, int, tuple[int, int, int]]] = {
    "first capture": ("run", 1, (0, 1, 0)),
    "second batch of the first capture": ("run", 2, (0, 1, 0)),
    "a later level": ("run", 5, (0, 17, 0)),
    "keeping inputs": ("keep", 2, (0, 9, 0)),
    "keeping outputs, first batch": ("keep", 3, (0, 10, 0)),
    "keeping outputs, second batch": ("keep", 4, (0, 10, 8)),
    "first batch of a propagation": ("run", 9, (1, 0, 0)),
    "middle of a propagation": ("run", 10, (1, 0, 8)),
    "second block": ("run", 14, (1, 9, 0)),
    "last capture": ("run", 28, (2, 25, 0)),
}


def fail_once(patch: pytest.MonkeyPatch, what: str, number: int) -> None:
    """Let the device run out of memory at the given call, and never again once the batch is halved: dropping kept inputs is not enough."""
    owner, name = {"run": (BlockCall, "outputs"), "keep": (cache_module._CachedRows, "put")}[what]
    original, drop = getattr(owner, name), solving_module._Spare.drop
    calls = [0]

    def dropping(self: Any) -> None:
        drop(self)
        calls[0] = number - 1

    def failing(self: Any, *args: Any) -> Any:
        if what == "keep" or (len(args[1]) > 1 and not args[1].is_meta):  # the structure is found on one row, or on none that is real
            calls[0] += 1
            if calls[0] == number:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, *args)

    patch.setattr(owner, name, failing)
    patch.setattr(solving_module._Spare, "drop", dropping)


@pytest.fixture(scope="module")
def halved(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Report, list[tuple[int, int]]]]:
    """Moment → output folder and report of a job whose device failed then, and the rows that were overwritten, in order."""
    known: dict[str, tuple[Path, Report, list[tuple[int, int]]]] = {}
    put = ActivationStore.put

    def get(moment: str) -> tuple[Path, Report, list[tuple[int, int]]]:
        if moment not in known:
            out, puts = tmp_path_factory.mktemp("halved") / "out", list[tuple[int, int]]()

            def watched(self: ActivationStore, lo: int, hidden: Tensor) -> None:
                puts.append((lo, lo + len(hidden)))
                put(self, lo, hidden)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ActivationStore, "put", watched)
                fail_once(patch, *MOMENTS[moment][:2])
                known[moment] = out, bigq.quantize(str(checkpoint("llama")), out, job(ids_file)), puts
        return known[moment]

    return get


def spans(batch: int, lo: int = 0) -> list[tuple[int, int]]:
    return [(a, a + batch) for a in range(lo, ROWS, batch)]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_job_goes_on_with_half_the_batch(
    moment: str, halved: Callable[[str], tuple[Path, Report, list[tuple[int, int]]]], whole: Callable[..., tuple[Path, Report]]
) -> None:
    out, report, puts = halved(moment)
    block, step, row = MOMENTS[moment][2]
    assert report.batches == (8, 4)
    assert halvings_of(out) == [[block, step, row, 4]]
    assert [line["batch"] for line in journal_of(out)] == [None, *(4 if i >= block else 8 for i in range(3))]
    require_close(report, whole()[1])
    # Embedding, then blocks 0 and 1: every row exactly once each.
    expected = []
    for i in range(3):
        here = (i, 0) >= (block, step)
        expected += [(0, 8), *spans(4, 8)] if here and (i, step, row) == (block, 0, 8) else spans(4 if here else 8)
    assert puts == expected


def test_before_the_switch_bytes_are_those_of_the_larger_batch(
    halved: Callable[[str], tuple[Path, Report, list[tuple[int, int]]]], whole: Callable[..., tuple[Path, Report]]
) -> None:
    """And if it comes first of all, everything is as with the smaller batch."""
    plain = hashes(whole()[0])
    for moment, blocks in (("second block", 1), ("last capture", 2)):
        files = [f"model-{n:05d}-of-00004.safetensors" for n in range(1, blocks + 2)]
        assert all(hashes(halved(moment)[0])[name] == plain[name] for name in files), moment
    assert hashes(halved("first capture")[0]) == hashes(whole(batch=4)[0])
    assert hashes(halved("second batch of the first capture")[0]) == hashes(whole(batch=4)[0])


@pytest.mark.parametrize(
    "moment", ["first capture", "a later level", "keeping outputs, second batch", "middle of a propagation", "second block"]
)
def test_such_a_job_killed_anywhere_ends_in_the_same_bytes(
    moment: str,
    checkpoint: Callable[[str], Path],
    halved: Callable[[str], tuple[Path, Report, list[tuple[int, int]]]],
    ids_file: Path,
    tmp_path: Path,
) -> None:
    """Killed right after it has halved, and after commits; the next run's device has memory enough."""
    for kill in ("halving", 2, 3):
        out = tmp_path / str(kill)
        kill_and_resume(checkpoint("llama"), out, job(ids_file), moment, kill)
        assert hashes(out) == hashes(halved(moment)[0]), kill


@pytest.mark.parametrize("moment", ["keeping outputs, second batch", "middle of a propagation"])
def test_where_results_depend_much_on_the_batch_too(
    moment: str, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished block is replayed without what was kept while it was solved with a larger batch: it must not have been used either."""
    attention = LlamaAttention.forward

    def dependent(self: LlamaAttention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return attention(self, hidden_states * (1 + 0.02 * len(hidden_states)), *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", dependent)
    with pytest.MonkeyPatch.context() as patch:
        fail_once(patch, *MOMENTS[moment][:2])
        bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids_file))
    bigq.quantize(str(checkpoint("llama")), tmp_path / "plain", job(ids_file))
    assert hashes(tmp_path / "out") != hashes(tmp_path / "plain")
    for kill in ("halving", 2):
        out = tmp_path / str(kill)
        kill_and_resume(checkpoint("llama"), out, job(ids_file), moment, kill)
        assert hashes(out) == hashes(tmp_path / "out"), kill


def kill_and_resume(source: Path, out: Path, config: JobConfig, moment: str, kill: str | int) -> None:
    """A job whose device fails at a moment, killed right after it has halved or after so many commits, and then taken up again."""
    commit, halve = Journal.commit, Journal.record_halving
    commits: list[str] = []

    def committing(self: Journal, record: Commit) -> None:
        commit(self, record)
        commits.append(record.unit)
        if len(commits) == kill:
            raise KeyboardInterrupt

    def halving(self: Journal, place: Halving) -> None:
        halve(self, place)
        if kill == "halving":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        fail_once(patch, *MOMENTS[moment][:2])
        patch.setattr(Journal, "commit", committing)
        patch.setattr(Journal, "record_halving", halving)
        with pytest.raises(KeyboardInterrupt):
            bigq.quantize(str(source), out, config)
    with pytest.MonkeyPatch.context() as patch:
        if not (out / ".bigq" / "batches.json").exists():  # killed before the device failed: that happens to the second run instead
            fail_at_place(patch, *MOMENTS[moment][2])
        assert bigq.quantize(str(source), out, config).batches == (8, 4)


def fail_at_place(patch: pytest.MonkeyPatch, block: int, step: int, row: int) -> None:
    """Let the device run out of memory at a place of a job, once."""
    at, done = Batches.at, list[bool]()

    def placed(self: Batches, *here: int) -> int:
        if not done and (*here, 0)[:3] == (block, step, row):
            done.append(True)
            self.halve(block, step, row)
        return at(self, *here)

    patch.setattr(Batches, "at", placed)


@pytest.mark.parametrize("moment", ["first batch of a propagation", "middle of a propagation", "keeping outputs, second batch"])
def test_with_activations_on_disk_the_same_happens(
    moment: str,
    checkpoint: Callable[[str], Path],
    halved: Callable[[str], tuple[Path, Report, list[tuple[int, int]]]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that were read ahead for the larger batch are not taken for those of the smaller."""
    fail_once(monkeypatch, *MOMENTS[moment][:2])
    bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids_file, activations="disk"))
    assert hashes(tmp_path / "out") == hashes(halved(moment)[0])


def test_damaged_batches_are_told(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bigq.quantize(str(checkpoint("llama")), out, job(ids_file))
    for text in ('{"halvings": [[1, 2]]}', '{"halvings": 3}', "{}", "{"):
        (out / ".bigq" / "batches.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"batches\.json"):
            bigq.quantize(str(checkpoint("llama")), out, job(ids_file))


@pytest.mark.parametrize(("family", "group_size"), [("llama", 32), ("bloom", 64)])
def test_losses_hardly_depend_on_the_batch(
    family: str, group_size: int, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path
) -> None:
    """In groups of 32, a weight of the bloom model lies in the middle of two codes, and one such weight changes every later loss."""
    scheme = QuantScheme(group_size=group_size, order="activation", scales="minmax", sweeps=0)
    plain, *others = (
        bigq.quantize(str(checkpoint(family)), tmp_path / str(batch), job(ids_file, batch=batch, scheme=scheme))
        for batch in (BATCH, 1, 3, 16)
    )
    for other in others:
        require_close(other, plain)
