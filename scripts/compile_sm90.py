#!/usr/bin/env python3
"""Compile every Triton kernel for sm_90 (H100), without a GPU: registers, spills, shared memory, instructions.

Each wrapper is called as a job would call it; the launch is caught and compiled instead of run. Ends with status 1 where
a kernel does not compile or spills more than a few registers. Triton's interpreter must be off.

    python scripts/compile_sm90.py --json docs/results/compile_sm90.json
"""

from __future__ import annotations

import argparse
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
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
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
from bigq.kernels.grid import GridSpec, GroupGrid

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.uint8: "u8",
}

#: Bytes of stack that a thread may use: syrk's epilogue parks eight registers once per tile.
STACK = 32

#: Instructions worth counting in PTX.
COUNTED = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "bulk_copies": "cp.async.bulk.tensor", "async_copies": "cp.async.cg"}


def compile_launch(kernel: JITFunction[Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """What the compiler makes of one launch, with the arguments specialized as a real launch would."""
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
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "warps": options["num_warps"],
        "registers": found["REG"],
        "stack_bytes": found["STACK"],
        "shared_bytes": compiled.metadata.shared,
        **{name: ptx.count(instruction) for name, instruction in COUNTED.items() if instruction in ptx},
    }


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """A name and a call for each variant that a job on a 4-bit or 3-bit model meets. Tensors hold nothing."""
    n, m, k = 4096, 512, 128

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    h = empty(n, n)
    for dtype in (torch.bfloat16, torch.float16):
        yield f"syrk, {TYPES[dtype]}", lambda dtype=dtype: syrk_triton.syrk_triton_(h, empty(64, n, dtype=dtype))
    yield "syrk, rows not aligned", lambda: syrk_triton.syrk_triton_(h, empty(64, n + 1, dtype=torch.bfloat16)[:, :n])
    yield "rank_update", lambda: rank_update_triton.rank_update_triton_(h[:2048, 1792:2048], h[:2048, 2048:], h[1792:2048, 2048:])
    for name, symmetric, width, min_zero in (
        ("symmetric, groups of 128", True, 128, 0),
        ("symmetric, groups of 32", True, 32, 0),
        ("asymmetric, groups of 128", False, 128, 1),
        ("symmetric, given scales", True, 0, 0),
        ("asymmetric, given scales", False, 0, 0),
        ("symmetric, groups of 40", True, 40, 0),
    ):
        groups = k // width if width else 4
        columns_of_block = groups * width if width else k
        grid = GroupGrid(
            GridSpec(bits=4, symmetric=symmetric, min_zero=min_zero),
            empty(groups, m),
            empty(groups, m),
            empty(columns_of_block, dtype=torch.int32),
            width > 0,
        )
        c = columns_of_block
        columns = (empty(m, k).T[:c], empty(k, k)[:c, :c], empty(m, n).T[:c], empty(m, n, dtype=torch.uint8).T[:c])
        yield f"gptq_block, {name}", lambda columns=columns, grid=grid: gptq_block_triton.gptq_block_triton_(*columns, grid)
    for bits in (2, 3, 4, 8):
        codes, words = empty(m, n, dtype=torch.uint8), empty(n * bits // 32, m, dtype=torch.int32)
        scales, zeros = empty(n // 128, m, dtype=torch.float16), empty(n // 128, m, dtype=torch.uint8)
        yield f"pack, {bits} bits", lambda codes=codes, bits=bits: pack_triton.pack_triton(codes.T, bits)
        yield f"unpack, {bits} bits", lambda words=words, bits=bits: pack_triton.unpack_triton(words, bits)
        yield (
            f"dequantize_packed, {bits} bits",
            lambda w=words, s=scales, z=zeros, b=bits: dequantize_triton.dequantize_packed_triton(w, s.T, z.T, b, torch.bfloat16),
        )
        for dtype in (torch.float16, torch.bfloat16):
            x = empty(4, n, dtype=dtype)
            yield (
                f"dequant_matvec, {bits} bits, {TYPES[dtype]}",
                lambda x=x, w=words, s=scales, z=zeros, b=bits: dequant_matvec_triton.dequant_matvec_triton(x, w, s, z, b),
            )
    yield "dequantize", lambda: dequantize_triton.dequantize_triton(codes, scales.T, zeros.T, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()
    caught: list[dict[str, Any]] = []

    def run(self: JITFunction[Any], *arguments: Any, grid: object, warmup: bool, **named: Any) -> None:
        caught.append(compile_launch(self, arguments, named))

    JITFunction.run = run
    for module in (syrk_triton, dequant_matvec_triton):
        module.uses_interpreter = lambda _x: False
    torch.cuda.get_device_capability = lambda _device=None: (9, 0)
    table: dict[str, Any] = {}
    failed = False
    for name, call in launches():
        caught.clear()
        try:
            call()
            table[name] = caught[0]
            failed |= caught[0]["stack_bytes"] > STACK
        except Exception as error:
            table[name] = {"error": f"{type(error).__name__}: {error}"}
            failed = True
        print(f"{name:32}", " ".join(f"{k}={v}" for k, v in table[name].items()), flush=True)
    if args.json:
        result = {"command": "python scripts/compile_sm90.py", "triton": triton.__version__, "target": "sm_90", "launches": table}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
