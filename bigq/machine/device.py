"""Choosing the device, and telling its errors in our terms."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

import torch

from bigq.errors import ResourceError, UsageError
from bigq.machine.memory import return_freed_memory

#: How allocations fail that libraries make beside torch's allocator, in words that accelerate does not look for.
OTHER_WORDS = ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

#: Eight buffers of 4 MiB.
CUBLAS_WORKSPACES = ":4096:8"


def choose_device(wanted: str) -> torch.device:
    """ "auto" is the first GPU, else the CPU. Raises UsageError for a malformed name, ResourceError for an absent device."""
    if wanted == "auto":
        wanted = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UsageError(f"--device {wanted}: is not a device; use auto, cpu or cuda:0") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UsageError(f"--device {wanted}: bigq runs on cpu and cuda")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ResourceError(f"--device {wanted}: this machine has {count} usable CUDA devices; use --device cpu, or check the driver")
    # Triton launches on the current device.
    torch.cuda.set_device(device.index or 0)
    _fix_workspaces()
    return torch.device("cuda", device.index or 0)


def _fix_workspaces() -> None:
    """Let products be summed in the same order in every run: cuBLAS picks its algorithms by the workspace that it is given.

    One size per stream, as NVIDIA's cuBLAS documentation asks for where results must be reproducible with several streams; read by
    torch when the first product is taken. cuDNN's trials of algorithms are off, which is torch's default too.
    """
    os.putenv("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES)
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Tell an allocation that failed as a ResourceError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).partition("\n")[0]
        raise ResourceError(f"{device}: out of memory ({said}); use fewer --samples, a shorter --seqlen or --activations host") from error
    except MemoryError as error:
        raise ResourceError("the host is out of memory; use fewer --samples or a smaller --batch") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError("the host is out of memory; use fewer --samples or a smaller --batch") from error


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that an allocation failed, so that a smaller batch may do."""
    if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OTHER_WORDS):
        return True
    from accelerate.utils.memory import should_reduce_batch_size  # imported here: it takes seconds

    return bool(should_reduce_batch_size(error))


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, after an allocation failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return_freed_memory()
