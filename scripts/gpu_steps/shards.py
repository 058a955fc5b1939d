"""The inputs of the steps bloom and llama: written beside the other steps, so that those two only measure."""

from __future__ import annotations

import subprocess

from gpu_steps.setting import Findings, Setting
from gpu_steps.slices import SLICES, bench, slice_of


def run(setting: Setting, found: Findings) -> None:
    for name in SLICES:
        one = slice_of(setting, name)
        status = subprocess.run(bench(setting, one, "--inputs-only"), check=False).returncode
        found.require(f"{name}: inputs are written", status == 0)
