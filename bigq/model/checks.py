"""Checks by running a model that it may be run block by block: what streaming takes for granted about its forward is tried out.

``capture`` sees how often and in which order blocks are called, and what passes between them. Here are the checks of the values: blocks
and the modules around them keep no state, and the output head sees nothing of the blocks but the last one's output.
"""

from __future__ import annotations

import contextlib
import enum
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from bigq.errors import UnsupportedModelError
from bigq.model.blocks import block_linears
from bigq.model.capture import (
    BlockCall,
    OutputForm,
    first_input,
    forward_errors,
    hidden_of,
    output_head,
    record_calls,
    replace_forwards,
    split_call,
)
from bigq.model.experts.cut import without_banks
from bigq.model.skeleton import linear_weight

#: Differences that count as rounding, relative to the largest value: this, or four times the dtype's epsilon if that is more.
ROUNDING = 1e-4
#: The order in which probes run to see that the first gives the same again: at once, and after another one.
_TWICE = (0, 0, 1, 0)
#: How deep objects among a block's arguments are compared.
_DEPTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCheck:
    """Checks loaded blocks one at a time, on the inputs of block 0 for three short batches of two rows.

    hidden: [3, 2, T, d]; the third batch has its first row from the first batch, and its second row from the second. calls: of each block
    for two rows. form: how block 0 returns its hidden states.
    """

    hidden: Tensor
    calls: list[BlockCall]
    form: OutputForm
    path: str

    def run(self, i: int, block: nn.Module) -> None:
        """Check block i: its outputs have the form, shape and dtype of its inputs, and depend on its inputs alone.

        Raises UnsupportedModelError.
        """
        name, call = f"{self.path}.{i}", self.calls[i]
        with _Linears(name, block):
            one = self._outputs(name, block, call, 0)
        again, _, later = (self._outputs(name, block, call, k) for k in _TWICE[1:])
        if not (agree(one, again) and agree(one, later)):
            raise UnsupportedModelError(
                f"{name}: the same input gives another output the second time, so the block keeps state between calls (such as a cache or "
                "a counter), or draws random numbers (such as dropout); this architecture is not supported"
            )
        if not agree(one[0], self._outputs(name, block, call, 2)[0]):
            raise UnsupportedModelError(
                f"{name}: the output of a row depends on the other rows of its batch; this architecture is not supported"
            )

    def require_causal(self, i: int, block: nn.Module) -> None:
        """Raise UnsupportedModelError if block i, which is loaded, computes a token's output from later tokens too."""
        name, call, changed = f"{self.path}.{i}", self.calls[i], self.hidden[0].clone()
        changed[:, -1] = self.hidden[1][:, -1]
        with without_banks(block):
            one, other = (hidden_of(block(x, *call.args, **call.kwargs)) for x in (self.hidden[0].clone(), changed))
        if not agree(one[:, :-1], other[:, :-1]):
            raise UnsupportedModelError(
                f"{name}: sees later tokens of a row, so the model would be given the tokens that it should predict, and perplexity means "
                "nothing"
            )

    def _outputs(self, name: str, block: nn.Module, call: BlockCall, k: int) -> Tensor:
        hidden = self.hidden[k].clone()
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
        if not agree(hidden, self.hidden[k]):
            raise UnsupportedModelError(f"{name}: overwrites its input; this architecture is not supported")
        return result.clone()


class _Linears:
    """Checks while it is open that the Linears of a block compute x · Wᵀ + b, as the formats' readers will."""

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
            if not args or not isinstance(output, Tensor):
                return
            weight, bias = linear_weight(module), module.bias
            if "weight" not in module._parameters or not agree(functional.linear(args[0], weight, bias), output):  # type: ignore[arg-type]
                raise UnsupportedModelError(
                    f"{self._name}.{name}: its {type(module).__name__} does not compute x · Wᵀ + b with its own weight, which is what "
                    "quantized Linears do; this architecture is not supported"
                )

        return after


def check_block_calls(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, form: OutputForm) -> list[BlockCall]:
    """Check that the blocks' arguments depend only on the shape of the batch. Returns them.

    ids: two different probes of one shape, [2, B, T]. Raises UnsupportedModelError.
    """
    one = record_calls(model, blocks, ids[0], form)
    other = record_calls(model, blocks, ids[1], form, perturb=1.0)
    differing = first_difference(one, other)
    if differing is not None:
        raise UnsupportedModelError(f"the arguments of block {differing} depend on the tokens; this architecture is not supported")
    return one


