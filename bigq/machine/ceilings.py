"""Peak rates of a device, from which plans estimate times: measured if the device is present, else from data sheets."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bigq.kernels.precision import fp32_products
from bigq.kernels.syrk import syrk_

#: Bytes per second of a good NVMe disk or parallel file system. Used if the disk's rate is not given.
DISK_RATE = 3e9
#: Sides of the products that are measured are powers of two from this one.
SMALLEST = 64
#: Runs of each product, and the most seconds that those of one size may be expected to take.
RUNS, LONGEST = 4, 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """How fast a device receives, and sends as fast at the same time: bytes per second.

    bus: from host memory. peers: from devices of the same host. hosts: from those of others.
    peers_wait, hosts_wait: seconds that a collective operation takes without its bytes, on one host and on several: **assumed**, not
        from a data sheet.
    """

    bus: float
    peers: float
    hosts: float
    peers_wait: float = 30e-6
    hosts_wait: float = 50e-6


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Peak rates of a device.

    products: operations per second of matrix products in the compute dtype. correcting: of GPTQ's error feedback (TF32 on a GPU,
        fp32 on a CPU). single: in fp32. hessian: of sums ``XᵀX`` in fp32 from inputs in the compute dtype, one triangle counted.
    copy: bytes per second read and written by a copy within its memory.
    memory: bytes of device memory, 0 for a CPU.
    source: where the figures are from. links: None where they are not known.
    """

    name: str
    products: float
    correcting: float
    single: float
    hessian: float
    copy: float
    memory: int
    source: str
    links: Links | None = None


#: Half of what data sheets state for both directions together: PCIe 4 with 64 and PCIe 5 with 128 GB/s, NVLink with 600 GB/s (A100) and
#: 900 GB/s (H100 and H200 SXM). Between hosts, one InfiniBand adapter for each device, as in NVIDIA's DGX A100 (HDR, 200 Gb/s) and
#: DGX H100 (NDR, 400 Gb/s).
_PCIE_4, _PCIE_5 = Links(bus=32e9, peers=300e9, hosts=25e9), Links(bus=64e9, peers=450e9, hosts=50e9)
#: Peaks from data sheets (SXM cards, dense): tensor cores in bf16 and TF32, fp32, memory bandwidth.
KNOWN = {
    "a100": Ceilings("A100 80 GB", 312e12, 156e12, 19.5e12, 312e12, 2.04e12, 80 * 10**9, "data sheet", _PCIE_4),
    "h100": Ceilings("H100 80 GB", 989e12, 494e12, 67e12, 989e12, 3.35e12, 80 * 10**9, "data sheet", _PCIE_5),
    "h200": Ceilings("H200 141 GB", 989e12, 494e12, 67e12, 989e12, 4.8e12, 141 * 10**9, "data sheet", _PCIE_5),
}


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure a device, in about a second: matrix products of up to 1024² (GPU 8192²) and a copy of 8 MiB (GPU 1 GiB)."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 1024
    source = torch.empty(2**30 if gpu else 2**23, dtype=torch.uint8, device=device)
    with fp32_products(source, tf32=False):
        products = {kind: _products(device, kind, size) for kind in {dtype, torch.float32}}
    correcting = products[torch.float32]
    if gpu:
        with fp32_products(source, tf32=True):
            correcting = _products(device, torch.float32, size)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / _best(device, lambda: target.copy_(source))
    hessian = products[dtype] if gpu else _hessian(dtype, size)
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else 0
    return Ceilings(name, products[dtype], correcting, products[torch.float32], hessian, copied, memory, "measured now")


def _hessian(dtype: torch.dtype, size: int) -> float:
    """Operations per second of a CPU's sum over ``size`` tokens of as many inputs. Processors have several instructions for it."""
    x, h = torch.ones(size, size, dtype=dtype), torch.zeros(size, size)
    return float(size) ** 3 / _best(h.device, partial(syrk_, h, x))


def _products(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations per second of products of ``size``², or of a smaller power of two where those would take too long.

    A CPU without instructions for fp16 or bf16 takes seconds for a single product of 1024².
    """
    side = SMALLEST
    while True:
        a = torch.ones(side, side, dtype=dtype, device=device)
        out = torch.empty_like(a)
        seconds = _best(device, partial(torch.mm, a, a, out=out))
        if 2 * side > size or RUNS * 8 * seconds > LONGEST:
            return 2.0 * side**3 / seconds
        side *= 2


def _best(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of the fastest of three runs, after one warm-up."""
    seconds = []
    for _ in range(RUNS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
