"""Tensors that transformers merges on loading: the matrices of single experts, which become one parameter of a bank.

Checkpoints store ``experts.17.gate_proj.weight``; the model has ``experts.gate_up_proj`` [experts, outputs, inputs]. Which tensor goes
where follows from transformers' own rules: their patterns, and the order in which they stack and concatenate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.json_file import show_name


@dataclass(frozen=True, slots=True)
class Part:
    """Where a stored matrix goes: to ``parameter[expert]``, as the part number ``part`` of ``parts`` along the outputs."""

    parameter: str
    expert: int
    part: int
    parts: int


def merged_parts(model: nn.Module, names: Iterable[str]) -> dict[str, Part]:
    """Checkpoint name → where it goes, for those tensors that transformers would merge.

    Raises UnsupportedModelError for rules that do more than stack experts and concatenate their matrices by outputs, CheckpointError where
    an expert lacks one of them.
    """
    from transformers.core_model_loading import dot_natural_key

    found: dict[str, dict[str, list[str]]] = {}
    rules: dict[str, Any] = {}
    for name, (target, pattern, rule) in _matches(model, names).items():
        found.setdefault(target, {}).setdefault(pattern, []).append(name)
        rules[target] = rule
    result: dict[str, Part] = {}
    for target, by_pattern in found.items():
        _require_stacking(target, rules[target])
        patterns = [pattern for pattern in rules[target].source_patterns if pattern in by_pattern]
        columns = [sorted(by_pattern[pattern], key=dot_natural_key) for pattern in patterns]
        if len(patterns) < len(rules[target].source_patterns) or len(set(map(len, columns))) > 1:
            fewest = min(columns, key=len)
            raise CheckpointError(
                f"the checkpoint holds {len(max(columns, key=len))} tensors like {show_name(max(columns, key=len)[0])}, but "
                f"{len(fewest) if len(patterns) == len(rules[target].source_patterns) else 0} of another matrix of the same experts; "
                "fetch it again"
            )
        for part, column in enumerate(columns):
            result |= {name: Part(target, expert, part, len(columns)) for expert, name in enumerate(column)}
    return result


def _matches(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, str, Any]]:
    """For tensors that a rule converts: (the parameter's name, the rule's pattern for the tensor, the rule)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    places = model.state_dict()
    result = {}
    for name in names:
        if name in places:
            continue
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, places)
        if pattern is not None and target in places:
            result[name] = target, pattern, next(c for c in converters if pattern in c.source_patterns)
    return result


def _require_stacking(target: str, rule: Any) -> None:
    """Raise UnsupportedModelError unless a rule stacks tensors as experts and then concatenates them by outputs at most."""
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in rule.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) or len(rule.target_patterns) != 1:
        raise UnsupportedModelError(
            f"{target}: transformers makes it of several tensors by {', '.join(name for name, _ in steps)}, which is not supported"
        )
