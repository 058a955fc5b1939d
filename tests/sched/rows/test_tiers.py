"""Storage tiers of activations: every tier returns what was put, and a job's output does not depend on the tier."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import bigq
from bigq.errors import ResourceError, UsageError
from bigq.machine import pinned
from bigq.sched.rows import tiers
from bigq.sched.rows.tiers import Tier, choose_tier, fastest_tier

CPU = torch.device("cpu")
KINDS = ("host", "disk")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back_as_they_were_put(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    rows = torch.randn(7, 3, 5).to(dtype)
    buffer = Tier(kind, CPU, tmp_path).buffer(7, 15, dtype)
    for lo, hi in ((0, 3), (3, 6), (6, 7)):
        buffer.put(lo, rows[lo:hi])
    assert torch.equal(buffer.get(0, 3), rows[:3].reshape(3, 15)) and torch.equal(buffer.get(6, 7), rows[6:].reshape(1, 15))
    buffer.prefetch(3, 6)
    assert torch.equal(buffer.get(3, 6), rows[3:6].reshape(3, 15))
    buffer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_overwrite_inputs_while_the_next_are_read(kind: str, tmp_path: Path) -> None:
    """Several passes over the batches, in their order."""
    count = 9
    buffer = Tier(kind, CPU, tmp_path).buffer(count, 2000, torch.float32)
    expected = torch.randn(count, 2000)
    for i in range(count):
        buffer.put(i, expected[i : i + 1])
    for _ in range(4):
        for i in range(count):
            x = buffer.get(i, i + 1).clone()
            if i + 1 < count:
                buffer.prefetch(i + 1, i + 2)
            buffer.put(i, 2 * x + 1)
        expected = 2 * expected + 1
    assert torch.equal(torch.cat([buffer.get(i, i + 1) for i in range(count)]), expected)
    buffer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_prefetched_rows_are_dropped_when_they_are_overwritten(kind: str, tmp_path: Path) -> None:
    buffer = Tier(kind, CPU, tmp_path).buffer(4, 8, torch.float32)
    buffer.put(0, torch.zeros(4, 8))
    buffer.prefetch(1, 3)
    buffer.put(2, torch.ones(1, 8))
    assert buffer.get(1, 3).sum(1).tolist() == [0, 8]
    buffer.close()


def test_the_file_has_no_name_and_takes_its_room_at_once(tmp_path: Path) -> None:
    before = os.statvfs(tmp_path).f_bavail
    buffer = Tier("disk", CPU, tmp_path).buffer(64, 2**18, torch.float32)
    assert list(tmp_path.iterdir()) == []
    assert (before - os.statvfs(tmp_path).f_bavail) * os.statvfs(tmp_path).f_frsize > 48 * 2**20
    buffer.close()


def test_a_full_disk_is_reported_before_the_job_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"No space left.*--activations host"):
        Tier("disk", CPU, tmp_path).buffer(4, 8, torch.float32)


def test_a_failed_write_is_raised_by_a_later_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = Tier("disk", CPU, tmp_path).buffer(16, 8, torch.float32)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def put_all() -> None:
        for i in range(16):
            buffer.put(i, torch.zeros(1, 8))

    monkeypatch.setattr(os, "pwritev", broken)
    with pytest.raises(ResourceError, match="Input/output error"):
        put_all()
    buffer.close()


def test_no_more_than_a_few_writes_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = Tier("disk", CPU, tmp_path).buffer(32, 8, torch.float32)
    for i in range(32):
        buffer.put(i, torch.full((1, 8), float(i)))
        assert len(buffer._writes) <= tiers.WRITES_IN_FLIGHT
    assert torch.equal(buffer.get(0, 32)[:, 0], torch.arange(32.0))
    buffer.close()


@pytest.mark.parametrize(
    ("needed", "device_free", "host_free", "tier"), [(10, 20, 0, "gpu"), (10, 19, 20, "host"), (10, 0, 20, "host"), (10, 0, 19, "disk")]
)
def test_auto_takes_the_first_tier_with_room(needed: int, device_free: int, host_free: int, tier: str) -> None:
    assert fastest_tier(needed, device_free, host_free) == tier


def test_without_a_plan_memory_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "host_budget", lambda resident: 20)
    assert [choose_tier(CPU, needed, tmp_path).kind for needed in (10, 11)] == ["host", "disk"]
    assert [choose_tier(CPU, needed, tmp_path, 2).kind for needed in (5, 6)] == ["host", "disk"]


def test_an_unknown_tier() -> None:
    with pytest.raises(UsageError, match="--activations ssd: must be one of"):
        bigq.JobConfig(activations="ssd")


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "falcon"])
def test_the_tiers_give_identical_output(family: str, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    """Families with folded and unfolded rows, with and without shortcuts; the last batch is smaller."""
    digests = []
    for kind in KINDS:
        out = tmp_path / kind
        config = bigq.JobConfig(
            scheme=bigq.QuantScheme(group_size=32),
            calibration=str(ids_file),
            samples=7,
            seqlen=40,
            batch=3,
            activations=kind,
            device="cpu",
            quiet=True,
        )
        bigq.quantize(str(checkpoint(family)), out, config)
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*.safetensors"))})
        assert not [p for p in (out / ".bigq").iterdir() if "tmp" in p.name]
    assert digests[0] == digests[1] and len(digests[0]) > 1


class FakeStream:
    """A fake CUDA stream that records what waits for what."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def wait_stream(self, other: FakeStream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeEvent) -> None:
        self.calls.append(f"{self.name} waits for copy {event.number}")

    def synchronize(self) -> None:
        self.calls.append(f"all of {self.name} awaited")


