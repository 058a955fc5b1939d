"""Prefetch to a simulated slow device: the same tensors, within the budget, in all error cases."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from slow_copier import SlowCopier
from torch import Tensor

from bigq.errors import CheckpointError, NumericsError, ResourceError
from bigq.io.index import Checkpoint, TensorInfo
from bigq.io.prefetch import pieces, to_device
from bigq.io.prefetch.to_device import DevicePrefetch, least_budget
from bigq.io.reader import read_tensor
from bigq.progress.trace import Trace

CHUNK = 1024
#: Numbers of elements of tensors of mixed dtypes: 0, 1, below, at and above a piece, and above the ring.
COUNTS = (0, 1, 7, 255, 256, 257, 511, 513, 1000, 3333, 20_011)
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float64)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(to_device, "SEGMENT_BYTES", 4 * CHUNK)


@pytest.fixture(scope="module")
def infos(tmp_path_factory: pytest.TempPathFactory) -> list[TensorInfo]:
    folder = tmp_path_factory.mktemp("odd")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": (torch.randn(count, generator=generator) * 30).to(dtype)
        for i, (count, dtype) in enumerate((c, d) for c in COUNTS for d in DTYPES)
    }
    tensors |= {"scalar": torch.tensor(3.5), "matrix": torch.randn(30, 41, generator=generator)}
    save_file(tensors, folder / "model.safetensors")
    return list(Checkpoint.open(folder).tensors.values())


def same(tensor: Tensor, info: TensorInfo) -> bool:
    expected = read_tensor(info)
    return tensor.dtype == expected.dtype and tensor.shape == expected.shape and torch.equal(tensor, expected)


def all_free(reader: DevicePrefetch) -> bool:
    """Whether all memory is free once the copies in progress are done."""
    deadline = time.monotonic() + 10
    while (held := reader._direct.arena.held + reader._ring.arena.held) and time.monotonic() < deadline:
        time.sleep(0.001)
    return held == 0


@pytest.mark.parametrize("budget", [0, 8 * CHUNK, 9 * CHUNK, 50_001, 10**6])
@pytest.mark.parametrize("order", ["announced", "backwards", "shuffled"])
def test_tensors_arrive_within_the_budget(infos: list[TensorInfo], budget: int, order: str) -> None:
    copier = SlowCopier(0.0005)
    reader = DevicePrefetch(budget, copier)
    allowed = max(budget, least_budget())
    assert reader.capacity <= allowed
    reader.announce(infos[:9])
    reader.announce(infos)
    turns = list(infos)
    if order == "backwards":
        turns.reverse()
    elif order == "shuffled":
        random.Random(1).shuffle(turns)
    for info in turns:
        assert same(reader.take(info), info), info.name
    reader.check()
    assert same(reader.take(infos[20]), infos[20]), "not announced"
    assert all_free(reader)
    assert 0 < reader.peak <= copier.allocated <= reader.capacity
    reader.close()


@pytest.mark.parametrize("seed", range(3))
def test_several_takers_at_once(infos: list[TensorInfo], seed: int) -> None:
    reader = DevicePrefetch(20 * CHUNK, SlowCopier(0.0002))
    reader.announce(infos[::2])
    turns = list(infos)
    random.Random(seed).shuffle(turns)
    with ThreadPoolExecutor(5) as takers:
        results = list(takers.map(lambda info: (info, reader.take(info)), turns))
    assert all(same(tensor, info) for info, tensor in results)
    assert all_free(reader) and reader.peak <= 20 * CHUNK
    reader.close()


def test_announced_tensors_are_read_before_they_are_taken(infos: list[TensorInfo]) -> None:
    trace = Trace()
    reader = DevicePrefetch(200 * CHUNK, SlowCopier(), trace)
    reader.announce(infos[:8])
    expected = {info.name for info in infos[:8] if info.nbytes}
    deadline = time.monotonic() + 10
    # By name: a busy machine pauses in the middle of a tensor, which then has several spans.
    while {s.name for s in trace.spans} != expected and time.monotonic() < deadline:
        time.sleep(0.001)
    assert {s.name for s in trace.spans} == expected
    reader.close()


def test_a_region_is_not_overwritten_before_its_copy_is_done(infos: list[TensorInfo]) -> None:
    """While no copy ends, reads fill the ring and then stop."""
    large = max(infos, key=lambda info: info.nbytes)
    copier = SlowCopier()
    copier.gate.clear()
    reader = DevicePrefetch(16 * CHUNK, copier)
    reader.announce(infos)
    with ThreadPoolExecutor(1) as taker:
        taken = taker.submit(reader.take, large)
        deadline = time.monotonic() + 10
        while copier.copies < to_device.DIRECT_PIECES and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert copier.copies == to_device.DIRECT_PIECES and not taken.done()
        assert reader.peak <= reader.capacity == 16 * CHUNK
        copier.gate.set()
        assert same(taken.result(20), large)
    reader.close()


def test_check_names_the_tensor_with_nan(tmp_path: Path) -> None:
    weights = {name: torch.zeros(2000) for name in ("a", "b", "c")}
    weights["b"][1999] = float("nan")
    weights["c"][0] = float("inf")
    save_file(weights | {"ids": torch.ones(3, dtype=torch.int64)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    reader = DevicePrefetch(0, SlowCopier())
    for info in (checkpoint["ids"], checkpoint["a"]):
        reader.take(info)
    reader.check()
    for name in ("a", "b", "c"):
        reader.take(checkpoint[name])
    with pytest.raises(NumericsError, match=r"model\.safetensors: tensor b contains NaN or Inf"):
        reader.check()
    reader.check()
    reader.close()


def failing_preadv(position: int, error: int) -> Any:
    real = os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if offset <= position < offset + len(buffers[0]):
            raise OSError(error, os.strerror(error))
        return real(fd, buffers, offset)

    return preadv


@pytest.mark.parametrize("announced", [True, False])
def test_a_disk_error_is_raised_by_take(infos: list[TensorInfo], announced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    large = max(infos, key=lambda info: info.nbytes)
    monkeypatch.setattr(os, "preadv", failing_preadv(large.start + large.nbytes // 3, errno.EIO))
    reader = DevicePrefetch(20 * CHUNK, SlowCopier(0.0005))
    if announced:
        reader.announce([large, *infos])
    with pytest.raises(ResourceError, match=rf"model\.safetensors: reading at byte \d+ \(tensor {large.name}\) failed: Input/output"):
        reader.take(large)
    for info in infos:
        if info is not large:
            assert same(reader.take(info), info)
    assert all_free(reader), "a tensor that failed gives its room back"
    reader.close()


def test_truncated_and_deleted_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(5000), "b": torch.ones(5000)}, tmp_path / "model.safetensors")
    first, second = sorted(Checkpoint.open(tmp_path).tensors.values(), key=lambda info: info.start)
    os.truncate(first.file, second.stop - 5)
    reader = DevicePrefetch(10**5, SlowCopier())
    reader.announce([first, second])
    assert torch.equal(reader.take(first), torch.ones(5000))
    with pytest.raises(CheckpointError, match=rf"ends at byte {second.stop - 5}, before the end of tensor {second.name} .*fetch"):
        reader.take(second)
    first.file.unlink()
    with pytest.raises(CheckpointError, match=rf"cannot be opened to read tensor {first.name}: No such file"):
        reader.take(first)
    assert all_free(reader)
    reader.close()


def test_short_reads_add_up(infos: list[TensorInfo], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset))
    reader = DevicePrefetch(30 * CHUNK, SlowCopier())
    reader.announce(infos)
    assert all(same(reader.take(info), info) for info in infos)
    reader.close()


@pytest.mark.parametrize("fail_at", [0, 5])
def test_a_device_error_is_raised_and_nothing_hangs(infos: list[TensorInfo], fail_at: int) -> None:
    large = max(infos, key=lambda info: info.nbytes)
    reader = DevicePrefetch(20 * CHUNK, SlowCopier(fail_at=fail_at))
    reader.announce(infos)
    with pytest.raises(RuntimeError, match="fell off the bus"):
        reader.take(large)
    with pytest.raises(RuntimeError, match="fell off the bus"):
        reader.take(infos[0])
    reader.close()


@pytest.mark.parametrize("where", ["host_memory", "target"])
def test_failed_allocations_are_raised(infos: list[TensorInfo], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host, where reads allocate, and on the device. Memory is freed, and tensors can be taken once there is enough."""

    def refuses(*_: object) -> Tensor:
        raise MemoryError("no room")

    large = max(infos, key=lambda info: info.nbytes)
    copier = SlowCopier()
    reader = DevicePrefetch(20 * CHUNK, copier)
    with monkeypatch.context() as patch:
        patch.setattr(copier, where, refuses)
        for _ in range(2):
            with pytest.raises(MemoryError, match="no room"):
                reader.take(large)
    assert all_free(reader)
    reader.announce(infos)
    assert all(same(reader.take(info), info) for info in infos)
    reader.close()


