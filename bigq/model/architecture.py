"""Which class a checkpoint's config.json names, and whether it is one with a causal language model, which bigq builds.

transformers picks the class by the model type and what the caller asks for, and does not look at ``architectures``. So a classifier, an
embedding model or the language part of a larger model would be built as a causal language model without a word. A composite class, which
takes images or audio beside text, is built as a whole: its language model is quantized, its other parts are copied.
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
    if _classes(config) or getattr(config, "auto_map", None):
        return None
    return f"model type {show_value(str(config.model_type))} is that of {_kind_of(config)}; {ONLY}"


def auto_class(config: Any) -> str:
    """The name of transformers' auto class that builds a config's model: of causal language models, or of composite ones.

    A model type may have both. ``architectures`` then names one; without it, a causal class that is a part of what the config describes is
    not the whole.
    """
    causal, whole = _of_table("CAUSAL_LM", config), _of_table("MULTIMODAL_LM", config)
    name = _first_class(getattr(config, "architectures", None))
    is_whole = whole and (not causal or name in [cls.__name__ for cls in whole] or (name is None and _is_part(causal[0], config)))
    return "AutoModelForMultimodalLM" if is_whole else "AutoModelForCausalLM"


def auto_class_named(architectures: Any) -> str:
    """The auto class that has the class which a config.json names; that of causal language models where it does not say."""
    name = _first_class(architectures)
    known = name is not None and not _CAUSAL.search(name) and name not in _table("CAUSAL_LM").values()
    return "AutoModelForMultimodalLM" if known and name in _table("MULTIMODAL_LM").values() else "AutoModelForCausalLM"


def is_composite(config: Any) -> bool:
    """Whether a config describes a model of several parts, such as a language model and a tower for images."""
    return bool(getattr(config, "sub_configs", None))


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model: the config itself, or one of several in it."""
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, ValueError):  # own code may have no such method; a config may describe several models of text
        return config


def max_positions(config: Any) -> int | None:
    """The longest sequence that the language model has positions for; None where its config does not say."""
    config = text_config(config)
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _is_part(cls: type, config: Any) -> bool:
    """Whether a class is that of one of several parts that a config describes."""
    return getattr(cls, "config_class", None) in (getattr(config, "sub_configs", None) or {}).values()


def require_causal(path: Path, raw: Mapping[str, Any], config: Any, *, trust_remote_code: bool) -> None:
    """Raise UnsupportedModelError if a config.json is not that of a model with a causal language model that transformers builds.

    path, raw: the file and its content. config: what transformers made of it.
    """
    own = raw.get("auto_map") if trust_remote_code else None
    code = {key: _class_name(value) for key, value in own.items()} if isinstance(own, Mapping) else {}
    name = _first_class(raw.get("architectures"))
    known = _classes(config)
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
    elif name is not None and name not in [cls.__name__ for cls in known]:
        _refuse_other(path, name, known[0].__name__, type(config))
    elif getattr(config, "is_encoder_decoder", False) and not _of_table("CAUSAL_LM", config):
        raise UnsupportedModelError(f"{path}: {known[0].__name__} is an encoder-decoder model; {ONLY}: give MODEL one of those")


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
    if _CAUSAL.search(name) or kind in _COMPOSITE:
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


#: Kinds that hold a causal language model among other parts, and kinds that might.
_COMPOSITE = ("a vision-language model", "a multimodal model")
_LATER = ("a speech model",)
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
    generating = [
        (table, kind)
        for table, kind in _KINDS
        if kind in (*_COMPOSITE, *_LATER, _ENCODER, _AUDIO, _IMAGE) or table.startswith("SEQ_TO_SEQ")
    ]
    kind = next((kind for table, kind in generating if getattr(config, "model_type", None) in _table(table)), "another kind of model")
    return "a model of images and text" if kind == _IMAGE and hasattr(config, "vision_config") else kind


def _table(name: str) -> Mapping[str, Any]:
    """One of transformers' tables: model type → name of its class, or names."""
    from transformers.models.auto import modeling_auto

    found: Mapping[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES" if name else "MODEL_MAPPING_NAMES", {})
    return found


def _classes(config: Any) -> tuple[type, ...]:
    """transformers' classes with a causal language model for a config, the composite ones last; none if it has none."""
    return tuple(dict.fromkeys((*_of_table("CAUSAL_LM", config), *_of_table("MULTIMODAL_LM", config))))


def _of_table(name: str, config: Any) -> tuple[type, ...]:
    """The classes for a config in one of transformers' tables; none if it has none."""
    from transformers.models.auto import modeling_auto

    table = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING")
    if type(config) not in table:
        return ()
    found = table[type(config)]
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def _first_class(architectures: Any) -> str | None:
    """The class that a config names, if it names one."""
    return next((name for name in architectures if isinstance(name, str)), None) if isinstance(architectures, list) else None


def _class_name(reference: Any) -> str:
    """The name of a class in an entry of auto_map, such as "module.Class" or "owner/name--module.Class"; entries may be lists."""
    if isinstance(reference, (tuple, list)):
        reference = next((r for r in reference if r), "")
    return str(reference).rpartition(".")[2]


def broken_code(folder: Path, raw: Mapping[str, Any], error: Exception) -> str:
    """The message for a checkpoint whose own code cannot be loaded."""
    from transformers import CONFIG_MAPPING

    lost = re.search(r"file named (\S+\.py)", str(error))
    package = re.search(r"pip install [\w. -]+", str(error))
    reason = f"{lost[1]} is missing" if lost else error_line(error)
    remedy = f"run {package[0].strip()}" if package else f"fetch {lost[1]} into it" if lost else "fetch its .py files again"
    known = raw["model_type"] in CONFIG_MAPPING
    without = f", or leave out --trust-remote-code: transformers has its own code for {show_value(raw['model_type'])}" if known else ""
    return f"{folder}: the checkpoint's own code cannot be loaded ({reason}); {remedy}{without}"


def error_line(error: Exception) -> str:
    """What an exception of transformers says, in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300] if text.isprintable() else show_value(text)}"
