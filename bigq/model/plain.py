"""The modules with a plain matrix that readers might take for a packed Linear, unless the quantization config says otherwise.

Readers build quantized Linears for all modules that the config does not exclude, and fail where the checkpoint has a plain weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from bigq.io.index import TensorInfo
from bigq.model import skeleton
from bigq.model.experts.bank import bank_modules
from bigq.model.experts.naming import base_name


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainModules:
    """Modules of a model and of its checkpoint, by name.

    every: all Linears of the model, packed ones too, and of other 2-D weights that are no embedding.
    outside: those of them outside the blocks and beside the head, and those inside that are no Linear, such as routers.
    apart: paths that hold no module of the model but such weights: ``mtp``, ``model.layers.61``, ``visual``.
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
    paths = bank_modules(model)
    targets = ((name, target.rpartition(".")[0]) for name, target in placed.items() if len(tensors[name].shape) == 3)
    banks = {base_name(path, name) for name, path in targets if path in paths}
    return PlainModules(
        every=tuple(dict.fromkeys([*linears, *sorted(others)])),
        outside=tuple(sorted(outside)),
        apart=tuple(sorted(apart)),
        banks=tuple(sorted(banks)),
    )


def _apart(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The shortest beginning of a path that is no module of the model."""
    parts = path.split(".")
    return next(start for i in range(1, len(parts) + 1) if (start := ".".join(parts[:i])) not in modules)
