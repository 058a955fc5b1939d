"""A complete model on one device, as transformers runs it.

Quantized Linears stay packed on a GPU. On a CPU they are dequantized while they are loaded, if they fit: a weight of 4096 × 4096 takes
2.6 to 2.9 s to dequantize and 0.014 to 0.023 s to multiply with one vector (4 bits; fp32 and bf16, on two busy cores).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bigq.errors import ResourceError
from bigq.infer.packed_linear import PackedLinear
from bigq.io.hub import resolve_model
from bigq.io.reader import read_tensor
from bigq.machine.budget import gpu_budget, host_budget
from bigq.machine.device import choose_device
from bigq.machine.memory import hold_heap, return_freed_memory
from bigq.model import skeleton
from bigq.model.pager import Pager
from bigq.progress.sizes import show_size


def load_model(
    model: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False, packed: bool | None = None
) -> nn.Module:
    """A model, original or quantized, as a transformers model in evaluation mode.

    packed: whether quantized Linears stay packed; defaults to True on a GPU, and on a CPU only if the dequantized weights do not fit.
    Raises ResourceError if the model does not fit the device, otherwise as ``bigq.evaluate``.
    """
    hold_heap()
    skeleton.silence_transformers()
    target = choose_device(device)
    pager = Pager(resolve_model(str(model)), device=target, dtype=dtype, trust_remote_code=trust_remote_code)
    return load_resident(pager, packed=packed)


def load_resident(
    pager: Pager, *, tokens: int = 0, packed: bool | None = None, say: Callable[[str], None] = lambda line: None
) -> nn.Module:
    """The complete model of a pager on its device. Raises as ``load_model``.

    tokens: leave room for a KV cache of this many tokens. say: receives a warning if the model will be slow.
    """
    if choose_packed(pager, tokens, packed):
        if pager.device.type == "cpu":
            say("warning: the weights stay packed, because they do not fit otherwise; on a CPU this is about a hundred times slower")
        for name in pager.packed:
            _keep_packed(pager, name)
    if _quantizes_inputs(pager) and any(any(bank.packed()) for bank in pager.banks.values()):
        say("note: the inputs of experts are not rounded here, as readers of this format and bigq eval do")
    _fill(pager)
    return_freed_memory()
    return pager.model


def choose_packed(pager: Pager, tokens: int, packed: bool | None = None) -> bool:
    """Whether quantized Linears stay packed: ``packed``, or if it is None, depending on the free memory.

    Raises ResourceError if the model does not fit either way.
    """
    on_gpu = pager.device.type == "cuda"
    there = gpu_budget(pager.device) if on_gpu else host_budget(0)
    ways = (False,) if _quantizes_inputs(pager) else (on_gpu, True) if packed is None else (packed,)
    for way in ways:
        if bytes_needed(pager, tokens, packed=way) <= there:
            return way and bool(pager.packed)
    least = bytes_needed(pager, tokens, packed=ways[-1])
    raise ResourceError(
        f"{pager.folder}: needs {show_size(least)} to generate, but {pager.device} has {show_size(there)} free; "
        + ("use --device cpu, or " if on_gpu else "")
        + "measure it with bigq eval, which loads one block at a time"
    )


def _quantizes_inputs(pager: Pager) -> bool:
    """Whether packed Linears quantize their inputs, for which ``PackedLinear`` has no way."""
    return pager.schemes is not None and bool(pager.schemes.format.quantized_inputs)


def bytes_needed(pager: Pager, tokens: int, *, packed: bool) -> int:
    """Bytes that the model needs, with a KV cache of ``tokens`` (as if without grouped queries) and buffers for dequantizing."""
    weights = largest = 0
    seen = set()
    for name, param in pager.model.named_parameters(remove_duplicate=False):
        if name in pager.packed:
            dense = param.numel() * pager.dtype_of(name).itemsize
            largest = max(largest, dense)
            stored = sum(info.nbytes for info in pager.packed_source(name).tensors)
            weights += stored if packed else dense
        elif id(param) not in seen:
            seen.add(id(param))
            weights += param.numel() * param.dtype.itemsize
    hidden = pager.embedding.embedding_dim
    cache = 2 * len(pager.blocks) * hidden * tokens * pager.dtype.itemsize
    # Without Triton, dequantizing also unpacks codes, a byte each.
    return weights + cache + (2 * largest if pager.packed else 0)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _keep_packed(pager: Pager, name: str) -> None:
    """Replace the Linear whose weight is ``name`` by a PackedLinear."""
    path = name.removesuffix(".weight")
    assert pager.schemes is not None
    scheme = pager.schemes.scheme(path)
    bias = pager.model.get_submodule(path)._parameters.get("bias")
    words, scales, zeros = (t.to(pager.device).contiguous() for t in pager.stored(name))
    half = scales.to(torch.float16)
    scales = half if torch.equal(half.to(scales.dtype), scales) else scales
    parent, _, leaf = path.rpartition(".")
    setattr(pager.model.get_submodule(parent), leaf, PackedLinear(words, scales, zeros, scheme.bits, bias, scheme.points).eval())


def _fill(pager: Pager) -> None:
    """Read all remaining parameters and buffers; ties are kept."""
    model = pager.model
    made: dict[int, nn.Parameter] = {}
    for name, param in list(model.named_parameters(remove_duplicate=False)):
        module, leaf = _owner(model, name)
        if id(param) not in made:
            made[id(param)] = nn.Parameter(pager.value_of(name), requires_grad=False)
            pager.load_input_number(name)
        module._parameters[leaf] = made[id(param)]
    for name, _ in list(model.named_buffers()):
        if name in pager.sources:
            module, leaf = _owner(model, name)
            module._buffers[leaf] = read_tensor(pager.sources[name], keep_cached=False).to(pager.device)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
