"""Choosing the device, and telling its errors in our terms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bigq.errors import ResourceError, UsageError


def choose_device(wanted: str) -> torch.device:
    """ "auto" is the first GPU, else the CPU. Raises UsageError for a malformed name, ResourceError for an absent device."""
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
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
    return torch.device("cuda", device.index or 0)


@contextlib.contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Tell an allocation that failed as a ResourceError."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ResourceError(f"{device}: out of memory ({str(error).splitlines()[0]}); use a smaller --batch or fewer --samples") from error
    except MemoryError as error:
        raise ResourceError("the host is out of memory; use fewer --samples or a smaller --batch") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError("the host is out of memory; use fewer --samples or a smaller --batch") from error
