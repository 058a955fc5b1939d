"""The modules with a plain matrix that readers might take for a packed Linear, unless the quantization config says otherwise.

Readers build quantized Linears for all modules that the config does not exclude, and fail where the checkpoint has a plain weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from bigq.io.index import TensorInfo
from bigq.model import skeleton
from bigq.model.architecture import is_composite
from bigq.model.experts.bank import bank_modules
from bigq.model.experts.naming import base_name


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainModules:
    """Modules of a model and of its checkpoint, by name.

    every: all Linears of the model, packed ones too, and of other 2-D weights that are no embedding.
    outside: those of them outside the blocks and beside the head, and those inside that are no Linear, such as routers.
    apart: paths that hold no module of the model but such weights: ``mtp``, ``model.layers.61``, ``visual``. Also the parts of a composite
    model beside its language model, by each path that they have somewhere.
    banks: paths of the banks that are stored as one tensor for all experts, packed or not.
    """

    every: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    banks: tuple[str, ...] = ()


def plain_modules(
    model: nn.Module, blocks_path: str, tensors: Mapping[str, TensorInfo], dropped: Iterable[str] = (), experts: Collection[str] = ()
) -> PlainModules:
    """The plain modules of a model and its checkpoint. dropped: names of tensors that the output does not hold. experts: of those that
    hold one matrix of one expert, which readers take for Linears."""
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()  # type: ignore[operator]
    gone, placed = set(dropped), skeleton.map_names(model, tensors)
    linears = skeleton.linears(model)
    outside = {name for name in linears if modules[name] is not head and not name.startswith(f"{blocks_path}.")}
    others, apart = set(), set()
    for name, info in tensors.items():
        if not name.endswith(".weight") or len(info.shape) != 2 or name in gone:
            continue
        path = placed.get(name, name).removesuffix(".weight")
        if name in experts:
            others.add(path)
            continue
        if path not in modules:
            others.add(path)
            apart.add(_apart(path, modules))
        elif not isinstance(modules[path], nn.Embedding) and not skeleton.is_linear(modules[path]):
            others.add(path)
            outside.add(path)
    if is_composite(model.config):
        apart |= _parts_beside(model, blocks_path, outside, placed)
    paths = bank_modules(model)
    shapes = {name: param.ndim for name, param in model.named_parameters()}
    targets = ((name, target.rpartition(".")[0]) for name, target in placed.items() if shapes.get(target) == 3)
    banks = {base_name(path, name) for name, path in targets if path in paths}
    return PlainModules(
        every=tuple(dict.fromkeys([*linears, *sorted(others)])),
        outside=tuple(sorted(outside)),
        apart=tuple(sorted(apart)),
        banks=tuple(sorted(banks)),
    )


def _parts_beside(model: nn.Module, blocks_path: str, outside: Iterable[str], placed: Mapping[str, str]) -> set[str]:
    """The largest modules that hold Linears of ``outside``, but not the blocks, the embedding or the head: a tower, a projector.

    Each by its path in the model, by that in the checkpoint (placed: name there → name in the model), and by its last part, which is its
    path in vLLM.
    """
    own = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    kept = [blocks_path, *(name for name, module in model.named_modules() if any(module is one for one in own))]
    found = set()
    for name in outside:
        if name.startswith(f"{blocks_path}."):  # a router
            continue
        parts = name.split(".")
        starts = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        found.add(next(start for start in starts if not any(f"{path}.".startswith(f"{start}.") for path in kept)))
    stored = {
        name.removesuffix(target.removeprefix(path))
        for path in found
        for name, target in placed.items()
        if target.startswith(f"{path}.") and name.endswith(target.removeprefix(path))
    }
    last = {path.rpartition(".")[2] for path in found}
    return found | {path for path in stored | last if not any(f"{other}.".startswith(f"{path}.") for other in kept)}


def _apart(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The shortest beginning of a path that is no module of the model."""
    parts = path.split(".")
    return next(start for i in range(1, len(parts) + 1) if (start := ".".join(parts[:i])) not in modules)
