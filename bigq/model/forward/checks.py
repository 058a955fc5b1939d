"""Checks by running a model that it may be run block by block: what streaming takes for granted about its forward is tried out.

``capture`` sees how often and in which order blocks are called, and what passes between them. Here are the checks of the values: blocks
and the modules around them keep no state, and the output head sees nothing of the blocks but the last one's output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bigq.errors import UnsupportedModelError
from bigq.model.blocks import block_linears, is_product
from bigq.model.experts.cut import without_banks
from bigq.model.forward.arguments import probe_calls
from bigq.model.forward.block_call import BlockCall, HandedOn, OfTokens, OutputForm, extras_of, fill_from_first, hidden_of
from bigq.model.forward.capture import first_input, forward_errors, output_head, record_calls, replace_forwards, split_call
from bigq.model.forward.compare import agree
from bigq.model.forward.quantized_inputs import QuantizedInputs
from bigq.model.skeleton import linear_weight

#: The order in which probes run to see that the first gives the same again: at once, and after another one.
_TWICE = (0, 0, 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCheck:
    """Checks loaded blocks one at a time, on the inputs of block 0 for three short batches of two rows.

    hidden: [3, 2, T, d]; the third batch has its first row from the first batch, and its second row from the second. calls: of each block
    for each batch; what blocks hand on besides hidden states is that of block 0. of_tokens: see ``ProbedCalls``.
    form: how block 0 returns its hidden states.
    """

    hidden: Tensor
    calls: tuple[list[BlockCall], ...]
    of_tokens: tuple[tuple[int, ...], ...]
    form: OutputForm
    path: str

    def run(self, i: int, block: nn.Module) -> None:
        """Check block i: its outputs have the form, shape and dtype of its inputs, and depend on its inputs alone.

        Raises UnsupportedModelError.
        """
        name = f"{self.path}.{i}"
        with _Linears(name, block):
            one = self._outputs(i, block, 0)
        again, _, later = (self._outputs(i, block, k) for k in _TWICE[1:])
        if not (_all_agree(one, again) and _all_agree(one, later)):
            raise UnsupportedModelError(
                f"{name}: the same input gives another output the second time, so the block keeps state between calls (such as a cache or "
                "a counter), or draws random numbers (such as dropout); this architecture is not supported"
            )
        if not _all_agree((x[0] for x in one), (x[0] for x in self._outputs(i, block, 2))):
            raise UnsupportedModelError(
                f"{name}: the output of a row depends on the other rows of its batch; this architecture is not supported"
            )

    def require_causal(self, i: int, block: nn.Module) -> None:
        """Raise UnsupportedModelError if block i, which is loaded, computes a token's output from later tokens too."""
        changed = self.hidden[0].clone()
        changed[:, -1] = self.hidden[1][:, -1]
        calls = self.calls[0][i], self._with_last_token(i)
        with without_banks(block):
            one, other = (call.run(block, x) for call, x in zip(calls, (self.hidden[0].clone(), changed), strict=True))
        if not agree(one[:, :-1], other[:, :-1]):
            raise UnsupportedModelError(
                f"{self.path}.{i}: sees later tokens of a row, so the model would be given the tokens that it should predict, and "
                "perplexity means nothing"
            )

    def _with_last_token(self, i: int) -> BlockCall:
        """The call of block i for the first batch, where arguments that are computed from tokens are those of the second at the end."""
        one, other = (calls[i] for calls in self.calls[:2])
        leaves, rows = other.leaves(), self.hidden.shape[1:3]

        def value(place: int, leaf: Any) -> Any:
            if place not in self.of_tokens[i] or leaf.shape[:2] != rows:
                return leaf
            return torch.cat([leaf[:, :-1], leaves[place][:, -1:]], 1)

        return one.replaced(value) if self.of_tokens[i] else one

    def _outputs(self, i: int, block: nn.Module, k: int) -> tuple[Tensor, ...]:
        """Copies of the hidden states that block i returns for batch k, and of what it hands on besides."""
        name, call, hidden = f"{self.path}.{i}", self.calls[k][i], self.hidden[k].clone()
        with forward_errors("where a block runs by itself"), without_banks(block):
            output = block(hidden, *call.args, **call.kwargs)
        if not OutputForm.fits(output) or OutputForm.of(output) != self.form:
            raise UnsupportedModelError(f"{name}: returns its outputs in another form than block 0; this architecture is not supported")
        result = hidden_of(output)
        if result.shape != hidden.shape or result.dtype != hidden.dtype:
            raise UnsupportedModelError(
                f"{name}: turns hidden states {list(hidden.shape)} of {hidden.dtype} into {list(result.shape)} of {result.dtype}; "
                "blocks that change their shape or dtype are not supported"
            )
        extras = extras_of(output, call.hands_on)
        if any(extra.ndim == 0 or len(extra) != len(hidden) for extra in extras):
            raise UnsupportedModelError(f"{name}: hands on something that has no part for every row; this architecture is not supported")
        if not agree(hidden, self.hidden[k]):
            raise UnsupportedModelError(f"{name}: overwrites its input; this architecture is not supported")
        return tuple(x.clone() for x in (result, *extras))


