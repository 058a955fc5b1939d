"""Running a model on the meta device, and counting the memory and the operations that it would take."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigq.model.experts.cut import without_banks
from bigq.model.forward.block_call import BlockCall, OutputForm, fill_from_first
from bigq.model.forward.capture import first_input, record_calls


@dataclass(slots=True)
class MetaRun:
    """A batch that enters the blocks.

    hidden [rows, seqlen, width]; calls: the call of every block; of_tokens: their arguments that are computed from tokens. handed_on: bytes
    of what block 0 hands on besides hidden states. around: bytes of the forward before and between the blocks, if it computes arguments.
    """

    hidden: Tensor
    calls: list[BlockCall]
    of_tokens: list[list[Tensor]]
    handed_on: int
    around: int

    @classmethod
    def of(
        cls, model: nn.Module, blocks: nn.ModuleList, form: OutputForm, rows: int, seqlen: int, of_tokens: Sequence[Sequence[int]] = ()
    ) -> MetaRun:
        """of_tokens: which arguments of each block are computed from tokens."""
        ids = torch.zeros(rows, seqlen, dtype=torch.long, device="meta")
        hidden, _ = first_input(model, blocks, ids)
        # Whatever looks at parameters uses them, for ``OnUse``; so this does only where memory is to be counted.
        live = Live([*model.parameters(), *model.buffers(), ids]) if any(of_tokens) else None
        with live or contextlib.nullcontext():
            calls = record_calls(model, blocks, ids, form)
        made = [[leaf for place, leaf in enumerate(c.leaves()) if place in at] for c, at in zip(calls, of_tokens, strict=False)]
        extras: list[Tensor] = []

        def first(call: BlockCall) -> tuple[Tensor, ...]:
            with without_banks(blocks[0]):
                outputs = call.outputs(blocks[0], hidden)
            extras.extend(outputs[1:])
            return outputs

        calls = fill_from_first(calls, first)
        return cls(hidden, calls, made, sum_bytes(extras), live.peak if live is not None else 0)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the blocks' arguments, except the hidden states."""
        for call in self.calls:
            yield from call.tensors()

    def call_bytes(self) -> int:
        """Bytes of the arguments that are the same for all rows."""
        apart = {id(leaf) for leaves in self.of_tokens for leaf in leaves}
        kept = [t.untyped_storage() for t in self.tensors() if id(t) not in apart]
        return sum({storage._cdata: storage.nbytes() for storage in kept}.values())

    def call_signature(self, i: int) -> tuple[Any, ...]:
        call = self.calls[i]
        return tuple(leaf.shape if isinstance(leaf, Tensor) else None for leaf in call.leaves())


def sum_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of some tensors, whatever else their memory holds."""
    return sum(t.numel() * t.dtype.itemsize for t in tensors)


class Live(TorchDispatchMode):
    """Counts the bytes of live tensors, and the operations of batched products (attention).

    known: tensors that do not count.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self.products = 0.0
        self._known = [t.untyped_storage() for t in known]
        self._alive: dict[int, Any] = {storage._cdata: storage for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            a, b = args[-2:]
            self.products += 2.0 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return output

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *, masked: bool) -> None:
        """Count an attention that holds no matrix of scores. It computes half of them if it is causal, all if a mask says which count."""
        scores = query.numel() // query.shape[-1] * key.shape[-2]
        self.products += (1 + masked) * scores * (query.shape[-1] + value.shape[-1])

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def gone(_: Any) -> None:
            del self._alive[key]
            self.bytes -= size

        self._alive[key] = weakref.ref(storage, gone)


class WholeRows(TorchFunctionMode):
    """Lets a model run on meta: fused attention needs no memory for scores, and transformers' checks of ids and masks get the answers for
    calibration rows, which are whole rows without padding or packing. fused: see ``Outline``."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self._fused = fused

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            masked = kwargs.get("attn_mask", args[3] if len(args) > 3 else None) is not None
            if not self._fused and query.shape[-1] != value.shape[-1]:
                with sdpa_kernel(SDPBackend.MATH):
                    return func(*args, **kwargs)
            for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
                if isinstance(mode, Live):
                    mode.attention(query, key, value, masked=masked)
            output = query.new_empty(*query.shape[:-1], value.shape[-1])
            if torch.is_grad_enabled():  # as marks of what the output depends on
                output = sum((t.sum() for t in (query, key, value) if t.requires_grad), start=output)
            return output
        return func(*args, **kwargs)
