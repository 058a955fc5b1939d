"""What a program took to quantize: processor time, time, peak of resident memory. Begin after imports, so that all are measured alike."""

from __future__ import annotations

import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


class Used:
    """Counts from its creation on. Memory is that of the process since it began, with what it imported."""

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.monotonic()

    def said(self, *packages: str) -> dict[str, Any]:
        """cpu_s, wall_s, peak_bytes until now; threads of torch; versions of packages."""
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
        return {
            "cpu_s": round(time.process_time() - self._cpu, 1),
            "wall_s": round(time.monotonic() - self._wall, 1),
            "peak_bytes": int(line.split()[1]) * 1024,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in packages},
        }


def write(said: dict[str, Any], path: Path) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(said) + "\n")
    os.replace(path.with_suffix(".tmp"), path)
