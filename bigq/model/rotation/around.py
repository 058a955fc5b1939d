"""Roles of a whole model: the experiments on its blocks, and on what comes before and after them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedModelError
from bigq.model.architecture import is_composite, text_config
from bigq.model.description import ModelDescription, replace_forward
from bigq.model.forward.block_call import BlockCall, OutputForm
from bigq.model.forward.capture import StopForward, forward_errors, replace_forwards
from bigq.model.rotation.banks import ADVICE
from bigq.model.rotation.calls import StandInModel
from bigq.model.rotation.find import CLOSE, Call, factor_of, find_roles
from bigq.model.rotation.matrices import Rotation
from bigq.model.rotation.proof import prove
from bigq.model.rotation.roles import STREAM_SEED, Roles

#: Tokens of the row that experiments run on.
TOKENS = 8


@dataclass(frozen=True, slots=True)
class ModelRoles:
    """Roles in every block, and around them: there the last norm and the head. difference: the largest that a proof has found."""

    width: int
    blocks: tuple[Roles, ...]
    around: Roles
    difference: float


def model_roles(described: ModelDescription) -> ModelRoles:
    """Find and prove the roles of a model, without any of its weights. Raises UnsupportedModelError, naming what cannot be rotated."""
    model = described.model
    if is_composite(described.config):
        raise UnsupportedModelError(f"--rotate: {type(model).__name__} takes images or audio too, which write to its stream; {ADVICE}")
    if not isinstance(described.head, nn.Linear):
        raise UnsupportedModelError(f"--rotate: the output head is a {type(described.head).__name__}, no Linear; {ADVICE}")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), forward_errors():
            return _Experiments(described).run()
    except UnsupportedModelError as error:
        if str(error).startswith("--rotate"):
            raise
        raise UnsupportedModelError(f"--rotate: the model does not run on stand-ins of its weights ({error}); {ADVICE}") from error


class _Experiments:
    def __init__(self, described: ModelDescription) -> None:
        self._of, self._model = described, described.model
        self._whole = StandInModel(described, TOKENS)
        self._stream = Rotation(self._whole.width, STREAM_SEED)

    def run(self) -> ModelRoles:
        whole = self._whole
        hidden, first = whole.entering(whole.rows)
        if hidden.shape != whole.rows.shape:
            raise UnsupportedModelError(
                f"--rotate: the residual stream is {list(hidden.shape[2:])} numbers a token, and the embedding has {whole.width}; {ADVICE}"
            )
        turned, _ = whole.entering(self._stream.turn(whole.rows))
        if not factor_of(hidden, whole.rows) or not _same(turned, self._stream.turn(hidden)):
            raise UnsupportedModelError(
                f"--rotate: what enters the first block is not what the embedding returns, such as a sum with position embeddings; {ADVICE}"
            )
        form = whole.form(hidden, first)
        found: dict[Any, Roles] = {}
        roles: list[Roles] = []
        worst = 0.0
        for i, (block, call) in enumerate(zip(self._of.blocks, self._calls(form), strict=True)):
            bare = whole.bare(i)
            run = _block_run(block, call)
            key = (type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))
            if key not in found:
                found[key] = find_roles(bare, run, hidden, head_sizes(self._of.config))
            worst = max(worst, prove(bare, run, hidden, found[key]))
            roles.append(found[key])
        run = self._logits(form)
        around = find_roles(whole.rest, run, hidden, (), ends=True)
        if tuple(around.readers) != (self._of.head_name,):
            raise UnsupportedModelError(
                f"--rotate: {self._of.head_name}, the output head, is behind no norm of the residual stream; {ADVICE}"
            )
        worst = max(worst, prove(whole.rest, run, hidden, around, stream_out=False))
        return ModelRoles(whole.width, tuple(roles), around, worst)

    def _calls(self, form: OutputForm) -> list[BlockCall]:
        """The calls of all blocks, which must not depend on the stream."""
        rows = self._whole.rows
        found = [self._whole.calls(given, form) for given in (rows, self._stream.turn(rows))]
        for i, (one, other) in enumerate(zip(*found, strict=True)):
            if one.row_values or any(
                a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True)
            ):
                raise UnsupportedModelError(
                    f"--rotate: {self._of.blocks_path}.{i} takes more from the embedding, or from other blocks, than the residual stream; "
                    f"{ADVICE}"
                )
        return found[0]

    def _logits(self, form: OutputForm) -> Call:
        blocks = self._of.blocks

        def run(hidden: Tensor) -> Tensor:
            seen: list[Tensor] = []

            def at_head(x: Tensor) -> Tensor:
                seen.append(head(x))
                raise StopForward

            head = self._of.head.forward  # the stand-in
            with (
                self._whole.embedded(self._whole.rows),
                replace_forwards([*blocks], lambda i: lambda *args, **kwargs: form.wrap(hidden.clone(), i)),
                replace_forward(self._of.head, at_head),
                contextlib.suppress(StopForward),
            ):
                self._model(input_ids=self._whole.ids, use_cache=False)
            return seen[0]

        return run


def _block_run(block: nn.Module, call: BlockCall) -> Call:
    return lambda hidden: call.run(block, hidden.clone())


def head_sizes(config: Any) -> tuple[int, ...]:
    """The sizes that heads of values may have, by the config."""
    text = text_config(config)
    heads = getattr(text, "num_attention_heads", None) or 0
    width = getattr(text, "hidden_size", None) or 0
    given = [getattr(text, name, None) for name in ("v_head_dim", "head_dim")] + [width // heads if heads else None]
    return tuple(dict.fromkeys(size for size in given if isinstance(size, int) and size > 1))


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= CLOSE * b.norm())
