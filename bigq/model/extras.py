"""The tensors of a checkpoint that the model has no place for: which are copied to the output, and which are left out.

No table of families: what is expected follows from the model's class in transformers, from its config, and from the names themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bigq.io.index import TensorInfo
from bigq.io.json_file import show_name
from bigq.model import skeleton

#: A part of a name that belongs to layers for multi-token prediction, which are stored beside the decoder blocks: mtp, mtp_block, nextn.
_PREDICTOR = re.compile(r"(^|\.)(mtp|nextn)(_\w+)?\.")
#: Settings that count such layers: num_nextn_predict_layers, num_mtp_modules, mtp_num_hidden_layers.
_PREDICTOR_COUNT = re.compile(r"(?=.*(mtp|nextn))(?=.*(layers|modules|predict|depth))")
#: Sub-configs that describe no other part of the model than the language model.
_NO_PARTS = ("text_config", "llm_config", "language_config", "quantization_config", "generation_config")
#: Settings of which a sub-config has one if it describes a part with weights.
_PART_SETTINGS = frozenset({"hidden_size", "embed_dim", "d_model", "num_hidden_layers", "depth"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """The tensors of a checkpoint that the model has no place for, by name in the checkpoint's order.

    carried: loaders of the source expect these, so the output keeps them unquantized: MTP layers, vision towers, known buffers.
    dropped: no loader would take these, and strict ones fail on them: layers beyond the last, a stray classifier head.
    """

    carried: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def warnings(self) -> tuple[str, ...]:
        """At most one sentence."""
        count, both = len(self.carried) + len(self.dropped), bool(self.carried and self.dropped)
        if not count:
            return ()
        example = show_name((self.dropped or self.carried)[0])
        parts = [f"left out of the output: {len(self.dropped) if both else 'all'}"] if self.dropped else []
        kept = f", such as {show_name(self.carried[0])}" if both else ""
        parts += [f"copied unquantized, since loaders expect them: {len(self.carried) if both else 'all'}{kept}"] if self.carried else []
        these = f"tensor {example}" if count == 1 else f"{count} tensors of the checkpoint, such as {example}"
        return (f"the model of config.json has no place for {these}: {'; '.join(parts)}",)


def find_extras(model: nn.Module, config: Any, blocks_path: str, tensors: Mapping[str, TensorInfo], placed: Mapping[str, str]) -> Extras:
    """The tensors that a model has no place for. config: of transformers. placed: as ``skeleton.map_names`` finds it."""
    left = [name for name in tensors if name not in placed]
    if not left:
        return Extras()
    settings = config.to_dict()
    renamed = skeleton.unplaced_names(model, left)
    blocks = _Blocks.of(model, blocks_path)
    predictors = _predictor_layers(blocks, settings, tensors, renamed)
    roots = _roots(blocks, placed) if _has_other_parts(settings) else None

    def is_carried(name: str) -> bool:
        target, ignored = renamed[name]
        layer, _ = blocks.layer(target)
        if layer >= blocks.count:
            return layer in predictors
        return ignored or _PREDICTOR.search(target) is not None or (roots is not None and _is_other_part(target, blocks, roots))

    carried = {name for name in left if is_carried(name)}
    return Extras(carried=tuple(n for n in left if n in carried), dropped=tuple(n for n in left if n not in carried))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """The decoder blocks. base: prefix of the base model's names; path: of the blocks in it. inside: names of a block's own tensors."""

    base: str
    path: str
    count: int
    inside: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, blocks_path: str) -> _Blocks:
        blocks, base = model.get_submodule(blocks_path), f"{getattr(model, 'base_model_prefix', '')}."
        assert isinstance(blocks, nn.ModuleList)
        inside = frozenset(name.partition(".")[2] for name in blocks.state_dict())
        return cls(base=base, path=blocks_path.removeprefix(base), count=len(blocks), inside=inside)

    def layer(self, name: str) -> tuple[int, str]:
        """The number of the layer that a tensor belongs to, and the rest of its name; -1 for tensors that are in no layer."""
        match = re.match(rf"{re.escape(self.path)}\.(\d{{1,6}})\.(.+)", name.removeprefix(self.base))
        return (-1, "") if match is None else (int(match[1]), match[2])


def _predictor_layers(
    blocks: _Blocks, settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], renamed: Mapping[str, tuple[str, bool]]
) -> frozenset[int]:
    """Numbers of the layers behind the last block that predict further tokens, as DeepSeek and GLM store them.

    Such a layer holds a matrix that no block has, such as the projection of two hidden states; a decoder layer that a lowered
    num_hidden_layers left over does not. It is one of as many as the config announces, or one that transformers expects in this class.
    """
    announced = max((v for k, v in _settings(settings) if _PREDICTOR_COUNT.search(k) and type(v) is int), default=0)
    found = set()
    for name, (target, ignored) in renamed.items():
        layer, own = blocks.layer(target)
        expected = ignored or layer < blocks.count + announced
        if layer >= blocks.count and expected and own not in blocks.inside and len(tensors[name].shape) == 2:
            found.add(layer)
    return frozenset(found)


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Every setting of a config and of the configs in it."""
    for name, inner in value.items():
        yield str(name), inner
        if isinstance(inner, dict):
            yield from _settings(inner)


def _has_other_parts(settings: Mapping[str, Any]) -> bool:
    """Whether a config describes parts beside the language model, such as a vision tower (``vision_config``)."""
    return any(
        str(name).endswith("_config") and name not in _NO_PARTS and isinstance(value, dict) and not _PART_SETTINGS.isdisjoint(value)
        for name, value in settings.items()
    )


def _roots(blocks: _Blocks, placed: Mapping[str, str]) -> frozenset[str]:
    """The modules at the top of the model and of its base model. Other parts of a composite model stand beside them."""
    return frozenset(target.removeprefix(blocks.base).partition(".")[0] for target in placed.values())


def _is_other_part(name: str, blocks: _Blocks, roots: frozenset[str]) -> bool:
    """Whether a tensor belongs to a part beside the model's own modules. A head is no part: it is one Linear, such as ``score.weight``."""
    inner = name.removeprefix(blocks.base)
    return inner.partition(".")[0] not in roots and inner.count(".") > 1
