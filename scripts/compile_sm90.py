#!/usr/bin/env python3
"""Compile every Triton kernel for sm_90 (H100) or another target, without a GPU: registers, spills, shared memory, instructions.

The script calls each wrapper as a job does, and compiles the launch instead of running it. Exit status 1 if a kernel does not
compile, spills more than a few registers, or uses more shared memory than there is. Triton's interpreter must be off.
Variants that most jobs launch come first.

    python scripts/compile_sm90.py --json docs/results/compile_sm90.json
    python scripts/compile_sm90.py --target gfx942 --json docs/results/compile_gfx942.json
    python scripts/compile_sm90.py --few              # only the variants of common jobs
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from gpu_steps.kernels import LOOPS, Loop
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bigq.kernels.gpu import dequant_matvec as dequant_matvec_triton
from bigq.kernels.gpu import dequantize as dequantize_triton
from bigq.kernels.gpu import gptq_block as gptq_block_triton
from bigq.kernels.gpu import pack as pack_triton
from bigq.kernels.gpu import rank_update as rank_update_triton
from bigq.kernels.gpu import syrk as syrk_triton
from bigq.kernels.grid import GroupGrid
from bigq.kernels.grid_spec import PointsName

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.uint8: "u8",
}

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}

#: Bytes of shared memory that a program may use. A launch that wants more fails.
SHARED = {"sm_90": 227 << 10, "gfx942": 64 << 10}

#: Bytes of stack allowed per thread: the epilogue of syrk stores eight registers once per tile.
STACK = 32
#: The same for the column loop over groups that fit no tile of 32 columns, such as groups of 40.
WHOLE_STACK = 128

#: Instructions to count in PTX.
COUNTED = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "bulk_copies": "cp.async.bulk.tensor", "async_copies": "cp.async.cg"}
#: The same in AMD's assembly, and what its compiler notes.
COUNTED_AMD = {"mfma": "v_mfma"}
NOTES_AMD = {"registers": r"\.vgpr_count: +(\d+)", "stack_bytes": r"\.private_segment_fixed_size: (\d+)"}


def compile_launch(kernel: JITFunction[Any], arguments: tuple[Any, ...], named: dict[str, Any], target: GPUTarget) -> dict[str, Any]:
    """Compile one launch, with arguments specialized as in a real launch. Returns registers, stack, shared memory and counts."""
    names = [p.name for p in kernel.params]
    options = {k: v for k, v in named.items() if k not in names}
    values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in named.items() if k in names}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        else:
            if isinstance(value, torch.Tensor):
                signature[parameter.name], aligned = f"*{TYPES[value.dtype]}", value.data_ptr() % 16 == 0
            else:
                signature[parameter.name], aligned = ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options=options)
    usage, assembly, counted = (noted if target.backend == "hip" else used)(compiled.asm)
    return {
        "kernel": kernel.__name__,
        "warps": options["num_warps"],
        **usage,
        "shared_bytes": compiled.metadata.shared,
        **{name: assembly.count(instruction) for name, instruction in counted.items() if instruction in assembly},
    }


def used(asm: dict[str, Any]) -> tuple[dict[str, int], str, dict[str, str]]:
    """Registers and stack of a kernel for an NVIDIA GPU, its PTX, and the instructions to count."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {"registers": found["REG"], "stack_bytes": found["STACK"]}, asm["ptx"], COUNTED


def noted(asm: dict[str, Any]) -> tuple[dict[str, int], str, dict[str, str]]:
    """The same for an AMD GPU."""
    assembly = asm["amdgcn"]
    return {name: int(re.findall(note, assembly)[0]) for name, note in NOTES_AMD.items()}, assembly, COUNTED_AMD


Launch = tuple[str, Callable[[], object]]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def column_loop(loop: Loop, batch: int = 0) -> Launch:
    """A launch of the column loop. batch: matrices, 0 without a leading dimension."""
    k, m, groups, lead = loop.k, loop.m or 512, loop.k // loop.width if loop.width else 4, (batch,) if batch else ()
    grid = GroupGrid(loop.spec, empty(*lead, groups, m), empty(*lead, groups, m), empty(*lead, k, dtype=torch.int32), loop.width > 0)
    columns = (empty(*lead, m, 128).mT[..., :k, :], empty(*lead, 128, 128)[..., :k, :k], empty(*lead, m, 4096).mT[..., :k, :])
    codes = empty(*lead, m, 4096, dtype=torch.uint8).mT[..., :k, :]
    name = f"gptq_block, {loop.name}" + (f", {batch} matrices" if batch else "")
    return name, lambda: gptq_block_triton.gptq_block_triton_(*columns, codes, grid)


