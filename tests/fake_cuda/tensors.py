"""The tensor of the simulated device: a wrapper around a CPU tensor, on which every operation is done by the CPU."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fake_cuda.copies import copy_between
from fake_cuda.findings import LOCK, problem, waited
from fake_cuda.memory import memory_of, pin, poison
from fake_cuda.streams import DEVICE, MAIN, Stream, current_stream, host_waits

aten = torch.ops.aten

#: Operations whose result the host gets, so that it waits for the device.
RESULT_FOR_HOST = {aten._local_scalar_dense.default, aten.equal.default}
#: Operations whose result's shape depends on values, so that the host waits for the device.
SHAPE_FROM_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default}
#: Operations that take indices on the CPU too.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
#: Operations that read no memory of their tensor arguments.
LIKE = ("empty_like", "new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")


class CudaTensor(Tensor):
    """A tensor on the simulated device. inner: the CPU tensor with its bytes. memory: what happens to them."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        assert type(inner) is Tensor and inner.device.type == "cpu", f"{type(inner)} on {inner.device}"
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner, made.memory = inner, memory_of(inner)
        return made  # type: ignore[no-any-return]

    def __init__(self, inner: Tensor) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({self.inner!r})"

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        with LOCK:
            self.memory.recorded.add(stream.number)

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaTensor:
        if id(self) not in memo:
            memo[id(self)] = CudaTensor(self.inner.clone())
        return memo[id(self)]  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class CudaMode(TorchDispatchMode):
    """Makes tensors on the simulated device where no argument is one. It counts for one thread."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(issubclass(t, CudaTensor) for t in types) and _device(kwargs) == "cuda":
            return dispatch(func, args, kwargs)
        return func(*args, **kwargs)


def run_with_mode(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """``threading.Thread.run`` with the mode on."""

    def run_thread(thread: threading.Thread) -> None:
        with CudaMode():
            run(thread)

    return run_thread


def unwrap(x: Any) -> Any:
    return x.inner if isinstance(x, CudaTensor) else x


def wrap(x: Any) -> Any:
    return CudaTensor(x) if type(x) is Tensor and x.device.type == "cpu" else x


def _device(kwargs: dict[str, Any]) -> str | None:
    device = kwargs.get("device")
    return None if device is None else torch.device(device).type


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation with CUDA tensors among its arguments, or on the device that ``kwargs`` names."""
    if func is aten.copy_.default:
        target, source, asynchronous = args[0], args[1], kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        _copy(target, source, bool(asynchronous))
        return target
    if func is aten._to_copy.default:
        return _to_copy(args[0], kwargs)
    if func is aten.is_pinned.default:
        return False
    assert torch.Tag.inplace_view not in func.tags, f"{func} is not simulated"
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    cuda = [t for t in tensors if isinstance(t, CudaTensor)]
    _require_one_device(func, args, tensors)
    use(func, args, kwargs, cuda)
    _count_waits(func, args, cuda)
    target = _device(kwargs) or "cuda"
    if _device(kwargs) == "cuda":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    before = {id(t.inner): t for t in cuda}
    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if target != "cuda":
        return out
    if "empty" in func.__name__ and isinstance(out, Tensor):
        poison(out)
    return tree_map(lambda x: before.get(id(x)) if id(x) in before else wrap(x), out)


def use(func: Any, args: Any, kwargs: dict[str, Any], cuda: list[CudaTensor]) -> None:
    """The current stream uses the memory of an operation's arguments."""
    if func.is_view or func._schema.name.removeprefix("aten::") in LIKE:
        return
    if current_stream() is not MAIN:
        problem(f"{func} on a side stream")
    with LOCK:
        MAIN.advance()
        written = {id(t.memory) for t in _written(func, args, kwargs)}
        for memory in {id(t.memory): t.memory for t in cuda}.values():
            memory.use_on_main(write=id(memory) in written)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[CudaTensor]:
    for i, name in _written_arguments(func):
        value = kwargs.get(name, args[i] if i < len(args) else None)
        yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, CudaTensor))


@functools.cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    return [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def _require_one_device(func: Any, args: Any, tensors: list[Tensor]) -> None:
    indices = {id(leaf) for leaf in tree_leaves(args[1])} if func in INDEXING else set()
    for t in tensors:
        if isinstance(t, CudaTensor) or (t.device.type == "cpu" and (t.ndim == 0 or id(t) in indices)):
            continue
        problem(f"tensors of two devices in {func}")
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and {t.device}! ({func})"
        )


def _count_waits(func: Any, args: Any, cuda: list[CudaTensor]) -> None:
    masks = func in INDEXING and any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]))
    host_indices = func in INDEXING and any(isinstance(t, Tensor) and not isinstance(t, CudaTensor) for t in tree_leaves(args[1]))
    if not cuda or not (func in RESULT_FOR_HOST or func in SHAPE_FROM_VALUES or masks or host_indices):
        return
    waited("indices on the host" if host_indices else "mask as index" if masks else func.__name__.partition(".")[0])
    host_waits(MAIN.clock)


def _copy(target: Tensor, source: Tensor, asynchronous: bool) -> None:
    to_device, from_device = isinstance(target, CudaTensor), isinstance(source, CudaTensor)
    inner: Tensor = unwrap(source)
    if inner.shape != target.shape:
        inner = inner.expand(target.shape)
    if to_device and from_device and current_stream() is MAIN:
        use(aten.copy_.default, (target, source), {}, [target, source])  # type: ignore[list-item]
        unwrap(target).copy_(inner)
        return
    copy_between(unwrap(target), inner, to_device=to_device, from_device=from_device, asynchronous=asynchronous)


def _to_copy(source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """``source.to(…)`` that copies. An asynchronous copy to the host has a pinned result."""
    inner, from_device = unwrap(source), isinstance(source, CudaTensor)
    to = _device(kwargs) or ("cuda" if from_device else "cpu")
    dtype = kwargs.get("dtype") or source.dtype
    if to == "meta":
        return torch.ops.aten._to_copy.default(inner, **kwargs)  # type: ignore[no-any-return]
    if from_device and to == "cuda":
        use(aten._to_copy.default, (source,), {}, [source])  # type: ignore[list-item]
        return CudaTensor(inner.to(dtype, copy=True, memory_format=kwargs.get("memory_format") or torch.preserve_format))
    same = inner if dtype == inner.dtype else inner.to(dtype)
    out = torch.empty_like(same, memory_format=kwargs.get("memory_format") or torch.preserve_format)
    asynchronous = bool(kwargs.get("non_blocking", False))
    if from_device and asynchronous:
        pin(out)
    made = CudaTensor(out) if to == "cuda" else out
    copy_between(out, same, to_device=to == "cuda", from_device=from_device, asynchronous=asynchronous)
    return made
