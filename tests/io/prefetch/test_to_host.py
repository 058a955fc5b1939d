"""Prefetch into host memory: the same tensors, within the budget, during computation."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import bigq
from bigq.errors import CheckpointError, NumericsError, ResourceError
from bigq.io.index import Checkpoint, TensorInfo
from bigq.io.prefetch import pieces
from bigq.io.prefetch.to_host import HostPrefetch
from bigq.io.reader import read_tensor
from bigq.model.pager import Pager
from bigq.progress.trace import Trace


@pytest.fixture
def infos(tmp_path: Path) -> list[TensorInfo]:
    """Ten tensors of 4000 bytes."""
    generator = torch.Generator().manual_seed(0)
    save_file({f"t{i}": torch.randn(10, 100, generator=generator) for i in range(10)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    return [checkpoint[f"t{i}"] for i in range(10)]


@pytest.mark.parametrize("budget", [0, 4000, 13_000, 10**6])
def test_tensors_are_what_the_reader_reads_and_the_budget_holds(infos: list[TensorInfo], budget: int) -> None:
    reader = HostPrefetch(budget)
    reader.announce(infos[:5])
    reader.announce(infos)
    for info in infos:
        assert torch.equal(reader.take(info), read_tensor(info))
    assert reader.peak == min(budget // 4000, 10) * 4000
    reader.announce(infos[:1])
    assert torch.equal(reader.take(infos[0]), read_tensor(infos[0])) and reader.peak <= budget
    reader.close()


def test_announced_tensors_are_read_within_the_budget(infos: list[TensorInfo]) -> None:
    trace = Trace()
    reader = HostPrefetch(12_000, trace)

    def read() -> list[str]:
        return sorted(span.name for span in trace.spans)

    reader.announce(infos)
    assert reached(lambda: len(read()) == 3)
    time.sleep(0.02)
    assert read() == ["t0", "t1", "t2"]
    reader.take(infos[0])
    assert reached(lambda: len(read()) == 4), "the next one follows when one is taken"
    reader.take(infos[7])
    assert reached(lambda: read() == ["t0", "t1", "t2", "t3", "t7"]), "a tensor whose read has not begun is read when it is taken"
    reader.close()
    assert reader.peak == 12_000


def reached(state: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not state() and time.monotonic() < deadline:
        time.sleep(0.001)
    return state()


def test_a_tensor_larger_than_the_budget_does_not_block_others(infos: list[TensorInfo], tmp_path: Path) -> None:
    save_file({"large": torch.arange(5000.0)}, tmp_path / "model.safetensors")
    large = Checkpoint.open(tmp_path)["large"]
    trace = Trace()
    reader = HostPrefetch(8000, trace)
    reader.announce([large, *infos])
    assert reached(lambda: len(trace.spans) == 2) and {span.name for span in trace.spans} == {"t0", "t1"}
    assert torch.equal(reader.take(large), torch.arange(5000.0)) and reader.peak == 8000
    reader.close()


@pytest.mark.parametrize("budget", [0, 9000, 10**6])
@pytest.mark.parametrize("chunk", [64, 1000, 2**20])
def test_several_takers_at_once_and_any_size_of_pieces(
    infos: list[TensorInfo], budget: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "CHUNK_BYTES", chunk)
    reader = HostPrefetch(budget)
    reader.announce(infos)
    with ThreadPoolExecutor(4) as takers:
        for info, tensor in zip(infos[::-1], takers.map(reader.take, infos[::-1]), strict=True):
            assert torch.equal(tensor, read_tensor(info))
    assert reader.peak <= budget
    reader.close()


def test_closing_while_reads_are_in_flight(infos: list[TensorInfo], monkeypatch: pytest.MonkeyPatch) -> None:
    """Endless reads, one byte at a time."""
    real, begun = os.preadv, threading.Event()

    def crawls(fd: int, buffers: Any, offset: int) -> int:
        begun.set()
        time.sleep(0.01)
        return real(fd, [buffers[0][:1]], offset)

    monkeypatch.setattr(os, "preadv", crawls)
    reader = HostPrefetch(10**6)
    reader.announce(infos)
    with ThreadPoolExecutor(1) as taker:
        taken = taker.submit(reader.take, infos[9])
        assert begun.wait(10)
        started = time.monotonic()
        reader.close()
        assert time.monotonic() - started < 5
        with pytest.raises(CancelledError):
            taken.result(5)


def test_a_disk_error_names_file_tensor_and_byte(infos: list[TensorInfo], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    for budget in (0, 10**6):
        reader = HostPrefetch(budget)
        reader.announce(infos)
        with pytest.raises(ResourceError, match=rf"model.safetensors: reading at byte {infos[4].start} \(tensor t4\) failed.*same command"):
            reader.take(infos[4])
        reader.close()


def test_errors_are_raised_by_take(infos: list[TensorInfo]) -> None:
    with open(infos[0].file, "r+b") as file:
        file.seek(infos[3].start)
        file.write(b"\xff" * 4)
        file.truncate(max(info.stop for info in infos) - 1)
    last = max(infos, key=lambda info: info.stop)
    reader = HostPrefetch(10**6)
    reader.announce(infos)
    assert torch.equal(reader.take(infos[1]), read_tensor(infos[1]))
    with pytest.raises(NumericsError, match="t3"):
        reader.take(infos[3])
    with pytest.raises(CheckpointError, match="before the end of tensor"):
        reader.take(last)
    reader.close()


def test_a_job_reads_the_next_block_while_it_solves_one(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a slow disk, reads overlap with the work on the block before. The output does not change."""
    reads: list[str] = []
    read_piece = pieces.read_piece

    def slow(files: Any, info: TensorInfo, *rest: Any) -> None:
        time.sleep(0.04)
        read_piece(files, info, *rest)
        reads.append(info.name)

    monkeypatch.setattr(pieces, "read_piece", slow)
    seconds, counts, outputs = {}, {}, {}
    for blocks in (0, 1):
        out = tmp_path / str(blocks)
        scheme = bigq.QuantScheme(group_size=32)
        reads.clear()
        report = bigq.quantize(
            str(checkpoint("llama")),
            out,
            bigq.JobConfig(scheme=scheme, calibration=str(ids_file), samples=8, seqlen=40, read_ahead=blocks, device="cpu", quiet=True),
        )
        seconds[blocks], counts[blocks] = report.seconds_by_phase["load"], len(reads)
        outputs[blocks] = {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
    assert counts[0] == counts[1] > 0
    assert outputs[0] == outputs[1]
    assert seconds[1] < 0.8 * seconds[0]


def test_blocks_are_announced_within_the_budget(checkpoint: Callable[[str], Path]) -> None:
    pager = Pager(checkpoint("llama"), device=torch.device("cpu"))
    sizes = [sum(t.nbytes for t in pager.block_tensors(i)) for i in range(len(pager.blocks))]
    assert len(sizes) > 1
    for budget, expected in ((0, set()), (sizes[0] // 2, {0}), (sizes[0], {0}), (10 * sum(sizes), set(range(len(sizes))))):
        trace = Trace()
        with pager.reading_ahead(budget, trace):
            pager.announce_block(0)
            whole = {t.name for i in expected for t in pager.block_tensors(i)}
            assert budget < sizes[0] or reached(lambda: {s.name for s in trace.spans} == whole)  # noqa: B023
        assert {s.name for s in trace.spans} <= whole


def test_a_negative_number_of_blocks_is_refused() -> None:
    with pytest.raises(bigq.errors.UsageError, match="--read-ahead -1"):
        bigq.JobConfig(read_ahead=-1)
