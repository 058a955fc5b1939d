"""Brings parameters of the skeleton to life, one block at a time, and puts them back to meta.

A parameter comes from a checkpoint tensor of its own, or, in a packed checkpoint, from the codes of its Linear.
Knows nothing of activations or of solving.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.folders import STATE_FOLDER
from bigq.io.formats import PackedSchemes, PackedWeight, read_schemes
from bigq.io.index import Checkpoint, TensorInfo
from bigq.io.json_file import read_json_object, show_value
from bigq.io.prefetch.prefetch import Prefetch, open_prefetch
from bigq.io.reader import read_rows, read_tensor
from bigq.kernels.dequantize import dequantize_packed
from bigq.model import skeleton
from bigq.model.description import ModelDescription
from bigq.progress.trace import Trace

#: Parameters that are made for each tensor of the checkpoint, at most, before it is clear that some are missing.
MOST_PARAMETERS = 4


class Pager(ModelDescription):
    """A model on meta whose parts can be loaded and evicted.

    dtype: of the forward passes. device: where loaded parts live. packed: weight name → prefix of its packed tensors.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: str = "auto", trust_remote_code: bool = False) -> None:
        _require_finished(folder)
        self.device = device
        config = skeleton.load_config(folder, trust_remote_code=trust_remote_code)
        self.checkpoint = Checkpoint.open(folder)
        self.schemes: PackedSchemes | None = None
        self.dtype = skeleton.compute_dtype(config, dtype, (t.dtype for t in self.checkpoint.tensors.values()))
        most = MOST_PARAMETERS * len(self.checkpoint.tensors) + 1000
        super().__init__(folder, config, skeleton.build(config, self.dtype, trust_remote_code=trust_remote_code, max_parameters=most), {})
        self.packed = self._packed_linears()
        self._name_sources()
        self._meta = dict(self.model.named_parameters(remove_duplicate=False))
        self._forced = skeleton.forced_dtypes(self.model, self.dtype, self._meta)
        self._check_complete()
        self._ahead: Prefetch | None = None
        self._budget = 0
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def _packed_linears(self) -> dict[str, str]:
        path = self.folder / "config.json"
        said = read_json_object(path).get("quantization_config")
        if said is None:
            return {}
        if not isinstance(said, dict):
            raise CheckpointError(f"{path}: quantization_config is {show_value(said)}, not an object; fetch it again")
        self.schemes = read_schemes(path, said)
        mark = f".{self.schemes.format.mark}"
        prefixes = [name.removesuffix(mark) for name in self.checkpoint if name.endswith(mark)]
        if not prefixes:
            raise CheckpointError(f"{path}: quantization_config is there, but no tensor is packed; fetch the checkpoint again")
        renamed = skeleton.map_names(self.model, [f"{p}.weight" for p in prefixes])
        return {target: name.removesuffix(".weight") for name, target in renamed.items()}

    def _name_sources(self) -> None:
        renamed = skeleton.map_names(self.model, self.checkpoint)
        self.sources = {target: self.checkpoint[name] for name, target in renamed.items()}
        by_object = {}
        for name, param in self.model.named_parameters(remove_duplicate=False):
            if name in self.sources:
                by_object[id(param)] = self.sources[name]
        for name, param in self.model.named_parameters(remove_duplicate=False):
            if name not in self.sources and id(param) in by_object:
                self.sources[name] = by_object[id(param)]

    def _check_complete(self) -> None:
        for name, param in self._meta.items():
            if name in self.packed:
                self._check_packed(name)
                continue
            if name not in self.sources:
                raise CheckpointError(
                    f"{self.folder}: tensor {name} is missing from the checkpoint; fetch it again, or correct config.json"
                )
            info = self.sources[name]
            if info.shape != tuple(param.shape):
                raise CheckpointError(
                    f"{info.file}: tensor {info.name} has shape {list(info.shape)}, but config.json makes it {list(param.shape)}; "
                    "the two belong to different models"
                )
            if not info.dtype.is_floating_point or info.dtype.itemsize == 1:
                raise UnsupportedModelError(f"{info.file}: tensor {info.name} is {info.dtype}; bigq reads fp32, fp16 and bf16 sources")

    def packed_tensors(self, name: str) -> list[str]:
        """Names of the checkpoint's tensors that the packed weight ``name`` lies in."""
        assert self.schemes is not None
        symmetric = self.schemes.scheme(name.removesuffix(".weight")).symmetric
        return [f"{self.packed[name]}.{suffix}" for suffix in self.schemes.format.suffixes(symmetric)]

    def _check_packed(self, name: str) -> None:
        assert self.schemes is not None
        bits = self.schemes.scheme(name.removesuffix(".weight")).bits
        outputs, inputs = skeleton.linear_weight(self._owner(name)[0]).shape
        file = self.checkpoint[self.packed_tensors(name)[0]].file
        try:
            packed = self.schemes.format.geometry(self.packed[name], self.checkpoint.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}; fetch it again") from None
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{file}: {error}") from None
        if (packed.bits, packed.outputs, packed.inputs) != (bits, outputs, inputs):
            raise CheckpointError(
                f"{file}: tensor {self.packed_tensors(name)[0]} is packed as {packed}, but config.json makes it {bits} bits, "
                f"{outputs} × {inputs}; the two belong to different models"
            )

    def block_names(self, i: int) -> list[str]:
        """Names of the parameters and persistent buffers of block i."""
        return self._block_names[i]

    @functools.cached_property
    def _block_names(self) -> list[list[str]]:
        prefix = f"{self.blocks_path}."
        found: list[list[str]] = [[] for _ in self.blocks]
        for name in self.model.state_dict():
            if name.startswith(prefix):
                found[int(name.removeprefix(prefix).partition(".")[0])].append(name)
        return found

    def rest_names(self) -> list[str]:
        """Names of all parameters and persistent buffers outside the blocks, embedding and head."""
        prefix = f"{self.blocks_path}."
        large = {id(p) for m in (self.embedding, self.head) for p in m.parameters()}
        return [
            name
            for name in self.model.state_dict()
            if not name.startswith(prefix) and (name not in self._meta or id(self._meta[name]) not in large)
        ]

    def block_tensors(self, i: int) -> list[TensorInfo]:
        """The checkpoint's tensors that block i is loaded from."""
        infos: list[TensorInfo] = []
        for name in self.block_names(i):
            if name in self.packed:
                infos += [self.checkpoint[tensor] for tensor in self.packed_tensors(name)]
            elif name in self.sources:
                infos.append(self.sources[name])
        return infos

    @contextlib.contextmanager
    def prefetch(self, budget: int, trace: Trace) -> Iterator[None]:
        """Let ``announce_block`` read so many bytes ahead; all reading is a lane of the trace."""
        with contextlib.closing(open_prefetch(self.device, budget, trace)) as self._ahead:
            self._budget = budget
            try:
                yield
            finally:
                self._ahead = None

    def announce_block(self, i: int) -> None:
        """Block i will be loaded next, if there is one, and then those that follow: they are read as far as the budget allows."""
        left = self._budget
        while self._ahead is not None and i < len(self.blocks) and left > 0:
            tensors = self.block_tensors(i)
            self._ahead.announce(tensors)
            left -= sum(t.nbytes for t in tensors)
            i += 1

    def load_block(self, i: int) -> nn.Module:
        """Bring block i to the device. Raises CheckpointError or NumericsError."""
        if self._ahead is not None:
            self._ahead.announce(self.block_tensors(i))
        self._load_all(self.block_names(i))
        block = self.blocks[i]
        assert isinstance(block, nn.Module)
        return block

    def evict_block(self, i: int) -> None:
        for name in self.block_names(i):
            self._evict(name)

    @contextlib.contextmanager
    def rest_loaded(self) -> Iterator[None]:
        """Everything outside blocks, embedding and head: norms, position embeddings, projections."""
        names = self.rest_names()
        try:
            self._load_all(names)
            yield
        finally:
            for name in names:
                self._evict(name)

    @contextlib.contextmanager
    def head_loaded(self) -> Iterator[None]:
        names = [name for name in self._meta if self._owner(name)[0] is self.head]
        try:
            self._load_all(names)
            yield
        finally:
            for name in names:
                self._evict(name)

    @contextlib.contextmanager
    def embedding_rows(self, ids: Tensor) -> Iterator[None]:
        """Let the input embedding work for the tokens that occur in ``ids``, having read only their rows."""
        embedding = self.embedding
        name = next(n for n, m in self.model.named_modules() if m is embedding) + ".weight"
        tokens = ids.unique()
        rows = self.to_device(name, read_rows(self.sources[name], tokens))
        places = torch.searchsorted(tokens, torch.arange(int(tokens[-1]) + 1)).to(self.device)
        padding, embedding.padding_idx = embedding.padding_idx, None
        embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        try:
            with replace_forward(embedding, lambda x: type(embedding).forward(embedding, places[x])):
                yield
        finally:
            embedding._parameters["weight"] = self._meta[name]
            embedding.padding_idx = padding

    def to_device(self, name: str, tensor: Tensor) -> Tensor:
        """Cast a parameter's stored values to what the model computes with, and move them."""
        dtype = self._forced.get(name, self._meta[name].dtype)
        return tensor.to(device=self.device, dtype=dtype)

    def dequantized(self, name: str) -> Tensor:
        """The weight of a packed Linear, [outputs, inputs], in the compute dtype."""
        assert self.schemes is not None
        words, scales, zeros = (t.to(self.device) for t in self.stored(name))
        return dequantize_packed(words, scales, zeros, self.schemes.scheme(name.removesuffix(".weight")).bits, self.dtype)

    def stored(self, name: str) -> PackedWeight:
        """The weight of a packed Linear as it is packed, where it was read."""
        assert self.schemes is not None
        scheme = self.schemes.scheme(name.removesuffix(".weight"))
        return self.schemes.format.read(self.packed[name], lambda n: self._read(self.checkpoint[n]), scheme)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _load_all(self, names: list[str]) -> None:
        for name in names:
            self._load(name)
        if self._ahead is not None:
            self._ahead.check()

    def _load(self, name: str) -> None:
        module, leaf = self._owner(name)
        if name not in self._meta:
            if name in self.sources:
                module._buffers[leaf] = self._read(self.sources[name]).to(self.device)
            return
        if name in self.packed:
            weight = self.dequantized(name)
            value = weight.T.contiguous() if skeleton.is_transposed(module) else weight
        else:
            value = self.to_device(name, self._read(self.sources[name]))
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _read(self, info: TensorInfo) -> Tensor:
        return read_tensor(info, keep_cached=False) if self._ahead is None else self._ahead.take(info)

    def _evict(self, name: str) -> None:
        if name in self._meta:
            module, leaf = self._owner(name)
            module._parameters[leaf] = self._meta[name]


def _require_finished(folder: Path) -> None:
    """Raise CheckpointError where the folder is that of a job of bigq that is still to be finished: ``config.json`` comes last."""
    if (folder / STATE_FOLDER).is_dir() and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder / 'config.json'}: is missing, as the job of bigq in this folder is not finished; run the command that made it again"
        )


@contextlib.contextmanager
def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let one module instance run ``forward`` instead of its own."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before
