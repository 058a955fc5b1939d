"""Scalar versions of grids and of the column loop, in numpy and Python floats: one group or one weight at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bigq.kernels.grid import GridSpec

TINY = 2.0**-24


def as_fp16(value: float) -> float:
    stored = float(np.float16(value))
    if value == 0:
        return 1.0
    return stored if stored > 0 else TINY


def range_grid(low: float, high: float, bits: int, symmetric: bool, min_zero: int) -> tuple[float, int]:
    top = 2**bits - 1
    if symmetric:
        return as_fp16(2 * max(-low, high) / top), 2 ** (bits - 1)
    scale = as_fp16((high - low) / top)
    zero = min(max(int(np.rint(-low / scale)), 0), top)
    if zero < min_zero:
        if high > 0:
            scale = max(scale, as_fp16(high / (top - min_zero)))
        zero = min_zero
    return scale, zero


def rounding_error(group: np.ndarray, scale: float, zero: int, bits: int, power: float = 2.4) -> float:
    codes = np.clip(np.rint(group / scale) + zero, 0, 2**bits - 1)
    return float((np.abs(group - (codes - zero) * scale) ** power).sum())


def reference_grid(group: np.ndarray, spec: GridSpec) -> tuple[float, int]:
    """Scale and zero of one group."""
    low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
    shrinks = [1 - i / 100 for i in range(80 if spec.mse else 1)]
    grids = [range_grid(low * s, high * s, spec.bits, spec.symmetric, spec.min_zero) for s in shrinks]
    return min(grids, key=lambda grid: rounding_error(group, *grid, spec.bits, spec.mse_power))


def column_loop(
    target: Tensor, u: Tensor, work: Tensor, spec: GridSpec, scale: Tensor, zero: Tensor, group: Tensor, find: bool
) -> dict[str, Tensor]:
    """The expected results of ``gptq_block_`` for target [k, m], all in fp64."""
    k, m = target.shape
    width = k // len(scale)
    out = {name: torch.zeros(k, m, dtype=torch.float64) for name in ("target", "work", "codes")}
    out |= {"loss": torch.zeros(m, dtype=torch.float64), "scale": scale.clone(), "zero": zero.clone()}
    rows = u.tolist()
    for i in range(m):
        values = target[:, i].tolist()
        for j in range(k):
            g = int(group[j])
            if find and j % width == 0:
                out["scale"][g, i], out["zero"][g, i] = reference_grid(np.array(values[j : j + width]), spec)
            s, z = float(out["scale"][g, i]), float(out["zero"][g, i])
            code = min(max(round(values[j] / s) + z, 0), spec.max_code)
            error = (values[j] - s * (code - z)) / rows[j][j]
            for later in range(j + 1, k):
                values[later] -= error * rows[j][later]
            out["target"][j, i], out["codes"][j, i] = error, code
            out["work"][j, i] = work[j, i] - s * (code - z)
            out["loss"][i] += error**2
    return out
