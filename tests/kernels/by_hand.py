"""Scalar versions of grids and of the column loop, in numpy and Python floats: one group or one weight at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bigq.kernels.grid import GridSpec
from bigq.kernels.grid_spec import REFINED

TINY = 2.0**-24


def as_fp16(value: float) -> float:
    stored = float(np.float16(value))
    if value == 0:
        return 1.0
    return stored if stored > 0 else TINY


def range_grid(low: float, high: float, part: float, spec: GridSpec) -> tuple[float, int]:
    """part: of the range; a negative one puts the spare step of a symmetric grid on the shorter side, not on the longer one."""
    top, longer = spec.max_code, "above" if high > -low else "below"
    low, high = abs(part) * low, abs(part) * high
    if spec.symmetric:
        scale = as_fp16(2 * max(-low, high) / top)
        above = longer == "above" if part > 0 else longer == "below"
        return -scale if spec.search and above else scale, 2 ** (spec.bits - 1)
    scale = as_fp16((high - low) / top)
    zero = min(max(int(np.rint(-low / scale)), 0), top)
    if zero < spec.min_zero:
        if high > 0:
            scale = max(scale, as_fp16(high / (top - spec.min_zero)))
        zero = spec.min_zero
    return scale, zero


def rounding_error(group: np.ndarray, scale: float, zero: int, bits: int, weights: np.ndarray | float = 1.0) -> float:
    codes = np.clip(np.rint(group / scale) + zero, 0, 2**bits - 1)
    return float((np.abs(group - (codes - zero) * scale) ** 2 * weights).sum())


def reference_grid(group: np.ndarray, spec: GridSpec, weights: np.ndarray | float = 1.0) -> tuple[float, int]:
    """Scale and zero of one group; with a search, those of the least squared error, weighted."""
    low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
    parts = [i / 100 for i in spec.tried] if spec.search else [1.0]
    grids = [range_grid(low, high, part, spec) for part in parts]
    return min(grids, key=lambda grid: rounding_error(group, *grid, spec.bits, weights))


def loss_grid(group: list[float], u: list[list[float]], spec: GridSpec) -> tuple[float, int]:
    """Scale and zero of one group, of the least loss of the column loop with its part of U: first among all parts, then around the best."""
    low, high = min(0.0, *group), max(0.0, *group)

    def tried(part: float) -> tuple[float, tuple[float, int]]:
        scale, zero = range_grid(low, high, part, spec)
        values, loss = list(group), 0.0
        for j, value in enumerate(values):
            error = (value - scale * (min(max(round(value / scale) + zero, 0), spec.max_code) - zero)) / u[j][j]
            loss += error**2
            for later in range(j + 1, len(values)):
                values[later] -= error * u[j][later]
        return loss, (scale, zero)

    best = min((i / 100 for i in spec.solved), key=lambda part: tried(part)[0])
    for step in REFINED:
        best = min((best, best - step / 100, best + step / 100), key=lambda part: tried(part)[0])
    return tried(best)[1]


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
                inside = slice(j, j + width)
                part = [row[inside] for row in rows[inside]]
                found = loss_grid(values[inside], part, spec) if spec.search else reference_grid(np.array(values[inside]), spec)
                out["scale"][g, i], out["zero"][g, i] = found
            s, z = float(out["scale"][g, i]), float(out["zero"][g, i])
            code = min(max(round(values[j] / s) + z, 0), spec.max_code)
            error = (values[j] - s * (code - z)) / rows[j][j]
            for later in range(j + 1, k):
                values[later] -= error * rows[j][later]
            out["target"][j, i], out["codes"][j, i] = error, code
            out["work"][j, i] = work[j, i] - s * (code - z)
            out["loss"][i] += error**2
    return out
