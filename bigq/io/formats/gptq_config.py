"""A ``quantization_config`` of the gptq formats, read back: the scheme of each packed Linear, from JSON that others may have written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.errors import CheckpointError, UsageError
from bigq.io.formats.base import Format
from bigq.io.json_file import plain, shown
from bigq.scheme import QuantScheme, Rule, scheme_for

#: Entries of ``dynamic``.
MAX_RULES = 10_000
_KINDS: Mapping[str, type] = {"bits": int, "group_size": int, "sym": bool}


@dataclass(frozen=True, slots=True)
class GptqSchemes:
    """base: the scheme of Linears that no rule is for."""

    path: Path
    base: QuantScheme
    rules: tuple[Rule, ...]
    format: Format

    @classmethod
    def read(cls, path: Path, config: Mapping[str, Any], format: Format) -> GptqSchemes:
        """From the ``quantization_config`` of the config.json at ``path``. Raises CheckpointError."""
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict) or len(dynamic) > MAX_RULES:
            raise _bad(path, f"dynamic {shown(dynamic)} is not an object of at most {MAX_RULES} rules")
        rules = tuple(_rule(path, pattern, said) for pattern, said in dynamic.items())
        said = {name: config[name] for name in _KINDS if name in config}
        if not {"bits", "group_size"} <= set(said):
            raise _bad(path, "has no bits or no group_size")
        base = _overridden(path, QuantScheme(), said)
        for rule in rules:
            _overridden(path, base, rule.overrides or {})
        return cls(path, base, rules, format)

    def scheme(self, name: str) -> QuantScheme:
        """Of the packed Linear ``name``. Raises CheckpointError where it should not be packed."""
        scheme = scheme_for(name, self.base, self.rules)
        if scheme is None:
            raise CheckpointError(f"{self.path}: {name} is packed although the quantization config leaves it out")
        return scheme


def _rule(path: Path, pattern: str, said: Any) -> Rule:
    skips = pattern.startswith("-:")
    if not skips and not isinstance(said, dict):
        raise _bad(path, f"dynamic {plain(pattern)} is {shown(said)}, not an object")
    expression = pattern[2:] if pattern.startswith(("+:", "-:")) else pattern
    try:
        return Rule(expression, None if skips else {name: said[name] for name in _KINDS if name in said})
    except UsageError as error:
        raise _bad(path, f"dynamic: {plain(str(error))}") from None


def _overridden(path: Path, base: QuantScheme, said: Mapping[str, Any]) -> QuantScheme:
    for name, value in said.items():
        if type(value) is not _KINDS[name]:
            raise _bad(path, f"{name} is {shown(value)}")
    try:
        return QuantScheme(
            bits=said.get("bits", base.bits),
            group_size=said.get("group_size", base.group_size),
            symmetric=said.get("sym", base.symmetric),
        )
    except UsageError as error:
        raise _bad(path, str(error)) from None


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: quantization_config: {what}; fetch it again")
