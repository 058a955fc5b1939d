"""Compares the names of a checkpoint's tensors with the model's, and says why they do not match."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import nn

from bigq.errors import CheckpointError
from bigq.io.adapter import refuse_adapter_tensors
from bigq.io.json_file import show_name
from bigq.model import skeleton

#: Parts of names that wrappers of a module add, and what to save instead of the wrapper.
_WRAPPERS: Mapping[str, tuple[str, str]] = {
    "base_model.model.": ("PEFT", "model.merge_and_unload()"),
    "_orig_mod.": ("torch.compile", "model._orig_mod"),
    "_fsdp_wrapped_module.": ("FSDP", "the state dict that FSDP gathers in full"),
    "_checkpoint_wrapped_module.": ("activation checkpointing", "the module that is wrapped"),
    "_forward_module.": ("Lightning", "the module that is wrapped"),
    "module.": ("DistributedDataParallel or DeepSpeed", "model.module"),
}
#: Where the lines that rename the tensors of a saved checkpoint are.
_RENAMING = "docs/what-happens-when.md has lines that rename a saved one"


def require_parameters(folder: Path, model: nn.Module, found: Iterable[str], unplaced: Iterable[str]) -> None:
    """Raise CheckpointError where parameters of a model are not stored, UnsupportedModelError for the tensors of an adapter.

    found: names of the parameters that are stored, in some form. unplaced: of tensors that the model has no place for.
    """
    there, left = set(found), list(unplaced)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {id(param) for name, param in parameters.items() if name in there}
    missing = [name for name, param in parameters.items() if name not in there and id(param) not in tied]
    if missing:
        _explain_prefix(folder, model, missing, left)
    refuse_adapter_tensors(folder, left)
    if not missing:
        return
    more = "" if len(missing) == 1 else f" and {len(missing) - 1} more are"
    alike = _alike(missing, left)
    if left and (2 * (len(parameters) - len(missing)) < len(parameters) or 2 * len(alike) > len(missing)):
        has, stored = alike[0] if alike else (missing[0], left[0])
        raise CheckpointError(
            f"{folder}: the names of the tensors do not match the model of config.json: it has {show_name(has)}, the checkpoint "
            f"has {show_name(stored)} ({len(missing)} of {len(parameters)} are missing); "
            "give config.json and weights that were saved together"
        )
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and all(parameters[name] is param for name in missing for param in head.parameters()):
        raise CheckpointError(
            f"{folder}: tensor {missing[0]} is missing from the checkpoint, so the model has no output head, like embedding models; "
            "if the head shares the weight of the input embedding, set tie_word_embeddings to true in config.json, else fetch it again"
        )
    verb = f"{more} missing" if more else " is missing"
    raise CheckpointError(f"{folder}: tensor {missing[0]}{verb} from the checkpoint; fetch it again, or correct config.json")


def _alike(missing: Iterable[str], left: Iterable[str]) -> list[tuple[str, str]]:
    """Missing tensors that the checkpoint has under another path: each with a name whose last parts, down to the layer, are the same."""
    tails = {_tail(name): name for name in left}
    return [(name, tails[_tail(name)]) for name in missing if _tail(name) in tails]


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-4:])


def _explain_prefix(folder: Path, model: nn.Module, missing: Collection[str], left: Collection[str]) -> None:
    """Raise CheckpointError where the missing tensors are there with something before or within their names."""
    wanted = set(missing)
    for part, (wrapper, instead) in _WRAPPERS.items():
        bare = {name: _without_wrappers(name) for name in left if f".{part}" in f".{name}"}
        placed = skeleton.map_names(model, bare.values()) if bare else {}
        example = next((name for name, inner in bare.items() if placed.get(inner) in wanted), None)
        if example is not None:
            raise CheckpointError(
                f"{folder}: tensor {show_name(example)}: {part} is what {wrapper} adds to names; save {instead} with save_pretrained "
                f"instead ({_RENAMING})"
            )
    prefix = _common_prefix(missing, left)
    if prefix is not None:
        raise CheckpointError(
            f"{folder}: names of tensors begin with {show_name(prefix)}, as in {show_name(prefix + next(iter(missing)))}, those of "
            f"the model do not; save the inner model with save_pretrained ({_RENAMING}), or give the config.json that belongs to it"
        )


def _without_wrappers(name: str) -> str:
    for part in _WRAPPERS:
        name = re.sub(rf"(?<![^.]){re.escape(part)}", "", name)
    return name


def _common_prefix(missing: Collection[str], left: Collection[str]) -> str | None:
    """What stands before the names of most missing tensors in the checkpoint; tied ones need not be there."""
    first, names = next(iter(missing)), set(left)
    prefixes = (name.removesuffix(first) for name in left if name.endswith(f".{first}"))
    return next((prefix for prefix in prefixes if 2 * sum(prefix + name in names for name in missing) > len(missing)), None)