def _all_agree(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(agree(a, b) for a, b in zip(some, others, strict=True))


class _Linears:
    """Checks while it is open that Linears which return the shape of a product compute x · Wᵀ + b, as the formats' readers will."""

    def __init__(self, name: str, block: nn.Module) -> None:
        self._name, self._linears = name, block_linears(block)
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        self._handles = [module.register_forward_hook(self._check(name)) for name, module in self._linears.items()]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _check(self, name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or isinstance(module, QuantizedInputs) or not is_product(module, args[0], output):
                return  # it stays unquantized, or is quantized already, with its inputs
            weight, bias = linear_weight(module), module.bias
            if "weight" not in module._parameters or not agree(functional.linear(args[0], weight, bias), output):  # type: ignore[arg-type]
                raise UnsupportedModelError(
                    f"{self._name}.{name}: its {type(module).__name__} does not compute x · Wᵀ + b with its own weight, which is what "
                    "quantized Linears do; this architecture is not supported"
                )

        return after


def probe_blocks(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, form: OutputForm, path: str) -> BlockCheck:
    """Check what happens before and after the blocks, for token ids [3, 2, T] that make the hidden states of a ``BlockCheck``.

    Block 0 is loaded. Raises UnsupportedModelError.
    """
    first = blocks[0]
    for i, block in enumerate(blocks):
        if block._forward_hooks or block._forward_pre_hooks:
            raise UnsupportedModelError(f"{path}.{i}: has forward hooks, which would run twice; this architecture is not supported")
    with forward_errors("around its blocks"):
        calls = probe_calls(model, blocks, ids, form)
    one, again, other, later, mixed = (first_input(model, blocks, ids[k])[0] for k in (*_TWICE, 2))
    _require_agreement([one, again, later], mixed, "its first block")
    hidden = torch.stack([one, other, mixed])
    _check_tail(model, blocks, ids, form, hidden[0])
    with forward_errors("where a block runs by itself"), without_banks(first):
        batches = tuple(
            fill_from_first(given, lambda call, x=x: call.outputs(first, x.clone()))  # type: ignore[misc]
            for given, x in zip(calls.batches, hidden, strict=True)
        )
    return BlockCheck(hidden=hidden, calls=batches, of_tokens=calls.of_tokens, form=form, path=path)


def _require_agreement(runs: Sequence[Tensor], mixed: Tensor, where: str) -> None:
    """Compare what arrives somewhere in several runs of one batch, and for a batch with the same first row."""
    if not all(agree(runs[0], run) for run in runs):
        raise UnsupportedModelError(
            f"what reaches {where} differs between two runs on the same tokens: the model keeps state between calls, or draws random "
            "numbers (such as dropout); this architecture is not supported"
        )
    if not agree(runs[0][0], mixed[0]):
        raise UnsupportedModelError(f"what reaches {where} for a row depends on the other rows; this architecture is not supported")


def _check_tail(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, form: OutputForm, hidden: Tensor) -> None:
    """Check that the head's input and the logits depend on nothing but the tokens and the output of the last block.

    hidden: any inputs of block 0 [B, T, d].
    """
    generator = torch.Generator().manual_seed(1)

    def noise() -> Tensor:
        return torch.randn(hidden.shape, generator=generator).to(hidden)

    last, other, between = noise(), noise(), noise()
    probes = (last, other, torch.cat([last[:1], other[1:]]))
    one, again, _, later, mixed = (_tail(model, blocks, ids[k], form, probes[k], {}) for k in (*_TWICE, 2))
    for *runs, alike in zip(one, again, later, mixed, strict=True):
        _require_agreement(runs, alike, "its output head")

    def changed(values: Mapping[int, Tensor]) -> bool:
        return not all(agree(a, b) for a, b in zip(one, _tail(model, blocks, ids[0], form, last, values), strict=True))

    if changed(dict.fromkeys(range(len(blocks) - 1), between)):
        i = next((i for i in range(len(blocks) - 1) if changed({i: between})), None)
        which = "outputs of blocks before the last" if i is None else f"output of block {i}"
        raise UnsupportedModelError(
            f"the {which} is used after the last block, so what reaches the output head is more than the last block's output; "
            "this architecture is not supported"
        )


def _tail(
    model: nn.Module, blocks: nn.ModuleList, ids: Tensor, form: OutputForm, hidden: Tensor, values: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """The input of the output head, and logits made of a part of it, where block i returns ``values[i]``, or else ``hidden``."""
    seen: list[Tensor] = []
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]

    def make(i: int) -> Callable[..., Any]:
        if i == len(blocks):
            return at_head
        return lambda *args, **kwargs: form.wrap(values.get(i, hidden).clone())

    def at_head(x: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(x)
        return x[..., :1].expand(*x.shape[:-1], vocabulary)

    with forward_errors("around its blocks"), replace_forwards([*blocks, output_head(model)], make):
        logits = model(input_ids=ids, use_cache=False).logits
    if len(seen) != 1:
        times = "never calls its output head" if not seen else f"calls its output head {len(seen)} times"
        raise UnsupportedModelError(f"{type(model).__name__}: its forward {times}; this architecture is not supported")
    return seen[0], logits


def check_hidden_paths(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, form: OutputForm) -> tuple[tuple[int, ...], ...]:
    """Check that blocks pass on nothing but their hidden states and extra outputs, for a model on meta. Raises UnsupportedModelError.

    First, no argument of a block comes from other blocks; returned is which come from the embeddings (see ``OfTokens``). Then each block
    runs on hidden states that are the start of a graph of gradients of its own. If its outputs' graphs have another start too, something
    comes by another way from an earlier block, such as an attribute of a shared module.
    """
    extras: dict[HandedOn | OfTokens, Tensor] = {}

    def make(i: int) -> Callable[..., Any]:
        return at_head if i == len(blocks) else lambda *args, **kwargs: at_block(i, *split_call(args, kwargs))

    def at_block(i: int, hidden: Tensor, call: BlockCall) -> Any:
        block, start = blocks[i], hidden.detach().requires_grad_()
        call = dataclasses.replace(call.filled(lambda leaf: extras[leaf]), hands_on=calls[i].hands_on)
        with without_banks(block):
            result, *others = call.outputs(functools.partial(type(block).forward, block), start.clone())
        if any(leaf is not start for output in (result, *others) for leaf in _graph_starts(output)):
            raise UnsupportedModelError(
                f"block {i} receives something from an earlier block by another way than its arguments, such as an attribute of a module; "
                "this architecture is not supported"
            )
        extras.update({HandedOn(i, index): extra.detach() for index, extra in zip(call.hands_on, others, strict=True)})
        return form.wrap(result.detach() if i == len(blocks) - 1 else result, i)

    def at_head(x: Tensor, *_: Any, **__: Any) -> Tensor:
        if x.requires_grad:
            raise UnsupportedModelError(
                "something from the blocks besides the last one's output is used after the last block; this architecture is not supported"
            )
        return x[..., :1].expand(*x.shape[:-1], 1)

    with forward_errors(), torch.enable_grad():
        with _marked_embeddings(model, blocks, ids) as marks:
            calls = record_calls(model, blocks, ids, form, lambda hidden: hidden.detach().requires_grad_().clone())
        of_tokens = tuple(_marked_leaves(i, call, marks) for i, call in enumerate(calls))
    with forward_errors(), torch.enable_grad(), replace_forwards([*blocks, output_head(model)], make):
        model(input_ids=ids, use_cache=False)
    return of_tokens


def _marked_leaves(i: int, call: BlockCall, marks: Sequence[Tensor]) -> tuple[int, ...]:
    """Which arguments of block i are computed from the tensors ``marks``. Raises UnsupportedModelError if others have gradients."""
    found = [(place, leaf) for place, leaf in enumerate(call.leaves()) if isinstance(leaf, Tensor) and leaf.requires_grad]
    starts = [start for _, leaf in found for start in (_graph_starts(leaf) or [leaf])]
    if any(all(start is not mark for mark in marks) for start in starts):
        raise UnsupportedModelError(
            f"the arguments of block {i} depend on what earlier blocks computed; this architecture is not supported"
        )
    return tuple(place for place, _ in found)


def _graph_starts(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor's gradients would go to."""
    found, seen = [], set()
    waiting = [] if tensor.grad_fn is None else [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [each for each, _ in node.next_functions if each is not None]
    return found


@contextlib.contextmanager
def _marked_embeddings(model: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> Iterator[list[Tensor]]:
    """Let everything that is computed from embeddings of token ids [B, T] outside the blocks have gradients.

    Yields the tensors that these would go to. Other embeddings of ids of this shape, such as positions, are among them.
    """
    marks: list[Tensor] = []
    inside = set(blocks.modules())

    def mark(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not args or not isinstance(args[0], Tensor) or args[0].shape != ids.shape:
            return output
        marks.append(output.detach().requires_grad_())
        return marks[-1].clone()

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding) and module not in inside]
    handles = [module.register_forward_hook(mark) for module in embeddings]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()