@pytest.mark.parametrize("taking", [True, False])
def test_closing_while_reads_are_in_flight(infos: list[TensorInfo], taking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads hang until closing has begun. Waiting takers get an error."""
    large = max(infos, key=lambda info: info.nbytes)
    real, begun, released = os.preadv, threading.Event(), threading.Event()

    def hangs(*args: Any) -> int:
        begun.set()
        assert released.wait(30)
        return real(*args)

    monkeypatch.setattr(os, "preadv", hangs)
    reader = DevicePrefetch(20 * CHUNK, SlowCopier(0.001))
    reader.announce(infos)
    with ThreadPoolExecutor(2) as threads:
        taken = threads.submit(reader.take, large) if taking else None
        assert begun.wait(10)
        closed = threads.submit(reader.close)
        time.sleep(0.05)
        assert not closed.done(), "memory that is being read into is not given back"
        released.set()
        closed.result(20)
        if taken is not None:
            with pytest.raises(CancelledError):
                taken.result(20)
    with pytest.raises(CancelledError):
        reader.take(infos[0])


def test_reads_and_copies_are_lanes_of_the_trace(infos: list[TensorInfo]) -> None:
    trace = Trace()
    reader = DevicePrefetch(50 * CHUNK, SlowCopier(0.0002), trace)
    reader.announce(infos)
    for info in infos:
        reader.take(info)
    assert all_free(reader)
    reader.close()
    for lane in ("read", "copy to device"):
        spans = [span for span in trace.spans if span.lane == lane]
        assert {span.name for span in spans} == {info.name for info in infos if info.nbytes}
        assert all(span.begin <= span.end for span in spans)
    copies = sorted((span.begin, span.end) for span in trace.spans if span.lane == "copy to device")
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(copies)), "copies follow one another"