def first_difference(one: list[BlockCall], other: list[BlockCall]) -> int | None:
    """The first block whose arguments differ between two forwards."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if not _same((a.args, a.kwargs), (b.args, b.kwargs))), None)


def probe_blocks(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, form: OutputForm, path: str) -> BlockCheck:
    """Check what happens before and after the blocks, for token ids [3, 2, T] that make the hidden states of a ``BlockCheck``.

    Raises UnsupportedModelError.
    """
    for i, block in enumerate(blocks):
        if block._forward_hooks or block._forward_pre_hooks:
            raise UnsupportedModelError(f"{path}.{i}: has forward hooks, which would run twice; this architecture is not supported")
    calls = check_block_calls(model, blocks, ids[:2], form)
    one, again, other, later, mixed = (first_input(model, blocks, ids[k])[0] for k in (*_TWICE, 2))
    _require_agreement([one, again, later], mixed, "its first block")
    hidden = torch.stack([one, other, mixed])
    _check_tail(model, blocks, ids, form, hidden[0])
    return BlockCheck(hidden=hidden, calls=calls, form=form, path=path)


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


def check_hidden_paths(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, form: OutputForm) -> None:
    """Check that blocks pass on nothing but their hidden states, for a model on meta. Raises UnsupportedModelError.

    First, no argument of a block but the hidden states comes from the embeddings. Then each block runs on hidden states that are the
    start of a graph of gradients of its own. If its output's graph has another start too, something comes by another way from an earlier
    block, such as an attribute of a shared module.
    """

    def make(i: int) -> Callable[..., Any]:
        return at_head if i == len(blocks) else lambda *args, **kwargs: at_block(i, *split_call(args, kwargs))

    def at_block(i: int, hidden: Tensor, call: BlockCall) -> Any:
        block, start = blocks[i], hidden.detach().requires_grad_()
        with without_banks(block):
            result = hidden_of(type(block).forward(block, start.clone(), *call.args, **call.kwargs))
        if any(leaf is not start for leaf in _graph_starts(result)):
            raise UnsupportedModelError(
                f"block {i} receives something from an earlier block by another way than its arguments, such as an attribute of a module; "
                "this architecture is not supported"
            )
        return form.wrap(result.detach() if i == len(blocks) - 1 else result)

    def at_head(x: Tensor, *_: Any, **__: Any) -> Tensor:
        if x.requires_grad:
            raise UnsupportedModelError(
                "something from the blocks besides the last one's output is used after the last block; this architecture is not supported"
            )
        return x[..., :1].expand(*x.shape[:-1], 1)

    with forward_errors(), torch.enable_grad():
        with _marked_embeddings(model):
            calls = record_calls(model, blocks, ids, form)
        for i, call in enumerate(calls):
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((call.args, dict(call.kwargs)))):
                raise UnsupportedModelError(f"the arguments of block {i} depend on the tokens; this architecture is not supported")
    with forward_errors(), torch.enable_grad(), replace_forwards([*blocks, output_head(model)], make):
        model(input_ids=ids, use_cache=False)


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
def _marked_embeddings(model: nn.Module) -> Iterator[None]:
    """Let everything that is computed from the input embeddings have gradients."""

    def mark(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_().clone()

    handle = model.get_input_embeddings().register_forward_hook(mark)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding; NaN and Inf are equal to each other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or torch.equal(a, b):
        return torch.equal(a, b)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return False
    x, y = a[finite].double(), b[finite].double()
    share = max(ROUNDING, 4 * torch.finfo(a.dtype).eps)
    return not x.numel() or float((x - y).abs().max()) <= share * float(x.abs().max())


def _same(a: Any, b: Any, depth: int = _DEPTH) -> bool:
    """Whether two arguments are equal. Objects are compared by their attributes, functions by their code and what they hold on to."""
    if a is b or depth == 0:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key], depth - 1) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y, depth - 1) for x, y in zip(a, b, strict=True))
    if isinstance(a, (int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)):
        return bool(a == b)
    if isinstance(a, types.FunctionType):
        cells = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (a, b)]
        return a.__code__ is b.__code__ and _same(cells[0], cells[1], depth - 1)
    return isinstance(a, nn.Module) or _same(getattr(a, "__dict__", None), getattr(b, "__dict__", None), depth - 1)
