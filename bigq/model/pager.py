"""Loads the parameters of the skeleton one block at a time, and evicts them to meta.

A parameter is loaded from its own tensor in the checkpoint or, in a packed checkpoint, dequantized from its Linear's packed tensors.
Knows nothing of activations or of solving.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bigq.io.folders import require_finished
from bigq.io.formats import PackedSchemes, PackedWeight
from bigq.io.formats.base import module_of
from bigq.io.index import Checkpoint, TensorInfo, unread_warnings
from bigq.io.prefetch.prefetch import Prefetch, open_prefetch
from bigq.io.reader import decoded, read_rows, read_tensor
from bigq.io.remote.shards import RemoteShards
from bigq.io.side_files import side_files
from bigq.io.sources.base import Source
from bigq.io.sources.joined import JoinedSource
from bigq.io.sources.packed import PackedSource
from bigq.io.sources.plain import PlainSource
from bigq.model import skeleton
from bigq.model.architecture import is_composite
from bigq.model.description import ModelDescription, OnUse
from bigq.model.experts.pages import StoredBank, stored_banks, stores_inputs
from bigq.model.experts.source import ExpertSource, expert_sources, joined
from bigq.model.experts.stored import Part, joined_parameters, merged_beside, merged_parts, require_unmerged
from bigq.model.extras import Extras, find_extras
from bigq.model.folding.around import model_folds
from bigq.model.forward.quantized_inputs import quantize_inputs, set_input_number
from bigq.model.lookup import rows_held, rows_read, token_tables
from bigq.model.names import require_parameters
from bigq.model.packed import packed_sources
from bigq.model.plain import PlainModules, plain_modules
from bigq.model.quantization import coded_warnings, open_source, packed_schemes, refuse_quantized_tensors
from bigq.model.rotation.checkpoint import described_rotation, untie
from bigq.model.tied import tie_warnings, with_ties
from bigq.progress.trace import Trace

#: The maximum number of parameters per tensor of the checkpoint. With more, some tensors must be missing.
MOST_PARAMETERS = 4


class Pager(ModelDescription):
    """A model on meta whose parts can be loaded and evicted.

    dtype: of the forward passes. device: of the loaded parts. remote: has the shards. packed: weight name → prefix of its packed tensors.
    decode: whether packed Linears become plain ones as they are read, so that they can be quantized again; then ``packed`` stays empty.
    rotate: whether everything is read as the rotated model's (``bigq.model.rotation``). fold: whether ``folds`` of its blocks are found.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        decode: bool = False,
        remote: RemoteShards | None = None,
        rotate: bool = False,
        fold: bool = False,
    ) -> None:
        require_finished(folder)
        self.device = device
        config = skeleton.load_config(folder, trust_remote_code=trust_remote_code)
        if rotate:
            untie(config)
        self.remote = remote
        self.checkpoint = open_source(folder, integers=decode, remote=remote)
        self.schemes: PackedSchemes | None = None if decode else packed_schemes(folder)
        self.dtype = skeleton.compute_dtype(config, dtype, (t.dtype for t in self.checkpoint.tensors.values()))
        most = MOST_PARAMETERS * len(self.checkpoint.tensors) + 1000
        super().__init__(folder, config, skeleton.build(config, self.dtype, trust_remote_code=trust_remote_code, max_parameters=most), {})
        self._unrotated = self.checkpoint.tensors
        if rotate:
            tensors = described_rotation(self, self._unrotated)
            self.checkpoint = Checkpoint(self.checkpoint.folder, tensors, self.checkpoint.fingerprint)
        self.folds = model_folds(self) if fold else ()
        self._meta = dict(self.model.named_parameters(remove_duplicate=False))
        self._forced = skeleton.forced_dtypes(self.model, self.dtype, self._meta)
        self.banks: dict[str, StoredBank] = {}
        self._weights = self._find_sources()
        if self.schemes is not None and (kind := self.schemes.format.quantized_inputs):
            self._forced |= dict.fromkeys(self.packed, torch.float32)
            stored = stores_inputs(folder, self.schemes.format, self.banks.values())
            quantize_inputs(folder, (self._owner(name)[0] for name in self.packed), kind, stored=stored)
        self._ahead: Prefetch | None = None
        self._budget = 0
        skeleton.move_buffers(self.model, device)

    @functools.cached_property
    def _placement(self) -> skeleton.Placement:
        return skeleton.place(self.model, self.checkpoint)

    @functools.cached_property
    def _placed(self) -> dict[str, str]:
        """Tensor of the checkpoint → parameter or buffer."""
        return dict(self._placement.whole)

    @functools.cached_property
    def _parts(self) -> dict[str, Part]:
        """Tensor of the checkpoint that is not packed → the part of a parameter that it becomes."""
        return merged_parts({name: merge for name, merge in self._placement.merged.items() if name not in self._beside})

    @functools.cached_property
    def _beside(self) -> dict[str, skeleton.Merge]:
        return merged_beside(self.model, self._placement.merged)

    @functools.cached_property
    def _expert_parts(self) -> dict[str, str]:
        """Tensor of the checkpoint → the parameter that it becomes a part of."""
        return {name: part.parameter for name, part in self._parts.items()}

    @functools.cached_property
    def extras(self) -> Extras:
        """The tensors that the model has no place for. Packed ones count too, so this is for checkpoints that are to be quantized."""
        beside = {name: merge.target for name, merge in self._beside.items()}
        return find_extras(self.model, self.config, self.blocks_path, self.checkpoint.tensors, self._placed | self._expert_parts | beside)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what the folder holds besides the model, for those who quantize it."""
        own = (*coded_warnings(self.folder, self._unrotated), *self.extras.warnings(), *tie_warnings(self.model, self.sources))
        return (*own, *unread_warnings(self.folder, self.checkpoint.tensors), *side_files(self.folder).warnings())

    def plain_modules(self, dropped: Iterable[str] = ()) -> PlainModules:
        """The modules that a quantization config must not count as packed. dropped: tensors that the output does not hold."""
        return plain_modules(self.model, self.blocks_path, self.checkpoint.tensors, dropped, self._expert_parts)

    def _find_plain(self) -> dict[str, TensorInfo]:
        return with_ties({target: self.checkpoint[name] for name, target in self._placed.items()}, self._meta)

    def _find_sources(self) -> dict[str, Source]:
        """How each parameter is stored. Raises CheckpointError where one is missing or has another shape, UnsupportedModelError."""
        packed = packed_sources(self.folder, self.model, self.checkpoint, self.schemes)
        parts = {info.name for source in packed.values() for info in source.tensors}
        # bitsandbytes and w8a8-int8 store codes under the name of the weight.
        self.sources = {name: info for name, info in self._find_plain().items() if info.name not in parts}
        experts = self._find_experts(packed)
        merged = {info.name for sources in experts.values() for source in sources for info in source.tensors}
        used = {*self._placed, *parts, *merged, *self._beside}
        unplaced = [name for name in self.checkpoint if name not in used]
        if self.schemes is None:
            refuse_quantized_tensors(self.folder, unplaced)
        self.packed = {name: source.prefix for name, source in packed.items() if name in self._meta}
        beside = {target for merge in self._beside.values() for target in merge.targets}
        require_parameters(self.folder, self.model, [*self.packed, *self.sources, *experts, *beside], unplaced)
        self.banks = stored_banks(self.model, experts)
        self.expert_linears = {bank.base: bank.linears() for bank in self.banks.values()}
        pieces = joined_parameters(self.model, self._placement.merged)
        found: dict[str, Source] = {name: JoinedSource([self.checkpoint[n] for n in names]) for name, names in pieces.items()}
        for name, param in self._meta.items():
            if name in pieces:
                found[name].check(tuple(param.shape))
            if name in experts or name in beside:
                continue
            if name in packed:
                packed[name].check(tuple(skeleton.linear_weight(self._owner(name)[0]).shape))
                found[name] = packed[name]
                continue
            found[name] = PlainSource(self.sources[name])
            found[name].check(tuple(param.shape))
        return found

    def _find_experts(self, packed: Mapping[str, PackedSource]) -> dict[str, tuple[ExpertSource, ...]]:
        """How the experts of each 3-D parameter are stored. packed: the packed Linears; those of experts have their stored names."""
        plain: dict[str, Source] = {name: PlainSource(self.checkpoint[name]) for name in (*self._placed, *self._expert_parts)}
        parts = None if packed else self._parts
        return expert_sources(self.model, plain | {name: packed[name] for name in packed if name not in self._meta}, self._placed, parts)

    def source_of(self, name: str) -> Source:
        """How a parameter is stored."""
        return self._weights[name]

    def stored_under(self, path: str) -> set[str]:
        """Names of the checkpoint's tensors that hold parameters and buffers of the module ``path``, without those of experts."""
        found = {info.name for name, info in self.sources.items() if name.startswith(f"{path}.") and not self._is_of_experts(name)}
        return found | {info.name for name, source in self._weights.items() if name.startswith(f"{path}.") for info in source.tensors}

    def _is_of_experts(self, name: str) -> bool:
        """Whether a parameter holds a matrix of every expert of a bank."""
        path, _, key = name.rpartition(".")
        return path in self.banks and key in self.banks[path].sources

    def has_source(self, name: str) -> bool:
        """Whether a name is that of a parameter; buffers that are stored have a plain tensor in ``sources``."""
        return name in self._weights

    def value_of(self, name: str) -> Tensor:
        """A parameter's value on the device, as the model computes with it. The experts of a bank are loaded all at once."""
        if self._is_of_experts(name):
            path, _, key = name.rpartition(".")
            return torch.stack([source.value(self._read, self.device, self.dtype_of(name)) for source in self.banks[path].sources[key]])
        if name not in self.packed:
            return self._weights[name].value(self._read, self.device, self.dtype_of(name))
        weight = self.dequantized(name)
        return weight.T.contiguous() if skeleton.is_transposed(self._owner(name)[0]) else weight

    def packed_source(self, name: str) -> PackedSource:
        """How the weight of a packed Linear is stored."""
        source = self._weights[name]
        assert isinstance(source, PackedSource), f"{name} is not packed"
        return source

    def packed_sources(self) -> dict[str, PackedSource]:
        """Every packed Linear by its module name, and every packed matrix of an expert by its name in the checkpoint."""
        found = {name.removesuffix(".weight"): self.packed_source(name) for name in self.packed}
        return found | {module_of(source.prefix): source for bank in self.banks.values() for source in bank.packed()}

    def block_names(self, i: int) -> list[str]:
        """Names of the parameters and persistent buffers of block i, without the matrices of experts."""
        return self._block_names[i]

    @functools.cached_property
    def _block_names(self) -> list[list[str]]:
        prefix = f"{self.blocks_path}."
        found: list[list[str]] = [[] for _ in self.blocks]
        for name in self.state_names:
            if name.startswith(prefix) and not (name in self._meta and name not in self._weights):
                found[int(name.removeprefix(prefix).partition(".")[0])].append(name)
        return found

    def block_tensors(self, i: int) -> list[TensorInfo]:
        """The stored tensors that block i is loaded from."""
        infos: list[TensorInfo] = []
        for name in self.block_names(i):
            if name in self._weights:
                infos += self._weights[name].tensors
            elif name in self.sources:
                infos.append(self.sources[name])
        return [part for info in infos for part in info.stored]

    @contextlib.contextmanager
    def prefetch(self, budget: int, trace: Trace) -> Iterator[None]:
        """Let ``announce_block`` prefetch up to ``budget`` bytes while the context is open. Reads are a lane of the trace."""
        with contextlib.closing(open_prefetch(self.device, budget, trace)) as self._ahead:
            self._budget = budget
            try:
                yield
            finally:
                self._ahead = None

    def announce_block(self, i: int) -> None:
        """Prefetch block i, if it exists, and as many blocks after it as the budget allows."""
        left = self._budget
        while self._ahead is not None and i < len(self.blocks) and left > 0:
            tensors = self.block_tensors(i)
            self._ahead.announce(tensors)
            left -= sum(t.nbytes for t in tensors)
            i += 1

    def load_block(self, i: int) -> nn.Module:
        """Load block i onto the device. Raises CheckpointError; NumericsError for weights that are not finite."""
        if self._ahead is not None:
            self._ahead.announce(self.block_tensors(i))
        self._load_all(self.block_names(i))
        block = self.blocks[i]
        assert isinstance(block, nn.Module)
        return block

    def load_expert(
        self, path: str, e: int, matrices: Mapping[str, list[Tensor]] | None = None, *, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Expert e of the bank ``path`` on the device: its part of every parameter, by the name in the bank. A spare expert has none.

        Small parameters, such as biases, are loaded with the block. matrices: of its parameters, if they are not to be read from the
        checkpoint, [outputs, inputs] each. dtype: of those that are read, if not their own. Raises CheckpointError; NumericsError for NaN.
        """
        bank, module = self.banks[path], self.model.get_submodule(path)
        found: dict[str, Tensor] = {}
        for key, param in module.named_parameters(recurse=False) if e < bank.experts else ():
            if matrices is not None and key in matrices:
                found[key] = joined(matrices[key], transposed=bank.is_transposed(key))
            elif key in bank.sources:
                found[key] = bank.sources[key][e].value(self._read, self.device, dtype or self.dtype_of(f"{path}.{key}"))
            else:
                found[key] = param[e].clone()
        if self._ahead is not None:
            self._ahead.check()
        return found

    def announce_experts(self, path: str, experts: Iterable[int]) -> None:
        """Prefetch some experts of a bank."""
        if self._ahead is not None:
            self._ahead.announce([part for info in self.banks[path].tensors(experts) for part in info.stored])

    def evict_block(self, i: int) -> None:
        """Put the parameters of block i back to meta."""
        for name in self.block_names(i):
            self._evict(name)

    @contextlib.contextmanager
    def rest_loaded(self) -> Iterator[None]:
        """Load everything outside blocks, embedding and head while the context is open: norms, position embeddings, projections.

        Of a composite model, a parameter is loaded when something computes with it; those for images and audio never are. Large tables
        are read by rows.
        """
        found = token_tables(self.model, self.blocks_path)
        tables = {name: module for name, module in found.items() if isinstance(self._weights.get(name), PlainSource)}
        names = [name for name in self.rest_names() if name not in tables]
        waiting = {name: self._meta[name] for name in names if name in self._meta} if is_composite(self.config) else {}
        try:
            self._load_all([name for name in names if name not in waiting])
            with contextlib.ExitStack() as stack:
                for name, module in tables.items():
                    stack.enter_context(rows_read(module, functools.partial(self._rows, name)))
                if waiting:
                    stack.enter_context(OnUse(waiting, self.device, self._loaded))
                yield
        finally:
            for name in names:
                self._evict(name)

    @contextlib.contextmanager
    def head_loaded(self) -> Iterator[None]:
        """Load the output head while the context is open."""
        names = [name for name in self._meta if self._owner(name)[0] is self.head]
        try:
            self._load_all(names)
            yield
        finally:
            for name in names:
                self._evict(name)

    @contextlib.contextmanager
    def embedding_rows(self, ids: Tensor) -> Iterator[None]:
        """Load only those rows of the input embedding that ``ids`` uses; while the context is open, others are refused."""
        embedding, tokens = self.embedding, ids.unique()
        name = next(n for n, m in self.model.named_modules() if m is embedding) + ".weight"
        with rows_held(embedding, tokens.to(self.device), self._rows(name, tokens)):
            yield

    def _rows(self, name: str, tokens: Tensor) -> Tensor:
        """Rows of a table on the device, for tokens in order."""
        return read_rows(self.sources[name], tokens.cpu()).to(device=self.device, dtype=self.dtype_of(name))

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which the model computes with a parameter."""
        return self._forced.get(name, self._meta[name].dtype)

    def dequantized(self, name: str) -> Tensor:
        """The weight of a packed Linear, [outputs, inputs], in the compute dtype."""
        return self.packed_source(name).value(self._read, self.device, self.dtype_of(name))

    def stored(self, name: str) -> PackedWeight:
        """The packed tensors of a packed Linear's weight, on the device that they were read to."""
        return self.packed_source(name).stored(self._read)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _load_all(self, names: list[str]) -> None:
        for name in names:
            self._load(name)
        if self._ahead is not None:
            self._ahead.check()

    def _loaded(self, name: str) -> Tensor:
        """A parameter, which is loaded if it is not yet. Raises UnsupportedModelError if it is not stored as it is."""
        module, leaf = self._owner(name)
        if module._parameters[leaf] is self._meta[name]:
            require_unmerged(name, {} if name in self._weights else self._beside)
            self._load_all([name])
        return module._parameters[leaf]  # type: ignore[return-value]

    def _load(self, name: str) -> None:
        module, leaf = self._owner(name)
        if name not in self._meta:
            if name in self.sources:
                module._buffers[leaf] = self._read(self.sources[name]).to(self.device)
            return
        module._parameters[leaf] = nn.Parameter(self.value_of(name), requires_grad=False)
        self.load_input_number(name)

    def load_input_number(self, name: str) -> None:
        """Load what the format stores for the inputs of a packed Linear, if ``name`` is its weight, which is loaded just before."""
        if name in self.packed and (number := self.packed_source(name).input_number(self._read)) is not None:
            set_input_number(self._owner(name)[0], number.to(self.device))

    def _read(self, info: TensorInfo) -> Tensor:
        if self._ahead is None:
            return read_tensor(info, keep_cached=False)
        if info.coding is None:
            return self._ahead.take(info)
        return decoded(info, [self._read(part) for part in info.parts])

    def _evict(self, name: str) -> None:
        if name in self._meta:
            module, leaf = self._owner(name)
            module._parameters[leaf] = self._meta[name]
