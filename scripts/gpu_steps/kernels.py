"""Every kernel on the device: against fp64 or its reference version, and the same bytes when it runs again.

On a CPU the public functions pick the reference versions, so a smoke run checks this module only. The kernels' own tests
run the GPU versions in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from gpu_bench import relative
from torch import Tensor

from bigq.kernels.cholesky import upper_cholesky_, upper_cholesky_many_
from bigq.kernels.dequant_matvec import dequant_matvec
from bigq.kernels.dequantize import dequantize, dequantize_packed, dequantize_reference
from bigq.kernels.feedback import feedback
from bigq.kernels.finiteness import is_finite
from bigq.kernels.gptq_block import gptq_block_, gptq_block_reference_
from bigq.kernels.grid import SCALE_BITS, GridSpec, GroupGrid
from bigq.kernels.grid_spec import BITS_OF_FORM, PointsName, ScaleForm
from bigq.kernels.pack import pack, pack_reference, unpack
from bigq.kernels.pick import empty_columns
from bigq.kernels.rank_update import rank_update_
from bigq.kernels.syrk import syrk_
from bigq.kernels.triangles import mirror_, permute_
from bigq.scheme import QuantScheme
from bigq.solver.batch import HessianSums
from bigq.solver.gptq import column_order, solve, solve_many
from bigq.solver.hessian import HessianSum, factorize
from bigq.vocabulary import ORDERS, OrderName
from gpu_steps.setting import Findings, Setting

#: The name of this step at small sizes, for the step sanitizer.
SMALL = "small-kernels"
#: The factor of all sizes where they are not small.
FULL = 32
#: Relative errors of a product in each type, against fp64.
PRODUCT_LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def run(setting: Setting, found: Findings) -> None:
    cases = Cases(found, torch.device(setting.device), 4 if setting.smoke or setting.step == SMALL else FULL)
    for dtype in (torch.bfloat16, torch.float16):
        for aligned in (True, False):
            cases.attempt("syrk", lambda d=dtype, a=aligned: cases.syrk(d, aligned=a))
    for n in (200, 64 * cases.size, 128 * cases.size + 40):
        cases.attempt("cholesky", lambda n=n: cases.cholesky(n))
    for n in (200, 32 * cases.size + 40) if cases.size < FULL else (2048, 7168):
        cases.attempt("batched factor", lambda n=n: cases.batched_factor(n))
    cases.attempt("rank update", cases.rank_update)
    cases.attempt("feedback", cases.feedback)
    cases.attempt("whole matrices", cases.whole_matrices)
    for loop in LOOPS:
        cases.attempt("column loop", lambda loop=loop: cases.column_loop(loop))
    for loop in (LOOPS[0], Loop(bits=3, symmetric=False, width=0)):
        cases.attempt("batched column loop", lambda loop=loop: cases.batched_column_loop(loop))
    for bits in (2, 3, 4, 8):
        cases.attempt("packing", lambda b=bits: cases.packing(b))
        for dtype in (torch.float16, torch.bfloat16):
            cases.attempt("matvec", lambda b=bits, d=dtype: cases.matvec(b, d, 32 * cases.size, 64 * cases.size, 128))
    some = 32 * cases.size
    for m, n, width in ((2 * some, some, 32), (some, 2 * some, 2 * some), (128 * some + 128, 256, 128)):
        cases.attempt("matvec", lambda m=m, n=n, w=width: cases.matvec(4, torch.bfloat16, m, n, w))
    for order in ORDERS:
        cases.attempt("solve", lambda o=order: cases.solve(order=o))
        cases.attempt("batched solve", lambda o=order: cases.batched_solve(order=o))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A launch of the column loop. k: columns; m: rows, None for some thousands; width: columns of a group, 0 for given scales.

    search: whether the scales are searched for, which is a launch of its own before it. points, scale_form: of codebooks.
    """

    bits: int
    symmetric: bool
    width: int
    k: int = 128
    m: int | None = None
    min_zero: int = 0
    scale_bits: int = SCALE_BITS
    search: bool = False
    points: PointsName = "int"
    scale_form: ScaleForm = "fp16"

    @property
    def spec(self) -> GridSpec:
        names = ("bits", "symmetric", "min_zero", "search", "points", "scale_form")
        scale_bits = BITS_OF_FORM.get(self.scale_form, self.scale_bits)
        return GridSpec(scale_bits=scale_bits, **{name: getattr(self, name) for name in names})

    @property
    def name(self) -> str:
        kind = "symmetric" if self.symmetric else f"asymmetric from {self.min_zero}"
        rows = "" if self.m is None else f", {self.m} rows"
        scales = f"{'search in ' * self.search}groups of {self.width}" if self.width else "given scales"
        if self.points != "int":
            return f"column loop, {self.k} columns{rows}, {self.points}, {scales}, {self.scale_form} scales"
        return f"column loop, {self.k} columns{rows}, {self.bits} bits {kind}, {scales}, {self.scale_bits}-bit scales"


