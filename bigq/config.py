"""What a job is asked to do, as one frozen value; the command line and the Python API both build it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from bigq.errors import UsageError
from bigq.scheme import QuantScheme, Rule

METHODS = ("gptq", "rtn")
FORMATS = ("gptq", "gptq_v2")
DEFAULT_SEQLEN = 2048
ACTIVATIONS = ("auto", "gpu", "host", "disk")
DTYPES = ("auto", "float32", "bfloat16", "float16")

#: Fields that decide the output's bytes: a resumed job must have them as they were.
FROZEN_FIELDS = (
    "scheme",
    "rules",
    "method",
    "format",
    "true_sequential",
    "calibration",
    "samples",
    "seqlen",
    "seed",
    "batch",
    "dtype",
    "trust_remote_code",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """One quantization job.

    scheme, rules: how Linears are quantized, and which ones otherwise or not at all.
    method: "gptq", or "rtn" for plain rounding to nearest (no calibration).
    format: "gptq" (v1) or "gptq_v2".
    true_sequential: solve a block's Linears level by level, each seeing the quantized ones before it.
    calibration: a file, "c4" or "builtin"; samples rows of seqlen tokens, drawn by seed.
        seqlen None means 2048 or the model's limit, whichever is less.
    batch: calibration rows that go through a block at once; None means 8 on a GPU, and on a CPU about 1024 tokens, or as many
        as there is memory for.
    activations: where calibration activations are kept between blocks: "gpu", "host", "disk", or "auto", the first of them
        that has room. The output is the same.
    read_ahead: blocks whose weights are read while the block before is computed; with 0, finished blocks are not written beside
        the computation either. None means 1 on a GPU, and 0 on a CPU, where files are a small part of a job's time and blocks
        in flight a large part of its memory.
    vram, ram, disk: bytes of device memory, host memory and disk space that the job may take; None is what is free.
    trace: a file for the job's timeline, as Chrome's trace viewer and Perfetto read it.
    device: "auto", "cpu" or "cuda:N". dtype: of the forward passes; "auto" is the checkpoint's own.
    """

    scheme: QuantScheme = field(default_factory=QuantScheme)
    rules: tuple[Rule, ...] = ()
    method: str = "gptq"
    format: str = "gptq"
    true_sequential: bool = True
    calibration: str = "c4"
    samples: int = 128
    seqlen: int | None = None
    seed: int = 0
    batch: int | None = None
    activations: str = "auto"
    read_ahead: int | None = None
    vram: int | None = None
    ram: int | None = None
    disk: int | None = None
    trace: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("--method", self.method, METHODS),
            ("--format", self.format, FORMATS),
            ("--dtype", self.dtype, DTYPES),
            ("--activations", self.activations, ACTIVATIONS),
        ):
            if value not in allowed:
                raise UsageError(f"{name} {value}: must be one of {', '.join(allowed)}")
        for name, number in (("--samples", self.samples), ("--batch", self.batch), ("--seqlen", self.seqlen)):
            if number is not None and number < 1:
                raise UsageError(f"{name} {number}: must be at least 1")
        if self.read_ahead is not None and self.read_ahead < 0:
            raise UsageError(f"--read-ahead {self.read_ahead}: must not be negative")

    def blocks_ahead(self, device_type: str) -> int:
        """``read_ahead`` with nothing left open."""
        return self.read_ahead if self.read_ahead is not None else int(device_type == "cuda")

    @property
    def base_scheme(self) -> QuantScheme:
        """The scheme with what the output format demands of it."""
        return dataclasses.replace(self.scheme, min_zero=1 if self.format == "gptq" else 0)

    @property
    def format_version(self) -> int:
        """1 or 2: of the gptq format."""
        return 2 if self.format == "gptq_v2" else 1

    def frozen(self) -> dict[str, Any]:
        """The fields that decide the output's bytes, as plain JSON values."""
        whole = dataclasses.asdict(self)
        return {name: whole[name] for name in FROZEN_FIELDS}


def default_batch(device_type: str, seqlen: int) -> int:
    """Rows per batch: a GPU wants large products; on a CPU larger ones only take more memory.

    1024 tokens at once peak at 624 MiB on the model of ``scripts/bench_small.py``, 2048 at 670, in the same time.
    """
    return 8 if device_type == "cuda" else max(1, 1024 // seqlen)
