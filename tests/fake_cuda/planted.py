"""Faults that the simulated device must find. Each replaces a few words of one function of bigq while a job runs."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """In a function (``module:Class.method``) the text ``old`` becomes ``new``. found: a problem, or the error that the job ends with.

    "" as ``found``: nothing but the job's bytes shows the fault.
    """

    function: str
    old: str
    new: str
    found: str


COPIER = "bigq.io.prefetch.cuda_copier:CudaCopier"
EXPORTER = "bigq.io.device_to_host:DeviceToHost"
PINNED = "bigq.sched.rows.tiers:_PinnedBuffer"
WAITS_FOR_MAIN = "self._stream.wait_stream(torch.cuda.current_stream(self._device))"
COPY = (
    "for part, piece in zip(target.view(-1).split([len(piece) for piece in pieces]), pieces, strict=True):\n"
    "                part.copy_(piece, non_blocking=True)"
)
RECORD = "arrived = torch.cuda.Event()\n            arrived.record(self._stream)"

FAULTS: Mapping[str, Fault] = {
    "a weight is used before its copy is waited for": Fault(
        f"{COPIER}.join", "torch.cuda.current_stream(self._device).wait_stream(self._stream)", "pass", "read while a copy"
    ),
    "a copy does not wait for earlier work on its target's memory": Fault(
        f"{COPIER}.target", WAITS_FOR_MAIN, "pass", "does not wait for the work that uses its target"
    ),
    "a region of the ring is reused before its copy": Fault(
        "bigq.io.prefetch.cuda_copier:_CudaCopy.wait", "self._event.synchronize()", "pass", "was overwritten before"
    ),
    "the ring is not pinned": Fault(f"{COPIER}.host_memory", ", pin_memory=True", "", "not pinned"),
    "a buffer is on the wrong device": Fault(
        "bigq.solver.gptq:_quantize_columns",
        "torch.uint8, work.device",
        'torch.uint8, torch.device("cpu")',
        "CPU tensor given to the kernel",
    ),
    "a kernel gets a tensor of the host": Fault(
        "bigq.solver.gptq:_Columns.grid",
        "zero, self.group[..., a:b] - first",
        "zero, (self.group[..., a:b] - first).cpu()",
        "CPU tensor given to the kernel",
    ),
    "two devices in one operation": Fault(
        "bigq.solver.gptq:_quantize_columns", "dtype=torch.float64, device=work.device", "dtype=torch.float64", "tensors of two devices"
    ),
    "rows are freed while they are copied": Fault(f"{PINNED}.put", "rows.record_stream(self._stream)", "pass", "is freed while a copy"),
    "rows are copied to the host before they are computed": Fault(
        f"{PINNED}.put", WAITS_FOR_MAIN, "pass", "does not wait for the work that makes its source"
    ),
    "an event is recorded before the copy it stands for": Fault(
        f"{PINNED}._fetch",
        f"{COPY}\n            {RECORD}\n",
        f"{RECORD}\n            {COPY}\n",
        "read while a copy",
    ),
    "rows are used before their copy is waited for": Fault(
        f"{PINNED}.get", "torch.cuda.current_stream(self._device).wait_event(expected[3])", "pass", "read while a copy"
    ),
    "a shard is written before its copy to the host": Fault(f"{EXPORTER}.chunks", "copied.synchronize()", "pass", ""),
    "a shard is copied before it is packed": Fault(
        f"{EXPORTER}.mark",
        "event.record(torch.cuda.current_stream(self._device))",
        "pass",
        "does not wait for the work that makes its source",
    ),
    "one host buffer in place of two": Fault(f"{EXPORTER}.chunks", "(i + 1) % 2", "0", ""),
    "an asynchronous copy to the host on the compute stream": Fault(
        "bigq.sched.rows.tiers:_FileBuffer.put",
        'to("cpu", self._dtype, copy=True)',
        'to("cpu", self._dtype, copy=True, non_blocking=True)',
        "",
    ),
}


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """Let bigq have a fault, while the context is open. name: of ``FAULTS``; "" for none."""
    if not name:
        yield
        return
    fault = FAULTS[name]
    path, _, inside = fault.function.partition(":")
    module = importlib.import_module(path)
    owner = module
    *outer, function = inside.split(".")
    for part in outer:
        owner = getattr(owner, part)
    real = getattr(owner, function)
    source, old = inspect.getsource(real), fault.old
    assert source.count(old) == 1, f"{fault.function} does not hold {fault.old!r} once"
    scope: dict[str, object] = {}
    text = "from __future__ import annotations\n" + textwrap.dedent(source.replace(old, fault.new))
    exec(compile(text, inspect.getfile(real), "exec"), vars(module), scope)
    setattr(owner, function, scope[function])
    try:
        yield
    finally:
        setattr(owner, function, real)
