"""Layers with experts of DeepSeek-V3 and Qwen3-235B-A22B by ``scripts/bench_176b``, some experts under torch's profiler.

All experts of a layer are loaded, solved and written; those that share bytes on disk have tokens of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gpu_steps.aims import Aim
from gpu_steps.setting import Findings, Setting, need
from gpu_steps.slices import PACKAGES, Slice, in_mode, measure

#: What such a model may take at most.
MOST_DEVICE, MOST_HOST = 24 * 10**9, 32 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayers(Slice):
    """layer_seconds: the aim for one layer. profiled_experts: the first one in block 0, and how many.

    The profile is in the first layer, which compiles kernels, so every later layer counts for the median.
    """

    layer_seconds: float
    profiled_experts: tuple[int, int]
    profiled_block: int = -1
    profiled: ClassVar[str] = "kernels_of_some_experts"

    @property
    def profile(self) -> list[str]:
        return ["--profile-experts", *map(str, self.profiled_experts)]

    @property
    def before_profile(self) -> tuple[str, ...]:
        """Nothing that says more of the host's peak than what follows: the profile is short."""
        return ()

    def more_aims(self, result: Mapping[str, Any], steady: float | None) -> list[Aim]:
        peaks = result["peaks"]
        aims = [Aim(name="peak of device memory, bytes", value=peaks["device_bytes"], high=MOST_DEVICE)]
        aims.append(Aim(name="peak of host memory, bytes", value=peaks["host_resident_bytes"], high=MOST_HOST))
        return aims if steady is None else [*aims, Aim(name="seconds of the median layer", value=steady, high=self.layer_seconds)]


LAYERS = {
    "deepseek": ExpertLayers(
        shape="deepseek-v3", blocks=3, seconds=95, minutes=15, vocabulary=8192, layer_seconds=12, profiled_experts=(64, 16)
    ),
    "qwen3": ExpertLayers(shape="qwen3-235b", blocks=4, seconds=62, minutes=6, vocabulary=8192, layer_seconds=4, profiled_experts=(64, 16)),
}
SMOKE_LAYERS = {
    "deepseek": ExpertLayers(
        shape="tiny-experts", blocks=2, seconds=95, minutes=15, experts=16, layer_seconds=12, profiled_experts=(4, 4), samples=4, seqlen=64
    ),
    "qwen3": ExpertLayers(
        shape="tiny-experts", blocks=1, seconds=62, minutes=6, experts=8, layer_seconds=4, profiled_experts=(2, 4), samples=4, seqlen=64
    ),
}


def layers_of(setting: Setting, name: str) -> ExpertLayers:
    return in_mode(setting, (SMOKE_LAYERS if setting.smoke else LAYERS)[name])


def run(setting: Setting, found: Findings) -> None:
    need(*PACKAGES)
    measure(setting, found, layers_of(setting, setting.step))
