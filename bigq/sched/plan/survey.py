"""The shape of a model, found by running it on the meta device: nothing is read, computed or allocated.

Shared inputs and dependencies of Linears are found as for loaded blocks (``model.structure``), with gradients instead of NaN as the
mark that spreads. The memory of a forward is counted as its tensors are allocated and freed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bigq.io.index import TensorInfo
from bigq.model.architecture import is_composite
from bigq.model.blocks import block_linears
from bigq.model.description import OnUse
from bigq.model.experts.bank import bank_modules
from bigq.model.experts.cut import chosen_experts, without_banks
from bigq.model.experts.naming import ExpertLinear, Naming, experts_of
from bigq.model.experts.pages import StoredBank, nominal_linears
from bigq.model.folding.fold import BlockFolds
from bigq.model.forward.block_call import OutputForm
from bigq.model.forward.capture import first_input, forward_errors, on_its_input, replace_forwards
from bigq.model.forward.checks import check_hidden_paths
from bigq.model.lookup import token_tables
from bigq.model.skeleton import is_transposed, linear_weight
from bigq.model.structure import BlockPlan, Shortcut, plan_block
from bigq.model.tracers import GradientTracer
from bigq.sched.plan.meta_run import Live, MetaRun, WholeRows, sum_bytes
from bigq.sched.plan.selections import AllSelected
from bigq.sched.plan.shape import BankShape, BlockShape, FoldShape, GroupShape, LeftShape, LinearShape, MemoShape, ModelShape, Reach, Rows

#: Tokens of the row with which the structure is probed.
_STRUCTURE_TOKENS = 16
NO_FOLDS = BlockFolds()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A model whose weights need not exist.

    model: the skeleton, which the survey takes over; blocks_path: of its decoder blocks. dtype: of the forward passes.
    sources: parameter name → the checkpoint's tensor; parameters without one count in ``dtype``. stored: bytes of all the
    checkpoint's tensors, if it is known. coded: how many of these bytes are not in files, because weights are decoded as they are read.
    banks: of experts, as they are stored.
    folds: of every block, for methods that scale inputs.
    fused: whether attention needs no memory for scores if queries and values differ in width too. Torch's on a CPU does.
    """

    model: nn.Module
    blocks_path: str
    dtype: torch.dtype
    sources: Mapping[str, TensorInfo]
    stored: int | None = None
    coded: int = 0
    banks: Mapping[str, StoredBank] = field(default_factory=dict)
    folds: Sequence[BlockFolds] = ()
    fused: bool = True

    def expert_linears(self) -> dict[str, dict[str, ExpertLinear]]:
        """Of each bank, every matrix of every expert by its name in the output; without a checkpoint, by a name that it might have."""
        return {bank.base: bank.linears() for bank in self.banks.values()} if self.banks else nominal_linears(self.model)


