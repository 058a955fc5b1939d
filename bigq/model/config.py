"""What a config.json may say before transformers builds anything from it.

transformers takes numbers as they come: it makes lists and loops of them, and tensors. What no published model comes near to
is refused here; what only code of the checkpoint's own or of a kernel hub could serve, too. Knows nothing of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.json_file import show_name, show_value

#: Kind of number → the names that it goes by, and the most that is taken. Of several kinds the first counts.
_LIMITS: tuple[tuple[re.Pattern[str], int], ...] = (
    # Modules that are made one by one. Published models have some hundreds, doge 16384 experts.
    (re.compile(r"(layers?|blocks?|experts?|heads?|stages|depths?|levels?)$"), 2**15),
    # Sizes of tensors: 134 million. The longest published contexts are of 10 million positions.
    (re.compile(r"size|dim|width|embd|inner|ff|^d_|vocab|position|ctx|channel|kernel|rank|mlp|conv|state|ratio"), 2**27),
    # Other things that are counted, and of which lists are made, such as labels.
    (re.compile(r"layer|block|expert|head|stage|depth|codebook|group|branch|repeat|^n_|^num_|_num_"), 2**20),
    (re.compile(""), 2**63 - 1),
)
_PROBABILITY = re.compile(r"drop(out)?(_prob|_rate|_p)?$|(^|_)pdrop$")
#: Attention that is computed by code which transformers or torch bring along.
_OWN_ATTENTION = (None, "eager", "sdpa", "flex_attention")


def check_config(path: Path, config: dict[str, Any], *, trust_remote_code: bool) -> None:
    """Raise CheckpointError where a number is absurd, UnsupportedModelError where code from elsewhere would be needed."""
    for name, value in _leaves("", config):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if _PROBABILITY.search(name) and not 0 <= value <= 1:
            raise CheckpointError(f"{path}: {show_name(name)} is {show_value(value)}, which is no probability; correct it")
        if isinstance(value, float):
            continue
        limit = next(most for names, most in _LIMITS if names.search(name))
        if abs(value) > limit:
            raise CheckpointError(
                f"{path}: {show_name(name)} is {show_value(value)}, and more than {limit} is taken for a mistake; correct it"
            )
    if trust_remote_code:
        return
    for name, value in config.items():
        if any(inner == "auto_map" for inner, _ in _names(value)):
            raise UnsupportedModelError(
                f"{path}: {show_name(name)} comes with code of its own (auto_map); pass --trust-remote-code to run it"
            )


def uses_hub_kernels(config: dict[str, Any]) -> bool:
    """Whether a config asks for attention or expert code that may have to be fetched from a hub."""
    return any(
        name.lstrip("_") in ("attn_implementation", "experts_implementation")
        and any(leaf not in _OWN_ATTENTION for _, leaf in _leaves(name, value))
        for name, value in _names(config)
    )


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value that is no list and no object, with the name it goes by; those of a list go by the list's."""
    if isinstance(value, dict):
        for inner, leaf in value.items():
            yield from _leaves(inner, leaf)
    elif isinstance(value, list):
        for leaf in value:
            yield from _leaves(name, leaf)
    else:
        yield name, value


def _names(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (name, value) of every object in a value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name, inner
            yield from _names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _names(inner)
