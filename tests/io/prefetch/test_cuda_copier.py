"""Copies on a separate stream: the calls to CUDA in order and, on a GPU, that bytes arrive intact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bigq.errors import NumericsError, ResourceError
from bigq.io.index import Checkpoint
from bigq.io.prefetch.cuda_copier import CudaCopier
from bigq.io.prefetch.to_device import DevicePrefetch, least_budget
from bigq.io.reader import read_tensor
from bigq.progress.trace import Trace

CPU = torch.device("cpu")


class FakeStream:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def wait_stream(self, other: FakeStream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The copier's calls to CUDA, in order. Tensors are on the host."""
    calls: list[str] = []
    copying, current = FakeStream("copies", calls), FakeStream("current", calls)
    on = [current]

    @contextlib.contextmanager
    def stream(chosen: FakeStream) -> Iterator[None]:
        on.append(chosen)
        yield
        on.pop()

    class FakeEvent:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking

        def record(self, where: FakeStream) -> None:
            calls.append(f"event on {where.name}")

        def synchronize(self) -> None:
            calls.append("event waited for")

    def copy_(self: torch.Tensor, other: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        assert non_blocking
        calls.append(f"copy on {on[-1].name}")
        return real_copy(self, other)

    real_copy, real_empty = torch.Tensor.copy_, torch.empty

    def empty(*shape: Any, pin_memory: bool = False, **how: Any) -> torch.Tensor:
        calls.append("pinned" if pin_memory else f"allocated on {on[-1].name}")
        return real_empty(*shape, **how)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copying)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: on[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, where: calls.append(f"kept for {where.name}"))
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch, "empty", empty)
    return calls


def test_streams_wait_for_each_other(calls: list[str]) -> None:
    copier = CudaCopier(CPU)
    host = copier.host_memory(16)
    target = copier.target([16], torch.uint8)
    copies = [copier.copy(target[part], host[part]) for part in (slice(0, 8), slice(8, 16))]
    copier.join()
    copies[0].wait()
    assert torch.equal(host, target)
    assert calls == [
        "pinned",
        "allocated on current",
        "copies waits for current",
        "kept for copies",
        *["copy on copies", "event on copies"] * 2,
        "current waits for copies",
        "event waited for",
    ]


def test_memory_that_cannot_be_pinned_is_an_error(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might")

    monkeypatch.setattr(torch, "empty", refuses)
    with pytest.raises(ResourceError, match=r"4096 bytes .*out of memory\); use a smaller --read-ahead$"):
        CudaCopier(CPU).host_memory(4096)


@pytest.mark.gpu
def test_tensors_arrive_on_the_gpu(tmp_path: Path) -> None:
    """Several times the size of the ring, while the GPU still works on the memory that the tensors get."""
    device = torch.device("cuda:0")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(5_000_001 + 777 * i, generator=generator).to(torch.bfloat16) for i in range(20)}
    tensors |= {"large": torch.randn(30_000_000, generator=generator), "ids": torch.arange(1000), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    infos = list(Checkpoint.open(tmp_path).tensors.values())
    trace = Trace()
    reader = DevicePrefetch(3 * least_budget(), CudaCopier(device), trace)
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(3):
        reader.announce(infos)
        for info in infos:
            scratch = torch.empty(info.nbytes + 1, dtype=torch.uint8, device=device)
            for _ in range(4):
                busy = (busy @ busy).clamp_(-1, 1)
                scratch.fill_(7)
            del scratch
            assert torch.equal(reader.take(info).cpu(), read_tensor(info)), info.name
        reader.check()
    assert reader.peak <= reader.capacity <= 3 * least_budget()
    reader.close()
    assert {"read", "copy to device"} == {span.lane for span in trace.spans}


@pytest.mark.gpu
def test_nan_is_found_on_the_gpu(tmp_path: Path) -> None:
    save_file({"a": torch.ones(10), "b": torch.tensor([0.0, float("nan")], dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    reader = DevicePrefetch(0, CudaCopier(torch.device("cuda:0")))
    reader.take(checkpoint["a"])
    reader.check()
    reader.take(checkpoint["b"])
    with pytest.raises(NumericsError, match="tensor b"):
        reader.check()
    reader.close()
