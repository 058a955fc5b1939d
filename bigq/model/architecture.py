"""Which class a checkpoint's config.json names, and whether it is the causal language model that bigq builds.

transformers picks the class by the model type and what the caller asks for, and does not look at ``architectures``. So a classifier, an
embedding model or the language part of a larger model would be built as a causal language model without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigq.errors import UnsupportedModelError
from bigq.io.json_file import show_value

_ENCODER = "an encoder (a masked language model)"
_AUDIO = "an audio model"
_IMAGE = "an image model"
#: transformers' own tables of classes, and what the classes in them are. The first table that holds a class counts.
_KINDS: tuple[tuple[str, str], ...] = (
    ("SEQUENCE_CLASSIFICATION", "a sequence classifier (such as a reward model or a reranker)"),
    ("TOKEN_CLASSIFICATION", "a token classifier (such as a reward model of steps)"),
    ("QUESTION_ANSWERING", "an extractive question answering model"),
    ("MULTIPLE_CHOICE", "a multiple choice classifier"),
    ("SPEECH_SEQ_2_SEQ", "a speech model"),
    ("SEQ_TO_SEQ_CAUSAL_LM", "an encoder-decoder model"),
    ("IMAGE_TEXT_TO_TEXT", "a vision-language model"),
    ("MULTIMODAL_LM", "a multimodal model"),
    ("CTC", _AUDIO),
    ("AUDIO_CLASSIFICATION", _AUDIO),
    ("IMAGE_CLASSIFICATION", _IMAGE),
    ("MASKED_LM", _ENCODER),
    ("", "a model without an output head (such as an embedding model)"),
)
#: How names of classes end that are causal language models, whether transformers knows them or not.
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
#: The same for classes that are something else, in code of checkpoints.
_OTHER = re.compile(r"(Classification|Regression|Reward(Model)?|Classifier|Scorer)$")
#: What refusals say of the models that can be quantized.
ONLY = "bigq quantizes causal language models only"


def refuse_diffusion(path: Path, raw: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError if a config.json is that of a part of a diffusion model, which has no model type."""
    if "_diffusers_version" in raw or ("model_type" not in raw and ("_class_name" in raw or (path.parent / "model_index.json").exists())):
        raise UnsupportedModelError(
            f"{path}: is that of a part of a diffusion model ({show_value(raw.get('_class_name'))}); {ONLY}: give MODEL one of those"
        )


def not_causal(config: Any) -> str | None:
    """Why a config has no causal language model; None if transformers, or the checkpoint's own code, has one."""
    if _causal_classes(config) or getattr(config, "auto_map", None):
        return None
    return f"model type {show_value(str(config.model_type))} is that of {_kind_of(config)}; {ONLY}"


def require_causal(path: Path, raw: Mapping[str, Any], config: Any, *, trust_remote_code: bool) -> None:
    """Raise UnsupportedModelError if a config.json is not that of a causal language model that transformers builds.

    path, raw: the file and its content. config: what transformers made of it.
    """
    own = raw.get("auto_map") if trust_remote_code else None
    code = {key: _class_name(value) for key, value in own.items()} if isinstance(own, Mapping) else {}
    names = raw.get("architectures")
    name = next((n for n in names if isinstance(n, str)), None) if isinstance(names, list) else None
    known = _causal_classes(config)
    if code.get("AutoModelForCausalLM"):
        _require_own(path, name, code)
    elif not known:
        what = (
            f"architectures names {name}, {_kind(name)}"
            if name
            else f"model type {show_value(raw.get('model_type'))} is that of {_kind_of(config)}"
        )
        offers = f"; the checkpoint's own code offers {', '.join(sorted(code))}, but not AutoModelForCausalLM" if code else ""
        raise UnsupportedModelError(f"{path}: {what}{offers}; {ONLY}: give MODEL one of those")
    elif name is None:
        _require_whole(path, config, known)
    elif name not in [cls.__name__ for cls in known]:
        _refuse_other(path, name, known[0].__name__, type(config))


