"""Benchmarks of bigq's kernels and of whole Linears, each beside what torch alone does. Shapes are those of published models.

Every benchmark takes a ``gpu_bench.Bench`` and returns its figures as nested dicts: seconds, TFLOP/s, GB/s, bytes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from eager_gptq import eager_gptq
from gpu_bench import Bench, relative

from bigq.kernels.cholesky import upper_cholesky_
from bigq.kernels.dequant_matvec import dequant_matvec
from bigq.kernels.dequantize import dequantize, dequantize_packed
from bigq.kernels.feedback import feedback
from bigq.kernels.gptq_block import gptq_block_, gptq_block_reference_
from bigq.kernels.grid import GridSpec, GroupGrid
from bigq.kernels.pack import pack, unpack
from bigq.kernels.pick import empty_columns
from bigq.kernels.rank_update import rank_update_
from bigq.kernels.syrk import syrk_, syrk_reference_
from bigq.scheme import QuantScheme
from bigq.solver.batch import HessianSums
from bigq.solver.gptq import solve, solve_many
from bigq.solver.hessian import NATURAL, HessianSum, factorize

SCHEME = QuantScheme(bits=4, group_size=128)


def syrk(bench: Bench) -> dict[str, Any]:
    """XᵀX: the rate, counting one triangle, and the error against fp64 beside that of torch's fp32 product."""
    result: dict[str, Any] = {}
    for n in (4096, 8192, 14336, 28672):
        n, tokens = bench.size(n), bench.size(16384)
        x = bench.randn(tokens, n, dtype=torch.bfloat16)
        h = torch.zeros(n, n, device=bench.device)
        ours = bench.device_seconds(lambda h=h, x=x: syrk_(h, x), 5)
        row = {"seconds": ours, "tflops": n * (n + 1) * tokens / ours / 1e12}
        if n <= 8192:
            full = bench.device_seconds(lambda x=x: torch.mm(x.T, x), 5)
            plain = bench.seconds(lambda h=h, x=x: syrk_reference_(h, x), 1)
            row |= {"torch_bf16_full_product_s": full, "torch_fp32_triangle_s": plain}
            k = min(n, 512)
            exact = x[:, :k].double().T @ x[:, :k].double()
            h.zero_()
            syrk_(h, x)
            wide = x[:, :k].float()
            row["error"] = relative(h[:k, :k].triu(), exact.triu())
            row["torch_fp32_error"] = relative((wide.T @ wide).triu(), exact.triu())
        result[str(n)] = row
    return result


def hessian_of(bench: Bench, n: int, tokens: int | None = None) -> Tensor:
    """A full Hessian [n, n] of correlated inputs, accumulated as in a job."""
    total = HessianSum(n, bench.device)
    tokens = tokens or 2 * n
    mix = bench.randn(256, n, dtype=torch.bfloat16)
    for lo in range(0, tokens, 8192):
        rows = min(8192, tokens - lo)
        total.add(bench.randn(rows, n, dtype=torch.bfloat16) + 0.1 * (bench.randn(rows, 256, dtype=torch.bfloat16) @ mix))
    return total.finish()


def cholesky(bench: Bench) -> dict[str, Any]:
    """R with H = R·Rᵀ: time, memory and residual, beside those of torch.linalg.cholesky."""
    result: dict[str, Any] = {}
    for n in (4096, 8192, 16384, 28672):
        n = bench.size(n)
        h = hessian_of(bench, n)
        h.diagonal().add_(0.01 * h.diagonal().mean())
        work = h.clone()

        def ours(work: Tensor = work, h: Tensor = h) -> None:
            work.copy_(h)
            assert upper_cholesky_(work)

        copy = bench.device_seconds(lambda work=work, h=h: work.copy_(h), 3)
        row: dict[str, Any] = {"seconds": bench.seconds(ours, 3) - copy, "extra_bytes": bench.peak(ours)}
        row["tflops"] = n**3 / 3 / row["seconds"] / 1e12
        row["torch_s"] = bench.seconds(lambda h=h: torch.linalg.cholesky(h), 3)
        row["torch_extra_bytes"] = bench.peak(lambda h=h: torch.linalg.cholesky(h))
        if n <= 8192:
            r, lower = work.triu().double(), torch.linalg.cholesky(h).double()
            row["residual"] = relative(r @ r.T, h.double())
            row["torch_residual"] = relative(lower @ lower.T, h.double())
        result[str(n)] = row
        del h, work
    n, k = bench.size(16384), bench.size(8192)
    c, a = bench.randn(n, 256), bench.randn(n, k)
    update = bench.device_seconds(lambda: rank_update_(c, a, a[n - 256 :]), 5)
    plain = bench.device_seconds(lambda: c.addmm_(a, a[n - 256 :].T, alpha=-1), 5)
    result["rank_update"] = {"tflops": 2 * n * 256 * k / update / 1e12, "torch_fp32_tflops": 2 * n * 256 * k / plain / 1e12}
    return result


def column_loop(bench: Bench) -> dict[str, Any]:
    """One block of 128 columns, beside the plain torch loop."""
    result: dict[str, Any] = {}
    k = 128
    u = torch.eye(k, device=bench.device) + 0.05 * bench.randn(k, k).triu(1)
    group = torch.zeros(k, dtype=torch.int32, device=bench.device)
    for m in (4096, 14336, 57344):
        m = bench.size(m)
        buffers = [empty_columns(k, m, dtype, bench.device) for dtype in (torch.float32, torch.float32, torch.uint8)]
        buffers[0].normal_(0, 0.02)
        buffers[1].copy_(buffers[0])
        for bits, symmetric in ((4, True), (2, False)):
            spec = GridSpec(bits=bits, symmetric=symmetric)
            grid = GroupGrid(spec, *(torch.empty(1, m, device=bench.device) for _ in range(2)), group, True)

            def run(function: Callable[..., Tensor], grid: GroupGrid = grid, buffers: list[Tensor] = buffers) -> None:
                function(buffers[0], u, buffers[1], buffers[2], grid)

            ours = bench.graph_seconds([lambda run=run: run(gptq_block_)] * 10)
            plain = bench.seconds(lambda run=run: run(gptq_block_reference_), 1)
            result[f"{m} rows, {bits} bits, {'sym' if symmetric else 'asym'}"] = {"seconds": ours, "torch_s": plain}
    return result


