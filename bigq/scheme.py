"""How Linears are quantized: the scheme of a Linear, and rules that give some Linears another one. Imports no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bigq.errors import UsageError
from bigq.kernels.grid_spec import BITS_OF_FORM, FEWEST_SCALE_BITS, SCALE_BITS, GridSpec, PointsName, ScaleForm
from bigq.options import Effect, Range, Resume, checked, option, require_known, require_names, settle, shown, table
from bigq.vocabulary import DATA_FREE_METHODS, OrderName, ScalesName

BITS = (2, 3, 4, 8)

#: Of options about calibration, the Hessian or the order of columns: data-free methods have none of these.
CALIBRATED = Effect(
    unless=f"with --method {' or '.join(DATA_FREE_METHODS)}",
    holds=lambda job, _: job.method not in DATA_FREE_METHODS,
)

WEIGHTS = "how weights are quantized"


def _weights(default: Any, *, help: str, **more: Any) -> Any:
    """An option of the scheme. A rule may set its value too, so messages name the field and not the flag."""
    return option(default, help=help, group=WEIGHTS, resume=Resume.REFUSED, by_name=True, **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """How the weights of one Linear are quantized.

    ``w ≈ scale · (code − zero)`` with ``0 ≤ code < 2**bits``, or ``scale · book[code]`` with a codebook. Scale and zero are shared by
    ``group_size`` consecutive inputs of one output row. symmetric: zero is ``2**(bits−1)``. The other fields are described below.
    Raises UsageError.
    """

    bits: int = _weights(4, help="bits per weight", choices=BITS, rule_key="bits")
    group_size: int = _weights(
        128,
        help="inputs that share a scale; -1: the whole row",
        unit="inputs",
        placeholder="N",
        rule_key="group_size",
        range=Range(
            must="be -1 or a positive multiple of 8",
            holds=lambda size: size == -1 or (size >= 8 and size % 8 == 0),
        ),
    )
    symmetric: bool = _weights(
        True,
        help="fix the zero point in the middle; --asym finds one for each group",
        flag="--sym",
        opposite="--asym",
        rule_key="sym",
    )
    # In all orders a group is a run of consecutive inputs, so nothing changes for readers of the result.
    order: OrderName = _weights(
        "group",
        help="order in which columns are quantized: from left to right; by decreasing Hessian diagonal, with scales from the original "
        "weights; or group by group, by decreasing Hessian diagonal",
        rule_key="order",
        effects=(CALIBRATED,),
    )
    damping: float = _weights(
        0.01,
        help="what is added to the Hessian's diagonal, as a fraction of its mean without dead inputs and the largest twentieth",
        placeholder="X",
        rule_key="damping",
        range=Range(must="lie between 0 and 1", holds=lambda damping: 0 < damping < 1),
        effects=(CALIBRATED,),
    )
    scales: ScalesName = _weights(
        "search",
        help="a group's scale spans all its weights, or is searched for the least error: of the Linear's output, or of weights for rtn",
        rule_key="scales",
    )
    sweeps: int = _weights(
        1,
        help="passes of coordinate descent over all codes and scales of a Linear, after the column loop",
        placeholder="N",
        rule_key="sweeps",
        range=Range(must="be from 0 to 100", holds=lambda sweeps: 0 <= sweeps <= 100),
        effects=(CALIBRATED,),
    )
    # The gptq v1 format stores zero − 1 and needs 1.
    min_zero: int = _weights(0, help="smallest zero point allowed; the output format decides it", flag=None)
    points: PointsName = _weights("int", help="what codes stand for; the output format decides it", flag=None, added=True)
    scale_form: ScaleForm = _weights("fp16", help="how scales are stored; the output format decides it", flag=None, added=True)
    # fp16 has 11. Scales of 8 bits are exact in bf16. The product of a scale of 7 bits and a zero point of 4 bits is exact in fp16.
    scale_bits: int | None = _weights(
        None,
        help="significant bits of a scale",
        placeholder="N",
        unset="8 for a bf16 checkpoint, whose readers convert scales to bf16, else 11",
        range=Range(
            must=f"lie between {FEWEST_SCALE_BITS} and {SCALE_BITS}, all that fp16 has",
            holds=lambda bits: FEWEST_SCALE_BITS <= bits <= SCALE_BITS,
        ),
    )

    def __post_init__(self) -> None:
        settle(self)

    @property
    def grid(self) -> GridSpec:
        """The fields that decide a group's scale and zero point."""
        return GridSpec(
            bits=self.bits,
            symmetric=self.symmetric,
            min_zero=self.min_zero,
            # Floats have the same relative precision with any scale.
            search=self.scales == "search" and self.points != "e4m3",
            scale_bits=BITS_OF_FORM.get(self.scale_form, self.scale_bits or SCALE_BITS),
            points=self.points,
            scale_form=self.scale_form,
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

    @classmethod
    def of(cls, given: Any, what: str) -> Any:
        """The scheme of a mapping; other values unchanged. Raises UsageError, naming ``what``, for an unknown field."""
        if not isinstance(given, Mapping):
            return given
        require_known(cls, given, what)
        return cls(**given)


#: What a rule may override, by its name in a rule.
OVERRIDES = {each.rule_key: each for each in table(QuantScheme).values() if each.rule_key is not None}

EXPECTED = "expected REGEX:key=value[,key=value…]"

#: Limits of a rule's pattern: characters, and repetitions. Checkpoints contain patterns too, and the time of a match grows exponentially
#: with the number of repetitions.
MAX_PATTERN, MAX_REPETITIONS = 1000, 6


@dataclass(frozen=True, slots=True)
class Rule:
    """Overrides for the Linears whose module name matches ``pattern`` (``re.match``: from the start).

    overrides: fields of QuantScheme by name, ``sym`` for symmetric; None skips the Linears, which stay unquantized.
    Raises UsageError.
    """

    pattern: str
    overrides: Mapping[str, int | float | bool | str] | None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise UsageError(f"Rule: pattern must be a string, not {shown(self.pattern)}")
        too_much = len(re.findall(r"[*+{]", self.pattern)) > MAX_REPETITIONS or re.search(r"\)[*+{]", self.pattern)
        if len(self.pattern) > MAX_PATTERN or too_much:
            raise UsageError(
                f"{self.pattern[:MAX_PATTERN]!r} is too long or repeats too much to be matched in bounded time; "
                f"use at most {MAX_REPETITIONS} of * + {{ and none of them after a group"
            )
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"{self.pattern!r} is not a regular expression: {error}") from None
        if self.overrides is not None:
            if not isinstance(self.overrides, Mapping):
                raise UsageError(f"Rule: overrides must be a dict or None, not {shown(self.overrides)}")
            _overridden(QuantScheme(), self.overrides)

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read ``REGEX:bits=8,group_size=32``. Raises UsageError."""
        pattern, _, settings = text.rpartition(":")
        if not pattern or not settings:
            raise UsageError(f"--rule {text!r}: {EXPECTED}")
        overrides: dict[str, int | float | bool | str] = {}
        for setting in settings.split(","):
            key, equals, value = setting.partition("=")
            key = key.strip()
            if not equals or key not in OVERRIDES:
                raise UsageError(f"--rule {text!r}: {setting!r} is not key=value with a key of {', '.join(OVERRIDES)}; {EXPECTED}")
            overrides[key] = _parse_value(OVERRIDES[key].types[0], value.strip(), f"--rule {text!r}: {key}")
        try:
            return cls(pattern, overrides)
        except UsageError as error:
            raise UsageError(f"--rule {text!r}: {error}") from None

    @classmethod
    def all_of(cls, given: Any) -> Any:
        """A tuple of the rules of a list, in which strings are parsed; other values unchanged. Raises UsageError."""
        if not isinstance(given, list | tuple):
            return given
        rules = tuple(cls.parse(rule) if isinstance(rule, str) else rule for rule in given)
        for rule in rules:
            if not isinstance(rule, cls):
                raise UsageError(f"JobConfig: rules must hold Rules or strings such as 'REGEX:bits=8', not {shown(rule)}")
        return rules


def _parse_value(kind: type, value: str, what: str) -> int | float | bool | str:
    if kind is str:
        return value
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


def _overridden(base: QuantScheme, overrides: Mapping[str, int | float | bool | str]) -> QuantScheme:
    renamed: dict[str, Any] = {OVERRIDES[name].name if name in OVERRIDES else name: value for name, value in overrides.items()}
    require_known(QuantScheme, renamed, "Rule: QuantScheme")
    return dataclasses.replace(base, **renamed)


def scheme_fields(what: str, fields: Any, names: Iterable[str]) -> dict[str, Any]:
    """Fields of a scheme from an untrusted JSON value. Raises UsageError."""
    require_names(what, fields, names)
    return {name: checked(f"{what}.{name}", value, table(QuantScheme)[name]) for name, value in fields.items()}


def frozen_rules(rules: Any) -> tuple[Rule, ...]:
    """The rules in an untrusted JSON value. Raises UsageError."""
    if not isinstance(rules, list | tuple):
        raise UsageError(f"settings.rules must be a list, not {rules!r}")
    return tuple(_frozen_rule(f"settings.rules[{i}]", rule) for i, rule in enumerate(rules))


def _frozen_rule(what: str, rule: Any) -> Rule:
    require_names(what, rule, ("pattern", "overrides"))
    pattern, overrides = rule["pattern"], rule["overrides"]
    if not isinstance(pattern, str):
        raise UsageError(f"{what}.pattern cannot be {pattern!r}")
    if overrides is not None:
        what = f"{what}.overrides"
        if not isinstance(overrides, dict):
            raise UsageError(f"{what} cannot be {overrides!r}")
        renamed = {"symmetric" if name == "sym" else name: value for name, value in overrides.items()}
        scheme_fields(what, renamed, [name for name in table(QuantScheme) if name in renamed])
    return Rule(pattern, overrides)