def survey(outline: Outline, seqlen: int) -> ModelShape:
    """Survey a model for calibration rows of ``seqlen`` tokens. Raises UnsupportedModelError if it cannot be streamed."""
    model = outline.model.to("meta")
    blocks = model.get_submodule(outline.blocks_path)
    assert isinstance(blocks, nn.ModuleList)
    with torch.no_grad(), WholeRows(outline.fused), AllSelected(), forward_errors():
        form = _form(model, blocks)
        short_ids = torch.zeros(1, min(seqlen, _STRUCTURE_TOKENS), dtype=torch.long, device="meta")
        of_tokens = check_hidden_paths(model, blocks, short_ids, form)
        runs = [MetaRun.of(model, blocks, form, rows, seqlen, of_tokens) for rows in (1, 2)]
        rest, table_row = _rest_bytes(model, outline, form)
        short = MetaRun.of(model, blocks, form, 1, short_ids.shape[1], of_tokens)
        kinds: dict[Any, BlockShape] = {}
        shapes = []
        for i, block in enumerate(blocks):
            folds = outline.folds[i] if outline.folds else NO_FOLDS
            key = (_signature(block), id(folds), tuple(run.call_signature(i) for run in runs), *_stored(outline, block, i))
            if key not in kinds:
                found = _block_shape(outline, block, i, runs, short)
                kinds[key] = dataclasses.replace(found, folds=tuple(_folds(folds)), unfolded=folds.without)
            shapes.append(kinds[key])
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    stored = outline.stored if outline.stored is not None else sum(_bytes(outline, name) for name, _ in outline.model.named_parameters())
    head = model.get_output_embeddings()  # type: ignore[operator]
    name = next((n for n, m in model.named_modules() if m is embedding), "")
    info = outline.sources.get(f"{name}.weight")
    return ModelShape(
        path=outline.blocks_path,
        blocks=tuple(shapes),
        seqlen=seqlen,
        width=math.prod(runs[0].hidden.shape[2:]),
        itemsize=runs[0].hidden.dtype.itemsize,
        vocabulary=embedding.num_embeddings,
        embedding_row=embedding.embedding_dim * (info.dtype if info is not None else outline.dtype).itemsize,
        rest_stored=stored - sum(shape.stored + shape.expert_bytes for shape in shapes),
        rest_loaded=rest,
        coded=outline.coded,
        head=_head(outline, model, head, embedding),
        family=getattr(model.config, "model_type", None),
        table_row=table_row,
        handed_on=runs[0].handed_on,
        of_tokens=max(map(sum_bytes, runs[0].of_tokens), default=0),
        around=Rows.through(*(run.around for run in runs)),
        transposed=any(is_transposed(module) for block in blocks for module in block_linears(block).values()),
    )


def _rest_bytes(model: nn.Module, outline: Outline, form: OutputForm) -> tuple[int, int]:
    """Bytes of the parameters outside blocks, embedding and head that are loaded, and of a row of the tables that are read by rows.

    Of a composite model, only those count that text needs.
    """
    blocks = model.get_submodule(outline.blocks_path)
    assert isinstance(blocks, nn.ModuleList)
    apart = [model.get_input_embeddings(), model.get_output_embeddings(), blocks]  # type: ignore[operator]
    others = {id(p) for m in apart if m is not None for p in m.parameters(recurse=m is blocks)}
    rest = {name: p for name, p in model.named_parameters() if id(p) not in others}
    used = set(rest)
    if is_composite(model.config):
        used.clear()

        def use(name: str) -> Tensor:
            used.add(name)
            return rest[name]

        with OnUse(rest, torch.device("meta"), use):
            MetaRun.of(model, blocks, form, 1, 2)
    tables = {name: module for name, module in token_tables(model, outline.blocks_path).items() if name in used}
    row = sum(_bytes(outline, name) // module.num_embeddings for name, module in tables.items())
    return sum(rest[name].numel() for name in used - set(tables)) * outline.dtype.itemsize, row


def require_hidden_paths(model: nn.Module, blocks_path: str) -> None:
    """Check that blocks pass on nothing but hidden states, on a copy of a model, for callers that need no plan.

    Raises UnsupportedModelError.
    """
    model = copy.deepcopy(model).to("meta")
    blocks = model.get_submodule(blocks_path)
    assert isinstance(blocks, nn.ModuleList)
    with torch.no_grad(), WholeRows(), AllSelected(), forward_errors():
        ids = torch.zeros(1, _STRUCTURE_TOKENS, dtype=torch.long, device="meta")
        check_hidden_paths(model, blocks, ids, _form(model, blocks))


def _head(outline: Outline, model: nn.Module, head: nn.Module | None, embedding: nn.Module) -> LinearShape | None:
    """The output head, if it is a Linear with its own weight."""
    if not isinstance(head, nn.Linear) or head.weight is embedding.weight:
        return None
    name = next(n for n, m in model.named_modules() if m is head)
    return LinearShape(name, head.out_features, head.in_features, _bytes(outline, f"{name}.weight"))


def _form(model: nn.Module, blocks: nn.ModuleList) -> OutputForm:
    with forward_errors(on_its_input(model)):
        hidden, call = first_input(model, blocks, torch.zeros(1, 2, dtype=torch.long, device="meta"))
    with forward_errors(), without_banks(blocks[0]):
        return OutputForm.of(blocks[0](hidden, *call.args, **call.kwargs))


def _signature(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that run alike: with the same modules, parameters and plain settings, such as the layer's kind of attention."""

    def settings(module: nn.Module) -> tuple[Any, ...]:
        return tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, (int, str)) and k != "layer_idx"))

    modules = tuple((name, type(module).__name__, settings(module)) for name, module in block.named_modules())
    return modules, tuple((name, p.shape, p.dtype) for name, p in block.named_parameters())


