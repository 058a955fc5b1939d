"""A whole model on one device, as transformers runs it: to try out what a job made, where it fits.

Quantized Linears stay packed on a GPU. On a CPU they are dequantized as they are loaded if there is room: a weight of 4096 × 4096 takes
2.6 to 2.9 s to form and 0.014 to 0.023 s to multiply one vector with (4 bits; fp32 and bf16, on two busy cores).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

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
    """A model, original or quantized by bigq, as a transformers model in evaluation mode.

    packed: whether quantized Linears stay packed; None means yes on a GPU, and on a CPU only where there is no room for the others.
    Raises ResourceError where it does not fit the device, and otherwise as ``bigq.evaluate``.
    """
    hold_heap()
    skeleton.silence_transformers()
    target = choose_device(device)
    pager = Pager(resolve_model(str(model)), device=target, dtype=dtype, trust_remote_code=trust_remote_code)
    return load_whole(pager, packed=packed)


def load_whole(pager: Pager, *, tokens: int = 0, packed: bool | None = None, say: Callable[[str], None] = lambda line: None) -> nn.Module:
    """All of a pager's model on its device, with room left for a cache of so many tokens. Raises as ``load_model``.

    say: is told where the model will be slow.
    """
    if choose_packed(pager, tokens, packed):
        if pager.device.type == "cpu":
            say(
                "warning: the weights stay packed, as there is no room for them otherwise; on a CPU that takes about a hundred times longer"
            )
        for name in pager.packed:
            _keep_packed(pager, name)
    _fill(pager)
    return_freed_memory()
    return pager.model


def choose_packed(pager: Pager, tokens: int, packed: bool | None = None) -> bool:
    """Whether quantized Linears stay packed; ``packed`` decides where it is not None. Raises ResourceError where nothing fits."""
    on_gpu = pager.device.type == "cuda"
    there = gpu_budget(pager.device) if on_gpu else host_budget(0)
    ways = (on_gpu, True) if packed is None else (packed,)
    for way in ways:
        if needed(pager, tokens, packed=way) <= there:
            return way and bool(pager.packed)
    least = needed(pager, tokens, packed=ways[-1])
    raise ResourceError(
        f"{pager.folder}: needs {show_size(least)} to run as a whole, but {pager.device} has {show_size(there)} free; "
        + ("use --device cpu, or " if on_gpu else "")
        + "judge it with bigq eval, which takes one block at a time"
    )


def needed(pager: Pager, tokens: int, *, packed: bool) -> int:
    """Bytes that the model takes, with a cache of so many tokens (as if without grouped queries) and what forming weights takes."""
    weights = largest = 0
    seen = set()
    for name, param in pager.model.named_parameters(remove_duplicate=False):
        if name in pager.packed:
            dense = param.numel() * pager.dtype.itemsize
            largest = max(largest, dense)
            stored = sum(info.nbytes for info in pager.packed_source(name).tensors)
            weights += stored if packed else dense
        elif id(param) not in seen:
            seen.add(id(param))
            weights += param.numel() * param.dtype.itemsize
    hidden = pager.embedding.embedding_dim
    cache = 2 * len(pager.blocks) * hidden * tokens * pager.dtype.itemsize
    # The plain version of dequantizing also unpacks codes, a byte each.
    return weights + cache + (2 * largest if pager.packed else 0)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _keep_packed(pager: Pager, name: str) -> None:
    """Put a PackedLinear in the place of the Linear that has the weight ``name``."""
    path = name.removesuffix(".weight")
    assert pager.schemes is not None
    bits = pager.schemes.scheme(path).bits
    bias = pager.model.get_submodule(path)._parameters.get("bias")
    words, scales, zeros = (t.to(pager.device).contiguous() for t in pager.stored(name))
    half = scales.to(torch.float16)
    scales = half if torch.equal(half.to(scales.dtype), scales) else scales
    parent, _, leaf = path.rpartition(".")
    setattr(pager.model.get_submodule(parent), leaf, PackedLinear(words, scales, zeros, bits, bias).eval())


def _fill(pager: Pager) -> None:
    """Read every parameter and buffer that is still to come; those that are tied stay tied."""
    model = pager.model
    made: dict[int, nn.Parameter] = {}
    for name, param in list(model.named_parameters(remove_duplicate=False)):
        module, leaf = _owner(model, name)
        if id(param) not in made:
            made[id(param)] = nn.Parameter(_value(pager, name, module), requires_grad=False)
        module._parameters[leaf] = made[id(param)]
    for name, _ in list(model.named_buffers()):
        if name in pager.sources:
            module, leaf = _owner(model, name)
            module._buffers[leaf] = read_tensor(pager.sources[name], keep_cached=False).to(pager.device)


def _value(pager: Pager, name: str, module: nn.Module) -> Tensor:
    if name not in pager.packed:
        return read_tensor(pager.sources[name], keep_cached=False).to(device=pager.device, dtype=pager.dtype_of(name))
    weight = pager.dequantized(name)
    return weight.T.contiguous() if skeleton.is_transposed(module) else weight


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
