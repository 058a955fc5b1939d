"""Steps in the background: one at a time, in order, with errors raised."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import bigq
from bigq.errors import ResourceError
from bigq.sched import shards
from bigq.sched import solving as solving_module
from bigq.sched.write_behind import WriteBehind


def test_a_step_runs_beside_its_caller_and_after_the_previous_step() -> None:
    go, order = threading.Event(), []

    def first() -> None:
        assert go.wait(10)
        order.append(1)

    with contextlib.closing(WriteBehind(threaded=True)) as behind:
        behind.start(first)
        assert order == []
        go.set()
        behind.start(lambda: order.append(2))
        assert order[:1] == [1]
        behind.wait()
    assert order == [1, 2]


def test_an_error_is_raised_by_the_next_call_only() -> None:
    def broken() -> None:
        raise ResourceError("full")

    later: list[int] = []
    with contextlib.closing(WriteBehind(threaded=True)) as behind:
        behind.start(broken)
        with pytest.raises(ResourceError, match="full"):
            behind.start(lambda: later.append(1))
        behind.wait()
        behind.start(broken)
    assert later == []


def test_without_a_thread_a_step_runs_at_once() -> None:
    ran: list[int] = []
    with contextlib.closing(WriteBehind(threaded=False)) as behind:
        behind.start(lambda: ran.append(threading.get_ident()))
        assert ran == [threading.get_ident()]
        with pytest.raises(ZeroDivisionError):
            behind.start(lambda: ran.append(1 // 0))
        behind.wait()


def test_the_next_block_is_solved_while_one_is_written(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block's write does not end before the second block's solve has begun."""
    write_shard, solve_block = shards.write_shard, solving_module.solve_block
    solving = [threading.Event() for _ in range(16)]

    def slow_write(path: Path, tensors: object) -> object:
        if solving[0].is_set():
            assert solving[1].wait(30), "the job waits for its writes"
        return write_shard(path, tensors)  # type: ignore[arg-type]

    def seen(job: solving_module.BlockJob, *args: object, **kwargs: object) -> object:
        solving[job.index].set()
        return solve_block(job, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "write_shard", slow_write)
    monkeypatch.setattr(solving_module, "solve_block", seen)
    config = bigq.JobConfig(
        scheme=bigq.QuantScheme(group_size=32), calibration=str(ids_file), samples=4, seqlen=40, read_ahead=1, device="cpu", quiet=True
    )
    report = bigq.quantize(str(checkpoint("llama")), tmp_path / "out", config)
    assert report.blocks > 1 and (tmp_path / "out" / "config.json").exists()
