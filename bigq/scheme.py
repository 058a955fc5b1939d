"""The vocabulary that solver, formats and pipeline share: how to quantize a Linear, and a Linear quantized.

Shapes: m output features, n input features, G groups along the inputs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.errors import UsageError
from bigq.kernels.dequantize import dequantize
from bigq.kernels.grid import FEWEST_SCALE_BITS, MSE_POWER, SCALE_BITS, GridSpec

BITS = (2, 3, 4, 8)

#: With so few bits the grid search sums errors to this power. The usual 2.4 cuts off much of the largest weights, and what the errors
#: before them add comes on top: at 2 bits the shipped model is worse for such a search than for none (docs/quality.md).
FEW_BITS, FEW_BITS_POWER = 3, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """How the weights of one Linear are quantized.

    ``w ≈ scale · (code − zero)`` with ``0 ≤ code < 2**bits``; scale and zero are shared by ``group_size``
    consecutive inputs of one output row.

    bits: 2, 3, 4 or 8.
    group_size: inputs per group; -1 makes one group of the whole row.
    symmetric: zero is fixed at ``2**(bits-1)``; else it is found with the scale from the group's range.
    act_order: quantize columns by decreasing Hessian diagonal. The groups stay those of the natural order
        ("static groups"), so nothing changes for whoever reads the result.
    damping: fraction of the Hessian's mean diagonal that is added to its diagonal.
    mse: shrink each group's range where that lowers its rounding error (a grid search).
    mse_power: the search's errors are summed to this power. Little is cut off the largest weights with a high one. None: 4 for 2 and
        3 bits, else 2.4, as others have it; in rounding to nearest, which has no error feedback, always 2.4.
    min_zero: smallest zero point allowed. The ``gptq`` v1 format stores zero − 1 and needs 1.
    scale_bits: significant bits of a scale, 7 to 11. fp16 has 11; scales of 8 are whole in bf16 too, and those of 7 are fp16 numbers still
        when they are multiplied by a zero point of 4 bits. None: 11; in a job 8 where the checkpoint is bf16, since readers convert
        scales to its type.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = False
    damping: float = 0.01
    mse: bool = False
    mse_power: float | None = None
    min_zero: int = 0
    scale_bits: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"bits={self.bits}: must be one of 2, 3, 4, 8")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise UsageError(f"group_size={self.group_size}: must be -1 or a positive multiple of 8")
        if not 0 < self.damping < 1:
            raise UsageError(f"damping={self.damping}: must lie between 0 and 1")
        if self.mse_power is not None and not 1 <= self.mse_power <= 10:
            raise UsageError(f"mse_power={self.mse_power}: must lie between 1 and 10")
        if self.scale_bits is not None and not FEWEST_SCALE_BITS <= self.scale_bits <= SCALE_BITS:
            raise UsageError(f"scale_bits={self.scale_bits}: must lie between {FEWEST_SCALE_BITS} and {SCALE_BITS}, all that fp16 has")

    @property
    def grid(self) -> GridSpec:
        """What concerns a single group's scale and zero."""
        return GridSpec(
            bits=self.bits,
            symmetric=self.symmetric,
            min_zero=self.min_zero,
            mse=self.mse,
            mse_power=self.mse_power or (FEW_BITS_POWER if self.bits <= FEW_BITS else MSE_POWER),
            scale_bits=self.scale_bits or SCALE_BITS,
        )

    def group_width(self, n: int) -> int:
        """Inputs per group for a Linear of n inputs.

        Raises UsageError where the group size does not divide n.
        """
        if self.group_size == -1:
            return n
        if n % self.group_size:
            raise UsageError(f"group size {self.group_size} does not divide {n} input features")
        return self.group_size


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A Linear's weight as codes, scales and zero points.

    codes: uint8 [m, n]. scales: fp16 [m, G]. zeros: uint8 [m, G].
    loss: Σ over rows of (w−q)ᵀ·H·(w−q), with the damped Hessian that was factored. For round-to-nearest,
        which has no Hessian, H is the identity.
    energy: the same quadratic form of w itself, so that ``loss / energy`` is the relative output error. Where there
        are more than 128 rows, GPTQ estimates it from at most 128 evenly spaced ones.
    damping: the damping that the factorization took (the scheme's, or a step up the ladder).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: QuantScheme
    loss: float
    energy: float
    damping: float

    @property
    def relative_error(self) -> float:
        return self.loss / self.energy if self.energy > 0 else 0.0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [m, n] that a reader of the codes sees: computed in fp32, rounded once to ``dtype``."""
        return dequantize(self.codes, self.scales, self.zeros, dtype)


_OVERRIDES: Mapping[str, type] = {
    "bits": int,
    "group_size": int,
    "sym": bool,
    "act_order": bool,
    "damping": float,
    "mse": bool,
    "mse_power": float,
}


#: Of a rule's pattern: characters, and repetitions. Patterns come with checkpoints too, and matching one takes time in the power of its
#: repetitions.
MAX_PATTERN, MAX_REPETITIONS = 1000, 6


@dataclass(frozen=True, slots=True)
class Rule:
    """Overrides for the Linears whose module name matches ``pattern`` (``re.match``: from the start).

    ``overrides`` None means: leave them unquantized.
    """

    pattern: str
    overrides: Mapping[str, int | float | bool] | None

    def __post_init__(self) -> None:
        too_much = len(re.findall(r"[*+{]", self.pattern)) > MAX_REPETITIONS or re.search(r"\)[*+{]", self.pattern)
        if len(self.pattern) > MAX_PATTERN or too_much:
            raise UsageError(
                f"{self.pattern[:MAX_PATTERN]!r} is too long or repeats too much to be matched in bounded time; "
                f"use at most {MAX_REPETITIONS} of * + {{ and none of them behind a group"
            )
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"{self.pattern!r} is not a regular expression: {error}") from None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read ``REGEX:bits=8,group_size=32``. Raises UsageError."""
        pattern, _, settings = text.rpartition(":")
        if not pattern or not settings:
            raise UsageError(f"--rule {text!r}: expected REGEX:key=value[,key=value…]")
        overrides: dict[str, int | float | bool] = {}
        for setting in settings.split(","):
            key, equals, value = setting.partition("=")
            key = key.strip()
            if not equals or key not in _OVERRIDES:
                raise UsageError(f"--rule {text!r}: {setting!r} is not key=value with a key of {', '.join(_OVERRIDES)}")
            overrides[key] = _parse_value(_OVERRIDES[key], value.strip(), f"--rule {text!r}: {key}")
        _overridden(QuantScheme(), overrides)
        return cls(pattern, overrides)


def _parse_value(kind: type, value: str, what: str) -> int | float | bool:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise UsageError(f"{what} must be true or false, not {value!r}")
        return value.lower() == "true"
    try:
        return int(value) if kind is int else float(value)
    except ValueError:
        raise UsageError(f"{what} must be a number, not {value!r}") from None


def scheme_for(name: str, base: QuantScheme, rules: tuple[Rule, ...]) -> QuantScheme | None:
    """The scheme of the Linear called ``name``: the first matching rule over ``base``; None if it is skipped."""
    for rule in rules:
        if re.match(rule.pattern, name):
            if rule.overrides is None:
                return None
            return _overridden(base, rule.overrides)
    return base


def _overridden(base: QuantScheme, overrides: Mapping[str, int | float | bool]) -> QuantScheme:
    renamed = {"symmetric" if k == "sym" else k: v for k, v in overrides.items()}
    return dataclasses.replace(base, **renamed)  # type: ignore[arg-type]
