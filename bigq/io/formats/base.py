"""What a format of packed checkpoints is: how a packed Linear lies in safetensors, and what config.json says of it.

However a format arranges its tensors, in memory a packed Linear is always the same three: ``Stored``. So that every format can be made
of every other, and whoever computes needs to know none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UsageError
from bigq.io.index import TensorInfo
from bigq.kernels.pack import pack
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme, Rule

#: Codes are packed into whole words, in cycles of at most so many.
ALIGNMENT = 32


class Stored(NamedTuple):
    """A packed Linear of m outputs, n inputs, G groups and b bits: ``weight = scale · (code − zero)``.

    words: int32 [n·b/32, m], codes packed along the inputs as a stream of bits, least significant first. scales: [m, G], of a floating
    type that holds them exactly. zeros: uint8 [m, G].
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Stored:
        return cls(pack(weight.codes.T, weight.scheme.bits), weight.scales, weight.zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLinear:
    """A packed Linear as its tensors say: m outputs, n inputs, G groups along the inputs."""

    bits: int
    outputs: int
    inputs: int
    groups: int

    def __str__(self) -> str:
        return f"{self.bits} bits, {self.outputs} × {self.inputs}, {self.groups} groups"


class PackedSchemes(Protocol):
    """A quantization config that was read: the scheme of every packed Linear."""

    @property
    def format(self) -> Format: ...

    def scheme(self, name: str) -> QuantScheme:
        """Of the packed Linear ``name`` (its module name). Raises CheckpointError where it should not be packed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What a quantization config tells of a finished job.

    scheme, rules: as asked for. packed: the scheme of every packed Linear, by module name. left_out: module names of Linears inside
    blocks that stay unquantized although no rule says so. others: module names of all Linears that are not packed, wherever they are.
    head: the output head's name, if it is packed. meta: for people.
    """

    scheme: QuantScheme
    rules: tuple[Rule, ...]
    packed: Mapping[str, QuantScheme]
    left_out: tuple[str, ...]
    others: tuple[str, ...]
    head: str | None
    meta: Mapping[str, Any]


class Format(ABC):
    """How packed Linears lie in safetensors. Instances have no state.

    name: as ``--format`` says. mark: the suffix of the one tensor that only packed Linears have. zeros: that of their zero points.
    symmetric_key: what the config says with whether they are all in the middle. min_zero: the smallest one that can be stored.
    spare: suffixes of tensors that others put beside those of a packed Linear and that, where ``geometry`` takes them, say nothing more.
    takes_transposed: whether readers know Linears that are stored transposed (GPT-2's Conv1D). config_file: a file
    beside config.json that holds the quantization config too, if readers look for one. names_linears: whether the config names Linears,
    packed or not, one by one. scales_as_weights: whether scales have the type of the weights that were packed, instead of fp16.
    """

    name: ClassVar[str]
    mark: ClassVar[str]
    zeros: ClassVar[str]
    symmetric_key: ClassVar[str]
    min_zero: ClassVar[int] = 0
    spare: ClassVar[tuple[str, ...]] = ()
    takes_transposed: ClassVar[bool] = True
    config_file: ClassVar[str | None] = None
    names_linears: ClassVar[bool] = False
    scales_as_weights: ClassVar[bool] = False

    @abstractmethod
    def suffixes(self, symmetric: bool) -> tuple[str, ...]:
        """Of the tensors that stand for a packed weight; ``mark`` comes first."""

    @abstractmethod
    def store(self, prefix: str, stored: Stored, scheme: QuantScheme, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that stand for ``prefix.weight``. dtype: of the weight that they stand for."""

    @abstractmethod
    def layout(
        self, prefix: str, linear: PackedLinear, symmetric: bool, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtypes and shapes of the tensors that ``store`` gives for such a Linear, in the same order. dtype: as there."""

    def pack(self, prefix: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """``store`` for a weight as it was solved."""
        return self.store(prefix, Stored.of(weight), weight.scheme, dtype)

    @abstractmethod
    def read(self, prefix: str, get: Callable[[str], Tensor], scheme: QuantScheme) -> Stored:
        """From the tensors that ``get`` returns by name. Raises CheckpointError where they do not belong together."""

    @abstractmethod
    def geometry(self, prefix: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
        """What the tensors of a packed Linear say, values aside.

        Raises CheckpointError where one is missing or does not fit the others, UnsupportedModelError where its groups are not in natural
        order and ``read`` would not see that.
        """

    @abstractmethod
    def look(self, suffix: str, linear: PackedLinear, piece: Tensor, start: int) -> tuple[str | None, tuple[int, int] | None]:
        """(what is wrong with elements [start, …) of a tensor, if anything; its least and greatest zero point, if it holds such).

        The piece holds a multiple of ``together`` elements, or all that are left.
        """

    @abstractmethod
    def together(self, suffix: str, info: TensorInfo) -> int:
        """How many elements of a tensor can only be looked at together."""

    @abstractmethod
    def config(self, told: Quantization) -> dict[str, Any]:
        """``config.json["quantization_config"]``."""

    def require(self, name: str, m: int, n: int, scheme: QuantScheme, *, transposed: bool = False) -> None:
        """Raise UsageError, naming the Linear, where its shape does not fit the format or the group size."""
        if transposed and not self.takes_transposed:
            raise UsageError(
                f"{name} is stored transposed (Conv1D), which readers of {self.name} do not know; use --format gptq, or leave it out "
                f"with --skip '{name}$'"
            )
        if m % ALIGNMENT or n % ALIGNMENT:
            raise UsageError(f"{name} is {m} × {n}, but the format packs multiples of {ALIGNMENT}; leave it out with --skip '{name}$'")
        if scheme.group_size != -1 and n % scheme.group_size:
            raise UsageError(
                f"{name} has {n} inputs, which group size {scheme.group_size} does not divide; choose another --group-size, "
                f"or give it its own with --rule '{name}$:group_size=…' (-1 always fits)"
            )


def require_tensor(tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    """Raises CheckpointError where a packed Linear lacks it."""
    if name not in tensors:
        raise CheckpointError(f"tensor {name} is missing, although its Linear is packed")
    return tensors[name]


def natural_groups(n: int, groups: int, device: torch.device | None = None) -> Tensor:
    """int32 [n]: the group of each input, in natural order."""
    return (torch.arange(n, device=device) // (n // groups)).to(torch.int32)