def _bytes(outline: Outline, name: str) -> int:
    """Bytes of a parameter in the checkpoint."""
    info = outline.sources.get(name)
    return info.nbytes if info is not None else outline.model.get_parameter(name).numel() * outline.dtype.itemsize


def _stored(outline: Outline, block: nn.Module, i: int) -> tuple[int, int]:
    """Bytes of block i in the checkpoint, and of its largest tensor."""
    prefix = f"{outline.blocks_path}.{i}."
    own = _matrices_of_experts(block)
    sizes = [_bytes(outline, prefix + name) for name, _ in block.named_parameters() if name not in own]
    sizes += [info.nbytes for name, _ in block.named_buffers() if (info := outline.sources.get(prefix + name)) is not None]
    return sum(sizes), max(sizes)


def _block_shape(outline: Outline, block: nn.Module, i: int, runs: list[MetaRun], short: MetaRun) -> BlockShape:
    with torch.enable_grad():
        plan = plan_block(block, short.hidden, short.calls[i], GradientTracer())
    prefix = f"{outline.blocks_path}.{i}."
    linears = {
        name: LinearShape(name, linear_weight(module).shape[0], linear_weight(module).shape[1], _bytes(outline, f"{prefix}{name}.weight"))
        for name, module in block_linears(block).items()
    }
    groups = tuple(GroupShape(tuple(linears[name] for name in group.names), group.level) for group in plan.groups)
    one, two = (_Watch.forward(block, run, i, plan) for run in runs)
    stored, largest = _stored(outline, block, i)
    return BlockShape(
        groups=groups,
        reach=tuple(Reach(Rows.through(a[0], b[0]), Rows.through(a[1], b[1])) for a, b in zip(one.levels, two.levels, strict=True)),
        forward=Rows.through(one.live.peak, two.live.peak),
        calls=Rows.through(runs[0].call_bytes(), runs[1].call_bytes()),
        memos=tuple(_memo(shortcut, linears) for shortcut in plan.shortcuts),
        weights=sum(p.numel() * p.dtype.itemsize for name, p in block.named_parameters() if name not in _matrices_of_experts(block)),
        stored=stored,
        largest_stored=largest,
        attention=two.live.products - one.live.products,
        banks=tuple(_banks(outline, block, i, plan, short)),
        left=tuple(_left(block, plan)),
    )


def _folds(folds: BlockFolds) -> Iterator[FoldShape]:
    for fold in folds.folds:
        yield FoldShape(fold.producer, fold.readers, len(fold.channels), fold.count, "norm" if fold.rows is None else "linear")
    for inside in folds.experts:
        producer, reader = (f"{inside.bank}.{product.parameter}" for product in (inside.producer, inside.reader))
        yield FoldShape(producer, (reader,), len(inside.rows), len(inside.rows), "expert", inside.bank)


