"""Copies of tensors from a GPU to the host, with a simulated device that copies late, and on a real GPU if there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from bigq.io import device_to_host
from bigq.io.device_to_host import DeviceToHost
from bigq.io.index import read_header
from bigq.io.reader import read_tensor
from bigq.io.writer import OutputTensor, write_shard

CHUNK = 1000


class LateStream:
    """A stream whose copies are made only when they are waited for."""

    def __init__(self) -> None:
        self.begun: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.waited: list[LateEvent] = []

    def wait_event(self, event: LateEvent) -> None:
        self.waited.append(event)


class LateEvent:
    def __init__(self, blocking: bool = False) -> None:
        self.stream: LateStream | None = None
        self.copies = 0

    def record(self, stream: LateStream) -> None:
        self.stream, self.copies = stream, len(stream.begun)

    def synchronize(self) -> None:
        assert self.stream is not None
        for target, source in self.stream.begun[: self.copies]:
            real_copy(target, source)
        self.stream.begun[: self.copies] = [(torch.empty(0), torch.empty(0))] * self.copies


real_copy = torch.Tensor.copy_


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[LateStream, LateStream]:
    """The copy stream and the compute stream of a simulated device, whose memory is on the host."""
    copies, compute = LateStream(), LateStream()
    real_empty = torch.empty

    @contextlib.contextmanager
    def stream(chosen: LateStream) -> Iterator[None]:
        assert chosen is copies
        yield

    def copy_(self: torch.Tensor, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not non_blocking:
            return real_copy(self, other)
        copies.begun.append((self, other))
        return self

    def empty(*shape: int, pin_memory: bool = False, **how: torch.dtype) -> torch.Tensor:
        return real_empty(*shape, **how)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(device_to_host, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch, "empty", empty)
    return copies, compute


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2000, 7777])
def test_chunks_are_the_bytes_in_order(count: int, streams: tuple[LateStream, LateStream]) -> None:
    tensor = torch.randint(0, 256, (count,), dtype=torch.uint8)
    out = DeviceToHost(torch.device("cuda"))
    got = b"".join(bytes(piece) for piece in out.chunks(tensor, out.mark()))
    assert got == tensor.numpy().tobytes()


def test_a_piece_is_copied_while_another_is_written(streams: tuple[LateStream, LateStream]) -> None:
    tensor = torch.arange(3 * CHUNK, dtype=torch.int64).to(torch.uint8)
    out = DeviceToHost(torch.device("cuda"))
    pieces = out.chunks(tensor, out.mark())
    for begun in (2, 3, 3):
        next(pieces)
        assert len(streams[0].begun) == begun


def test_copies_wait_for_work_before_the_mark(streams: tuple[LateStream, LateStream], tmp_path: object) -> None:
    out = DeviceToHost(torch.device("cuda"))
    tensor = OutputTensor.of("x", torch.ones(10), out)
    assert not streams[0].waited
    b"".join(bytes(piece) for piece in tensor.chunks())
    (event,) = streams[0].waited
    assert event.stream is streams[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_shard_of_a_gpu_s_tensors(tmp_path_factory: pytest.TempPathFactory) -> None:
    device = torch.device("cuda:0")
    out = DeviceToHost(device)
    tensors = {f"t{i}": torch.randn(size, device=device) for i, size in enumerate((1, 5_000_000, 40_000_000))}
    path = tmp_path_factory.mktemp("out") / "shard.safetensors"
    write_shard(path, [OutputTensor.of(name, tensor, out) for name, tensor in tensors.items()])
    infos, _ = read_header(path)
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(infos[name]), tensor.cpu())
