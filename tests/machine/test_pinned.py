"""Pinned memory: what torch's rounding to powers of two costs, and that segments hold every element once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigq.io.prefetch.cuda_copier import CudaCopier
from bigq.io.reader import CHUNK_BYTES
from bigq.machine.pinned import GRANULE, PinnedMemory, segments


@pytest.mark.parametrize(
    "size", [1, GRANULE - 1, GRANULE, GRANULE + 1, 3 * GRANULE, 128 * 2048 * 14336 * 2, 128 * 2048 * 5120 * 2, 2**40 + 5]
)
def test_segments_are_powers_of_two_and_lose_less_than_a_granule(size: int) -> None:
    found = segments(size)
    assert all(segment.bit_count() == 1 for segment in found) and found == sorted(set(found), reverse=True)
    assert 0 <= sum(found) - size < GRANULE


def test_nothing_takes_nothing() -> None:
    assert segments(0) == [] and list(PinnedMemory(0, torch.float32).pieces(0, 0)) == []


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each pinned allocation, rounded as torch does; the memory is ordinary."""
    sizes: list[int] = []
    real_empty = torch.empty

    def empty(*shape: int, pin_memory: bool = False, **how: Any) -> torch.Tensor:
        made = real_empty(*shape, **how)
        assert pin_memory
        sizes.append(1 << (made.nbytes - 1).bit_length())
        return made

    monkeypatch.setattr(torch, "empty", empty)
    return sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pieces_are_the_elements_in_order(dtype: torch.dtype, allocated: list[int]) -> None:
    count = (5 * GRANULE + 300) // dtype.itemsize
    memory = PinnedMemory(count, dtype)
    assert sum(allocated) == 6 * GRANULE, "one allocation of this size would take 8"
    for number, piece in enumerate(memory.pieces(0, count)):
        piece.fill_(number)
    assert [len(piece) * dtype.itemsize for piece in memory.pieces(0, count)] == [4 * GRANULE, GRANULE + 300]
    edge = 4 * GRANULE // dtype.itemsize
    assert torch.cat(list(memory.pieces(edge - 2, edge + 2))).tolist() == [0, 0, 1, 1]
    assert [len(piece) for piece in memory.pieces(edge, edge + 1)] == [1]


def test_buffers_of_a_fixed_size_lose_nothing() -> None:
    """Those of the writer, and of the ring that weights are read into, are one allocation each."""
    assert CHUNK_BYTES.bit_count() == 1
    with pytest.raises(AssertionError):
        CudaCopier.host_memory(None, 3 * GRANULE)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_segments_are_pinned() -> None:
    count = 3 * GRANULE
    pieces = list(PinnedMemory(count, torch.uint8).pieces(0, count))
    assert len(pieces) == 2 and all(piece.is_pinned() for piece in pieces)
