"""The ``compressed-tensors`` checkpoint format, variant "pack-quantized", as transformers and vLLM read it.

For a Linear X with K inputs, N outputs, G groups and b bits:

    X.weight_packed       int32 [N, K·b/32]        codes packed along K
    X.weight_scale        [N, G]                   dtype of the original weight
    X.weight_shape        int64 [2]                N, K
    X.weight_zero_point   int32 [⌈N·b/32⌉, G]      zero points packed along N; asymmetric schemes only
    X.weight_g_idx        int32 [K]                never written; accepted if groups are in natural order

Experts whose gate and up are one Linear have the names that vLLM gives to those of gpt_oss: ``experts.3.w13_weight_packed``. Their prefix
ends with the underscore. Only ``experts.3.w13.weight_shape`` has a dot: vLLM does not need it, and fails on a name with w13_weight in it
that it does not know.

Codes of 3 bits are packed as one bit stream, which the compressed-tensors package reads since version 0.18.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UnsupportedModelError, UsageError
from bigq.io.formats.base import Format, PackedLinear, PackedWeight, Quantization, bank_of, module_of, natural_groups, require_tensor
from bigq.io.formats.gptq import check_scales, escaped
from bigq.io.index import TensorInfo
from bigq.io.json_file import show_name, show_value
from bigq.io.reader import read_tensor
from bigq.kernels.pack import pack_any, unpack_any, whole_words, words_for
from bigq.scheme import BITS, QuantScheme, Rule

#: The target for all experts.
EXPERTS = r"re:.*\.experts\.\d+\."
#: Maximum number of targets, and of names to ignore, in a config.
MAX_NAMES = 1_000_000
#: Maximum number of patterns among them. Each may be matched against every Linear.
MAX_PATTERNS = 1000
#: Values of ``actorder``, and whether the order of groups is then stored in ``weight_g_idx``.
_ORDERS: Mapping[str, bool] = {"static": False, "weight": False, "group": True, "dynamic": True}
#: Names of the tensors of experts whose gate and up are one Linear, as prefix and suffix; and of that Linear.
_JOINED = re.compile(r"(.+\.experts\.\d+\.w(?:13|2)_)(weight_packed|weight_scale|weight_zero_point)")
_W13 = re.compile(r"(.+)\.\d+\.w13")
#: Values of ``quantization_status`` for packed tensors. Older writers used "frozen".
_STATUSES = (None, "compressed", "frozen")


class CompressedTensors(Format):
    """If Linears have different schemes, the config has one group per scheme, which lists its Linears by name, and experts by a pattern.

    A group with the target "Linear" would be wrong there: for a fused Linear, vLLM matches the fused name, then the class, and only
    then the names of the parts.
    """

    name = tag = "compressed-tensors"
    mark = "weight_packed"
    zeros = "weight_zero_point"
    symmetric_key = "symmetric"
    spare: ClassVar[tuple[str, ...]] = ("weight_g_idx",)
    takes_transposed = False
    takes_joined = True
    scales_as_weights = True
    #: Whether ``weight_g_idx`` must be present and show that groups are in natural order.
    requires_g_idx: ClassVar[bool] = False

    def suffixes(self, symmetric: bool) -> tuple[str, ...]:
        always = ("weight_packed", "weight_scale", "weight_shape")
        return always if symmetric else (*always, "weight_zero_point")

    def tensor(self, prefix: str, suffix: str) -> str:
        if prefix.endswith("_") and suffix != "weight_shape":
            return prefix + suffix
        return f"{module_of(prefix)}.{suffix}"

    def split(self, name: str) -> tuple[str, str]:
        joined = _JOINED.fullmatch(name)
        return super().split(name) if joined is None else (joined[1], joined[2])

    def store(self, prefix: str, stored: PackedWeight, scheme: QuantScheme, dtype: torch.dtype) -> dict[str, Tensor]:
        words, scales, zeros = stored
        if scheme.symmetric and bool((zeros != 2 ** (scheme.bits - 1)).any()):
            raise ValueError(f"{prefix}: a zero point is not {2 ** (scheme.bits - 1)}, so the scheme is not symmetric")
        exact = scales.to(dtype)
        if not torch.equal(exact.to(scales.dtype), scales):
            raise UsageError(
                f"{prefix}: its scales are not exact in {dtype}, the dtype of scales in {self.name}; quantize the original model "
                f"with --format {self.name} or with --scale-bits 8"
            )
        tensors = {
            self.tensor(prefix, "weight_packed"): words.T.contiguous(),
            self.tensor(prefix, "weight_scale"): exact.contiguous(),
            self.tensor(prefix, "weight_shape"): torch.tensor([words.shape[1], words.shape[0] * 32 // scheme.bits], dtype=torch.int64),
        }
        if not scheme.symmetric:
            tensors[self.tensor(prefix, "weight_zero_point")] = pack_any(zeros, scheme.bits)
        return tensors

    def multiples(self, bits: int) -> tuple[int, int]:
        # Readers take any number of inputs. Packed words in memory are whole, which group sizes, multiples of 8, need at 4 and 8 bits only.
        return 1, whole_words(bits)

    def layout(
        self, prefix: str, linear: PackedLinear, symmetric: bool, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        m, n, groups, bits = linear.outputs, linear.inputs, linear.groups, linear.bits
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            self.tensor(prefix, "weight_packed"): (torch.int32, (m, n * bits // 32)),
            self.tensor(prefix, "weight_scale"): (dtype, (m, groups)),
            self.tensor(prefix, "weight_shape"): (torch.int64, (2,)),
        }
        zeros = (torch.int32, (words_for(m, bits), groups))
        return tensors if symmetric else {**tensors, self.tensor(prefix, "weight_zero_point"): zeros}

    def read(self, prefix: str, get: Callable[[str], Tensor], scheme: QuantScheme) -> PackedWeight:
        bits = scheme.bits
        packed, scales, shape = (get(self.tensor(prefix, name)) for name in self.suffixes(True))
        if packed.ndim != 2 or scales.ndim != 2 or packed.shape[1] * 32 % bits or len(packed) != len(scales):
            raise CheckpointError(f"{prefix}: weight_packed and weight_scale are not matrices of packed {bits}-bit codes and scales")
        (m, groups), n = scales.shape, packed.shape[1] * 32 // bits
        if shape.tolist() != [m, n] or not groups or n % groups:
            raise CheckpointError(f"{prefix}: weight_packed, weight_scale and weight_shape do not match")
        if scheme.symmetric:
            zeros = torch.full((m, groups), 2 ** (bits - 1), dtype=torch.uint8, device=packed.device)
        else:
            words = get(self.tensor(prefix, "weight_zero_point"))
            if words.shape != (words_for(m, bits), groups):
                raise CheckpointError(f"{prefix}: the shapes of weight_zero_point and weight_scale do not match")
            zeros = unpack_any(words, bits, m)
        return PackedWeight(packed.T, scales, zeros)

    def geometry(self, prefix: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
        packed, scales, shape = (require_tensor(tensors, self.tensor(prefix, suffix)) for suffix in self.suffixes(True))
        zeros = tensors.get(self.tensor(prefix, "weight_zero_point"))
        wrong = CheckpointError(f"tensor {packed.name}: its shape or dtype does not match those of the tensors beside it")
        floats, integers = (torch.float16, torch.bfloat16, torch.float32), (torch.int64, torch.int32)
        if packed.dtype != torch.int32 or shape.dtype not in integers or scales.dtype not in floats or shape.shape != (2,):
            raise wrong
        if len(packed.shape) != 2 or len(scales.shape) != 2 or packed.shape[0] != scales.shape[0] or not scales.shape[1]:
            raise wrong
        if zeros is not None and (zeros.dtype != torch.int32 or len(zeros.shape) != 2 or zeros.shape[1] != scales.shape[1]):
            raise wrong
        # The number of bits follows from the number of inputs, which is stored as a value.
        m, n = read_tensor(shape).tolist()
        bits = packed.shape[1] * 32 // n if n > 0 else 0
        groups = scales.shape[1]
        if m != scales.shape[0] or bits not in BITS or packed.shape[1] * 32 != n * bits or n % groups:
            raise wrong
        if zeros is not None and zeros.shape[0] != words_for(m, bits):
            raise wrong
        self._require_natural(prefix, tensors, n, groups)
        return PackedLinear(bits=bits, outputs=m, inputs=n, groups=groups)

    def _require_natural(self, prefix: str, tensors: Mapping[str, TensorInfo], n: int, groups: int) -> None:
        """Raise UnsupportedModelError unless the groups of n inputs are known to be in natural order."""
        name = self.tensor(prefix, "weight_g_idx")
        remedy = "bigq reads only natural order; use a checkpoint that was quantized with actorder=static or without actorder"
        if name in tensors:
            order = tensors[name]
            fits = order.shape == (n,) and order.dtype in (torch.int32, torch.int64)
            if not fits or not torch.equal(read_tensor(order).to(torch.int32), natural_groups(n, groups)):
                raise UnsupportedModelError(f"tensor {name}: groups are not in natural order; {remedy}")
        elif self.requires_g_idx:
            raise UnsupportedModelError(f"tensor {name} is missing, but actorder says that groups are reordered; {remedy}")

    def values_per_check(self, suffix: str, info: TensorInfo) -> int:
        # Three rows of words hold whole 3-bit codes; only the last rows may be fewer. With other widths, any number of rows does.
        return 3 * info.shape[1] if suffix == "weight_zero_point" else 1

    def check_values(self, suffix: str, linear: PackedLinear, piece: Tensor, start: int) -> tuple[str | None, tuple[int, int] | None]:
        if suffix == "weight_scale":
            return check_scales(piece), None
        if suffix == "weight_zero_point":
            before = start // linear.groups * 32 // linear.bits
            words = piece.view(-1, linear.groups)
            codes = unpack_any(words, linear.bits, min(linear.outputs - before, len(words) * 32 // linear.bits))
            low, high = (int(extreme) for extreme in torch.aminmax(codes))
            return None, (low, high)
        return None, None

    def config(self, job: Quantization) -> dict[str, Any]:
        found: dict[tuple[int, int, bool], dict[str, None]] = {}
        joined = _joined_banks(job.packed)
        for name, scheme in job.packed.items():
            bank = name.rsplit(".", 2)[0]
            # vLLM looks for gate_proj, up_proj and down_proj of such experts, which have no Linears of these names.
            found.setdefault(_kind(scheme), {})[f"re:^{escaped(bank)}\\." if bank in joined else name] = None
        groups = {kind: list(targets) for kind, targets in found.items()}
        if len(groups) < 2:
            # By class. In vLLM the output head is not a "Linear", so it is named.
            targets = ["Linear"] if job.head is None else ["Linear", job.head]
            groups = dict.fromkeys(groups or [_kind(job.scheme)], targets)
        else:
            groups = {kind: _with_experts_by_pattern(names, groups) for kind, names in groups.items()}
        return {
            "quant_method": self.name,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": _config_group(kind, targets) for i, (kind, targets) in enumerate(groups.items())},
            # Fused experts of other parts have no name of their own here, so these parts are ignored as a whole too.
            "ignore": [*sorted(job.others), *(f"re:^{escaped(path)}(\\.|$)" for path in job.apart)],
            "kv_cache_scheme": None,
        }


def _joined_banks(names: Iterable[str]) -> set[str]:
    """The banks of the experts whose gate and up are one Linear, w13."""
    return {match[1] for name in names if (match := _W13.fullmatch(name)) is not None}


class CompressedTensorsGroupOrder(CompressedTensors):
    """The format with actorder "group": the weight_g_idx of each Linear gives the group of each input."""

    requires_g_idx = True


def _kind(scheme: QuantScheme) -> tuple[int, int, bool]:
    return scheme.bits, scheme.group_size, scheme.symmetric


def _with_experts_by_pattern(names: Sequence[str], groups: Mapping[Any, Sequence[str]]) -> list[str]:
    """The targets of one of the groups. If all experts have one scheme, a pattern stands for them, by which transformers finds it."""
    experts = [name for name in names if bank_of(name) is not None]
    alone = all(bank_of(name) is None for other in groups.values() if other is not names for name in other)
    return [*(name for name in names if bank_of(name) is None), EXPERTS] if experts and alone else list(names)


def _config_group(kind: tuple[int, int, bool], targets: list[str]) -> dict[str, Any]:
    bits, group_size, symmetric = kind
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


@dataclass(frozen=True, slots=True)
class CompressedTensorsSchemes:
    """A parsed quantization config; the JSON may come from other programs.

    groups: targets and scheme of each config group. ignore: names and patterns that are not packed.
    """

    path: Path
    groups: tuple[tuple[_Targets, QuantScheme], ...]
    ignore: _Targets
    format: Format

    @classmethod
    def read(cls, path: Path, config: Mapping[str, Any], format: Format) -> CompressedTensorsSchemes:
        """Parse the ``quantization_config`` of the config.json at ``path``. Raises CheckpointError."""
        if config.get("format") != "pack-quantized":
            raise _bad(
                path, f"format {show_value(config.get('format'))} is not supported; of compressed-tensors, bigq reads pack-quantized"
            )
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups or len(groups) > MAX_PATTERNS:
            raise _bad(path, f"config_groups {show_value(groups)} is not an object of 1 to {MAX_PATTERNS} groups")
        require_plain(path, config)
        if any(_requires_g_idx(path, group) for group in groups.values()):
            format = CompressedTensorsGroupOrder()
        return cls(
            path,
            tuple(
                (_Targets.read(path, f"{show_name(name)}.targets", _get(group, "targets")), _scheme(path, group))
                for name, group in groups.items()
            ),
            _Targets.read(path, "ignore", config.get("ignore") or []),
            format,
        )

    def scheme(self, name: str) -> QuantScheme:
        if self.ignore.match(name):
            raise CheckpointError(f"{self.path}: {name} is packed, but the quantization config ignores it; fetch the model again")
        for by_name in (True, False):
            for targets, scheme in self.groups:
                if targets.match(name) if by_name else targets.linears:
                    return scheme
        raise CheckpointError(f"{self.path}: {name} is packed, but no group of the quantization config contains it; fetch the model again")


@dataclass(frozen=True, slots=True)
class _Targets:
    """Names and patterns of Linears. linears: whether the class "Linear" is a target, which matches all of them."""

    names: frozenset[str]
    patterns: tuple[str, ...]
    linears: bool

    @classmethod
    def read(cls, path: Path, what: str, value: Any) -> _Targets:
        if not isinstance(value, list) or len(value) > MAX_NAMES or not all(isinstance(name, str) for name in value):
            raise _bad(path, f"{what} is {show_value(value)}, not a list of names")
        patterns = [name.removeprefix("re:") for name in value if name.startswith("re:")]
        if len(patterns) > MAX_PATTERNS:
            raise _bad(path, f"{what} has {len(patterns)} patterns, more than {MAX_PATTERNS}")
        try:
            for pattern in patterns:
                Rule(pattern, None)
        except UsageError as error:
            raise _bad(path, f"{what}: {show_name(str(error))}") from None
        return cls(frozenset(value), tuple(patterns), "Linear" in value)

    def match(self, name: str) -> bool:
        return name in self.names or any(re.match(pattern, name) for pattern in self.patterns)


def _get(group: Any, key: str) -> Any:
    return group.get(key) if isinstance(group, dict) else None


def require_plain(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if weights are more than codes, scales and zero points (sparse, transformed, not compressed).

    ``kv_cache_scheme`` concerns only the cache and is ignored.
    """
    status, sparsity, transform = (config.get(key) for key in ("quantization_status", "sparsity_config", "transform_config"))
    if status not in _STATUSES:
        raise _bad(path, f"quantization_status is {show_value(status)}; bigq reads only compressed weights")
    if sparsity and _get(sparsity, "format") != "dense":
        raise _bad(path, f"sparsity_config is {show_value(sparsity)}; bigq reads only dense weights")
    if transform and (not isinstance(transform, dict) or any(transform.values())):
        raise _bad(path, "transform_config is set; bigq does not read transformed weights")


