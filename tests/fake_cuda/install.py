"""Puts the simulated device into torch and into bigq's kernels, for the whole process."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from fake_cuda import findings
from fake_cuda.findings import DONE, problem
from fake_cuda.memory import USAGE, pin, poison
from fake_cuda.streams import MAIN, Event, Stream, current_stream, on_stream, synchronize
from fake_cuda.tensors import CudaMode, CudaTensor, run_with_mode, unwrap, use, wrap

#: c10::DeviceType.
CUDA, META = 1, 14
PROPERTIES = SimpleNamespace(name="simulated GPU", total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0)


def install() -> None:
    """Replace ``torch.cuda``, the making of pinned memory and fused attention. Before bigq is imported."""
    assert not torch.cuda.is_available(), "there is a real GPU"
    _allow_guards()
    torch._C._set_only_lift_cpu_tensors(True)
    for name, value in _replacements().items():
        setattr(torch.cuda, name, value)
    torch.empty = _empty(torch.empty)  # type: ignore[assignment]
    functional.scaled_dot_product_attention = _on_inner(functional.scaled_dot_product_attention)
    threading.Thread.run = run_with_mode(threading.Thread.run)  # type: ignore[method-assign]
    CudaMode().__enter__()


def _allow_guards() -> None:
    """Let torch's C++ code switch to the device: a build without CUDA has no "device guard" for it, so it gets that of meta tensors.

    That guard does nothing. The registry is a global array of c10, one pointer for each type of device.
    """
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    assert guards[META], "torch registers no guard for meta tensors"
    guards[CUDA] = guards[CUDA] or guards[META]


def _replacements() -> Mapping[str, Any]:
    return {
        "Stream": Stream,
        "Event": Event,
        "current_stream": current_stream,
        "stream": on_stream,
        "synchronize": synchronize,
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (USAGE.limit - USAGE.allocated, USAGE.limit),
        "memory_allocated": lambda device=None: USAGE.allocated,
        "max_memory_allocated": lambda device=None: USAGE.peak,
        "memory_reserved": lambda device=None: USAGE.allocated,
        "max_memory_reserved": lambda device=None: USAGE.peak,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": lambda device=None: PROPERTIES.name,
        "manual_seed_all": lambda seed: None,
    }


def _empty(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.empty`` with pinned memory."""

    def empty(*size: Any, pin_memory: bool = False, **how: Any) -> Tensor:
        made = real(*size, **how)
        return poison(pin(made)) if pin_memory else made

    return empty


def _on_inner(real: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors that the CPU does as a whole, as one kernel of the device."""

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        cuda = [t for t in tensors if isinstance(t, CudaTensor)]
        if not cuda:
            return real(*args, **kwargs)
        if len(cuda) < len(tensors):
            problem(f"tensors of two devices in {real.__name__}")
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!")
        use(torch.ops.aten.mm.default, (), {}, cuda)
        with _disable_current_modes():
            return wrap(real(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))

    return run


def install_kernels() -> None:
    """Replace every Triton version by its plain one, on the tensors inside.

    ``x_triton_`` of ``bigq.kernels.gpu.NAME`` becomes ``x_`` of ``bigq.kernels.NAME``, which takes the path of the CPU there. So the
    bytes are those of a job on the CPU, whatever its kernels are.
    """
    gpu = importlib.import_module("bigq.kernels.gpu")
    replaced = 0
    for info in pkgutil.iter_modules(gpu.__path__):
        module = importlib.import_module(f"bigq.kernels.gpu.{info.name}")
        plain = importlib.import_module(f"bigq.kernels.{info.name}")
        for name, value in list(vars(module).items()):
            if "_triton" in name and callable(value) and value.__module__ == module.__name__:
                setattr(module, name, _kernel(name, getattr(plain, name.replace("_triton", ""))))
                replaced += 1
    assert replaced >= 7, f"only {replaced} kernels were found"


def _kernel(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        tensors = [t for t in _tensors(args) if isinstance(t, Tensor)]
        if not all(isinstance(t, CudaTensor) for t in tensors):
            problem(f"a CPU tensor given to the kernel {name}")
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        DONE[name] += 1
        if current_stream() is not MAIN:
            problem(f"the kernel {name} on a side stream")
        MAIN.advance()
        for t in tensors:
            t.memory.use_on_main(write=True)
        with _disable_current_modes():
            return tree_map(wrap, plain(*(_replace(unwrap, a) for a in args)))

    return launch


def _tensors(value: Any) -> list[Any]:
    """The leaves of arguments; those of dataclasses too."""
    return [
        leaf
        for each in tree_leaves(value)
        for leaf in (tree_leaves([getattr(each, f.name) for f in dataclasses.fields(each)]) if dataclasses.is_dataclass(each) else [each])
    ]


def _replace(by: Callable[[Any], Any], value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: by(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return tree_map(by, value)


def replace_everywhere(name: str, value: Any) -> list[tuple[Any, Any]]:
    """Replace a function in all modules of bigq that imported it. Returns the modules and what they had."""
    found = [
        (module, getattr(module, name)) for path, module in list(sys.modules.items()) if path.startswith("bigq.") and hasattr(module, name)
    ]
    for module, _ in found:
        setattr(module, name, value)
    return found


def reset() -> None:
    """Forget what was found, before another job."""
    findings.reset()
    USAGE.peak = USAGE.allocated
