"""Roles of a whole model: the experiments on its blocks, and on what comes before and after them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedModelError
from bigq.model.architecture import is_composite, max_positions, text_config
from bigq.model.description import ModelDescription, replace_forward
from bigq.model.forward.block_call import BlockCall, OutputForm
from bigq.model.forward.capture import StopForward, first_input, forward_errors, record_calls, replace_forwards
from bigq.model.rotation.banks import ADVICE
from bigq.model.rotation.find import CLOSE, Call, factor_of, find_roles
from bigq.model.rotation.matrices import Rotation
from bigq.model.rotation.proof import prove
from bigq.model.rotation.roles import STREAM_SEED, Roles
from bigq.model.rotation.standins import Bare, generator_of

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
        self._device = next((b.device for b in described.model.buffers()), torch.device("cpu"))
        self._width = described.embedding.embedding_dim
        length = min(TOKENS, max_positions(described.config) or TOKENS)
        self._ids = torch.arange(length, device=self._device)[None] % described.embedding.num_embeddings
        self._rows = torch.randn(1, length, self._width, generator=generator_of("embedding")).to(self._device)
        self._rest = _bare_rest(described, self._width, self._device)
        self._stream = Rotation(self._width, STREAM_SEED)

    def run(self) -> ModelRoles:
        hidden, first = self._entering(self._rows)
        if hidden.shape != self._rows.shape:
            raise UnsupportedModelError(
                f"--rotate: the residual stream is {list(hidden.shape[2:])} numbers a token, and the embedding has {self._width}; {ADVICE}"
            )
        turned, _ = self._entering(self._stream.turn(self._rows))
        if not factor_of(hidden, self._rows) or not _same(turned, self._stream.turn(hidden)):
            raise UnsupportedModelError(
                f"--rotate: what enters the first block is not what the embedding returns, such as a sum with position embeddings; {ADVICE}"
            )
        form, calls = self._calls(hidden, first)
        found: dict[Any, Roles] = {}
        roles: list[Roles] = []
        worst = 0.0
        for i, (block, call) in enumerate(zip(self._of.blocks, calls, strict=True)):
            bare = Bare(block, f"{self._of.blocks_path}.{i}", self._width, self._device)
            run = _block_run(block, call)
            key = (type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))
            if key not in found:
                found[key] = find_roles(bare, run, hidden, _head_sizes(self._of.config))
            worst = max(worst, prove(bare, run, hidden, found[key]))
            roles.append(found[key])
        run = self._logits(form)
        around = find_roles(self._rest, run, hidden, (), ends=True)
        if tuple(around.readers) != (self._of.head_name,):
            raise UnsupportedModelError(
                f"--rotate: {self._of.head_name}, the output head, is behind no norm of the residual stream; {ADVICE}"
            )
        worst = max(worst, prove(self._rest, run, hidden, around, stream_out=False))
        return ModelRoles(self._width, tuple(roles), around, worst)

    @contextlib.contextmanager
    def _embedded(self, rows: Tensor) -> Iterator[None]:
        with replace_forward(self._of.embedding, lambda *_, **__: rows.clone()):
            yield

    def _entering(self, rows: Tensor) -> tuple[Tensor, BlockCall]:
        """What block 0 receives where the embedding returns ``rows`` [1, T, d]."""
        found: list[tuple[Tensor, BlockCall]] = []

        def run() -> Tensor:
            with self._embedded(rows):
                found.append(first_input(self._model, self._of.blocks, self._ids))
            return found[0][0]

        self._rest.run(run)
        return found[0]

    def _calls(self, hidden: Tensor, first: BlockCall) -> tuple[OutputForm, list[BlockCall]]:
        """The form of a block's output, and the calls of all blocks, which must not depend on the stream."""
        block = self._of.blocks[0]
        bare = Bare(block, f"{self._of.blocks_path}.0", self._width, self._device)
        outputs: list[Any] = []

        def run() -> Tensor:
            outputs.append(block(hidden.clone(), *first.args, **first.kwargs))
            return hidden

        bare.run(run)
        form = OutputForm.of(outputs[0])
        found: list[list[BlockCall]] = []
        for rows in (self._rows, self._stream.turn(self._rows)):

            def record(rows: Tensor = rows) -> Tensor:
                with self._embedded(rows):
                    found.append(record_calls(self._model, self._of.blocks, self._ids, form))
                return rows

            self._rest.run(record)
        for i, (one, other) in enumerate(zip(*found, strict=True)):
            if one.row_values or any(
                a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True)
            ):
                raise UnsupportedModelError(
                    f"--rotate: {self._of.blocks_path}.{i} takes more from the embedding, or from other blocks, than the residual stream; "
                    f"{ADVICE}"
                )
        return form, found[0]

    def _logits(self, form: OutputForm) -> Call:
        blocks = self._of.blocks

        def run(hidden: Tensor) -> Tensor:
            seen: list[Tensor] = []

            def at_head(x: Tensor) -> Tensor:
                seen.append(head(x))
                raise StopForward

            head = self._of.head.forward  # the stand-in
            with (
                self._embedded(self._rows),
                replace_forwards([*blocks], lambda i: lambda *args, **kwargs: form.wrap(hidden.clone(), i)),
                replace_forward(self._of.head, at_head),
                contextlib.suppress(StopForward),
            ):
                self._model(input_ids=self._ids, use_cache=False)
            return seen[0]

        return run


def _block_run(block: nn.Module, call: BlockCall) -> Call:
    return lambda hidden: call.run(block, hidden.clone())


def _bare_rest(described: ModelDescription, width: int, device: torch.device) -> Bare:
    name = type(described.model).__name__
    return Bare(described.model, name, width, device, without=described.blocks_path, embedding=described.embedding)


def _head_sizes(config: Any) -> tuple[int, ...]:
    """The sizes that heads of values may have, by the config."""
    text = text_config(config)
    heads = getattr(text, "num_attention_heads", None) or 0
    width = getattr(text, "hidden_size", None) or 0
    given = [getattr(text, name, None) for name in ("v_head_dim", "head_dim")] + [width // heads if heads else None]
    return tuple(dict.fromkeys(size for size in given if isinstance(size, int) and size > 1))


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= CLOSE * b.norm())
