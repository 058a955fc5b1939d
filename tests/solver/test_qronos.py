"""Qronos (arXiv 2505.11695), literally with least squares in fp64, and GPTQ on the whole correction: behind the first column they agree."""

from __future__ import annotations

import pytest
import torch
from test_upstream_error import problem, solved
from torch import Tensor

from bigq.scheme import QuantScheme

pytestmark = pytest.mark.usefixtures("one_thread")

#: One grid for a row, on which both round.
SCHEME = QuantScheme(bits=3, group_size=-1, order="natural", scales="minmax", sweeps=0, damping=1e-9)


def qronos(w: Tensor, x: Tensor, now: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Codes. Each column is rounded to what is best with the columns behind it as they are; then these become the least squares' ones."""

    def code(value: Tensor) -> Tensor:
        return ((value / scale).round() + zero).clamp(0, top)

    target, n = x @ w.T, w.shape[1]
    rest = w.clone()
    codes, done = torch.zeros_like(w), torch.zeros_like(target)
    for t in range(n):
        column = now[:, t]
        behind = now[:, t + 1 :]
        best = (target - done - behind @ rest[:, t + 1 :].T).T @ column / column.square().sum()
        codes[:, t] = code(best)
        done += torch.outer(column, (codes[:, t] - zero) * scale)
        if t + 1 < n:
            rest[:, t + 1 :] = torch.linalg.lstsq(behind, target - done).solution.T
    return codes


def test_qronos_is_gptq_on_the_whole_correction_behind_the_first_column() -> None:
    """Rows whose first code is the same have all codes the same; in some rows the first one differs, as Qronos keeps the others for it."""
    w, x, now = problem(256, 6)
    ours = solved(w, x, now, SCHEME)
    codes = qronos(w, x, now, ours.scales[:, 0].double(), ours.zeros[:, 0].double(), 7)
    alike = (codes == ours.codes).all(1)
    first = codes[:, 0] == ours.codes[:, 0]
    assert torch.equal(alike, first)
    assert 0.5 < first.float().mean() < 1
