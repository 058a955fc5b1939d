"""Dispatch between the versions of a kernel.

Every kernel has a reference in plain torch, which runs anywhere, and a Triton version in ``gpu/<kernel>.py``. Some also have a
version in ``cpu/``, which numba compiles. Both are imported at their first use: importing triton takes 73 MiB and 0.4 s, numba 0.4 s.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

#: Resident bytes of numba, LLVM and the compiled kernels once they are loaded: measured 109 MiB.
COMPILED_BYTES = 110 * 2**20

#: Elements that are converted or moved at a time where a whole copy would take as much memory as the matrix. On a CPU a piece fits its
#: second-level cache: a matrix of 5632 × 5632 is permuted in 92 to 120 ms, in pieces of a GPU's size in 151 ms (two cores).
CPU_PIECE, GPU_PIECE = 2**18, 2**24


def piece(*, on_gpu: bool) -> int:
    """How many elements of a large matrix are converted or moved at a time."""
    return GPU_PIECE if on_gpu else CPU_PIECE


def use_triton(x: Tensor) -> bool:
    """True if the Triton version runs for x: on CUDA devices, except for fp64, which serves as the reference in tests."""
    return x.is_cuda and x.dtype != torch.float64


def use_compiled(*tensors: Tensor) -> bool:
    """True if the version that numba compiles runs for these tensors: all fp32 on a CPU, and numba is installed."""
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors) and compiler_installed()


@functools.cache
def compiler_installed() -> bool:
    """Whether numba, an optional dependency, can be imported. Some versions cannot beside a newer numpy."""
    try:
        importlib.import_module("numba")
    except ImportError:
        return False
    return True


def compiled_bytes(device: torch.device) -> int:
    """The host memory that ``load_compiled`` will take: none if the kernels are loaded already."""
    if device.type != "cpu" or "bigq.kernels.cpu.loading" in sys.modules or importlib.util.find_spec("numba") is None:
        return 0
    return COMPILED_BYTES


def load_compiled(device: torch.device) -> None:
    """Load the kernels that numba compiles, if a job on ``device`` uses them."""
    if device.type == "cpu" and compiler_installed():
        from bigq.kernels.cpu.loading import load

        load()


def instruction_set() -> str:
    """What the choice of kernels on this CPU depends on, such as "AVX512, AMX"."""
    name = torch.backends.cpu.get_cpu_capability()
    if compiler_installed():
        from bigq.kernels.cpu.tiles import has_tiles

        return f"{name}, AMX" if has_tiles() else name
    return name


def uses_interpreter(x: Tensor) -> bool:
    """True if a Triton kernel called with x runs in Triton's interpreter, which has no bf16 arithmetic."""
    return not x.is_cuda


def input_precision() -> str:
    """``input_precision`` of products of fp32 numbers on tensor cores: three TF32 products on NVIDIA GPUs, fp32 itself on AMD's.

    Triton's compiler for AMD GPUs does not accept three TF32 products; their matrix cores multiply fp32 numbers.
    """
    return "tf32x3" if torch.version.hip is None else "ieee"


def empty_columns(k: int, m: int, dtype: torch.dtype, device: torch.device, batch: Sequence[int] = ()) -> Tensor:
    """An uninitialized [*batch, k, m] in the memory order of the column loop: each column contiguous on a CPU, each row on a GPU."""
    if device.type == "cuda":
        return torch.empty(*batch, m, k, dtype=dtype, device=device).mT
    return torch.empty(*batch, k, m, dtype=dtype, device=device)
