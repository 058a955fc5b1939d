"""The part of a GPU's memory that torch's allocator may take, and errors of memory that is allocated outside of it."""

from __future__ import annotations

import re

import pytest
import torch

from bigq.errors import ResourceError
from bigq.machine import device as chosen
from bigq.machine.budget import GPU_RESERVE, gpu_budget
from bigq.machine.device import choose_device, memory_errors, out_of_memory

GIB = 2**30
CUDA = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("free", "reserved", "allowed"),
    [
        (79 * GIB, 0, 79 * GIB - GPU_RESERVE),
        (70 * GIB, 9 * GIB, 79 * GIB - GPU_RESERVE),
        (3 * GIB, 0, 3 * GIB // 2),
        (GIB, 5 * GIB, 5 * GIB + GIB // 2),
        (0, 0, 1),
        (80 * GIB, 80 * GIB, 80 * GIB),
    ],
    ids=["alone", "with what the process holds", "little is free", "less than the reserve is free", "nothing is free", "all of it"],
)
def test_torch_s_allocator_leaves_the_reserve(free: int, reserved: int, allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And may take what plans count on."""
    caps: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: caps.append((fraction, device)))
    monkeypatch.setattr(chosen, "_fix_workspaces", lambda: None)
    device = choose_device("cuda:1")
    [(fraction, capped)] = caps
    assert capped == device and 0 < fraction <= 1 and fraction == pytest.approx(allowed / (80 * GIB), rel=1e-12)
    assert gpu_budget(device) <= allowed


def test_a_cpu_has_no_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: object) -> None:
        raise AssertionError("a job on the CPU must not touch a GPU")

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", called)
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "HIP error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "Triton Error [HIP]:  Code: 2, Messsage: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXpotrf(handle, params, uplo, n)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`. This error may appear if ...",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_memory_that_libraries_lack_is_recognized(message: str) -> None:
    assert out_of_memory(RuntimeError(message))
    with pytest.raises(ResourceError, match=re.escape(f"cuda:0: out of memory ({message.splitlines()[0]}); use")), memory_errors(CUDA):
        raise RuntimeError(message)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "HIP error: invalid device function",
        "Triton Error [CUDA]: invalid argument",
        "Triton Error [HIP]:  Code: 1, Messsage: invalid argument",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm( handle, opa, opb, m, n, k)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXpotrf(handle, params, uplo, n)`",
        "cusolver error: CUSOLVER_STATUS_INVALID_VALUE, when calling `cusolverDnCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_other_errors_of_the_same_libraries_are_not(message: str) -> None:
    """A smaller batch would not help."""
    assert not out_of_memory(RuntimeError(message))
    with pytest.raises(RuntimeError, match=re.escape(message)), memory_errors(CUDA):
        raise RuntimeError(message)