class FakeEvent:
    made = 0

    def __init__(self) -> None:
        FakeEvent.made += 1
        self.number = FakeEvent.made

    def record(self, stream: FakeStream) -> None:
        assert stream.name == "copies"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CUDA calls of the host tier, in order; device tensors are on the host."""
    calls: list[str] = []
    copies, current = FakeStream("copies", calls), FakeStream("compute", calls)
    on = [current]
    real_copy, real_empty = torch.Tensor.copy_, torch.empty

    @contextlib.contextmanager
    def stream(chosen: FakeStream) -> Iterator[None]:
        on.append(chosen)
        yield
        on.pop()

    def copy_(self: torch.Tensor, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if non_blocking:
            calls.append(f"copy on {on[-1].name}")
        return real_copy(self, other)

    def empty(*shape: int, pin_memory: bool = False, device: object = None, **how: torch.dtype) -> torch.Tensor:
        return real_empty(*shape, **how)  # type: ignore[call-overload, no-any-return]

    FakeEvent.made = 0
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: on[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: calls.append(f"kept for {stream.name}"))
    monkeypatch.setattr(torch, "empty", empty)
    return calls


def test_a_gpu_s_host_tier_copies_beside_the_computation(calls: list[str]) -> None:
    """Computation on rows waits only for their own copy. Every copy waits for the work queued before it."""
    buffer = Tier("host", torch.device("cuda"), Path()).buffer(4, 3, torch.float32)
    rows = torch.arange(12.0).view(4, 3)
    buffer.put(0, rows)
    assert calls == ["copies waits for compute", "copy on copies", "kept for copies"]
    calls.clear()
    assert torch.equal(buffer.get(0, 2), rows[:2])
    fetched = ["copies waits for compute", "copy on copies", "kept for copies"]
    assert calls == [*fetched, "compute waits for copy 1"]
    calls.clear()
    buffer.prefetch(2, 4)
    buffer.put(0, -rows[:2])
    assert torch.equal(buffer.get(2, 4), rows[2:])
    assert calls == [*fetched, *fetched, "compute waits for copy 2"]
    calls.clear()
    buffer.prefetch(0, 2)
    buffer.put(1, torch.zeros(1, 3))
    assert torch.equal(buffer.get(0, 2)[1], torch.zeros(3))
    assert calls[-1] == "compute waits for copy 4"
    buffer.close()
    assert calls[-1] == "all of copies awaited"


def test_a_gpu_s_host_tier_reads_and_writes_rows_that_lie_in_several_segments(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "GRANULE", 16)
    buffer = Tier("host", torch.device("cuda"), Path()).buffer(13, 3, torch.float32)  # 156 bytes: segments of 128 and 32
    expected = torch.arange(39.0).view(13, 3)
    for lo, hi in ((0, 5), (5, 13)):
        buffer.put(lo, expected[lo:hi].view(-1, 1, 3))
    assert calls.count("copy on copies") == 3
    for lo in range(13):
        for hi in range(lo + 1, 14):
            assert torch.equal(buffer.get(lo, hi), expected[lo:hi])
    buffer.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["gpu", "host", "disk"])
def test_rows_round_trip_on_a_gpu(kind: str, tmp_path: Path) -> None:
    device = torch.device("cuda:0")
    buffer = Tier(kind, device, tmp_path).buffer(6, 1 << 20, torch.float32)
    expected = torch.randn(6, 1 << 20)
    for i in range(6):
        buffer.put(i, expected[i : i + 1].to(device))
    for _ in range(5):
        for i in range(6):
            x = buffer.get(i, i + 1).clone()
            if i < 5:
                buffer.prefetch(i + 1, i + 2)
            buffer.put(i, x * 2 + 1)
        expected = expected * 2 + 1
    assert torch.equal(torch.cat([buffer.get(i, i + 1).cpu() for i in range(6)]), expected)
    buffer.close()
