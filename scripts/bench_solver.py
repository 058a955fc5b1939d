#!/usr/bin/env python3
"""Compare ``bigq.quantize_linear`` with an eager GPTQ on this machine's CPU, run in turn; and measure Hessians and the effect of TF32.

The speed is measured on one weight, 1024 × 2816, 4 bits, groups of 128, with the eager program's settings and with bigq's. Its floor
is the time of the products alone, at this machine's rate in a large product. The effect of TF32 factors in the feedback product (which a
GPU uses), and of bf16 factors (which bigq does not use), is measured by rounding the factors to these types.

    python scripts/bench_solver.py --json docs/results/bench_solver.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from eager_gptq import eager_gptq

import bigq.solver.gptq as solver
from bigq.kernels.cholesky import upper_cholesky_
from bigq.kernels.cpu.syrk import has_bf16_products, syrk_compiled_
from bigq.kernels.cpu.tiles import has_tiles
from bigq.kernels.syrk import syrk_reference_
from bigq.scheme import QuantScheme
from bigq.vocabulary import OrderName

M, N = 1024, 2816


def problem(m: int, n: int, seed: int, skewed: bool = False) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs, fp64; ``skewed`` adds a common direction and four large inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, dtype=torch.float64, generator=generator) / n**0.5
    x = torch.randn(2 * n, n, dtype=torch.float64, generator=generator) @ mix
    if skewed:
        x[:, :4] *= 50
        x += 5 * torch.randn(n, dtype=torch.float64, generator=generator)
    return 0.02 * torch.randn(m, n, dtype=torch.float64, generator=generator), 2 / len(x) * x.T @ x


def speed(rounds: int) -> dict[str, float]:
    """Median seconds of both, run in turn, their ratio, and the relative difference of their losses."""
    weight, hessian = (t.float() for t in problem(M, N, seed=0))
    scheme = QuantScheme(bits=4, group_size=128)
    times: dict[str, list[float]] = {"eager": [], "bigq": [], "bigq, defaults": []}
    losses: dict[str, float] = {}
    runs: dict[str, Callable[[], float]] = {
        "eager": lambda: eager_gptq(weight, hessian, 4, 128)[1],
        "bigq": lambda: solver.quantize_linear(weight, hessian, plain(scheme)).loss,
        "bigq, defaults": lambda: solver.quantize_linear(weight, hessian, scheme).loss,
    }
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            losses[name] = run()
            times[name].append(time.perf_counter() - started)
    eager, ours, defaults = (statistics.median(times[name]) for name in runs)
    return {
        "eager_s": eager,
        "bigq_s": ours,
        "bigq_defaults_s": defaults,
        "ratio": eager / ours,
        "lowest_ratio_of_a_round": min(a / b for a, b in zip(times["eager"], times["bigq"], strict=True)),
        "loss_difference": losses["bigq"] / losses["eager"] - 1,
        "loss_difference_of_defaults": losses["bigq, defaults"] / losses["eager"] - 1,
    }


def plain(scheme: QuantScheme) -> QuantScheme:
    """From left to right, with scales of ranges: what the paper does."""
    order: OrderName = "natural" if scheme.order == "group" else scheme.order
    return dataclasses.replace(scheme, order=order, scales="minmax", sweeps=0)


def hessians(rounds: int) -> dict[str, dict[str, float]]:
    """The sum over 2048 tokens by each unit of this processor: seconds, GFLOP/s of half a product, mean error of the diagonal."""
    x = (torch.randn(2048, N, generator=torch.Generator().manual_seed(0)) + 0.2).bfloat16()
    exact = x.double().square().sum(0)
    units = {"fp32 products": syrk_reference_}
    if has_bf16_products():
        units["AVX-512 BF16"] = lambda h, x: syrk_compiled_(h, x, False)
    if has_tiles():
        units["AMX"] = lambda h, x: syrk_compiled_(h, x, True)
    found = {}
    for name, add in units.items():
        h = torch.zeros(N, N)
        add(h, x)
        error = float(((h.diagonal().double() - exact) / exact).abs().mean())
        took = statistics.median(seconds(lambda add=add, h=h: add(h, x)) for _ in range(rounds))
        found[name] = {"seconds": took, "gflops": len(x) * N**2 / took / 1e9, "error": error}
    return found


def floor() -> dict[str, float]:
    """Seconds of the least arithmetic, n³/3 for the factor and m·n² for the feedback, at the rate of a large product."""
    a = torch.randn(N, N)
    rate = 2 * N**3 / min(seconds(lambda: a @ a) for _ in range(5))
    return {"product_gflops": rate / 1e9, "factor_s": N**3 / 3 / rate, "feedback_s": M * N**2 / rate}


def factor(rounds: int) -> dict[str, float]:
    """The factorization beside the library's: median seconds and the residual ‖R·Rᵀ − H‖ / ‖H‖."""
    hessian = problem(1, N, seed=0)[1]
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    single = hessian.float()
    ours, work, library = [], single.clone(), []
    for _ in range(rounds):
        work.copy_(single)
        ours.append(seconds(lambda: upper_cholesky_(work)))
        library.append(seconds(lambda: torch.linalg.cholesky(single)))
    r, lower = work.triu().double(), torch.linalg.cholesky(single).double()
    return {
        "bigq_s": statistics.median(ours),
        "torch_s": statistics.median(library),
        "residual": float((r @ r.T - hessian).norm() / hessian.norm()),
        "torch_residual": float((lower @ lower.T - hessian).norm() / hessian.norm()),
    }


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def as_tf32(x: Tensor) -> Tensor:
    """Round fp32 to 10 bits of mantissa, to nearest, as the tensor cores' conversion does."""
    bits = x.contiguous().view(torch.int32) + 0x1000
    return (bits & ~0x1FFF).view(torch.float32)


