"""Keeping the inputs of a block's last Linears saves time and changes nothing: all rows, some, or none; and when memory runs out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Child
from models import FAMILIES, make_checkpoint, random_ids, save_ids
from test_memory import random_llama
from torch import nn

import bigq
from bigq.config import JobConfig
from bigq.model.blocks import block_linears
from bigq.model.forward.block_call import BlockCall
from bigq.sched.plan import inputs
from bigq.sched.solve import propagate as propagate_module
from bigq.sched.units import block as block_unit
from bigq.scheme import QuantScheme

ROWS, BATCH = 8, 3
MIB = 2**20
#: Families whose blocks are llama's in all that decides which inputs are kept.
LIKE_LLAMA = ("mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ids(tmp_path_factory.mktemp("ids") / "ids.safetensors", random_ids(ROWS, 32))


def job(ids: Path, **changes: Any) -> JobConfig:
    values = {"scheme": QuantScheme(group_size=32), "calibration": str(ids), "samples": ROWS, "seqlen": 32, "batch": BATCH}
    return JobConfig(**{**values, "device": "cpu", "quiet": True, **changes})


def keep(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Let plans keep the inputs for so many rows."""
    real = inputs.make_plan

    def planned(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        assert found.choice.kept_rows == min(ROWS, found.work.rows)
        return dataclasses.replace(found, choice=dataclasses.replace(found.choice, kept_rows=rows))

    patch.setattr(inputs, "make_plan", planned)


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


def made(source: Path, out: Path, config: JobConfig, rows: int) -> dict[str, bytes]:
    """The shards of a job that keeps inputs for so many rows."""
    with pytest.MonkeyPatch.context() as patch:
        keep(patch, rows)
        bigq.quantize(str(source), out, config)
    return shards(out)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    known: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in known:
            known[family] = make_checkpoint(tmp_path_factory.mktemp("kept") / family, family, dtype=torch.bfloat16)
        return known[family]

    return get


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.long) if f in LIKE_LLAMA else f for f in FAMILIES])
def test_the_bytes_are_the_same_with_all_some_and_no_rows(
    family: str, source: Callable[[str], Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the Linears that are replayed are fewer for more rows: with all rows, only the last ones of each module."""
    counts: list[int] = []
    real = propagate_module.propagate

    def counted(index: int, block: nn.Module, *args: Any, **kwargs: Any) -> int:
        handles = [module.register_forward_hook(lambda *_: ran.append(1)) for module in block_linears(block).values()]
        ran: list[int] = []
        try:
            return real(index, block, *args, **kwargs)
        finally:
            counts.append(len(ran))
            for handle in handles:
                handle.remove()

    monkeypatch.setattr("bigq.sched.solving.propagate", counted)
    expected = made(source(family), tmp_path / "0", job(ids), 0)
    without = counts[:]
    assert len(expected) == 4 and len(without) == 2 and min(without) > 0
    for rows in (3, 6, ROWS):
        counts.clear()
        assert made(source(family), tmp_path / str(rows), job(ids), rows) == expected
        # Three batches. Hooks do not see the last Linear, which runs without its module. In OPT fc1 is called, but returns zeros.
        assert family == "opt" or [(3 - -(-rows // 3)) * n for n in without] == [3 * n for n in counts]


@pytest.mark.parametrize("changes", [{}, {"on_nonfinite": "skip"}, {"activations": "disk"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "bloom", "opt", "falcon"])
def test_rows_of_the_unquantized_model_keep_theirs_too(
    family: str, changes: dict[str, Any], source: Callable[[str], Path], ids: Path, tmp_path: Path
) -> None:
    config = job(ids, method="gptaq")
    expected = made(source(family), tmp_path / "0", config, 0)
    if "activations" in changes:
        bigq.quantize(str(source(family)), tmp_path / "disk", dataclasses.replace(config, **changes))
        assert shards(tmp_path / "disk") == expected
        return
    for rows in (3, ROWS):
        assert made(source(family), tmp_path / str(rows), dataclasses.replace(config, **changes), rows) == expected


def test_rules_that_leave_linears_out(source: Callable[[str], Path], ids: Path, tmp_path: Path) -> None:
    """A last Linear that stays unquantized is not collected, so its inputs are not kept; another one in its module makes no difference."""
    for name in ("down_proj", "(gate|up)_proj", "o_proj"):
        config = job(ids, rules=(bigq.Rule(rf".*\.{name}", None),))
        assert made(source("llama"), tmp_path / name / "all", config, ROWS) == made(source("llama"), tmp_path / name / "none", config, 0)


def test_a_job_interrupted_anywhere_resumes_to_the_same_bytes(
    source: Callable[[str], Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another number of rows kept by each run."""
    expected = made(source("llama"), tmp_path / "whole", job(ids), ROWS)
    for at in range(2):
        out = tmp_path / str(at)
        advance, seen = block_unit.BlockUnit._show_done, list[int]()

        def stopping(self: Any, *args: Any, at: int = at, advance: Any = advance, seen: list[int] = seen) -> None:
            advance(self, *args)
            seen.append(1)
            if len(seen) > at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(block_unit.BlockUnit, "_show_done", stopping)
            with pytest.raises(KeyboardInterrupt):
                made(source("llama"), out, job(ids, checkpoint_every=None), 3 if at else ROWS)
        assert made(source("llama"), out, job(ids, checkpoint_every=None), 0 if at else 6) == expected


def out_of_memory_once(patch: pytest.MonkeyPatch, number: int) -> None:
    """Let the ``number``-th call of a block with several rows fail."""
    run, calls = BlockCall.outputs, [0]

    def failing(self: BlockCall, block: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(hidden) > 1 and not hidden.is_meta:
            calls[0] += 1
            if calls[0] == number:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(self, block, hidden)

    patch.setattr(BlockCall, "outputs", failing)


#: Calls of a block: 3 batches for each of 4 levels, then for the replay. Those after which inputs are kept: (call, whether they are).
CALLS = {"first level": (1, False), "third level": (8, False), "second batch of the last level": (11, True), "replay": (14, True)}


@pytest.mark.parametrize("moment", CALLS)
def test_kept_inputs_are_dropped_before_a_batch_is_halved(
    moment: str,
    source: Callable[[str], Path],
    ids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And from then on none are kept. A smaller batch may change the output, this does not."""
    call, dropped = CALLS[moment]
    expected = made(source("llama"), tmp_path / "whole", job(ids), ROWS)
    out_of_memory_once(monkeypatch, call)
    report = bigq.quantize(str(source("llama")), tmp_path / "out", job(ids, quiet=False))
    said = capsys.readouterr().err
    assert ("out of memory: inputs of last Linears are not kept any more" in said) == dropped
    assert ("out of memory: batch 3 → 1" in said) == (not dropped)
    assert report.batches == ((3,) if dropped else (3, 1))
    assert (shards(tmp_path / "out") == expected) == dropped or not dropped


def test_a_batch_of_one_row_drops_them_too(
    source: Callable[[str], Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(ids, batch=1)
    expected = made(source("llama"), tmp_path / "whole", config, ROWS)
    propagated, failed = BlockCall.outputs, list[int]()

    def failing(self: BlockCall, block: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not hidden.is_meta and hidden.shape == (1, 32, 64):
            failed.append(1)
            if len(failed) == 4 * ROWS + 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return propagated(self, block, hidden)

    monkeypatch.setattr(BlockCall, "outputs", failing)
    assert bigq.quantize(str(source("llama")), tmp_path / "out", config).batches == (1,)
    assert shards(tmp_path / "out") == expected


PROGRAM = """
import json, sys
import bigq
source, out, ids, rows, seqlen, method, ram = sys.argv[1:]
scheme = bigq.QuantScheme(group_size=128)
config = bigq.JobConfig(scheme=scheme, method=method, calibration=ids, samples=int(rows), seqlen=int(seqlen), device="cpu", quiet=True)
report = bigq.quantize(source, out, config) if ram == "0" else bigq.quantize(source, out, bigq.JobConfig(**{**{
    f: getattr(config, f) for f in config.__dataclass_fields__}, "ram": int(ram)}))
run = json.loads(open(out + "/.bigq/runs.jsonl").readline())
print(json.dumps({"peak": report.host_peak_bytes, "planned": report.planned_host_bytes}))
"""


@pytest.mark.long
@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_the_peak_with_kept_inputs_is_within_a_tenth_of_the_plan(
    method: str, child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all rows, and for as many as half of the memory that they take leaves."""
    import test_memory

    monkeypatch.setattr(test_memory, "HIDDEN", 512)
    monkeypatch.setattr(test_memory, "INNER", 2816)
    source = random_llama(tmp_path / "model", 2)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    file = save_ids(tmp_path / "ids.safetensors", random_ids(64, 512))
    kept = 64 * 512 * 2816 * 2 * (2 if method == "gptaq" else 1)
    peaks = []
    ram = 0
    for name in ("all", "some"):
        done = child("-c", PROGRAM, source, tmp_path / name, file, "64", "512", method, str(ram), timeout=300)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["peak"] == pytest.approx(result["planned"], rel=0.1)
        peaks.append(result["peak"])
        ram = int((result["planned"] - kept / 2) / 0.9)
    assert kept > 150 * MIB and kept / 4 < peaks[0] - peaks[1] < 3 * kept / 4
    assert shards(tmp_path / "all") == shards(tmp_path / "some")
