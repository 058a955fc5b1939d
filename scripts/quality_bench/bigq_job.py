"""``bigq quantize`` in a process of its own, and what it took.

    bigq_job.py USED -- ARGUMENTS OF BIGQ

USED gets JSON: seconds of processor time and of the clock, without importing torch and transformers, and the peak of resident memory.
The bigq that is measured is the one on PYTHONPATH.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import transformers  # noqa: F401  # imported before the clock starts, as in the scripts of other programs

from bigq.cli.main import main


def peak_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    used, _, *arguments = sys.argv[1:]
    cpu, wall = time.process_time(), time.monotonic()
    status = main(arguments)
    said = {"cpu_s": round(time.process_time() - cpu, 1), "wall_s": round(time.monotonic() - wall, 1), "peak_bytes": peak_bytes()}
    Path(used).write_text(json.dumps(said | {"versions": {"torch": torch.__version__}, "threads": torch.get_num_threads()}) + "\n")
    sys.exit(status)
