"""The interface of a checkpoint format: the tensors of a packed Linear in safetensors, and its quantization config.

In memory, a packed Linear is a ``PackedWeight`` whatever its format. So every format can be converted to every other, and code that
computes does not depend on the format.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bigq.errors import CheckpointError
from bigq.io.index import TensorInfo
from bigq.kernels.grid_spec import PointsName, ScaleForm
from bigq.kernels.pack import pack
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import BITS, QuantScheme, Rule

#: Codes are packed into whole words, at most this many codes at a time.
ALIGNMENT = 32
#: Reasons that a refusal lists.
REASONS = 3


#: Types to which readers quantize the inputs of Linears; empty if they do not. "e4m3-groups": for each group of 128 inputs by itself.
InputType = Literal["", "int8", "e4m3", "e4m3-groups", "e2m1"]

#: The name of a matrix of one expert; readers take all experts of a bank, the first group, as one module.
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.\w+")


def bank_of(name: str) -> str | None:
    """The path of the bank that holds a matrix of an expert, such as "model.layers.0.mlp.experts"; None for the name of a Linear."""
    found = _EXPERT.fullmatch(name)
    return None if found is None else found[1]


class Misfit(NamedTuple):
    """Why a Linear does not fit.

    kind: what has to change for it to fit; "shape", "transposed", "joined" and "points" mean that nothing helps in this format.
    said: begins with a verb whose subject is the Linear, or with ":".
    """

    kind: Literal["transposed", "joined", "shape", "points", "group_size", "bits"]
    said: str


class PackedWeight(NamedTuple):
    """A packed Linear of m outputs, n inputs, G groups and b bits: ``weight = scale · (code − zero)``, or ``scale · book[code]`` where the
    scheme has a codebook.

    words: int32 [n·b/32, m], codes packed along the inputs as a bit stream, least significant bits first.
    scales: [m, G], of a floating type that represents them exactly.
    zeros: uint8 [m, G].
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, weight: QuantizedWeight) -> PackedWeight:
        return cls(pack(weight.codes.T, weight.scheme.bits), weight.scales, weight.zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLinear:
    """The dimensions of a packed Linear, from its tensors. groups: the number of groups along the inputs."""

    bits: int
    outputs: int
    inputs: int
    groups: int

    def __str__(self) -> str:
        return f"{self.bits} bits, {self.outputs} × {self.inputs}, {self.groups} groups"


class PackedSchemes(Protocol):
    """A parsed quantization config: the scheme of every packed Linear."""

    @property
    def format(self) -> Format: ...

    def scheme(self, name: str) -> QuantScheme:
        """The scheme of the packed Linear ``name`` (its module name). Raises CheckpointError if the config says it is not packed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What a quantization config records of a finished job.

    scheme, rules: as requested.
    packed: the scheme of every packed Linear, by module name.
    left_out: module names of Linears inside blocks that stay unquantized although no rule skips them.
    others: module names of all Linears that are not packed, inside and outside of blocks, and of other plain 2-D weights.
    outside: those of them outside the blocks and beside the head, and those inside that are no Linear.
    apart: module paths that hold nothing of the model but plain weights, such as MTP layers.
    head: the module name of the output head, if it is packed.
    dtype: of the original model.
    meta: further entries for human readers.
    """

    scheme: QuantScheme
    rules: tuple[Rule, ...]
    packed: Mapping[str, QuantScheme]
    left_out: tuple[str, ...]
    others: tuple[str, ...]
    outside: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    head: str | None
    dtype: torch.dtype = torch.bfloat16
    meta: Mapping[str, Any]


class Format(ABC):
    """The layout of packed Linears in safetensors. Instances have no state.

    name: the value of ``--format``.
    mark: suffix of the one tensor that every packed Linear has, and only these.
    zeros: suffix of the zero points.
    symmetric_key: key in the config for whether zero points are fixed at ``2**(bits-1)``.
    min_zero: the smallest zero point that can be stored.
    spare: suffixes of optional tensors that other writers add to a packed Linear. If ``geometry`` accepts them, they hold no further
        information.
    takes_transposed: whether readers support Linears that are stored transposed (GPT-2's Conv1D).
    takes_joined: whether readers know experts whose gate and up are one Linear (gpt_oss's w13).
    config_file: a file beside config.json to which the quantization config is written too, for readers that look for it.
    scales_as_weights: whether scales have the dtype of the original weights, instead of fp16.
    bits, group_sizes: those that it holds; None for any group size. one_size: whether its config has one group size for all Linears.
    quantized_inputs: the type to which its readers quantize the inputs of Linears too,
        so that the same weights in another format are another model; empty if they do not.
    input_suffix: suffix of the tensor that holds a number for the inputs of each Linear, which calibration finds; empty if there is none,
        because readers do not quantize inputs or find their scales for each token.
    tag: the hub's name of the format.
    points, scale_form: what codes stand for, and how scales are stored.
    fixed: fields of the scheme that have only one value in the format.
    takes_experts, takes_head: whether matrices of experts, and the output head, can be packed.
    outputs_of_parts: of which number the outputs of the parts of a fused Linear must be multiples, except of the last one.
    """

    name: ClassVar[str]
    mark: ClassVar[str]
    zeros: ClassVar[str]
    symmetric_key: ClassVar[str]
    min_zero: ClassVar[int] = 0
    spare: ClassVar[tuple[str, ...]] = ()
    takes_transposed: ClassVar[bool] = True
    takes_joined: ClassVar[bool] = False
    config_file: ClassVar[str | None] = None
    scales_as_weights: ClassVar[bool] = False
    tag: ClassVar[str]
    bits: ClassVar[tuple[int, ...]] = BITS
    group_sizes: ClassVar[tuple[int, ...] | None] = None
    one_size: ClassVar[bool] = False
    quantized_inputs: ClassVar[InputType] = ""
    input_suffix: ClassVar[str] = ""
    points: ClassVar[PointsName] = "int"
    scale_form: ClassVar[ScaleForm] = "fp16"
    fixed: ClassVar[Mapping[str, int | bool]] = {}
    takes_experts: ClassVar[bool] = True
    takes_head: ClassVar[bool] = True
    outputs_of_parts: ClassVar[int] = 1

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def suffixes(self, symmetric: bool) -> tuple[str, ...]:
        """Suffixes of the tensors of a packed weight, ``mark`` first."""

    def tensor(self, prefix: str, suffix: str) -> str:
        """The name of a packed Linear's tensor."""
        return f"{prefix}.{suffix}"

    def split(self, name: str) -> tuple[str, str]:
        """The prefix and the suffix of a tensor's name, if it belongs to a packed Linear."""
        prefix, _, suffix = name.rpartition(".")
        return prefix, suffix

    def prefixes(self, names: Iterable[str]) -> list[str]:
        """The prefixes of all packed Linears among the tensors ``names``."""
        ends = tuple(f"{between}{self.mark}" for between in "._")
        split = (self.split(name) for name in names if name.endswith(ends))
        return [prefix for prefix, suffix in split if suffix == self.mark]

    @abstractmethod
    def store(self, prefix: str, stored: PackedWeight, scheme: QuantScheme, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that replace ``prefix.weight``, by name. dtype: that of the original weight.

        Raises UsageError if the scales cannot be stored exactly.
        """

    @abstractmethod
    def layout(
        self, prefix: str, linear: PackedLinear, symmetric: bool, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtypes and shapes of the tensors that ``store`` and ``pack_inputs`` return for such a Linear, in the same order."""

    def pack(self, prefix: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """``store`` for a weight from the solver."""
        return self.store(prefix, PackedWeight.of(weight), weight.scheme, dtype)

    def pack_inputs(self, prefix: str, largest: float | None) -> dict[str, Tensor]:
        """The tensor for the inputs of a Linear, by name, which comes after those of its weight; none if the format has none.

        largest: the largest magnitude of an input in calibration; known where the format needs it.
        """
        if not self.input_suffix:
            return {}
        assert largest is not None, f"{prefix}: {self.name} stores {self.input_suffix}, for which calibration is needed"
        number = self.input_number(largest)
        assert number is not None, f"{self.name} has a tensor for inputs"
        return {self.tensor(prefix, self.input_suffix): number}

    def input_number(self, largest: float) -> Tensor | None:
        """fp32 [1]: what the tensor for inputs holds, from their largest magnitude in calibration. None if it has none."""
        return None

    @abstractmethod
    def read(self, prefix: str, get: Callable[[str], Tensor], scheme: QuantScheme) -> PackedWeight:
        """Read a packed weight from the tensors that ``get`` returns by name. Raises CheckpointError if their shapes do not match."""

    @abstractmethod
    def geometry(self, prefix: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
        """The dimensions of a packed Linear, from the headers of its tensors.

        Raises CheckpointError if a tensor is missing or does not match the others, UnsupportedModelError if groups are not in natural
        order and ``read`` would not detect it.
        """

    @abstractmethod
    def check_values(self, suffix: str, linear: PackedLinear, piece: Tensor, start: int) -> tuple[str | None, tuple[int, int] | None]:
        """Check a piece of a tensor, whose first element is number ``start`` of the tensor.

        The piece has a multiple of ``values_per_check`` elements, or all remaining ones. Returns what is wrong with it, or None; and the
        minimum and maximum zero point, or None if the tensor holds no zero points.
        """

    @abstractmethod
    def values_per_check(self, suffix: str, info: TensorInfo) -> int:
        """The smallest number of elements that ``check_values`` can check separately."""

    @abstractmethod
    def config(self, job: Quantization) -> dict[str, Any]:
        """``config.json["quantization_config"]``."""

    def multiples(self, bits: int) -> tuple[int, int]:
        """Of which numbers the outputs and inputs of a packed Linear must be multiples."""
        return ALIGNMENT, ALIGNMENT

    def misfit(
        self, m: int, n: int, scheme: QuantScheme, *, transposed: bool = False, joined: bool = False, expert: bool = False
    ) -> Misfit | None:
        """Why a Linear of m outputs and n inputs does not fit the format or its group size; None if it does.

        expert: whether it is a matrix of an expert.
        """
        if scheme.points != self.points:
            stored, has = ("integers" if points == "int" else f"codes of {points}" for points in (self.points, scheme.points))
            return Misfit("points", f"has {has}, but {self.name} stores {stored}")
        if transposed and not self.takes_transposed:
            return Misfit("transposed", f"is stored transposed (Conv1D), which readers of {self.name} do not support")
        if joined and not self.takes_joined:
            return Misfit("joined", f"is part of experts whose gate and up are one Linear, for which {self.name} has no names")
        outputs, inputs = self.multiples(scheme.bits)
        if m % outputs or n % inputs:
            only = "packed dimensions" if outputs == inputs else f"the inputs of Linears packed at {scheme.bits} bits"
            return Misfit("shape", f"is {m} × {n}, but {only} must be multiples of {inputs}")
        if scheme.bits not in self.bits:
            return Misfit("bits", f"is quantized at {scheme.bits} bits, but {self.name} holds {', '.join(map(str, self.bits))} bits only")
        if self.group_sizes is not None and scheme.group_size not in self.group_sizes:
            return Misfit("group_size", f"is quantized in groups of {scheme.group_size}, which readers of {self.name} do not take")
        if scheme.group_size != -1 and n % scheme.group_size:
            return Misfit("group_size", f"has {n} inputs, which group size {scheme.group_size} does not divide")
        return None

    def other_size(self, scheme: QuantScheme, size: int) -> Misfit | None:
        """Why a Linear does not fit a config whose group size is ``size``; None if it does."""
        if not self.one_size or scheme.group_size == size:
            return None
        groups, usual = (_in_groups(each) for each in (scheme.group_size, size))
        return Misfit("group_size", f"is quantized {groups}, but {self.name} has one group size for all Linears, which are {usual}")

    def clash(self, packed: Iterable[str], others: Iterable[str]) -> tuple[str, str] | None:
        """The first of the unpacked modules ``others`` whose name readers confuse with that of a packed Linear, and that name."""
        return None


def _in_groups(size: int) -> str:
    return "in whole rows" if size == -1 else f"in groups of {size}"


def module_of(prefix: str) -> str:
    """The module name of a packed Linear. prefix: of its tensors' names; one that ends with an underscore is followed by no dot."""
    return prefix.removesuffix("_")


def listed(found: Mapping[str, Misfit]) -> str:
    """Linears that do not fit, as text: one name and the number of others for each reason, at most ``REASONS`` of these."""
    by_reason: dict[str, list[str]] = {}
    for name, misfit in found.items():
        by_reason.setdefault(misfit.said, []).append(name)
    said = []
    for reason, names in list(by_reason.items())[:REASONS]:
        if len(names) > 1:
            for one, many in (("is ", "are "), ("has ", "have ")):
                reason = f"{many}{reason.removeprefix(one)}" if reason.startswith(one) else reason
        subject = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        said.append(f"{subject}{reason if reason.startswith(':') else f' {reason}'}")
    rest = sum(map(len, list(by_reason.values())[REASONS:]))
    return ", and ".join([*said, *([f"{rest} other{'s do' if rest > 1 else ' does'} not fit either"] if rest else [])])


def fitting_group_size(inputs: Sequence[int], at_most: int, step: int = 8) -> int:
    """The largest power of two from ``step`` to ``at_most``, or else ``step``, that divides all ``inputs``; else -1, the whole row."""
    common = math.gcd(*inputs)
    size = common & -common
    while size > max(at_most, step):
        size //= 2
    return size if size >= step else -1


def require_tensor(tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    """The tensor ``name`` of a packed Linear. Raises CheckpointError if it is missing."""
    if name not in tensors:
        raise CheckpointError(f"tensor {name} is missing, but its Linear is packed")
    return tensors[name]


def natural_groups(n: int, groups: int, device: torch.device | None = None) -> Tensor:
    """int32 [n]: the group of each input, in natural order."""
    return (torch.arange(n, device=device) // (n // groups)).to(torch.int32)
