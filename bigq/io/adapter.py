"""Adapters, which are no models: their weights must be merged into those of the base model first.

peft writes ``adapter_config.json``. transformers loads an adapter that lies beside the weights; bigq would compute without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.json_file import read_json_object, show_name

ADAPTER_CONFIG = "adapter_config.json"
#: Weights of an adapter, as peft names the files.
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
#: Kinds of adapters that are no change of weights but more tokens or more layers, by ``peft_type``.
_NOT_MERGEABLE = ("PROMPT", "P_TUNING", "PREFIX", "ADAPTION", "CPT")
#: Parts of names of an adapter's tensors.
_TENSOR = re.compile(r"\.(lora_[A-Za-z]\w*|base_layer|modules_to_save|ia3_l|hada_w\w+|lokr_w\w+|oft_r|vera_lambda_\w+)(\.|$)")
_MERGE = "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"


def refuse_adapter(folder: Path) -> None:
    """Raise UnsupportedModelError for a folder that holds an adapter, alone or beside the weights of a model."""
    path = folder / ADAPTER_CONFIG
    if not path.exists() and ((folder / "config.json").exists() or not any((folder / name).exists() for name in _ADAPTER_WEIGHTS)):
        return
    try:
        config = read_json_object(path)
    except CheckpointError:
        config = {}
    kind = _text(config.get("peft_type"))
    what = f"{kind} adapter" if kind else "adapter"
    mergeable = not (kind or "").upper().startswith(_NOT_MERGEABLE)
    article = "an" if what[0] in "aAIO" else "a"
    if (folder / "config.json").exists():
        merge = f"merge it first ({_MERGE}, and copy the tokenizer), or " if mergeable else ""
        raise UnsupportedModelError(
            f"{path}: {article} {what} lies beside the weights, and transformers would apply it; {merge}"
            f"move {ADAPTER_CONFIG} to another folder to use the weights without it"
        )
    base = _text(config.get("base_model_name_or_path"))
    of = f" of the model {base}" if base else ""
    model = f"the base model {base}" if base else "the base model"
    remedy = f"merge it into its base model ({_MERGE}) and give the new folder" if mergeable else f"it cannot be merged; give {model}"
    raise UnsupportedModelError(f"{folder}: is {article} {what}{of}, not a model; {remedy}")


def refuse_adapter_tensors(folder: Path, names: Iterable[str]) -> None:
    """Raise UnsupportedModelError where tensors that the model has no place for are those of an adapter."""
    found = next((name for name in names if _TENSOR.search(name)), None)
    if found is not None:
        raise UnsupportedModelError(
            f"{folder}: tensor {show_name(found)} belongs to an adapter that was not merged into the weights; merge it first: "
            "model.merge_and_unload().save_pretrained(NEW_FOLDER), with the peft model that saved it"
        )


def _text(value: Any) -> str | None:
    return show_name(value) if isinstance(value, str) and value else None
