"""Which version of a kernel runs.

Every kernel has a plain-torch version, its reference, which runs anywhere; next to it, in ``gpu/<kernel>.py``, lies
the one for GPUs. Those files are imported at their first use: triton takes 73 MiB and 0.4 s that a CPU need not spend.
"""

from __future__ import annotations

import torch
from torch import Tensor


def use_triton(x: Tensor) -> bool:
    """True where the Triton version serves: on CUDA devices, and not for fp64, which is there to check against."""
    return x.is_cuda and x.dtype != torch.float64


def interpreted(x: Tensor) -> bool:
    """True where a Triton kernel called with x runs in Triton's interpreter, which lacks arithmetic in bf16."""
    return not x.is_cuda


def empty_columns(k: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [k, m] in the memory order that the column loop wants: by columns on a CPU, by rows on a GPU."""
    if device.type == "cuda":
        return torch.empty(m, k, dtype=dtype, device=device).T
    return torch.empty(k, m, dtype=dtype, device=device)