def _requires_g_idx(path: Path, group: Any) -> bool:
    """Whether the order of groups is stored in ``weight_g_idx``."""
    order = _get(_get(group, "weights"), "actorder")
    if order is None or isinstance(order, bool):
        return bool(order)
    if not isinstance(order, str) or order.lower() not in _ORDERS:
        raise _bad(path, f"actorder {show_value(order)} is not one of {', '.join(_ORDERS)}")
    return _ORDERS[order.lower()]


def _scheme(path: Path, group: Any) -> QuantScheme:
    weights = _get(group, "weights")
    bits, size, symmetric, strategy = (_get(weights, key) for key in ("num_bits", "group_size", "symmetric", "strategy"))
    if _get(weights, "type") != "int" or strategy not in ("group", "channel") or type(bits) is not int or type(symmetric) is not bool:
        raise _bad(path, f"weights {show_value(weights)} are not supported; bigq reads integers with strategy group or channel")
    if _get(weights, "dynamic"):
        raise _bad(path, f"weights {show_value(weights)} are dynamic; bigq reads only static weights")
    if _get(group, "format") not in (None, "pack-quantized"):
        raise _bad(path, f"the format of a group is {show_value(_get(group, 'format'))}; of compressed-tensors, bigq reads pack-quantized")
    if _get(group, "input_activations") is not None or _get(group, "output_activations") is not None:
        raise _bad(path, "activations are quantized; bigq reads only weight-only quantization")
    if strategy == "group" and type(size) is not int:
        raise _bad(path, f"group_size is {show_value(size)}, not an integer")
    try:
        return QuantScheme(bits=bits, group_size=-1 if strategy == "channel" else size, symmetric=symmetric)
    except UsageError as error:
        raise _bad(path, str(error)) from None


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: quantization_config: {what}; fetch it again, or give the unquantized model as MODEL")
