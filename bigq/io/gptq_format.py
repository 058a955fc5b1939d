"""The ``gptq`` checkpoint format (v1 and v2): tensors, their packing, and the config that readers look for.

For a Linear X with K inputs, N outputs, G groups and b bits:

    X.qweight  int32 [K·b/32, N]   codes packed down K
    X.qzeros   int32 [G, N·b/32]   zero points packed along N; v1 stores zero − 1, v2 the zero itself
    X.scales   fp16  [G, N]
    X.g_idx    int32 [K]           the group of each input, natural order
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bigq.errors import CheckpointError, UsageError
from bigq.kernels.pack import pack, unpack
from bigq.scheme import QuantizedWeight, QuantScheme, Rule

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
ALIGNMENT = 32


def require_packable(name: str, m: int, n: int, scheme: QuantScheme) -> None:
    """Raise UsageError, naming the Linear, where its shape does not fit the format or the group size."""
    if m % ALIGNMENT or n % ALIGNMENT:
        raise UsageError(f"{name} is {m} × {n}, but the format packs multiples of {ALIGNMENT}; leave it out with --skip '{name}$'")
    if scheme.group_size != -1 and n % scheme.group_size:
        raise UsageError(
            f"{name} has {n} inputs, which group size {scheme.group_size} does not divide; choose another --group-size, "
            f"or give it its own with --rule '{name}$:group_size=…' (-1 always fits)"
        )


def pack_linear(prefix: str, weight: QuantizedWeight, version: int) -> dict[str, Tensor]:
    """The tensors that stand for ``prefix.weight``; version is 1 or 2."""
    bits = weight.scheme.bits
    groups = weight.scales.shape[1]
    n = weight.codes.shape[1]
    if version == 1 and bool((weight.zeros == 0).any()):
        raise ValueError(f"{prefix}: a zero point of 0 cannot be stored in format v1; solve with min_zero=1")
    zeros = weight.zeros if version == 2 else weight.zeros - 1
    return {
        f"{prefix}.qweight": pack(weight.codes.T, bits),
        f"{prefix}.qzeros": pack(zeros, bits).T.contiguous(),
        f"{prefix}.scales": weight.scales.T.contiguous(),
        f"{prefix}.g_idx": (torch.arange(n, device=weight.codes.device) // (n // groups)).to(torch.int32),
    }


def read_linear(prefix: str, get: Callable[[str], Tensor], bits: int, version: int) -> tuple[Tensor, Tensor, Tensor]:
    """(words int32 [K·b/32, N], scales fp16 [N, G], zeros uint8 [N, G]) from the tensors that ``get`` returns by name.

    Raises CheckpointError where shapes disagree or groups are not in natural order.
    """
    qweight, qzeros, scales = (get(f"{prefix}.{name}") for name in ("qweight", "qzeros", "scales"))
    if any(t.ndim != 2 for t in (qweight, qzeros, scales)) or qweight.shape[0] * 32 % bits or qzeros.shape[1] * 32 % bits:
        raise CheckpointError(f"{prefix}: qweight, qzeros or scales is not a matrix of {bits}-bit codes in whole words")
    zeros = unpack(qzeros.T.contiguous(), bits)
    if version == 1:
        zeros = zeros + 1
    k, n, groups = qweight.shape[0] * 32 // bits, qweight.shape[1], scales.shape[0]
    if n != scales.shape[1] or zeros.shape != (n, groups) or not groups or k % groups:
        raise CheckpointError(f"{prefix}: qweight, qzeros and scales have shapes that do not belong together")
    g_idx = get(f"{prefix}.g_idx")
    if not torch.equal(g_idx.long(), torch.arange(k, device=g_idx.device) // (k // groups)):
        raise CheckpointError(f"{prefix}: its groups are not in natural order (desc_act without static groups), which bigq does not read")
    return qweight, scales.T, zeros


def quantization_config(
    scheme: QuantScheme, rules: tuple[Rule, ...], version: int, left_out: tuple[str, ...], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """``config.json["quantization_config"]``, also written as ``quantize_config.json``.

    left_out: module names of Linears inside blocks that stay unquantized although no rule says so.
    Overrides per module go into ``dynamic``, first match first, as GPTQModel and vLLM read it.
    """
    dynamic: dict[str, dict[str, Any]] = {f"-:^{_escape(name)}$": {} for name in left_out}
    for rule in rules:
        if rule.overrides is None:
            dynamic.setdefault(f"-:{rule.pattern}", {})
        else:
            said = {k: v for k, v in rule.overrides.items() if k in ("bits", "group_size", "sym")}
            dynamic.setdefault(f"+:{rule.pattern}", said)
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "static_groups": scheme.act_order,
        "lm_head": False,
        "pack_dtype": "int32",
        "damp_percent": scheme.damping,
        "dynamic": dynamic,
        "meta": dict(meta),
    }


def _escape(name: str) -> str:
    return name.replace(".", r"\.")
