"""Parsing the ``quantization_config`` of the gptq formats: the scheme of each packed Linear. The JSON may come from other programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.errors import CheckpointError, UsageError
from bigq.io.formats.base import Format
from bigq.io.json_file import show_name, show_value
from bigq.scheme import QuantScheme, Rule, scheme_for

#: Maximum number of entries in ``dynamic``.
MAX_RULES = 10_000
_KINDS: Mapping[str, type] = {"bits": int, "group_size": int, "sym": bool}


@dataclass(frozen=True, slots=True)
class GptqSchemes:
    """A parsed quantization config. base: the scheme of Linears that match no rule."""

    path: Path
    base: QuantScheme
    rules: tuple[Rule, ...]
    format: Format

    @classmethod
    def read(cls, path: Path, config: Mapping[str, Any], format: Format) -> GptqSchemes:
        """Parse the ``quantization_config`` of the config.json at ``path``. Raises CheckpointError."""
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict) or len(dynamic) > MAX_RULES:
            raise _bad(path, f"dynamic {show_value(dynamic)} is not an object of at most {MAX_RULES} rules")
        rules = tuple(_rule(path, pattern, overrides) for pattern, overrides in dynamic.items())
        values = {name: config[name] for name in _KINDS if name in config}
        if not {"bits", "group_size"} <= set(values):
            raise _bad(path, "bits or group_size is missing")
        base = _override(path, QuantScheme(), values)
        for rule in rules:
            _override(path, base, rule.overrides or {})
        return cls(path, base, rules, format)

    def scheme(self, name: str) -> QuantScheme:
        """The scheme of the packed Linear ``name``. Raises CheckpointError if the config says it is not packed."""
        scheme = scheme_for(name, self.base, self.rules)
        if scheme is None:
            raise CheckpointError(f"{self.path}: {name} is packed, but the quantization config skips it; fetch the model again")
        return scheme


def _rule(path: Path, pattern: str, overrides: Any) -> Rule:
    skips = pattern.startswith("-:")
    if not skips and not isinstance(overrides, dict):
        raise _bad(path, f"dynamic {show_name(pattern)} is {show_value(overrides)}, not an object")
    expression = pattern[2:] if pattern.startswith(("+:", "-:")) else pattern
    try:
        return Rule(expression, None if skips else {name: overrides[name] for name in _KINDS if name in overrides})
    except UsageError as error:
        raise _bad(path, f"dynamic: {show_name(str(error))}") from None


def _override(path: Path, base: QuantScheme, values: Mapping[str, Any]) -> QuantScheme:
    for name, value in values.items():
        if type(value) is not _KINDS[name]:
            raise _bad(path, f"{name} is {show_value(value)}, not {'a boolean' if _KINDS[name] is bool else 'an integer'}")
    try:
        return QuantScheme(
            bits=values.get("bits", base.bits),
            group_size=values.get("group_size", base.group_size),
            symmetric=values.get("sym", base.symmetric),
        )
    except UsageError as error:
        raise _bad(path, str(error)) from None


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: quantization_config: {what}; fetch it again")
