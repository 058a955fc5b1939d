"""The dispatch between versions of a kernel, and that the tests' fixture selects Triton."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import Child
from torch import Tensor

from bigq.kernels import pick
from bigq.kernels.dequant_matvec import dequant_matvec
from bigq.kernels.dequantize import dequantize, dequantize_packed
from bigq.kernels.gptq_block import gptq_block_
from bigq.kernels.grid import GridSpec, GroupGrid
from bigq.kernels.pack import pack, unpack
from bigq.kernels.rank_update import rank_update_
from bigq.kernels.syrk import syrk_

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def block(dtype: torch.dtype) -> None:
    scale, group = ones(1, 3, dtype=dtype), torch.zeros(8, dtype=torch.int32)
    grid = GroupGrid(GridSpec(bits=4, symmetric=True), scale, scale.clone(), group, False)
    w = ones(8, 3, dtype=dtype)
    gptq_block_(w, torch.eye(8, dtype=dtype), w.clone(), ones(8, 3, dtype=torch.uint8), grid)


def quantized() -> tuple[Tensor, Tensor]:
    return ones(4, 2, dtype=torch.float16), ones(4, 2, dtype=torch.uint8)


def matvec() -> Tensor:
    return dequant_matvec(ones(1, 64, dtype=torch.float16), ones(8, 2, dtype=torch.int32), *quantized(), 4)


#: The function of a kernel's Triton module.
FUNCTIONS = {
    "syrk": ["syrk_triton_"],
    "rank_update": ["rank_update_triton_"],
    "gptq_block": ["gptq_block_triton_"],
    "pack": ["pack_triton", "unpack_triton"],
    "dequantize": ["dequantize_triton", "dequantize_packed_triton"],
    "dequant_matvec": ["dequant_matvec_triton"],
}

#: A call, and the module and function that handle it on a GPU, or None.
CALLS: list[tuple[Callable[[], object], str, str | None]] = [
    (lambda: syrk_(ones(4, 4), ones(3, 4, dtype=torch.float16)), "syrk", "syrk_triton_"),
    (lambda: syrk_(ones(4, 4), ones(3, 4, dtype=torch.bfloat16)), "syrk", "syrk_triton_"),
    (lambda: syrk_(ones(4, 4), ones(3, 4)), "syrk", None),
    (lambda: syrk_(ones(4, 4, dtype=torch.float64), ones(3, 4, dtype=torch.float16)), "syrk", None),
    (lambda: rank_update_(ones(4, 2), ones(4, 3), ones(2, 3)), "rank_update", "rank_update_triton_"),
    (lambda: rank_update_(*(ones(*s, dtype=torch.float64) for s in ((4, 2), (4, 3), (2, 3)))), "rank_update", None),
    (lambda: block(torch.float32), "gptq_block", "gptq_block_triton_"),
    (lambda: block(torch.float64), "gptq_block", None),
    (lambda: pack(ones(32, 3, dtype=torch.uint8), 4), "pack", "pack_triton"),
    (lambda: pack(ones(32, dtype=torch.uint8), 4), "pack", None),
    (lambda: unpack(ones(4, 3, dtype=torch.int32), 4), "pack", "unpack_triton"),
    (lambda: unpack(ones(4, dtype=torch.int32), 4), "pack", None),
    (lambda: dequantize(ones(4, 32, dtype=torch.uint8), *quantized(), torch.bfloat16), "dequantize", "dequantize_triton"),
    (lambda: dequantize(ones(4, 32, dtype=torch.uint8), *quantized(), torch.float64), "dequantize", None),
    (lambda: dequantize_packed(ones(4, 4, dtype=torch.int32), *quantized(), 4, torch.float16), "dequantize", "dequantize_packed_triton"),
    (lambda: dequantize_packed(ones(4, 4, dtype=torch.int32), *quantized(), 4, torch.float64), "dequantize", None),
    (matvec, "dequant_matvec", "dequant_matvec_triton"),
]


@pytest.mark.parametrize("triton", [False, True], ids=["cpu", "triton path"])
@pytest.mark.parametrize(("call", "kernel", "served_by"), CALLS, ids=[f"{kernel}-{served_by}" for _, kernel, served_by in CALLS])
def test_each_call_uses_its_version(
    call: Callable[[], object], kernel: str, served_by: str | None, triton: bool, request: pytest.FixtureRequest
) -> None:
    """The Triton function is replaced by one that records calls: on the CPU there must be none, with the fixture one for each."""
    module = pytest.importorskip(f"bigq.kernels.gpu.{kernel}")
    if triton:
        request.getfixturevalue("triton_path")
    monkeypatch = request.getfixturevalue("monkeypatch")
    reached = []
    for name in FUNCTIONS[kernel]:
        monkeypatch.setattr(module, name, lambda *args, name=name, **named: reached.append(name))
    if kernel == "dequantize":
        monkeypatch.setattr(sys.modules["bigq.kernels.dequantize"], "unpack", lambda words, bits: ones(32, 4, dtype=torch.uint8))
    call()
    assert reached == ([served_by] if triton and served_by else [])


def test_the_cpu_and_fp64_use_the_reference() -> None:
    assert not pick.use_triton(torch.ones(2))
    assert not pick.use_triton(torch.ones(2, dtype=torch.uint8))
    for dtype in (torch.float32, torch.uint8, torch.float64):
        on_gpu = SimpleNamespace(is_cuda=True, dtype=dtype)
        assert pick.use_triton(on_gpu) is (dtype != torch.float64)  # type: ignore[arg-type]


@pytest.mark.parametrize(("hip", "expected"), [(None, "tf32x3"), ("6.4.0", "ieee")], ids=["NVIDIA", "AMD"])
def test_products_of_fp32_have_a_precision_that_the_compiler_accepts(
    hip: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = pytest.importorskip(f"triton.backends.{'amd' if hip else 'nvidia'}.compiler")
    options = (compiler.HIPOptions(arch="gfx942") if hip else compiler.CUDAOptions(arch="sm90")).allowed_dot_input_precisions
    monkeypatch.setattr(torch.version, "hip", hip)
    assert pick.input_precision() == expected and expected in options


@pytest.mark.gpu
def test_a_gpu_uses_triton_except_for_fp64() -> None:
    for dtype, served in ((torch.float32, True), (torch.uint8, True), (torch.bfloat16, True), (torch.float64, False)):
        assert pick.use_triton(torch.ones(2, device="cuda").to(dtype)) is served


def test_empty_columns_has_the_memory_order_of_the_device(request: pytest.FixtureRequest) -> None:
    columns = pick.empty_columns(5, 3, torch.float32, torch.device("cpu"))
    assert columns.shape == (5, 3) and columns.stride() == (3, 1)
    assert pick.empty_columns(5, 3, torch.float32, torch.device("cpu"), (2,)).stride() == (15, 3, 1)
    request.getfixturevalue("triton_path")
    from bigq.solver.gptq import empty_columns

    columns = empty_columns(5, 3, torch.uint8, torch.device("cpu"))
    assert columns.shape == (5, 3) and columns.stride() == (1, 5) and columns.dtype == torch.uint8
    assert empty_columns(5, 3, torch.uint8, torch.device("cpu"), [2]).stride() == (15, 1, 5)
    assert int(columns.min()) == 255, "what is uninitialised is not poisoned"


def test_kernels_do_not_load_triton_before_they_need_it(child: Child) -> None:
    """And a command does not run Triton's interpreter unless it is requested."""
    lines = [
        "import importlib, os, pkgutil, sys, bigq.kernels, bigq.solver.gptq, bigq.scheme",
        "names = [m.name for m in pkgutil.iter_modules(bigq.kernels.__path__) if m.name != 'gpu']",
        "for name in names: importlib.import_module('bigq.kernels.' + name)",
        "print(len(names) > 8, 'triton' in sys.modules, 'TRITON_INTERPRET' in os.environ)",
    ]
    done = child("-c", "\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False", "False"]
