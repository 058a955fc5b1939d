"""Kernels on tensors of more than 2³¹ elements, where 32-bit offsets overflow: the largest Hessian of BLOOM-176B."""

from __future__ import annotations

import torch
from gpu_bench import relative
from torch import Tensor

from bigq.kernels.finiteness import is_finite
from bigq.kernels.rank_update import rank_update_
from bigq.kernels.syrk import syrk_
from bigq.kernels.triangles import mirror_, permute_
from gpu_steps.setting import Findings, Setting

TOKENS, TILE = 256, 64
LIMIT = 1e-5


def run(setting: Setting, found: Findings) -> None:
    n = 1024 if setting.smoke else 57344
    device = torch.device(setting.device)
    torch.manual_seed(0)
    x = torch.randn(TOKENS, n, device=device).to(torch.bfloat16)
    h = torch.zeros(n, n, device=device)
    corners = [(0, n - TILE), (n - TILE, n - TILE), (n // 2, n - 100), (n // 3, n // 3 + TILE)]
    with found.attempt("syrk"):
        check_syrk(found, h, x, corners)
    with found.attempt("finiteness"):
        check_finiteness(found, h)
    with found.attempt("triangles"):
        check_triangles(found, h, corners)
    with found.attempt("rank_update"):
        check_rank_update(found, h)


def check_syrk(found: Findings, h: Tensor, x: Tensor, corners: list[tuple[int, int]]) -> None:
    syrk_(h, x)
    for i, j in corners:
        exact, part = x[:, i : i + TILE].double().T @ x[:, j : j + TILE].double(), h[i : i + TILE, j : j + TILE]
        if i == j:
            exact, part = exact.triu(), part.triu()
        found.check(f"syrk at {i}, {j}", relative(part, exact), LIMIT)


def check_finiteness(found: Findings, h: Tensor) -> None:
    found.require("a finite matrix is finite", is_finite(h))
    flat = h.view(-1)
    for place in (0, len(flat) // 2 + 5, len(flat) - 1):
        kept = float(flat[place])
        for value in (float("nan"), float("inf"), -float("inf")):
            flat[place] = value
            found.require(f"{value} at {place} is found", not is_finite(h))
        flat[place] = kept


def check_triangles(found: Findings, h: Tensor, corners: list[tuple[int, int]]) -> None:
    mirror_(h)
    for i, j in corners:
        found.require(f"mirror at {i}, {j}", torch.equal(h[i : i + TILE, j : j + TILE], h[j : j + TILE, i : i + TILE].T))
    perm = torch.randperm(len(h), device=h.device)
    expected = h[perm[:TILE]][:, perm[:TILE]]
    permute_(h, perm)
    found.require("permutation", torch.equal(h[:TILE, :TILE], expected))


def check_rank_update(found: Findings, h: Tensor) -> None:
    n = len(h)
    hi, lo = n - 512, n - 768
    c, a, b = h[:hi, lo:hi], h[:hi, hi:], h[lo:hi, hi:]
    sampled = torch.tensor([0, hi // 2, lo - 1], device=h.device)
    exact = c[sampled].double() - a[sampled].double() @ b.double().T
    rank_update_(c, a, b)
    found.check("rank_update", relative(c[sampled], exact), LIMIT)