#: Variants that jobs launch: formats, group sizes, narrow last blocks, few rows.
LOOPS = (
    Loop(bits=4, symmetric=True, width=128),
    Loop(bits=4, symmetric=True, width=128, scale_bits=8),
    Loop(bits=4, symmetric=False, width=128, min_zero=1),
    Loop(bits=4, symmetric=False, width=128, min_zero=1, scale_bits=8),
    Loop(bits=4, symmetric=True, width=32, scale_bits=8),
    Loop(bits=4, symmetric=True, width=16),
    Loop(bits=3, symmetric=True, width=64, scale_bits=8),
    Loop(bits=8, symmetric=True, width=64),
    Loop(bits=4, symmetric=True, width=40, k=120),
    Loop(bits=4, symmetric=False, width=40, k=120, min_zero=1, scale_bits=8),
    Loop(bits=4, symmetric=True, width=64, k=64),
    Loop(bits=4, symmetric=True, width=0, k=1),
    Loop(bits=4, symmetric=True, width=128, m=1),
    Loop(bits=3, symmetric=False, width=0),
    Loop(bits=2, symmetric=True, width=0),
    Loop(bits=2, symmetric=False, width=0, m=1030),
    Loop(bits=4, symmetric=True, width=32, k=64, scale_bits=8, search=True),
    Loop(bits=2, symmetric=True, width=32, k=32, search=True),
    Loop(bits=4, symmetric=True, width=0, points="nf4", scale_form="nested"),
    Loop(bits=4, symmetric=True, width=16, points="e2m1", scale_form="e4m3"),
    Loop(bits=4, symmetric=True, width=32, points="e2m1", scale_form="e8m0"),
    Loop(bits=4, symmetric=True, width=16, k=32, points="e2m1", scale_form="e4m3", search=True),
    Loop(bits=8, symmetric=True, width=0, points="e4m3"),
)


@dataclass(frozen=True, slots=True)
class Cases:
    """size: a factor of all sizes."""

    found: Findings
    device: torch.device
    size: int

    def attempt(self, name: str, case: Callable[[], None]) -> None:
        torch.manual_seed(0)
        with self.found.attempt(name):
            case()
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # an error of a launch belongs to this case

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def repeats(self, name: str, first: Sequence[Tensor], *again: Sequence[Tensor]) -> None:
        """Record how many elements of a kernel's outputs differ between runs."""
        pairs = [pair for others in again for pair in zip(first, others, strict=True)]
        differing = sum(int((one != other).sum()) for one, other in pairs)
        self.found.check(f"{name}: elements that differ when repeated", differing, 0)

    def syrk(self, dtype: torch.dtype, *, aligned: bool) -> None:
        n = 64 * self.size + 8
        x = self.randn(1000, n if aligned else n + 1).to(dtype)[:, :n]
        h, again = (torch.zeros(n, n, device=self.device) for _ in range(2))
        syrk_(h, x)
        syrk_(again, x)
        name = f"syrk {n}, {dtype}, rows {'aligned' if aligned else 'not aligned'}"
        self.found.check(f"{name}: error", relative(h.triu(), (x.double().T @ x.double()).triu()), 2e-5)
        self.repeats(name, [h], [again])

    def cholesky(self, n: int) -> None:
        mix = self.randn(n, n, dtype=torch.float64) / n**0.5
        exact = mix @ mix.T + 0.01 * torch.eye(n, device=self.device, dtype=torch.float64)
        h, again = exact.float(), exact.float()
        self.found.require(f"cholesky {n}: positive definite", upper_cholesky_(h) and upper_cholesky_(again))
        r, lower = h.triu().double(), torch.linalg.cholesky(exact.float()).double()
        self.found.check(f"cholesky {n}: residual", relative(r @ r.T, exact), 5 * relative(lower @ lower.T, exact) + 5e-7)
        self.repeats(f"cholesky {n}", [h.triu()], [again.triu()])

    def batched_factor(self, n: int) -> None:
        """Three factors at once, of which one does not exist, beside those of single matrices."""
        mix = self.randn(2, n, n) / n**0.5
        exact = mix @ mix.mT + 0.01 * torch.eye(n, device=self.device)
        h = torch.stack([exact[0], -exact[0], exact[1]])
        singles, again = exact.clone(), h.clone()
        self.found.require(f"batched factor {n}: which are positive definite", upper_cholesky_many_(h) == [True, False, True])
        upper_cholesky_many_(again)
        for one, single, true in zip(h[::2], singles, exact, strict=True):
            upper_cholesky_(single)
            error, own = (relative(r.triu() @ r.triu().T, true.double()) for r in (one, single))
            self.found.check(f"batched factor {n}: residual", error, 2 * own + 5e-7)
        self.repeats(f"batched factor {n}", [h[::2].triu()], [again[::2].triu()])

    def rank_update(self) -> None:
        """Of the last n rows only the upper triangle is updated."""
        m, n, k = 64 * self.size + 8, 256, 32 * self.size
        a, b, c = self.randn(m, k), self.randn(n, k), self.randn(m, n)
        exact, again = c.double() - a.double() @ b.double().T, c.clone()
        rank_update_(c, a, b)
        rank_update_(again, a, b)
        self.found.check(f"rank update {m} × {n}: error", relative(c.triu(n - m), exact.triu(n - m)), 1e-5)
        self.repeats(f"rank update {m} × {n}", [c], [again])

    def feedback(self) -> None:
        a, s, m = 64 * self.size, 256, 32 * self.size + 7
        r, errors = self.randn(a, s), empty_columns(a, m, torch.float32, self.device).normal_()
        out, again = (empty_columns(s, m, torch.float32, self.device) for _ in range(2))
        feedback(r, errors, out)
        feedback(r, errors, again)
        self.found.check(f"feedback {s} × {m}: error", relative(out, r.double().T @ errors.double()), 2e-3)
        self.repeats(f"feedback {s} × {m}", [out], [again])

    def whole_matrices(self) -> None:
        """Mirroring, permuting and the search for NaN and infinity; the step large does the same at the largest size."""
        n = 64 * self.size + 40
        h, perm = self.randn(n, n), torch.randperm(n, device=self.device)
        expected = h.triu() + h.triu(1).T
        mirror_(h)
        self.found.require("mirror", torch.equal(h, expected))
        permute_(h, perm)
        self.found.require("permutation", torch.equal(h, expected[perm][:, perm]))
        self.found.require("a finite matrix is finite", is_finite(h))
        for value in (float("nan"), float("inf")):
            h[-1, -1] = value
            self.found.require(f"{value} is found", not is_finite(h))

    def column_loop(self, loop: Loop) -> None:
        k, m, width = loop.k, loop.m or 32 * self.size + 7, loop.width
        spec = loop.spec
        u = torch.eye(k, device=self.device) + 0.02 * self.randn(k, k).triu(1)
        weights, groups = self.randn(k, m), k // width if width else 3
        of_column = (torch.arange(k) // width if width else torch.randint(0, groups, (k,))).to(self.device, torch.int32)
        made = []
        for version in (gptq_block_, gptq_block_, gptq_block_reference_):
            target, work = (empty_columns(k, m, torch.float32, self.device).copy_(weights) for _ in range(2))
            codes = empty_columns(k, m, torch.uint8, self.device)
            scale = torch.full((groups, m), 0.25, device=self.device)
            zero = torch.full((groups, m), float(2 ** (loop.bits - 1)), device=self.device)
            loss = version(target, u, work, codes, GroupGrid(spec, scale, zero, of_column, width > 0))
            made.append((codes, loss, scale, target))
        ours, again, reference = made
        self.repeats(loop.name, ours, again)
        self.found.check(f"{loop.name}: codes that differ from the reference", float((ours[0] != reference[0]).double().mean()), 1e-3)
        self.found.check(f"{loop.name}: loss", relative(ours[1], reference[1].double()), 1e-2)

    def batched_column_loop(self, loop: Loop, count: int = 8) -> None:
        """Several matrices in one launch have the bytes that they have in launches of their own."""
        k, m, groups = loop.k, 32 * self.size + 7, loop.k // loop.width if loop.width else 3
        spec = loop.spec
        u = torch.eye(k, device=self.device) + 0.02 * self.randn(count, k, k).triu(1)
        weights = self.randn(count, k, m)
        of_column = torch.arange(k) // loop.width if loop.width else torch.randint(0, groups, (k,))
        made = []
        for _ in range(2):
            target, work = (empty_columns(k, m, torch.float32, self.device, (count,)).copy_(weights) for _ in range(2))
            codes = empty_columns(k, m, torch.uint8, self.device, (count,))
            scale, zero = torch.full((count, groups, m), 0.25, device=self.device), torch.full((count, groups, m), 4.0, device=self.device)
            grid = GroupGrid(spec, scale, zero, of_column.to(self.device, torch.int32).repeat(count, 1), loop.width > 0)
            made.append((target, u, work, codes, grid))
        loss = gptq_block_(*made[0])
        single = torch.stack([gptq_block_(*one) for one in zip(*made[1][:4], made[1][4].each(), strict=True)])
        self.repeats(f"{count} times {loop.name}", [loss, made[0][3], made[0][4].scale], [single, made[1][3], made[1][4].scale])

    def packing(self, bits: int) -> None:
        m, n = 32 * self.size + 32, 64 * self.size
        codes = torch.randint(0, 2**bits, (m, n), dtype=torch.uint8, device=self.device)
        scales = torch.rand(m, n // 128, device=self.device).half()
        zeros = torch.randint(0, 2**bits, (m, n // 128), dtype=torch.uint8, device=self.device)
        words, plain = pack(codes.T, bits), dequantize_reference(codes, scales, zeros, torch.bfloat16)
        for name, ours, reference in (
            ("pack", words, pack_reference(codes.T, bits)),
            ("unpack", unpack(words, bits), codes.T),
            ("dequantize", dequantize(codes, scales, zeros, torch.bfloat16), plain),
            ("dequantize_packed", dequantize_packed(words, scales, zeros, bits, torch.bfloat16), plain),
        ):
            self.found.require(f"{name}, {bits} bits: equals the reference", torch.equal(ours, reference))

    def matvec(self, bits: int, dtype: torch.dtype, m: int, n: int, width: int) -> None:
        codes = torch.randint(0, 2**bits, (m, n), dtype=torch.uint8, device=self.device)
        scales = torch.rand(m, n // width, device=self.device).half()
        zeros = torch.randint(0, 2**bits, (m, n // width), dtype=torch.uint8, device=self.device)
        words, weight = pack(codes.T, bits), dequantize_reference(codes, scales, zeros, torch.float64)
        by_group = scales.T.contiguous(), zeros.T.contiguous()
        for vectors in (1, 3, 16):
            x = self.randn(vectors, n).to(dtype)
            y, *again = (dequant_matvec(x, words, *by_group, bits) for _ in range(3))
            name = f"matvec {m} × {n}, {bits} bits, groups of {width}, {vectors} × {dtype}"
            self.found.check(f"{name}: error", relative(y, x.double() @ weight.T), PRODUCT_LIMITS[dtype])
            self.repeats(name, [y], *([other] for other in again))

    def solve(self, *, order: OrderName) -> None:
        """A whole Linear on the device and on the CPU, from one Hessian."""
        m, n = 16 * self.size, 32 * self.size
        total, mix = HessianSum(n, self.device), self.randn(n, n) / n**0.5
        for _ in range(4):
            total.add((self.randn(n, n) @ mix).to(torch.bfloat16))
        h, weight = total.finish(), 0.02 * self.randn(m, n)
        scheme, solved = QuantScheme(order=order), []
        for where in (self.device, self.device, torch.device("cpu")):
            factor = factorize(h.to(where, copy=True), order=column_order(scheme, n), damping=0.01)
            solved.append(solve([weight.to(where)], factor, scheme)[0])
        ours, again, on_cpu = solved
        name = f"solve {m} × {n}, {order} order"
        self.repeats(name, [ours.codes], [again.codes])
        self.found.check(f"{name}: codes that differ from the CPU's", float((ours.codes.cpu() != on_cpu.codes).double().mean()), 2e-2)
        self.found.check(f"{name}: loss over the CPU's", abs(ours.loss / on_cpu.loss - 1), 1e-2)

    def batched_solve(self, *, order: OrderName, count: int = 3) -> None:
        """Several matrices side by side, beside each alone. The library's products of a batch may round differently."""
        m, n = 16 * self.size, 32 * self.size
        scheme, names = QuantScheme(order=order), [str(i) for i in range(count)]
        mix = self.randn(n, n) / n**0.5
        xs = [((1 + i) * self.randn(2 * n, n) @ mix).to(torch.bfloat16) for i in range(count)]
        weights = [[0.02 * self.randn(m, n)] for _ in range(count)]
        runs = []
        for _ in range(2):
            sums = HessianSums.zeros(count, n, self.device)
            for one, x in zip(sums.each, xs, strict=True):
                one.add(x)
            factors, failures = sums.factorize(order=column_order(scheme, n), damping=0.01, names=names)
            assert factors is not None and failures == [None] * count
            runs.append([result for result in solve_many(weights, factors, scheme, names) if isinstance(result, list)])
        name = f"batched solve {m} × {n}, {order} order"
        self.repeats(name, *([result.codes for (result,) in run] for run in runs))
        for x, weight, (ours,) in zip(xs, weights, runs[0], strict=True):
            total = HessianSum(n, self.device)
            total.add(x)
            (alone,) = solve(weight, factorize(total.finish(), order=column_order(scheme, n), damping=0.01), scheme)
            self.found.check(f"{name}: codes that differ from single ones", float((ours.codes != alone.codes).double().mean()), 2e-2)
            self.found.check(f"{name}: loss over that of single ones", abs(ours.loss / alone.loss - 1), 1e-2)