def _require_own(path: Path, name: str | None, code: Mapping[str, str]) -> None:
    """The class that the checkpoint's own code offers for causal language models; published configs may give it another name."""
    causal = code["AutoModelForCausalLM"]
    if name is None or name == causal or _CAUSAL.search(name):
        return
    others = [key for key, value in code.items() if value == name and key not in ("AutoModel", "AutoModelForCausalLM")]
    if others or _OTHER.search(name):
        as_what = f" ({others[0]} in auto_map)" if others else ""
        raise UnsupportedModelError(
            f"{path}: architectures names {name}{as_what}, but the causal language model of the checkpoint's code is {causal}; {ONLY}: "
            "give MODEL one of those"
        )


def _require_whole(path: Path, config: Any, known: tuple[type, ...]) -> None:
    """Without ``architectures``: refuse a config of which the causal model would be a part only."""
    if getattr(known[0], "config_class", None) in (getattr(config, "sub_configs", None) or {}).values():
        raise UnsupportedModelError(
            f"{path}: has no architectures, and describes a model of several parts, of which {known[0].__name__} is one; such models (with "
            f"images, audio or video) are not supported yet; {ONLY}: give MODEL one of those"
        )


def _refuse_other(path: Path, name: str, causal: str, config_class: type) -> None:
    """Raise UnsupportedModelError for a class other than the causal one of the model type; a name that only looks new passes."""
    kind = _kind(name)
    if kind == _UNKNOWN:
        if _CAUSAL.search(name):
            return
        raise UnsupportedModelError(
            f"{path}: architectures names {name}, which transformers does not know; {ONLY}: if this is one, set architectures to "
            f'["{causal}"]'
        )
    begin = f"{path}: architectures names {name}, {kind}"
    if _CAUSAL.search(name):
        raise UnsupportedModelError(
            f"{begin} of another model type than {show_value(getattr(config_class, 'model_type', None))}, so readers that go by one or the "
            f'other run different models; set architectures to ["{causal}"] to quantize what transformers runs, or correct model_type'
        )
    if kind in _LATER:
        raise UnsupportedModelError(
            f"{begin}; such models are not supported yet, and {causal} is only a part of it; give MODEL a text model"
        )
    advice = "" if kind == _ENCODER else f', or, if the checkpoint does hold {causal}, set architectures to ["{causal}"]'
    raise UnsupportedModelError(f"{begin}; {ONLY}: give MODEL one of those{advice}")


#: Kinds that hold a causal language model among other parts.
_LATER = ("a vision-language model", "a multimodal model", "a speech model")
_UNKNOWN = "a class that transformers does not know"


def _kind(name: str) -> str:
    """What a class is, by transformers' own tables."""
    import transformers

    for table, kind in _KINDS:
        if any(name == entry or (isinstance(entry, (tuple, list)) and name in entry) for entry in _table(table).values()):
            return kind
    if _CAUSAL.search(name) and hasattr(transformers, name):
        return "a causal language model"
    return "another kind of model" if hasattr(transformers, name) else _UNKNOWN


def _kind_of(config: Any) -> str:
    """What a model type that has no causal class is, by the first table with a class of its that generates or predicts tokens."""
    generating = [(table, kind) for table, kind in _KINDS if kind in (*_LATER, _ENCODER, _AUDIO, _IMAGE) or table.startswith("SEQ_TO_SEQ")]
    kind = next((kind for table, kind in generating if getattr(config, "model_type", None) in _table(table)), "another kind of model")
    return "a model of images and text" if kind == _IMAGE and hasattr(config, "vision_config") else kind


def _table(name: str) -> Mapping[str, Any]:
    """One of transformers' tables: model type → name of its class, or names."""
    from transformers.models.auto import modeling_auto

    found: Mapping[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES" if name else "MODEL_MAPPING_NAMES", {})
    return found


def _causal_classes(config: Any) -> tuple[type, ...]:
    """transformers' classes of causal language models for a config; none if it has none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ()
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def _class_name(reference: Any) -> str:
    """The name of a class in an entry of auto_map, such as "module.Class" or "owner/name--module.Class"; entries may be lists."""
    if isinstance(reference, (tuple, list)):
        reference = next((r for r in reference if r), "")
    return str(reference).rpartition(".")[2]