def matvec(b: int, m: int, n: int, width: int, bits: int, dtype: torch.dtype) -> Launch:
    x, words = empty(b, n, dtype=dtype), empty(n * bits // 32, m, dtype=torch.int32)
    by_group = empty(n // width, m, dtype=torch.float16), empty(n // width, m, dtype=torch.uint8)
    name = f"dequant_matvec, {b} vectors, {m} × {n}, groups of {width}, {bits} bits, {TYPES[dtype]}"
    return name, lambda: dequant_matvec_triton.dequant_matvec_triton(x, words, *by_group, bits)


def syrk(n: int, dtype: torch.dtype, *, aligned: bool = True) -> Launch:
    """H is not allocated: one row stands for all, since nothing is run."""
    x = empty(64, n if aligned else n + 1, dtype=dtype)[:, :n]
    name = f"syrk, n = {n}, {TYPES[dtype]}" + ("" if aligned else ", rows not aligned")
    return name, lambda: syrk_triton.syrk_triton_(empty(1, n), x)


def dequantize(bits: int, dtype: torch.dtype, n: int = 4096, m: int = 512, points: PointsName = "int") -> Launch:
    """bits: 0 for codes."""
    source = empty(n * bits // 32, m, dtype=torch.int32) if bits else empty(m, n, dtype=torch.uint8)
    scales, zeros = empty(n // 128, m, dtype=torch.float16).T, empty(n // 128, m, dtype=torch.uint8).T
    if not bits:
        return f"dequantize to {TYPES[dtype]}", lambda: dequantize_triton.dequantize_triton(source, scales, zeros, dtype)
    name = f"dequantize_packed, {f'{bits} bits' if points == 'int' else points} to {TYPES[dtype]}"
    return name, lambda: dequantize_triton.dequantize_packed_triton(source, scales, zeros, bits, dtype, points)


def common() -> Iterator[Launch]:
    """What jobs on bf16 checkpoints launch with the default options: scales have 8 significant bits. Tensors are uninitialized."""
    yield column_loop(Loop(bits=4, symmetric=True, width=128, scale_bits=8))
    yield column_loop(Loop(bits=4, symmetric=False, width=128, scale_bits=8, min_zero=1))
    yield column_loop(Loop(bits=4, symmetric=True, width=32, scale_bits=8))
    yield column_loop(Loop(bits=4, symmetric=True, width=128, scale_bits=8, search=True))
    yield column_loop(Loop(bits=4, symmetric=False, width=128, scale_bits=8, min_zero=1, search=True))
    yield column_loop(Loop(bits=4, symmetric=True, width=32, scale_bits=8, search=True))
    yield column_loop(Loop(bits=4, symmetric=True, width=0))
    yield column_loop(Loop(bits=4, symmetric=False, width=0, min_zero=1))
    for dtype in (torch.bfloat16, torch.float16):
        yield syrk(4096, dtype)
    yield syrk(4096, torch.bfloat16, aligned=False)
    h = empty(4096, 4096)
    parts = h[:2048, 1792:2048], h[:2048, 2048:], h[1792:2048, 2048:]
    yield "rank_update", lambda: rank_update_triton.rank_update_triton_(*parts)
    several = empty(8, 2048, 2048)
    of_each = several[:, :1024, 768:1024], several[:, :1024, 1024:], several[:, 768:1024, 1024:]
    yield "rank_update, 8 matrices", lambda: rank_update_triton.rank_update_triton_(*of_each)
    # Experts that are solved side by side.
    yield column_loop(Loop(bits=4, symmetric=True, width=128, scale_bits=8), batch=8)
    yield column_loop(Loop(bits=4, symmetric=True, width=128, scale_bits=8, search=True), batch=8)
    yield column_loop(Loop(bits=4, symmetric=True, width=32, scale_bits=8), batch=8)
    yield column_loop(Loop(bits=4, symmetric=True, width=0), batch=8)
    for bits in (2, 3, 4, 8):
        codes, words = empty(512, 4096, dtype=torch.uint8), empty(128 * bits, 512, dtype=torch.int32)
        yield f"pack, {bits} bits", lambda codes=codes, bits=bits: pack_triton.pack_triton(codes.T, bits)
        yield f"unpack, {bits} bits", lambda words=words, bits=bits: pack_triton.unpack_triton(words, bits)
        yield dequantize(bits, torch.bfloat16)
        for dtype in (torch.float16, torch.bfloat16):
            yield matvec(4, 512, 4096, 128, bits, dtype)
    yield dequantize(0, torch.bfloat16)


def others() -> Iterator[Launch]:
    """What other jobs launch: other formats, group sizes, precisions of scales and shapes; the loops that ``gpu_session`` runs."""
    yield column_loop(Loop(bits=3, symmetric=False, width=64, scale_bits=8, m=1031), batch=3)
    for scale_bits in (7, 9, 10, 11):
        yield column_loop(Loop(bits=4, symmetric=True, width=128, scale_bits=scale_bits))
    yield column_loop(Loop(bits=4, symmetric=False, width=128, scale_bits=8))
    for bits, width, k in ((4, 64, 128), (3, 128, 128), (2, 128, 128), (4, 40, 120)):
        yield column_loop(Loop(bits=bits, symmetric=True, width=width, k=k, search=True))
    for width in (16, 40, 64):
        k = 120 if width == 40 else 128
        yield column_loop(Loop(bits=4, symmetric=True, width=width, k=k, scale_bits=8))
        yield column_loop(Loop(bits=4, symmetric=False, width=width, k=k, scale_bits=8, min_zero=1))
    yield column_loop(Loop(bits=3, symmetric=True, width=128, scale_bits=8, m=1030))
    yield column_loop(Loop(bits=4, symmetric=True, width=128, scale_bits=8, m=1031))
    yield column_loop(Loop(bits=4, symmetric=True, width=64, k=64, scale_bits=8, m=1))
    yield column_loop(Loop(bits=4, symmetric=True, width=0, k=1, m=1))
    for loop in LOOPS:
        yield column_loop(loop)
    for dtype in (torch.float16, torch.float32):
        yield dequantize(4, dtype)
        yield dequantize(0, dtype)
    yield dequantize(3, torch.float32)
    for bits, points in ((4, "nf4"), (4, "e2m1"), (8, "e4m3")):
        yield dequantize(bits, torch.bfloat16, points=points)
    yield syrk(57344, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16):
        yield matvec(1, 4096, 4096, 4096, 4, dtype)  # one group
        yield matvec(1, 4096, 4096, 128, 3, dtype)
        yield matvec(1, 4096, 4096, 128, 8, dtype)
    yield matvec(16, 4096, 4096, 32, 4, torch.bfloat16)
    yield matvec(1, 131200, 256, 128, 4, torch.bfloat16)  # no splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--few", action="store_true", help="compile only the variants of common jobs")
    parser.add_argument("--target", choices=TARGETS, default="sm_90", help="what to compile for (default: sm_90)")
    args = parser.parse_args()
    target = TARGETS[args.target]
    caught: list[dict[str, Any]] = []

    def run(self: JITFunction[Any], *arguments: Any, grid: object, warmup: bool, **named: Any) -> None:
        caught.append(compile_launch(self, arguments, named, target))

    JITFunction.run = run
    for module in (syrk_triton, dequant_matvec_triton):
        module.uses_interpreter = lambda _x: False
    torch.cuda.get_device_capability = lambda _device=None: (9, 0) if target.backend == "cuda" else (9, 4)
    torch.version.hip = None if target.backend == "cuda" else "compiled only"
    table: dict[str, Any] = {}
    failed = False
    for name, call in itertools.chain(common(), () if args.few else others()):
        if name in table:
            continue
        caught.clear()
        try:
            call()
            table[name] = caught[0]
            failed |= caught[0]["stack_bytes"] > (WHOLE_STACK if "groups of 40" in name else STACK)
            failed |= caught[0]["shared_bytes"] > SHARED[args.target]
        except Exception as error:
            table[name] = {"error": first_line(error)}
            failed = True
        print(f"{name:32}", " ".join(f"{k}={v}" for k, v in table[name].items()), flush=True)
        if args.json:
            command = f"python scripts/compile_sm90.py{'' if args.target == 'sm_90' else f' --target {args.target}'}"
            result = {"command": command, "triton": triton.__version__, "target": args.target, "launches": table}
            args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    sys.exit(1 if failed else 0)


def first_line(error: Exception) -> str:
    """The innermost error's type and the first line of its message. Triton wraps errors in ones that quote the source."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


if __name__ == "__main__":
    main()
