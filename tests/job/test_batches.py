"""The batch by place: it never grows, and a resumed job has the same batch at each place."""

from __future__ import annotations

import json

import pytest
import torch

from bigq.job.batches import Batches, Halving
from bigq.machine.device import out_of_memory


def test_a_halving_holds_from_its_place_on() -> None:
    batches = Batches(8)
    batches.halve(1, 0, 16)
    places = [(0, 0, 0), (0, 9, 99), (1, 0, 0), (1, 0, 15), (1, 0, 16), (1, 0, 24), (1, 1, 0), (2, 0, 0)]
    assert [batches.at(*place) for place in places] == [8, 8, 8, 8, 4, 4, 4, 4]
    batches.halve(2, 3)
    assert [batches.at(*place) for place in places] == [8, 8, 8, 8, 4, 4, 4, 4]
    assert (batches.at(2, 2, 99), batches.at(2, 3), batches.at(7, 0)) == (4, 2, 2)
    assert batches.sizes == (8, 4, 2)


def test_an_earlier_place_may_halve_later() -> None:
    """A job resumed on a device with less memory may fail at an earlier place than the first run. Later batches are no larger."""
    batches = Batches(8, [Halving(5, 1, 0, 4)])
    batches.halve(2, 0, 8)
    batches.halve(2, 0, 8)
    assert (batches.at(2, 0), batches.at(2, 0, 8), batches.at(5, 1), batches.at(6, 0)) == (8, 2, 2, 2)
    assert batches.sizes == (8, 4, 2)


def test_reported_halvings_restore_the_batches() -> None:
    reported: list[tuple[int, Halving]] = []
    batches = Batches(7, on_halving=lambda before, halving: reported.append((before, halving)))
    batches.halve(0, 2)
    batches.halve(3, 0, 5)
    assert [(before, h.batch) for before, h in reported] == [(7, 3), (3, 1)]
    again = Batches(7, [Halving(*numbers) for numbers in json.loads(json.dumps([h.to_json() for _, h in reported]))])
    for place in ((0, 0), (0, 2), (3, 0, 4), (3, 0, 5), (9, 9, 9)):
        assert batches.at(*place) == again.at(*place)
    with pytest.raises(AssertionError):
        batches.halve(4, 0)


ERRORS: list[tuple[Exception, bool]] = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB"), True),
    (torch.cuda.OutOfMemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("Triton Error [CUDA]: out of memory"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
    (RuntimeError(), False),
    (ValueError("CUDA was fine"), False),
]


@pytest.mark.parametrize(("error", "expected"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors_that_a_smaller_batch_may_avoid(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected
