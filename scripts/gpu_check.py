#!/usr/bin/env python3
"""All that a GPU machine can tell about bigq's kernels, in one command of at most nine minutes.

Runs the kernel and solver tests on the GPU, measures what the device can do at best (bf16 product, TF32 and fp32
products, copy), times every kernel against that and against what torch alone does, and takes whole Linears through
Hessian, factor and solve. Prints a table last and writes gpu_check.json to --out.

    scripts/gpu_check --out docs/results
    scripts/gpu_check --out /tmp/x --only ceilings,syrk,linears

``--smoke`` runs everything on tiny shapes, on a CPU where there is no GPU, to see that this script works; its times say
nothing about speed and the result says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from eager_gptq import eager_gptq
from facts import print_table, revision, said

import bigq
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
from bigq.solver.gptq import solve
from bigq.solver.hessian import HessianSum, factorize

SECONDS = 540
SCHEME = QuantScheme(bits=4, group_size=128)


@dataclass
class Bench:
    """Where it runs, how large, and what was measured so far."""

    device: torch.device
    smoke: bool
    out: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def size(self, n: int) -> int:
        """A size of the real benchmark, or a tiny one for a smoke run."""
        return max(256, n // 64 // 256 * 256) if self.smoke else n

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], rounds: int = 5) -> float:
        """The median time of a run, after one that warms up. On a GPU the L2 cache is overwritten before each."""
        run()
        flush = torch.empty(64 * 2**20 if self.device.type == "cuda" else 1, device=self.device)
        times = []
        for _ in range(1 if self.smoke else rounds):
            flush.zero_()
            self.sync()
            begin = time.perf_counter()
            run()
            self.sync()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def device_seconds(self, run: Callable[[], object], repeats: int = 20) -> float:
        """The mean time of a run among several in a row, from events around them: for runs that outlast their launch."""
        if self.device.type != "cuda":
            return self.seconds(run)
        run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats

    def graph_seconds(self, runs: Sequence[Callable[[], object]]) -> float:
        """The mean device time of short runs, recorded as one CUDA graph: no launches in between.

        Runs that read different memory, more in all than the caches hold, are timed as if each came cold.
        """
        if self.device.type != "cuda":
            return sum(self.seconds(run) for run in runs) / len(runs)
        for run in runs:
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        return self.device_seconds(graph.replay, 10) / len(runs)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def peak(self, run: Callable[[], object]) -> float:
        """The most memory that a run holds beyond what was held before it, in bytes; 0 on a CPU."""
        if self.device.type != "cuda":
            run()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)


def tests(bench: Bench) -> dict[str, Any]:
    """The kernel and solver tests on this device, as many at once as the machine has use for."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", "tests/kernels", "tests/solver"]
    if importlib.util.find_spec("xdist") and not bench.smoke:
        command += ["-n", "8"]
    if bench.smoke:
        command += ["-k", "test_pack"]
    begin = time.monotonic()
    left = max(30.0, SECONDS - (begin - bench.started))
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left, check=False)
        printed, passed = done.stdout + done.stderr[-300:], done.returncode == 0
    except subprocess.TimeoutExpired as cut:
        printed, passed = (cut.stdout or b"").decode(errors="replace") + f"\ncut off after {left:.0f} s", False
    lines = printed.strip().splitlines()
    return {
        "passed": passed,
        "summary": lines[-1] if lines else "",
        "failures": [line for line in lines if line.startswith(("FAILED", "E  "))][:20],
        "seconds": time.monotonic() - begin,
    }


def ceilings(bench: Bench) -> dict[str, Any]:
    """What the device reaches at best: products in TFLOP/s, copy in GB/s (bytes read and written)."""
    n = bench.size(8192)
    result: dict[str, Any] = {}
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False)):
        a, b = bench.randn(n, n, dtype=dtype), bench.randn(n, n, dtype=dtype)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        result[f"{name}_tflops"] = 2 * n**3 / bench.device_seconds(lambda a=a, b=b: a @ b, 10) / 1e12
        torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.empty(bench.size(2**30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    result["copy_gbs"] = 2 * source.numel() / bench.device_seconds(lambda: target.copy_(source), 10) / 1e9
    return result


def syrk(bench: Bench) -> dict[str, Any]:
    """XᵀX: rate by the triangle's arithmetic, and the error against fp64 beside that of torch's fp32 product."""
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


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def hessian_of(bench: Bench, n: int, tokens: int | None = None) -> Tensor:
    """A full Hessian of correlated inputs, accumulated as in a job."""
    total = HessianSum(n, bench.device)
    tokens = tokens or 2 * n
    mix = bench.randn(256, n, dtype=torch.bfloat16)
    for lo in range(0, tokens, 8192):
        rows = min(8192, tokens - lo)
        total.add(bench.randn(rows, n, dtype=torch.bfloat16) + 0.1 * (bench.randn(rows, 256, dtype=torch.bfloat16) @ mix))
    return total.finish()


def cholesky(bench: Bench) -> dict[str, Any]:
    """R with H = R·Rᵀ: time, memory and residual beside torch.linalg.cholesky's."""
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
    """One block of 128 columns, beside the plain loop."""
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
    """The feedback product at a Linear's middle."""
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
    """Pack, unpack and dequantize: GB/s of all bytes that must move."""
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
    """Packed weight times vectors: GB/s of the packed weight, and how much faster than the fp16 product.

    Copies of the weight, 256 MiB of them at the least, take turns, so that none lies in a cache.
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
    """Whole Linears: Hessian of at least 8192 tokens, factor, solve, pack; memory; the eager solve beside the small one."""
    result: dict[str, Any] = {}
    for m, n in ((4096, 4096), (8192, 8192), (8192, 28672), (14336, 57344)):
        m, n = bench.size(m), bench.size(n)
        weight = 0.02 * bench.randn(m, n, dtype=torch.bfloat16)
        h = hessian_of(bench, n, 8192 if n > 8192 else None)
        row: dict[str, Any] = {}
        if n <= 4096:
            row["eager_s"] = bench.seconds(lambda weight=weight, h=h: eager_gptq(weight, h, 4, 128), 1)
            solve([weight], factorize(h.clone(), act_order=False, damping=0.01), SCHEME)  # compiles the kernels
        diagonal = h.diagonal().clone()
        times = []
        for _ in range(3 if n <= 8192 else 1):
            own = h.clone() if n <= 8192 else h
            bench.sync()
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated() - own.nbytes
            begin = time.perf_counter()
            factor = factorize(own, act_order=False, damping=0.01)
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


def residual(r: Tensor, diagonal: Tensor, damping: float) -> float:
    """The largest relative error of some rows of R·Rᵀ against H, which the factor's lower triangle and the diagonal still hold."""
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
    """The rows of R from ``first`` on, [k, n − first] at a time, without what lies below the diagonal."""
    for lo in range(first, len(r), 2048):
        yield r[lo : lo + 2048, first:].triu(lo - first)


def profile(bench: Bench) -> dict[str, Any]:
    """Where a solve alone spends the device's time, by kernel, and the column loop's share of it."""
    if bench.device.type != "cuda":
        return {}
    result: dict[str, Any] = {}
    for m, n in ((4096, 4096), (8192, 8192), (8192, 28672)):
        weight = 0.02 * bench.randn(m, n, dtype=torch.bfloat16)
        factor = factorize(hessian_of(bench, n, 8192), act_order=False, damping=0.01)
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


def targets(result: dict[str, Any]) -> dict[str, Any]:
    """What was aimed at, beside what was reached; only what was measured in this run."""

    def ratio(*path: str, over: tuple[str, ...] = ()) -> float | None:
        values = []
        for names in (path, over):
            value: Any = result
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            values.append(value if names else 1.0)
        return values[0] / values[1] if all(isinstance(v, (int, float)) for v in values) else None

    bf16, copy = ("ceilings", "bf16_tflops"), ("ceilings", "copy_gbs")
    found: dict[str, float | None] = {
        f"Hessian over bf16 rate, n = {n} (≥ 0.7)": ratio("syrk", n, "tflops", over=bf16) for n in ("8192", "14336", "28672")
    }
    for name, aim in (("4096 × 4096", 0.03), ("14336 × 57344", 2.5)):
        parts = [ratio("linears", name, part) for part in ("factor_s", "solve_s")]
        found[f"{name}: factor + solve (≤ {aim} s)"] = None if None in parts else sum(part for part in parts if part is not None)
    found["14336 × 57344: peak over H and W (≤ 1.1)"] = ratio(
        "linears", "14336 × 57344", "peak_bytes", over=("linears", "14336 × 57344", "h_and_w_bytes")
    )
    for name in ("4096 × 4096", "8192 × 28672"):
        found[f"{name}: column loop's share of the solve (≤ 0.15)"] = ratio("profile", name, "column_loop_share")
    for name in ("8192², 4 bits, 1 vectors", "16384², 4 bits, 1 vectors", "16384², 4 bits, 16 vectors"):
        found[f"matvec {name} over copy rate (≥ 0.8)"] = ratio("matvec", name, "gbs", over=copy)
    return {name: value for name, value in found.items() if value is not None}


STEPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "ceilings": ceilings,
    "syrk": syrk,
    "cholesky": cholesky,
    "column_loop": column_loop,
    "products": products,
    "packing": packing,
    "matvec": matvec,
    "linears": linears,
    "profile": profile,
    "tests": tests,
}


def machine(bench: Bench) -> dict[str, Any]:
    """Device, driver, versions and revision that the figures belong to."""
    found: dict[str, Any] = {
        "bigq": bigq.__version__,
        "revision": revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if bench.device.type == "cuda":
        import triton

        driver = said("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
        properties = torch.cuda.get_device_properties(bench.device)
        found |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "driver_clock_power": driver,
            "triton": triton.__version__,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json")
    parser.add_argument("--only", help=f"some of {','.join(STEPS)}")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any device: does this script work?")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else list(STEPS)
    if unknown := set(wanted) - set(STEPS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(STEPS)}")
    if not args.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device here; --smoke tries the script on tiny shapes")
    bench = Bench(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), args.smoke)
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"command": f"scripts/gpu_check {' '.join(sys.argv[1:])}", "smoke": args.smoke, "machine": machine(bench)}
    failed = False
    for name in wanted:
        if time.monotonic() - bench.started > SECONDS - 45:
            result[name] = {"left_out": "no time left"}
            continue
        torch.manual_seed(0)
        try:
            result[name] = STEPS[name](bench)
            failed |= result[name].get("passed") is False
        except Exception as error:  # one broken step must not cost the others' results
            result[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
            failed = True
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        result["targets"] = targets(result)
        # Written after every step: a run that is cut short keeps what it has.
        result["seconds"] = time.monotonic() - bench.started
        (args.out / "gpu_check.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        print(f"{name}: {result['seconds']:.0f} s", file=sys.stderr, flush=True)
    print_table(result)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