def _left(block: nn.Module, plan: BlockPlan) -> Iterator[LeftShape]:
    """The parameters of a block that are quantized in no job, but for vectors, such as biases and the weights of norms."""
    linears = block_linears(block)
    quantized = {name for group in plan.groups for name in group.names}
    solved = {f"{place.name}.{key}" for place in plan.banks for key, p in block.get_submodule(place.name).named_parameters() if p.ndim == 3}
    for name, param in block.named_parameters():
        module, _, key = name.rpartition(".")
        if param.ndim < 2 or key.endswith("bias") or name in solved or (module in quantized and key == "weight"):
            continue
        if module in linears and key == "weight":
            yield LeftShape(module, param.numel(), plan.why_left(module, tuple(param.shape)), linear=True)
        else:
            yield LeftShape(name, param.numel(), "is not the weight of a Linear", linear=False)


def _banks(outline: Outline, block: nn.Module, i: int, plan: BlockPlan, short: MetaRun) -> Iterator[BankShape]:
    """The banks of a block, each with the matrices of its first expert."""
    chosen = chosen_experts(block, lambda: short.calls[i].run(block, short.hidden)) if plan.banks else {}
    prefix = f"{outline.blocks_path}.{i}."
    for place in plan.banks:
        products: list[tuple[LinearShape, ...]] = []
        stored = outline.banks.get(f"{prefix}{place.name}")
        for key, param in block.get_submodule(place.name).named_parameters(recurse=False):
            if param.ndim != 3:
                continue
            experts = param.shape[0]
            if stored is not None:
                linear, names, size = stored.shapes[key], stored.matrices(key, 0), stored.nbytes(key)
            else:
                naming = Naming.of(block.get_submodule(place.name))
                linear = naming.linear(key, tuple(param.shape))
                names = tuple(f"{experts_of(place.name)}.0.{part}" for part in naming.parts[key])
                size = linear.m * linear.n * outline.dtype.itemsize
            products.append(tuple(LinearShape(name.removeprefix(prefix), linear.m, linear.n, size) for name in names))
        whole, (of_token, inputs) = stored is not None and stored.is_whole, chosen[place.name]
        if len(products) == 1:  # its inputs or its outputs may be wider than the hidden states
            inputs = math.ceil(inputs * max(linear.m * len(names), linear.n) / short.hidden.shape[-1])
        yield BankShape(place.name, experts, of_token, place.level, tuple(products), whole, inputs)


def _matrices_of_experts(block: nn.Module) -> set[str]:
    """Parameters of a block that are not loaded with it."""
    return {f"{path}.{key}" for path, bank in bank_modules(block).items() for key, p in bank.named_parameters(recurse=False) if p.ndim == 3}


def _memo(shortcut: Shortcut, linears: Mapping[str, LinearShape]) -> MemoShape:
    own = linears[shortcut.linear]
    inside = tuple(n for n in linears if n.startswith(shortcut.module + ".") or n == own.name or n in shortcut.idle)
    return MemoShape(own.name, own.m, own.n, inside, shortcut.last)


@dataclass(slots=True)
class _Watch:
    """The memory of one block forward. levels: (peak bytes so far, bytes held) at the inputs of each level's last Linear."""

    live: Live
    levels: list[tuple[int, int]]

    @classmethod
    def forward(cls, block: nn.Module, run: MetaRun, i: int, plan: BlockPlan) -> _Watch:
        level_of = {name: group.level for group in plan.groups for name in group.names}
        live = Live([*block.parameters(), *block.buffers(), run.hidden, *run.tensors()])
        watch = cls(live, [(0, 0)] * (1 + max(level_of.values(), default=-1)))
        linears = block_linears(block)

        def make(k: int) -> Any:
            name = list(linears)[k]
            module = linears[name]

            def forward(x: Tensor) -> Any:
                if name in level_of:
                    watch.levels[level_of[name]] = live.peak, live.bytes
                counted = live.products
                y = type(module).forward(module, x)
                live.products = counted
                return y

            return forward

        with replace_forwards(list(linears.values()), make), without_banks(block), live:
            run.calls[i].run(block, run.hidden)
        return watch
