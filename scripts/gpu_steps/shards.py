"""The inputs of the steps that quantize blocks: written beside the other steps, so that those only measure."""

from __future__ import annotations

import subprocess
import time

from gpu_steps.expert_layers import LAYERS, layers_of
from gpu_steps.setting import Findings, Setting, need
from gpu_steps.slices import PACKAGES, SLICES, bench, slice_of


def run(setting: Setting, found: Findings) -> None:
    need(*PACKAGES)
    begun = time.monotonic()
    wanted = {name: slice_of(setting, name) for name in SLICES} | {name: layers_of(setting, name) for name in LAYERS}
    writers = {name: subprocess.Popen(bench(setting, one, "--inputs-only")) for name, one in wanted.items()}
    for name, writer in writers.items():
        found.require(f"{name}: inputs are written", writer.wait() == 0)
        found[f"{name}: seconds"] = round(time.monotonic() - begun, 1)
