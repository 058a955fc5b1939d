"""The 4-bit checkpoints of bitsandbytes, NF4 and FP4 with double quantization, as transformers saves and reads them.

For a Linear X with K inputs, N outputs and G = K / 64 blocks of inputs:

    X.weight                  uint8 [N·K/2, 1]      two codes in a byte, row by row, the first one in the high half
    X.weight.absmax           uint8 [N·G]           codes of the blocks' scales, row by row (``bigq.nested_scales``)
    X.weight.quant_map        fp32 [16]             the points that codes stand for
    X.weight.nested_absmax    fp32 [⌈N·G/256⌉]      the scales of 256 scales each
    X.weight.nested_quant_map fp32 [256]            the numbers that codes of scales stand for
    X.weight.quant_state.bitsandbytes__nf4          uint8: a JSON object with N, K, the dtype of the weight and the mean of the scales

bigq pads the JSON with spaces, so that its length does not depend on the mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError, UsageError
from bigq.io.formats.base import Format, Misfit, PackedLinear, PackedWeight, Quantization, require_tensor
from bigq.io.formats.gptq import check_scales
from bigq.io.index import TensorInfo
from bigq.io.json_file import show_value
from bigq.io.reader import read_tensor
from bigq.kernels.grid_spec import BOOKS
from bigq.kernels.pack import pack, unpack
from bigq.nested_scales import BLOCK, NestedScales, dynamic_table
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme

#: Inputs that share a scale.
GROUP = 64
#: Characters of an fp32 number in JSON, at most.
NUMBER = 24
#: The largest JSON object that is read.
MAX_STATE = 4096
#: For each code, the place of its point among the points in ascending order. FP4 has a sign bit, and bitsandbytes' own order of the others.
_PLACES: Mapping[str, tuple[int, ...]] = {
    "nf4": tuple(range(16)),
    "fp4": (7, 9, 14, 15, 12, 13, 10, 11, 8, 6, 1, 0, 3, 2, 5, 4),
}
_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class BitsAndBytes(Format):
    """kind: bitsandbytes' name of the points."""

    mark = "weight.absmax"
    zeros = ""
    symmetric_key = ""
    tag = "bitsandbytes"
    scale_form = "nested"
    takes_experts = False
    takes_head = False
    fixed: ClassVar[Mapping[str, int | bool]] = {"bits": 4, "group_size": GROUP, "symmetric": True}
    kind: ClassVar[Literal["nf4", "fp4"]]

    def suffixes(self, symmetric: bool) -> tuple[str, ...]:
        parts = ("absmax", "", "quant_map", "nested_absmax", "nested_quant_map", f"quant_state.bitsandbytes__{self.kind}")
        return tuple(f"weight.{part}".rstrip(".") for part in parts)

    def split(self, name: str) -> tuple[str, str]:
        for suffix in self.suffixes(True):
            if name.endswith(f".{suffix}"):
                return name.removesuffix(f".{suffix}"), suffix
        return super().split(name)

    def multiples(self, bits: int) -> tuple[int, int]:
        return 1, GROUP

    def pack(self, prefix: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        assert weight.nested is not None, f"{prefix}: its scales are not nested"
        return self._tensors(prefix, weight.codes, weight.nested, dtype)

    def store(self, prefix: str, stored: PackedWeight, scheme: QuantScheme, dtype: torch.dtype) -> dict[str, Tensor]:
        nested = NestedScales.of(stored.scales)
        if not torch.equal(nested.values(), stored.scales.float()):
            raise UsageError(
                f"{prefix}: its scales cannot be stored exactly in {self.name}; quantize the original model with --format {self.name}"
            )
        return self._tensors(prefix, unpack(stored.words, scheme.bits).T, nested, dtype)

    def _tensors(self, prefix: str, codes: Tensor, nested: NestedScales, dtype: torch.dtype) -> dict[str, Tensor]:
        own = torch.empty(16, dtype=torch.uint8)
        own[list(_PLACES[self.kind])] = torch.arange(16, dtype=torch.uint8)
        halves = own.to(codes.device)[codes.int()]
        made = (
            nested.codes.flatten(),
            (halves[:, ::2] << 4 | halves[:, 1::2]).reshape(-1, 1),
            self._points(),
            nested.blocks,
            dynamic_table(),
            self._state(codes.shape[0], codes.shape[1], dtype, nested.offset),
        )
        return {self.tensor(prefix, suffix): t.contiguous() for suffix, t in zip(self.suffixes(True), made, strict=True)}

    def _points(self) -> Tensor:
        """The points by their codes."""
        return torch.tensor(BOOKS[self.kind])[list(_PLACES[self.kind])]

    def _state(self, m: int, n: int, dtype: torch.dtype, offset: float) -> Tensor:
        said: dict[str, Any] = {"quant_type": self.kind, "blocksize": GROUP, "dtype": _dtype_name(dtype), "shape": [m, n]}
        said |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        text = json.dumps(said)
        padded = text.ljust(len(json.dumps(said | {"nested_offset": 0})) - 1 + NUMBER)
        return torch.frombuffer(bytearray(padded.encode()), dtype=torch.uint8)

    def layout(
        self, prefix: str, linear: PackedLinear, symmetric: bool, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        m, n, scales = linear.outputs, linear.inputs, linear.outputs * linear.groups
        kinds: tuple[tuple[torch.dtype, tuple[int, ...]], ...] = (
            (torch.uint8, (scales,)),
            (torch.uint8, (m * n // 2, 1)),
            (torch.float32, (16,)),
            (torch.float32, (math.ceil(scales / BLOCK),)),
            (torch.float32, (256,)),
            (torch.uint8, (len(self._state(m, n, dtype, 0.0)),)),
        )
        return {self.tensor(prefix, suffix): kind for suffix, kind in zip(self.suffixes(True), kinds, strict=True)}

    def read(self, prefix: str, get: Callable[[str], Tensor], scheme: QuantScheme) -> PackedWeight:
        absmax, packed, points, blocks, table, state = (get(self.tensor(prefix, suffix)) for suffix in self.suffixes(True))
        m, n, offset = self._read_state(prefix, state)
        shapes = [(m * n // GROUP,), (m * n // 2, 1), (16,), (math.ceil(m * n / GROUP / BLOCK),), (256,)]
        if [tuple(t.shape) for t in (absmax, packed, points, blocks, table)] != shapes:
            raise CheckpointError(f"{prefix}: the shapes of its tensors do not match")
        self._require_points(prefix, points)
        places = torch.tensor(_PLACES[self.kind], dtype=torch.uint8, device=packed.device)
        halves = torch.stack([packed >> 4, packed & 15], -1).view(m, n)
        of_each = blocks.repeat_interleave(BLOCK)[: len(absmax)]
        scales = (table[absmax.int()] * of_each + offset).view(m, n // GROUP)
        return PackedWeight(pack(places[halves.int()].T, scheme.bits), scales, torch.zeros_like(scales, dtype=torch.uint8))

    def _require_points(self, prefix: str, points: Tensor) -> None:
        if not torch.equal(points.cpu(), self._points()):
            raise CheckpointError(f"tensor {prefix}.weight.quant_map: holds other points than those of {self.kind}; fetch it again")

    def _read_state(self, prefix: str, state: Tensor) -> tuple[int, int, float]:
        """(outputs, inputs, the mean of the scales). Raises CheckpointError, UnsupportedModelError."""
        name = self.tensor(prefix, self.suffixes(True)[-1])
        wrong = CheckpointError(f"tensor {name}: is not a description of a matrix by bitsandbytes; fetch it again")
        try:
            said = json.loads(bytes(state.cpu().numpy()).decode()) if 0 < state.numel() <= MAX_STATE else None
        except (ValueError, RecursionError):
            raise wrong from None
        if not isinstance(said, dict):
            raise wrong
        sizes = said.get("blocksize"), said.get("nested_blocksize"), said.get("quant_type")
        if sizes != (GROUP, BLOCK, self.kind):
            raise UnsupportedModelError(
                f"tensor {name}: block sizes and type {show_value(sizes)}; of bitsandbytes, bigq reads blocks of {GROUP} with nested "
                f"blocks of {BLOCK}: give such a checkpoint, or the original model"
            )
        shape, offset = said.get("shape"), said.get("nested_offset")
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
            raise wrong
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
            raise wrong
        return shape[0], shape[1], float(offset)

    def geometry(self, prefix: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
        parts = [require_tensor(tensors, self.tensor(prefix, suffix)) for suffix in self.suffixes(True)]
        if parts[-1].dtype != torch.uint8 or len(parts[-1].shape) != 1 or parts[-1].nbytes > MAX_STATE:
            raise CheckpointError(f"tensor {parts[-1].name}: its shape or dtype does not match those of the tensors beside it")
        m, n, _ = self._read_state(prefix, read_tensor(parts[-1]))
        if n % GROUP:
            raise UnsupportedModelError(f"tensor {parts[1].name}: its blocks cross rows, which bigq does not read; give the original model")
        linear = PackedLinear(bits=4, outputs=m, inputs=n, groups=n // GROUP)
        expected = list(self.layout(prefix, linear, True, torch.float32).values())[:-1]
        if [(part.dtype, part.shape) for part in parts[:-1]] != expected:
            raise CheckpointError(f"tensor {parts[1].name}: its shape or dtype does not match those of the tensors beside it")
        return linear

    def values_per_check(self, suffix: str, info: TensorInfo) -> int:
        return 1

    def check_values(self, suffix: str, linear: PackedLinear, piece: Tensor, start: int) -> tuple[str | None, tuple[int, int] | None]:
        if suffix == "weight.quant_map" and not torch.equal(piece, self._points()[start : start + len(piece)]):
            return f"holds other points than those of {self.kind}", None
        if suffix in ("weight.nested_absmax", "weight.nested_quant_map") and (wrong := check_scales(piece)) == "holds NaN or Inf":
            return wrong, None
        return None, None

    def misfit(
        self, m: int, n: int, scheme: QuantScheme, *, transposed: bool = False, joined: bool = False, expert: bool = False
    ) -> Misfit | None:
        same_points = scheme.points == self.points
        if same_points and scheme.bits != 4:
            return Misfit("bits", f"has {scheme.bits} bits, but {self.name} has 4")
        if same_points and (scheme.group_size != GROUP or not scheme.symmetric):
            return Misfit("points", f"has groups of {scheme.group_size} or zero points, but {self.name} has blocks of {GROUP} without")
        return super().misfit(m, n, scheme, transposed=transposed, joined=joined, expert=expert)

    def config(self, job: Quantization) -> dict[str, Any]:
        """What ``BitsAndBytesConfig`` saves. Modules that stay unquantized are named: by default, transformers leaves out the head only."""
        skipped = sorted({*job.others, *job.left_out, *job.apart})
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_compute_dtype": _dtype_name(job.dtype),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": True,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": skipped or None,
            "llm_int8_threshold": 6.0,
        }


class Nf4(BitsAndBytes):
    """Points at quantiles of the normal distribution."""

    name = "bnb-nf4"
    kind = points = "nf4"


class BnbFp4(BitsAndBytes):
    """Points of a 4-bit float."""

    name = "bnb-fp4"
    kind = points = "fp4"


@dataclass(frozen=True, slots=True)
class BitsAndBytesSchemes:
    """A parsed quantization config: every packed Linear has the same scheme."""

    format: Format

    @classmethod
    def read(cls, path: Path, config: Mapping[str, Any], formats: Mapping[str, Format]) -> BitsAndBytesSchemes:
        """Parse the ``quantization_config`` of the config.json at ``path``. Raises UnsupportedModelError for kinds that bigq does not read.

        formats: all formats by name.
        """
        kind, nested, storage = (config.get(f"bnb_4bit_{key}") for key in ("quant_type", "use_double_quant", "quant_storage"))
        format = formats.get(f"bnb-{kind}")
        if config.get("load_in_4bit") is not True or format is None or nested is not True or storage not in (None, "uint8"):
            raise UnsupportedModelError(
                f"{path.parent}: is already quantized (bitsandbytes); of that, bigq reads 4 bits (nf4, fp4) with double quantization, "
                "stored as uint8: give such a checkpoint, or the original model"
            )
        return cls(format)

    def scheme(self, name: str) -> QuantScheme:
        points = self.format.points
        return QuantScheme(bits=4, group_size=GROUP, symmetric=True, points=points, scale_form=self.format.scale_form)


def _dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, each in _DTYPES.items() if each == dtype), "float32")