def products(bench: Bench) -> dict[str, Any]:
    """The feedback product at the middle of a Linear."""
    result: dict[str, Any] = {}
    for m, n in ((4096, 4096), (8192, 28672), (14336, 57344)):
        m, n = bench.size(m), bench.size(n)
        width = min(512, n // 2)
        r = torch.empty(n // 2, n, device=bench.device)[:, n // 2 : n // 2 + width].normal_()
        errors = empty_columns(n // 2, m, torch.float32, bench.device).normal_()
        out = empty_columns(width, m, torch.float32, bench.device)
        time_of = bench.device_seconds(lambda r=r, errors=errors, out=out: feedback(r, errors, out), 5)
        result[f"{m} × {n}"] = {"seconds": time_of, "tflops": 2 * m * width * (n // 2) / time_of / 1e12}
    return result


def packing(bench: Bench) -> dict[str, Any]:
    """Pack, unpack and dequantize: GB/s, counting every byte that must be read or written."""
    result: dict[str, Any] = {}
    m = n = bench.size(16384)
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 2**bits, (m, n), dtype=torch.uint8, device=bench.device)
        words = pack(codes.T, bits)
        scales = torch.rand(m, n // 128, device=bench.device).half()
        zeros = torch.full((m, n // 128), 2 ** (bits - 1), dtype=torch.uint8, device=bench.device)
        moved = codes.numel() * (1 + bits / 8)
        times = {
            "pack": (moved, bench.device_seconds(lambda codes=codes, bits=bits: pack(codes.T, bits))),
            "unpack": (moved, bench.device_seconds(lambda words=words, bits=bits: unpack(words, bits))),
            "dequantize": (
                codes.numel() * 3,
                bench.device_seconds(lambda c=codes, s=scales, z=zeros: dequantize(c, s, z, torch.bfloat16)),
            ),
            "dequantize_packed": (
                codes.numel() * (2 + bits / 8),
                bench.device_seconds(lambda w=words, s=scales, z=zeros, b=bits: dequantize_packed(w, s, z, b, torch.bfloat16)),
            ),
        }
        result[f"{bits} bits"] = {name: {"seconds": s, "gbs": b / s / 1e9} for name, (b, s) in times.items()}
    return result


def matvec(bench: Bench) -> dict[str, Any]:
    """Packed weight times vectors: GB/s of the packed weight, and the speed-up over the fp16 product.

    At least 256 MiB of copies of the weight take turns, so that none stays in a cache.
    """
    result: dict[str, Any] = {}
    held = 2**20 if bench.smoke else 2**28
    for n in (8192, 16384):
        n = bench.size(n)
        weights = [bench.randn(n, n, dtype=torch.float16) for _ in range(-(-held // (2 * n * n)))]
        xs = {b: bench.randn(b, n, dtype=torch.float16) for b in (1, 4, 16)}
        fp16 = {b: bench.graph_seconds([lambda x=x, w=w: x @ w.T for w in weights]) for b, x in xs.items()}
        del weights
        scales = torch.rand(n // 128, n, device=bench.device).half()
        for bits in (2, 3, 4, 8):
            zeros = torch.full((n // 128, n), 2 ** (bits - 1), dtype=torch.uint8, device=bench.device)
            shape = (n * bits // 32, n)
            copies = [
                torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=bench.device)
                for _ in range(-(-held // (4 * shape[0] * shape[1])))
            ]
            moved = copies[0].nbytes + scales.nbytes + zeros.nbytes
            for b, x in xs.items():
                run = bench.graph_seconds([lambda x=x, w=w, s=scales, z=zeros, k=bits: dequant_matvec(x, w, s, z, k) for w in copies])
                result[f"{n}², {bits} bits, {b} vectors"] = {"seconds": run, "gbs": moved / run / 1e9, "over_fp16": fp16[b] / run}
    return result


def linears(bench: Bench) -> dict[str, Any]:
    """Whole Linears: Hessian of at least 8192 tokens, factor, solve, pack; memory; for the smallest, an eager GPTQ as well."""
    result: dict[str, Any] = {}
    for m, n in ((4096, 4096), (8192, 8192), (8192, 28672), (14336, 57344)):
        m, n = bench.size(m), bench.size(n)
        weight = 0.02 * bench.randn(m, n, dtype=torch.bfloat16)
        h = hessian_of(bench, n, 8192 if n > 8192 else None)
        row: dict[str, Any] = {}
        if n <= 4096:
            row["eager_s"] = bench.seconds(lambda weight=weight, h=h: eager_gptq(weight, h, 4, 128), 1)
            solve([weight], factorize(h.clone(), order=NATURAL, damping=0.01), SCHEME)  # compiles the kernels
        diagonal = h.diagonal().clone()
        times = []
        for _ in range(3 if n <= 8192 else 1):
            own = h.clone() if n <= 8192 else h
            bench.sync()
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated() - own.nbytes
            begin = time.perf_counter()
            factor = factorize(own, order=NATURAL, damping=0.01)
            bench.sync()
            middle = time.perf_counter()
            solved = solve([weight], factor, SCHEME)[0]
            bench.sync()
            times.append((middle - begin, time.perf_counter() - middle))
            if bench.device.type == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated() - held
            row["residual"] = residual(factor.r, diagonal, factor.damping)
            row |= {"damping": factor.damping, "relative_error": solved.relative_error}
            codes = solved.codes
            del own, factor, solved
        row["factor_s"], row["solve_s"] = min(times, key=sum)
        row["h_and_w_bytes"] = 4 * n * n + 4 * m * n
        row["pack_s"] = bench.seconds(lambda codes=codes: pack(codes.T, 4), 1)
        result[f"{m} × {n}"] = row
        del h, codes
    return result


#: Matrices of experts, rows × inputs: gate and up as one, then down, of DeepSeek-V3 and of Qwen3-235B.
EXPERTS = ((4096, 7168), (7168, 2048), (3072, 4096), (4096, 1536))
#: Matrices that are solved side by side.
AT_ONCE = (1, 2, 4, 8)


def batches(bench: Bench) -> dict[str, Any]:
    """Matrices of experts, some of them side by side: seconds for each matrix of factoring, solving, and one block of the column loop."""
    result: dict[str, Any] = {}
    for m, n in EXPERTS:
        m, n = bench.size(m), bench.size(n)
        weight, x = 0.02 * bench.randn(m, n, dtype=torch.bfloat16), bench.randn(bench.size(8192), n, dtype=torch.bfloat16)
        for count in AT_ONCE[:2] if bench.smoke else AT_ONCE:
            times = []
            for _ in range(1 if bench.smoke else 3):  # the first one compiles the kernels
                sums = HessianSums.zeros(count, n, bench.device)
                for one in sums.each:
                    one.add(x)
                times.append(_factor_and_solve(bench, sums, [[weight]] * count))
            factor_s, solve_s = min(times, key=sum)
            loop_s = bench.graph_seconds([_loop_of_batch(bench, count, m)] * 10)
            row = {"factor_s": factor_s / count, "solve_s": solve_s / count, "column_loop_s": loop_s / count}
            result[f"{m} × {n}, {count} at once"] = row
        index = torch.randperm(4 * len(x), device=bench.device)[: len(x)]
        inputs = torch.empty(4 * len(x), n, dtype=torch.bfloat16, device=bench.device).normal_()
        h = torch.zeros(n, n, device=bench.device)
        gather, sum_s = bench.device_seconds(lambda i=index, x=inputs: x[i], 5), bench.device_seconds(lambda h=h, x=x: syrk_(h, x), 5)
        result[f"{m} × {n}, inputs"] = {"gather_s": gather, "syrk_s": sum_s}
        del inputs, h
    return result


def _factor_and_solve(bench: Bench, sums: HessianSums, weights: list[list[Tensor]]) -> tuple[float, float]:
    """Seconds of factoring and of solving. A single matrix goes the way of single ones."""
    if len(weights) == 1:
        h = sums.each[0].finish()
        bench.sync()
        started = time.perf_counter()
        factor = factorize(h, order=NATURAL, damping=0.01)
        bench.sync()
        factored = time.perf_counter()
        solve(weights[0], factor, SCHEME)
    else:
        bench.sync()
        started = time.perf_counter()
        factors, failures = sums.factorize(order=NATURAL, damping=0.01, names=[str(i) for i in range(len(weights))])
        bench.sync()
        factored = time.perf_counter()
        assert factors is not None and failures == [None] * len(weights)
        solve_many(weights, factors, SCHEME, [str(i) for i in range(len(weights))])
    bench.sync()
    return factored - started, time.perf_counter() - factored


def _loop_of_batch(bench: Bench, count: int, m: int, k: int = 128) -> Callable[[], Tensor]:
    """A launch of the column loop for several matrices."""
    u = torch.eye(k, device=bench.device) + 0.05 * bench.randn(count, k, k).triu(1)
    target, work = (empty_columns(k, m, torch.float32, bench.device, (count,)).normal_(0, 0.02) for _ in range(2))
    codes = empty_columns(k, m, torch.uint8, bench.device, (count,))
    scale, zero = (torch.empty(count, 1, m, device=bench.device) for _ in range(2))
    grid = GroupGrid(GridSpec(bits=4, symmetric=True), scale, zero, torch.zeros(count, k, dtype=torch.int32, device=bench.device), True)
    return lambda: gptq_block_(target, u, work, codes, grid)


def residual(r: Tensor, diagonal: Tensor, damping: float) -> float:
    """The largest relative error of some rows of R·Rᵀ against H. H is read from the factor's lower triangle and ``diagonal``."""
    n = len(diagonal)
    worst = 0.0
    for i in range(n // 7, n, n // 4):
        row = r[i].clone()
        row[:i] = 0
        product = (r[i:, i:].triu() @ row[i:]) if n <= 8192 else torch.cat([part @ row[i:] for part in _upper_rows(r, i)])
        exact = r[i:, i].clone()
        exact[0] = diagonal[i] + damping * diagonal.mean()
        worst = max(worst, relative(product, exact.double()))
    return worst


def _upper_rows(r: Tensor, first: int) -> Iterator[Tensor]:
    """The rows of R from ``first`` on, [k, n − first] at a time, with zeros below the diagonal."""
    for lo in range(first, len(r), 2048):
        yield r[lo : lo + 2048, first:].triu(lo - first)


def profile(bench: Bench) -> dict[str, Any]:
    """The device time of a solve by kernel, and the column loop's share of it."""
    if bench.device.type != "cuda":
        return {}
    result: dict[str, Any] = {}
    for m, n in ((4096, 4096), (8192, 8192), (8192, 28672)):
        weight = 0.02 * bench.randn(m, n, dtype=torch.bfloat16)
        factor = factorize(hessian_of(bench, n, 8192), order=NATURAL, damping=0.01)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            solve([weight], factor, SCHEME)
            bench.sync()
        events = sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)
        total = sum(e.self_device_time_total for e in events)
        loop = sum(e.self_device_time_total for e in events if "_gptq_block_kernel" in e.key)
        result[f"{m} × {n}"] = {
            "device_ms": total / 1e3,
            "column_loop_share": loop / total,
            "kernels": {e.key[:80]: {"ms": e.self_device_time_total / 1e3, "calls": e.count} for e in events[:12]},
        }
        del factor
    return result


BENCHMARKS: Mapping[str, Callable[[Bench], dict[str, Any]]] = {
    "syrk": syrk,
    "cholesky": cholesky,
    "column_loop": column_loop,
    "products": products,
    "packing": packing,
    "matvec": matvec,
    "linears": linears,
    "batches": batches,
    "profile": profile,
}
