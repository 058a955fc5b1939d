"""Checks of a config.json before transformers builds anything from it.

transformers does not check numbers before it makes lists, loops and tensors of that size. Values far above those of any published model
are refused here, and so are configs that need the checkpoint's own code or code from a kernel hub. Does not import transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.index import INDEX_NAME, SINGLE_NAME
from bigq.io.json_file import show_name, show_value

#: Pattern of a setting's name, and the largest value allowed. The first pattern that matches counts.
_LIMITS: tuple[tuple[re.Pattern[str], int], ...] = (
    # Modules that are built one by one. Published models have hundreds; doge has 16384 experts.
    (re.compile(r"(layers?|blocks?|experts?|heads?|stages|depths?|levels?)$"), 2**15),
    # Dimensions of tensors: 134 million. The longest published context has 10 million positions.
    (re.compile(r"size|dim|width|embd|inner|ff|^d_|vocab|position|ctx|channel|kernel|rank|mlp|conv|state|ratio"), 2**27),
    # Other counts that become lengths of lists, such as the number of labels.
    (re.compile(r"layer|block|expert|head|stage|depth|codebook|group|branch|repeat|^n_|^num_|_num_"), 2**20),
    (re.compile(""), 2**63 - 1),
)
_PROBABILITY = re.compile(r"drop(out)?(_prob|_rate|_p)?$|(^|_)pdrop$")
#: Attention implementations that come with transformers or torch.
_OWN_ATTENTION = (None, "eager", "sdpa", "flex_attention")


def check_config(path: Path, config: dict[str, Any], *, trust_remote_code: bool) -> None:
    """Raise CheckpointError for a number outside its limits, UnsupportedModelError where the checkpoint's own code would be needed."""
    for name, value in _leaves("", config):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if _PROBABILITY.search(name) and not 0 <= value <= 1:
            raise CheckpointError(f"{path}: {show_name(name)} is {show_value(value)}, which is not a probability; correct it")
        if isinstance(value, float):
            continue
        limit = next(most for names, most in _LIMITS if names.search(name))
        if abs(value) > limit:
            raise CheckpointError(f"{path}: {show_name(name)} is {show_value(value)}, above the limit of {limit}; correct it")
    weights = config.get("transformers_weights")
    if weights not in (None, SINGLE_NAME, INDEX_NAME):
        raise UnsupportedModelError(
            f"{path}: transformers_weights names {show_value(weights)} as the model's weights, but bigq reads {SINGLE_NAME} or "
            f"{INDEX_NAME}; rename that file and remove the entry"
        )
    if trust_remote_code:
        return
    for name, value in config.items():
        if any(inner == "auto_map" for inner, _ in _names(value)):
            raise UnsupportedModelError(
                f"{path}: {show_name(name)} needs the checkpoint's own code (auto_map); pass --trust-remote-code to run it"
            )


def uses_hub_kernels(config: dict[str, Any]) -> bool:
    """Whether a config asks for attention or expert kernels that transformers may fetch from the hub."""
    return any(
        name.lstrip("_") in ("attn_implementation", "experts_implementation")
        and any(leaf not in _OWN_ATTENTION for _, leaf in _leaves(name, value))
        for name, value in _names(config)
    )


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every scalar value with its name. Items of a list have the list's name."""
    if isinstance(value, dict):
        for inner, leaf in value.items():
            yield from _leaves(inner, leaf)
    elif isinstance(value, list):
        for leaf in value:
            yield from _leaves(name, leaf)
    else:
        yield name, value


def _names(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (name, value) pair of every object in a value, nested ones included."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name, inner
            yield from _names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _names(inner)
