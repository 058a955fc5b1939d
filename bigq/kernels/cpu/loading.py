"""Loading all compiled kernels at once, so that their memory is known before a job is planned."""

from __future__ import annotations

import torch

from bigq.kernels.cpu.columns import find_grid_compiled, gptq_block_compiled_
from bigq.kernels.cpu.syrk import PANEL, can_accumulate, syrk_compiled_
from bigq.kernels.grid_spec import GridSpec, GroupGrid


def load() -> None:
    """Run every kernel once. The first time on a machine this compiles them, in about 10 s; later they come from numba's cache."""
    k, m = 2, 1
    target, work, codes = torch.zeros(k, m), torch.zeros(k, m), torch.empty(k, m, dtype=torch.uint8)
    scale, zero = torch.empty(2, 1, m)
    spec = GridSpec(bits=4, symmetric=True, search=True)
    gptq_block_compiled_(target, torch.eye(k), work, codes, GroupGrid(spec, scale, zero, torch.zeros(k, dtype=torch.int32), True))
    find_grid_compiled(target, spec)
    h, x = torch.zeros(PANEL, PANEL), torch.zeros(2, PANEL, dtype=torch.bfloat16)
    if can_accumulate(h, x):
        syrk_compiled_(h, x)
