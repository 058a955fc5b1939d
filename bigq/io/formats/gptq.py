"""The ``gptq`` checkpoint format (v1 and v2), as transformers, vLLM, SGLang, TGI and ExLlama read it.

For a Linear X with K inputs, N outputs, G groups and b bits:

    X.qweight  int32 [K·b/32, N]   codes packed down K
    X.qzeros   int32 [G, N·b/32]   zero points packed along N; v1 stores zero − 1, v2 the zero itself
    X.scales   fp16  [G, N]
    X.g_idx    int32 [K]           the group of each input, in natural order
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UsageError
from bigq.io.formats.base import Format, PackedLinear, PackedWeight, Quantization, natural_groups, require_tensor
from bigq.io.index import TensorInfo
from bigq.kernels.finiteness import is_finite
from bigq.kernels.pack import pack, unpack
from bigq.scheme import BITS, QuantScheme


class Gptq(Format):
    """Version 1: zero points are stored minus one, so a zero point of 0 is impossible."""

    name = tag = "gptq"
    mark = "qweight"
    zeros = "qzeros"
    symmetric_key = "sym"
    min_zero = 1
    config_file = "quantize_config.json"
    #: Added to zero points when they are stored.
    shift = -1

    def suffixes(self, symmetric: bool) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales", "g_idx")

    def store(self, prefix: str, stored: PackedWeight, scheme: QuantScheme, dtype: torch.dtype) -> dict[str, Tensor]:
        words, scales, zeros = stored
        if bool((zeros < self.min_zero).any()):
            raise ValueError(f"{prefix}: format gptq (v1) cannot store a zero point of 0; solve with min_zero=1")
        n, groups = words.shape[0] * 32 // scheme.bits, scales.shape[1]
        half = require_half(prefix, scales, self.name)
        return {
            f"{prefix}.qweight": words.contiguous(),
            f"{prefix}.qzeros": pack(zeros + self.shift, scheme.bits).T.contiguous(),
            f"{prefix}.scales": half.T.contiguous(),
            f"{prefix}.g_idx": natural_groups(n, groups, words.device),
        }

    def layout(
        self, prefix: str, linear: PackedLinear, symmetric: bool, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        m, n, groups, bits = linear.outputs, linear.inputs, linear.groups, linear.bits
        return {
            f"{prefix}.qweight": (torch.int32, (n * bits // 32, m)),
            f"{prefix}.qzeros": (torch.int32, (groups, m * bits // 32)),
            f"{prefix}.scales": (torch.float16, (groups, m)),
            f"{prefix}.g_idx": (torch.int32, (n,)),
        }

    def read(self, prefix: str, get: Callable[[str], Tensor], scheme: QuantScheme) -> PackedWeight:
        bits = scheme.bits
        qweight, qzeros, scales, g_idx = (get(f"{prefix}.{name}") for name in self.suffixes(scheme.symmetric))
        if any(t.ndim != 2 for t in (qweight, qzeros, scales)) or qweight.shape[0] * 32 % bits or qzeros.shape[1] * 32 % bits:
            raise CheckpointError(f"{prefix}: qweight, qzeros and scales are not matrices of packed {bits}-bit codes and scales")
        zeros = unpack(qzeros.T.contiguous(), bits) - self.shift
        k, n, groups = qweight.shape[0] * 32 // bits, qweight.shape[1], scales.shape[0]
        if n != scales.shape[1] or zeros.shape != (n, groups) or not groups or k % groups:
            raise CheckpointError(f"{prefix}: the shapes of qweight, qzeros and scales do not match")
        if not torch.equal(g_idx.to(torch.int32), natural_groups(k, groups, g_idx.device)):
            raise CheckpointError(
                f"{prefix}: groups are not in natural order (desc_act without static_groups); bigq reads only natural order"
            )
        return PackedWeight(qweight, scales.T, zeros)

    def geometry(self, prefix: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
        parts = [require_tensor(tensors, f"{prefix}.{suffix}") for suffix in self.suffixes(True)]
        qweight, qzeros, scales, g_idx = parts
        wrong = CheckpointError(f"tensor {prefix}.qweight: its shape or dtype does not match those of qzeros, scales and g_idx")
        if [t.dtype for t in parts] != [torch.int32, torch.int32, torch.float16, torch.int32] or [len(t.shape) for t in parts] != [
            2,
            2,
            2,
            1,
        ]:
            raise wrong
        m, n, groups = qweight.shape[1], g_idx.shape[0], scales.shape[0]
        for bits in BITS:
            if min(m, n, groups) and not n % groups and qweight.shape[0] * 32 == n * bits:
                if scales.shape == (groups, m) and qzeros.shape[0] == groups and qzeros.shape[1] * 32 == m * bits:
                    return PackedLinear(bits=bits, outputs=m, inputs=n, groups=groups)
                raise wrong
        raise wrong

    def values_per_check(self, suffix: str, info: TensorInfo) -> int:
        return info.shape[1] if suffix == "qzeros" else 1

    def check_values(self, suffix: str, linear: PackedLinear, piece: Tensor, start: int) -> tuple[str | None, tuple[int, int] | None]:
        if suffix == "scales":
            return check_scales(piece), None
        if suffix == "qzeros":
            return self._check_zeros(linear, piece)
        if suffix == "g_idx":
            natural = torch.arange(start, start + len(piece)) // (linear.inputs // linear.groups)
            return None if torch.equal(piece.long(), natural) else "is not in natural order", None
        # Every word of qweight is valid, with 3 bits too: 32 codes fill three words.
        return None, None

    def _check_zeros(self, linear: PackedLinear, words: Tensor) -> tuple[str | None, tuple[int, int]]:
        """Zero points must be codes. In v1 the maximum stored value means zero point 2**bits, which is not a code."""
        stored = unpack(words.view(-1, linear.outputs * linear.bits // 32).T.contiguous(), linear.bits)
        low, high = (int(extreme) - self.shift for extreme in torch.aminmax(stored))
        wrong = None if high < 2**linear.bits else f"holds zero point {high}, which is above the maximum of {linear.bits} bits"
        return wrong, (low, high)

    def config(self, job: Quantization) -> dict[str, Any]:
        """Overrides per module are written to ``dynamic``. GPTQModel and vLLM apply the first match.

        Modules beside the model's own are excluded by path: vLLM looks fused Linears up by their fused name only.
        """
        dynamic: dict[str, dict[str, Any]] = excluded(job)
        for rule in job.rules:
            if rule.overrides is None:
                dynamic.setdefault(f"-:{rule.pattern}", {})
            else:
                overrides = {k: v for k, v in rule.overrides.items() if k in ("bits", "group_size", "sym")}
                dynamic.setdefault(f"+:{rule.pattern}", overrides)
        scheme = job.scheme
        # optimum needs this list if some Linears of the blocks are unquantized; vLLM, for modules that it renames.
        skips = bool(job.left_out or job.outside or job.apart) or any(rule.overrides is None for rule in job.rules)
        module_list = {"modules_in_block_to_quantize": [sorted(job.packed)]} if skips and job.packed else {}
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "sym": scheme.symmetric,
            "desc_act": False,
            "static_groups": scheme.order == "activation",
            "lm_head": job.head is not None,
            "pack_dtype": "int32",
            "damp_percent": scheme.damping,
            "dynamic": dynamic,
            **module_list,
            "meta": dict(job.meta),
        }


class GptqV2(Gptq):
    """Version 2: zero points are stored unchanged."""

    name = "gptq_v2"
    min_zero = 0
    shift = 0


def excluded(job: Quantization) -> dict[str, dict[str, Any]]:
    """The entries of ``dynamic`` for modules beside the model's own, by path, and for those that no rule skips, by name."""
    dynamic: dict[str, dict[str, Any]] = {f"-:^{escaped(path)}(\\.|$)": {} for path in job.apart}
    return dynamic | {f"-:^{escaped(name)}$": {} for name in (*job.outside, *job.left_out)}


def escaped(name: str) -> str:
    """A module name as a regular expression. ``re.escape`` would also escape characters that need it in no dialect."""
    return re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", name)


def require_half(prefix: str, scales: Tensor, format: str) -> Tensor:
    """Scales in fp16. Raises UsageError if they are not exact there."""
    half = scales.to(torch.float16)
    if not torch.equal(half.to(scales.dtype), scales):
        raise UsageError(
            f"{prefix}: its scales are not exact in fp16, the dtype of scales in {format}; keep the model in its present format"
        )
    return half


def check_scales(piece: Tensor) -> str | None:
    """What is wrong with some scales, or None."""
    if not is_finite(piece):
        return "holds NaN or Inf"
    # A group of zeros has scale 1, and scales that would round to 0 become the smallest fp16 number. A scale may be negative.
    return None if bool(piece.ne(0).all()) else "holds a scale of 0"