def precision() -> list[dict[str, object]]:
    """The loss in fp64 of codes solved with rounded feedback products, relative to those solved in fp64."""
    exact = solver.feedback
    roundings: dict[str, Callable[[Tensor], Tensor]] = {
        "fp32": lambda x: x,
        "tf32": as_tf32,
        "bf16": lambda x: x.bfloat16().float(),
    }
    rows: list[dict[str, object]] = []
    for skewed in (False, True):
        weight, hessian = problem(256, 2048, seed=1, skewed=skewed)
        for scheme in map(plain, (QuantScheme(bits=4), QuantScheme(bits=2), QuantScheme(bits=4, order="activation"))):
            damped = hessian + scheme.damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
            reference = solver.quantize_linear(weight, hessian, scheme)

            def loss(codes: solver.QuantizedWeight, damped: Tensor = damped, weight: Tensor = weight) -> float:
                error = weight - codes.dequantize(torch.float64)
                return float(((error @ damped) * error).sum())

            row: dict[str, object] = {"inputs": "skewed" if skewed else "plain", "bits": scheme.bits, "order": scheme.order}
            for name, rounding in roundings.items():

                def rounded(r: Tensor, errors: Tensor, out: Tensor, rounding: Callable[[Tensor], Tensor] = rounding) -> None:
                    torch.mm(rounding(r).T, rounding(errors), out=out)

                solver.feedback = rounded
                try:
                    result = solver.quantize_linear(weight.float(), hessian.float(), scheme)
                finally:
                    solver.feedback = exact
                row[name] = {
                    "loss": loss(result) / loss(reference) - 1,
                    "codes_that_differ": float((result.codes != reference.codes).float().mean()),
                }
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    figures = {
        "command": "python scripts/bench_solver.py",
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}",
        "speed": speed(args.rounds),
        "floor": floor(),
        "factor": factor(args.rounds),
        "hessian": hessians(args.rounds),
        "feedback_precision": precision(),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
