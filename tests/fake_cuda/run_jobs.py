"""Runs jobs on the simulated device, one after the other in one process: ``python -m fake_cuda.run_jobs JOBS.json RESULTS.json``.

JOBS: a list of ``{"name": …, "argv": [arguments of bigq], "fault": BIGQ_FAULT or "", "planted": name or "", "device_bytes": …}``.
A job whose fault kills runs in a forked process. RESULTS: the name of each job → how it ended, and what ``findings`` has.

Where a GPU's choice would change bytes, the choice of the CPU is made: the memory order of the column loop, and the kernel of fused
attention. Host memory is copied in small pieces, so that tiny models need several.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import json
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fake_cuda import install as device
from fake_cuda.findings import DONE, PAGEABLE, PROBLEMS, SYNCS
from fake_cuda.memory import USAGE, forget_pinned
from fake_cuda.planted import planted
from fake_cuda.streams import STREAMS, host_waits

#: Bytes of a piece that is copied to the device, and to the host.
TO_DEVICE, TO_HOST = 4096, 1024
#: Seconds after which a job that hangs ends the process.
HANGS = 60


def prepare() -> None:
    """Install the device, and pin what would change bytes or take long."""
    torch.set_num_threads(1)
    device.install()
    from bigq.cli import main as _main  # noqa: F401
    from bigq.io import device_to_host
    from bigq.io.prefetch import pieces
    from bigq.machine.ceilings import KNOWN
    from bigq.sched.plan import inputs

    device.install_kernels()
    for name in ("api", "infer.evaluate", "infer.generate", "sched.run"):
        __import__(f"bigq.{name}")
    device.replace_everywhere("empty_columns", lambda k, m, dtype, device, batch=(): torch.empty(*batch, k, m, dtype=dtype, device=device))
    inputs.measure = lambda *given: KNOWN["h100"]
    pieces.CHUNK_BYTES, device_to_host.CHUNK_BYTES = TO_DEVICE, TO_HOST


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job. Returns how it ended."""
    from bigq import faults
    from bigq.cli.main import main

    device.reset()
    faults.disarm()
    USAGE.limit = job.get("device_bytes") or 80 * 2**30
    told, said, started, code, raised = io.StringIO(), io.StringIO(), time.monotonic(), 0, ""
    if job.get("fault"):
        os.environ["BIGQ_FAULT"] = job["fault"]
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(said), planted(job.get("planted", "")):
            code = main([str(word) for word in job["argv"]])
    except BaseException as error:
        code, raised = -1, f"{type(error).__name__}: {error}"
        traceback.print_exc(file=told)
    os.environ.pop("BIGQ_FAULT", None)
    gc.collect()
    for stream in STREAMS:
        host_waits(stream.clock)
    forget_pinned()
    return {
        "code": code,
        "raised": raised,
        "said": said.getvalue(),
        "told": told.getvalue()[-2000:],
        "seconds": round(time.monotonic() - started, 2),
        "device_peak": USAGE.peak,
        "problems": _listed(PROBLEMS),
        "syncs": _listed(SYNCS),
        "pageable": _listed(PAGEABLE),
        "done": dict(DONE),
    }


def _listed(counter: Counter[tuple[str, str]]) -> list[tuple[int, str, str]]:
    return [(count, *what) for what, count in counter.most_common()]


def run_and_die(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job that kills its process."""
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(HANGS, exit=True)
        run(job)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return {
        "code": -os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "raised": "",
        "problems": [],
        "syncs": [],
        "pageable": [],
        "done": {},
    }


def main(jobs: Path, results: Path) -> None:
    prepare()
    found = {}
    for job in json.loads(jobs.read_text()):
        if "kill" in job.get("fault", ""):
            found[job["name"]] = run_and_die(job)
        else:
            faulthandler.dump_traceback_later(HANGS, exit=True)
            found[job["name"]] = run(job)
            faulthandler.cancel_dump_traceback_later()
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
