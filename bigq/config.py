"""What a job is asked to do, as one frozen value; the command line and the Python API both build it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bigq.calibration_data import calibration_source
from bigq.errors import CheckpointError, UsageError
from bigq.io.formats import FORMATS, Format
from bigq.io.json_file import show_name
from bigq.scheme import QuantScheme, Rule
from bigq.vocabulary import MethodName, OnNonfinite

METHODS = ("gptq", "gptaq", "rtn")
#: Of seeds, as torch takes them.
MAX_SEED = 2**64 - 1
#: Of packed shards, and "gguf": shards in gptq_v2, which a job goes on from and transformers reads, and a GGUF file made of them.
JOB_FORMATS = (*FORMATS, "gguf")
DEFAULT_SEQLEN = 2048
ACTIVATIONS = ("auto", "gpu", "host", "disk")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ON_NONFINITE = ("stop", "skip")

#: Fields that are kept with a job, so that one which is taken up again has them as they were wherever it does not say otherwise.
#: What may be said otherwise is in ``bigq.job.request.CHANGES``.
FROZEN_FIELDS = (
    "scheme",
    "rules",
    "method",
    "alpha",
    "format",
    "lm_head",
    "true_sequential",
    "calibration",
    "samples",
    "seqlen",
    "seed",
    "batch",
    "dtype",
    "trust_remote_code",
    "on_nonfinite",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """One quantization job.

    scheme, rules: how Linears are quantized, and which ones otherwise or not at all.
    method: "gptq"; "gptaq" for GPTQ with asymmetric calibration, which makes up for what the Linears before have done to the
        inputs; or "rtn" for plain rounding to nearest (no calibration).
    alpha: how much of that is made up for, from 0 (nothing, as "gptq") to 1 (all); for "gptaq" only.
    format: "gptq" (v1), "gptq_v2", "compressed-tensors", or "gguf" (one more file, beside shards in gptq_v2).
    lm_head: quantize the output head too.
    true_sequential: solve a block's Linears level by level, each seeing the quantized ones before it.
    calibration: a file, "c4" or "builtin", or data as ``bigq.calibration_data`` takes it; samples rows of seqlen tokens, drawn by seed.
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
    checkpoint_every: keep activations on disk so often that going on after a kill replays at most about so many seconds of
        finished blocks; 0 after every block, None never.
    grace: seconds that the job has after SIGTERM, SIGINT or SIGUSR1 to finish its step.
    steal_lock: take over the folder of a job that is dead.
    device: "auto", "cpu" or "cuda:N". dtype: of the forward passes; "auto" is the checkpoint's own.
    on_nonfinite: "stop", or "skip": Linears whose Hessian is not finite or cannot be factored stay unquantized, and tokens that
        are not finite stay out of the calibration.
    """

    scheme: QuantScheme = field(default_factory=QuantScheme)
    rules: tuple[Rule, ...] = ()
    method: MethodName = "gptq"
    alpha: float = 0.5
    format: str = "gptq"
    lm_head: bool = False
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
    checkpoint_every: float | None = 60.0
    grace: float = 60.0
    steal_lock: bool = False
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    on_nonfinite: OnNonfinite = "stop"
    quiet: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "calibration", calibration_source(self.calibration, "calibration"))
        for name, value, allowed in (
            ("--method", self.method, METHODS),
            ("--format", self.format, JOB_FORMATS),
            ("--dtype", self.dtype, DTYPES),
            ("--activations", self.activations, ACTIVATIONS),
            ("--on-nonfinite", self.on_nonfinite, ON_NONFINITE),
        ):
            if value not in allowed:
                raise UsageError(f"{name} {value}: must be one of {', '.join(allowed)}")
        for name, number in (("--samples", self.samples), ("--batch", self.batch), ("--seqlen", self.seqlen)):
            if number is not None and number < 1:
                raise UsageError(f"{name} {number}: must be at least 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"--seed {self.seed}: must be from 0 to {MAX_SEED}")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"--alpha {self.alpha:g}: must be between 0 and 1")
        if self.read_ahead is not None and self.read_ahead < 0:
            raise UsageError(f"--read-ahead {self.read_ahead}: must not be negative")
        every = self.checkpoint_every
        if every is not None and not (math.isfinite(every) and every >= 0):
            raise UsageError(f"--checkpoint-every {every:g}: must be a number of seconds, 0 for after every block, or never")
        if not (math.isfinite(self.grace) and self.grace > 0):
            raise UsageError(f"--grace {self.grace:g}: must be a number of seconds above 0")

    def blocks_ahead(self, device_type: str) -> int:
        """``read_ahead`` with nothing left open."""
        return self.read_ahead if self.read_ahead is not None else int(device_type == "cuda")

    @property
    def base_scheme(self) -> QuantScheme:
        """The scheme with what the output format demands of it."""
        return dataclasses.replace(self.scheme, min_zero=self.made.min_zero)

    @property
    def made(self) -> Format:
        """Of the shards."""
        return FORMATS["gptq_v2" if self.format == "gguf" else self.format]

    def frozen(self) -> dict[str, Any]:
        """The fields that are kept with a job, as plain JSON values."""
        whole = dataclasses.asdict(self)
        return {name: whole[name] for name in FROZEN_FIELDS}

    @classmethod
    def from_frozen(cls, settings: Any, where: str = "job.json") -> JobConfig:
        """The config that ``frozen`` made ``settings`` from; what is not frozen has its default.

        where: the file that they come from, for messages. Raises CheckpointError naming what is missing, unknown or wrong.
        """
        try:
            _require_names("settings", settings, FROZEN_FIELDS)
            values = {name: _checked(f"settings.{name}", settings[name], kinds) for name, kinds in _kinds(cls()).items()}
            scheme = QuantScheme(**_scheme_fields("settings.scheme", settings["scheme"], _SCHEME_KINDS))
            return cls(scheme=scheme, rules=_rules(settings["rules"]), **values)
        except UsageError as error:
            raise CheckpointError(
                f"{where}: {show_name(str(error))}; the file is damaged, or of another version of bigq: "
                "begin the job again in another folder"
            ) from None


_Kinds = tuple[type, ...]


def _kinds_of(default: Any) -> _Kinds:
    """The types that a field may have, by its default; where that is None, a number or None."""
    return (int, type(None)) if default is None else (type(default),)


_SCHEME_KINDS: Mapping[str, _Kinds] = {f.name: _kinds_of(f.default) for f in dataclasses.fields(QuantScheme)} | {
    "mse_power": (float, type(None))
}


def _kinds(default: JobConfig) -> dict[str, _Kinds]:
    """The types that frozen fields may have, by their defaults."""
    return {name: _kinds_of(getattr(default, name)) for name in FROZEN_FIELDS if name not in ("scheme", "rules")}


# What follows takes apart JSON values that may be anything, and raises UsageError, which ``from_frozen`` tells with the file.


def _require_names(what: str, value: Any, names: Iterable[str]) -> None:
    """Of ``value``, that it is an object with just these names."""
    if not isinstance(value, dict):
        raise UsageError(f"{what} must be an object, not {value!r}")
    for name in names:
        if name not in value:
            raise UsageError(f"{what}.{name} is missing")
    for name in value:
        if name not in names:
            raise UsageError(f"{what}.{name} is not known")


def _checked(what: str, value: Any, kinds: _Kinds) -> Any:
    """``value``, of one of the types; a whole number will do for a float, true and false for neither."""
    if type(value) not in kinds and not (float in kinds and type(value) is int):
        raise UsageError(f"{what} cannot be {value!r}")
    return value


def _scheme_fields(what: str, fields: Any, names: Iterable[str]) -> dict[str, Any]:
    _require_names(what, fields, names)
    return {name: _checked(f"{what}.{name}", value, _SCHEME_KINDS[name]) for name, value in fields.items()}


def _rules(rules: Any) -> tuple[Rule, ...]:
    if not isinstance(rules, list | tuple):
        raise UsageError(f"settings.rules must be a list, not {rules!r}")
    return tuple(_rule(f"settings.rules[{i}]", rule) for i, rule in enumerate(rules))


def _rule(what: str, rule: Any) -> Rule:
    _require_names(what, rule, ("pattern", "overrides"))
    pattern, overrides = _checked(f"{what}.pattern", rule["pattern"], (str,)), rule["overrides"]
    if overrides is not None:
        what = f"{what}.overrides"
        _checked(what, overrides, (dict,))
        renamed = {"symmetric" if name == "sym" else name: value for name, value in overrides.items()}
        QuantScheme(**_scheme_fields(what, renamed, [name for name in _SCHEME_KINDS if name in renamed]))
    return Rule(pattern, overrides)


def default_batch(device_type: str, seqlen: int) -> int:
    """Rows per batch: a GPU wants large products; on a CPU larger ones only take more memory.

    1024 tokens at once peak at 624 MiB on the model of ``scripts/bench_small.py``, 2048 at 670, in the same time.
    """
    return 8 if device_type == "cuda" else max(1, 1024 // seqlen)
