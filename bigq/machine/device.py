"""The choice of the device, and the translation of its memory errors."""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections.abc import Iterator

import torch

from bigq.errors import ResourceError, UsageError
from bigq.machine.budget import GPU_RESERVE
from bigq.machine.memory import return_freed_memory

#: Messages of allocations that fail outside of torch's allocator, which accelerate does not recognize: in the driver, and in the
#: libraries as PyTorch and Triton word their errors. cuBLAS and cuSOLVER report other errors when a handle finds no memory.
OTHER_MESSAGES = re.compile(
    r"(CUDA|HIP) error: out of memory"
    r"|Triton Error \[(CUDA|HIP)\]: .*out of memory"
    r"|(CUBLAS|HIPBLAS|CUSOLVER|HIPSOLVER|CUDNN)_STATUS_ALLOC_FAILED"
    r"|(CUBLAS|HIPBLAS)_STATUS_NOT_INITIALIZED,? when calling `(cublas|hipblas)(Lt)?Create"
    r"|CUSOLVER_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR),? when calling `cusolverDnCreate"
)

#: cuBLAS workspace: eight buffers of 4096 KiB.
CUBLAS_WORKSPACES = ":4096:8"


def choose_device(wanted: str, local: int = 0) -> torch.device:
    """The device named ``wanted``; "auto" is a GPU if there is one, else the CPU. local: of several ranks on a host, each has its own GPU.

    Raises UsageError for an invalid name, ResourceError for an absent device.
    """
    if wanted == "auto":
        wanted = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UsageError(f"--device {wanted}: not a device; use auto, cpu or cuda:0") from None
    if device.type == "cpu":
        return device
    if ":" not in wanted:
        device = torch.device(device.type, local)
    if device.type != "cuda":
        raise UsageError(f"--device {wanted}: bigq supports only CPUs and CUDA GPUs; use auto, cpu or cuda:0")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ResourceError(f"--device {wanted}: PyTorch finds {count} CUDA devices here; use --device cpu, or check the NVIDIA driver")
    # Triton launches on the current device.
    torch.cuda.set_device(device.index or 0)
    _fix_workspaces()
    chosen = torch.device("cuda", device.index or 0)
    _cap_allocator(chosen)
    return chosen


def _cap_allocator(device: torch.device) -> None:
    """Let torch's caching allocator take the memory that plans count on, not the reserve, which it would fill with freed blocks.

    The libraries' handles, loaded kernels and the driver allocate outside of torch's allocator, and fail where it has left nothing.
    Where little is free the allocator gets half of it, so that small models still run there.
    """
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.memory_reserved(device) + max(free - GPU_RESERVE, free // 2, 1)
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)


def _fix_workspaces() -> None:
    """Make matrix products reproducible: cuBLAS chooses its algorithms by the size of its workspace.

    NVIDIA's cuBLAS documentation recommends a fixed size where results must be reproducible with several streams. torch reads the
    variable at the first product. cuDNN's benchmark of algorithms is off, which is torch's default.
    """
    os.putenv("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES)
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn a failed allocation into a ResourceError."""
    try:
        yield
    except MemoryError as error:
        raise ResourceError("the host is out of memory; use fewer --samples or a smaller --batch") from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or OTHER_MESSAGES.search(str(error)):
            message = str(error).partition("\n")[0]
            raise ResourceError(
                f"{device}: out of memory ({message}); use fewer --samples, a shorter --seqlen or --activations host"
            ) from error
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError("the host is out of memory; use fewer --samples or a smaller --batch") from error


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that an allocation failed, so that a smaller batch may fit."""
    if isinstance(error, torch.OutOfMemoryError) or OTHER_MESSAGES.search(str(error)):
        return True
    from accelerate.utils.memory import should_reduce_batch_size  # imported here: it takes seconds

    return bool(should_reduce_batch_size(error))


def free_memory(device: torch.device) -> None:
    """Free unreferenced memory of device and host, after an allocation failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return_freed_memory()
