"""Compares the folder that a job wrote with its source, tensor by tensor; shares no code with bigq.

Packed Linears are decoded by the definitions of the formats ``gptq``, ``gptq_v2`` and ``compressed-tensors`` (pack-quantized). Experts that
the source stores as one tensor are separate matrices in the output; each is looked for in that tensor by its values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

#: The largest difference of a weight that is rounded to nearest, in steps of its grid: half a step, and the rounding of the scale.
STEPS = 0.6
#: The largest norm of the difference, as a share of the weight's, for weights that are not rounded to nearest.
SHARE = 0.6
_PACKED = re.compile(r"(.+?)[._](weight_packed|qweight)")
#: The name of one expert's matrix or bias, as bigq's output has it.
_EXPERT = re.compile(r"(.+)\.(\d+)\.(\w+?)(?:[._]bias)?")


@dataclass(frozen=True)
class Decoded:
    """A packed Linear. weight, step: fp32 [N, K]; step is the size of the grid's step at each weight."""

    weight: Tensor
    step: Tensor


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, by name."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def compare_output(source: Path, out: Path, *, rounded: bool) -> dict[str, Any]:
    """How an output agrees with its source: "right", or "different" with the reason.

    rounded: whether each weight was rounded to nearest, so that it is within a step of its grid. Every tensor of the source must be in the
    output, packed or as it was, and nothing else may be.
    """
    before, after = stored(source), stored(out)
    packing = json.loads((out / "config.json").read_text())["quantization_config"]
    packed = decoded(after, packing)
    own = {name for prefix in packed for name in _own_names(after, prefix)}
    plain = {name: tensor for name, tensor in after.items() if name not in own}
    cover = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in before.items()}
    largest = widest = 0.0
    for prefix, one in packed.items():
        steps, share = _find(prefix, one, before, cover, rounded)
        largest, widest = max(largest, steps), max(widest, share)
        if steps < 0:
            return {"result": "different", "reason": f"{prefix} is not what its source holds"}
    for name, tensor in plain.items():
        exact = name in before and before[name].dtype == tensor.dtype and _same(before[name], tensor)
        if exact:
            cover[name][...] = True
        elif name in before or _find(name, Decoded(tensor, torch.zeros(())), before, cover, True)[0] < 0:
            return {"result": "different", "reason": f"{name} is not what its source holds"}
    missing = [name for name, mask in cover.items() if not mask.all()]
    if missing:
        return {"result": "different", "reason": f"{missing[0]} is not in the output"}
    return {"result": "right", "format": packing.get("checkpoint_format", packing["quant_method"]), "linears": len(packed)} | (
        {"largest_steps": round(largest, 4)} if rounded else {"largest_share": round(widest, 4)}
    )


def _turned(x: Tensor, turned: bool) -> Tensor:
    return x.T if turned else x


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _own_names(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[str]:
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "qweight", "qzeros", "scales", "g_idx")
    return (name for dot in "._" for suffix in suffixes if (name := f"{prefix}{dot}{suffix}") in tensors)


def decoded(tensors: Mapping[str, Tensor], packing: Mapping[str, Any]) -> dict[str, Decoded]:
    """The packed Linears by their prefix."""
    found: dict[str, Decoded] = {}
    for name in tensors:
        match = _PACKED.fullmatch(name)
        if match is None:
            continue
        parts = {n.removeprefix(match[1])[1:]: tensors[n] for n in _own_names(tensors, match[1])}
        found[match[1]] = _gptq(parts, packing) if match[2] == "qweight" else _pack_quantized(parts)
    return found


def _pack_quantized(parts: Mapping[str, Tensor]) -> Decoded:
    """Codes along the inputs, symmetric: weight = scale · (code − 2^(bits−1))."""
    rows, columns = parts["weight_shape"].tolist()
    bits = parts["weight_packed"].shape[1] * 32 // columns
    codes = _unpacked(parts["weight_packed"], bits)
    step = parts["weight_scale"].float().repeat_interleave(columns // parts["weight_scale"].shape[1], dim=1)
    assert codes.shape == (rows, columns) and "weight_zero_point" not in parts
    return Decoded(step * (codes - 2 ** (bits - 1)), step)


def _gptq(parts: Mapping[str, Tensor], packing: Mapping[str, Any]) -> Decoded:
    """Words along the inputs, a column for each output; zero points are stored as they are (v2) or less 1."""
    bits, group = packing["bits"], parts["g_idx"].long()
    zeros = _unpacked(parts["qzeros"], bits) + (packing.get("checkpoint_format") != "gptq_v2")
    step = parts["scales"].float()[group].T
    return Decoded(step * (_unpacked(parts["qweight"].T, bits) - zeros[group].T), step)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [R, W] → numbers int64 [R, 32·W / bits], the lowest bits first. bits: a divisor of 32."""
    shifts = torch.arange(0, 32, bits)
    return ((words.long()[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)


def _find(name: str, one: Decoded, before: Mapping[str, Tensor], cover: Mapping[str, Tensor], rounded: bool) -> tuple[float, float]:
    """Find the piece of the source that a tensor of the output came from, and mark it in ``cover``.

    Returns the largest difference in steps, and the norm of the difference as a share; (−1, −1) if there is no such piece.
    """
    for stack, index in _pieces(name, one.weight, before):
        piece = index(before[stack])
        if piece.shape != one.weight.shape:
            continue
        difference = (piece.float() - one.weight.float()).abs()
        steps = float((difference / one.step).nan_to_num(0.0).max())
        share = float(difference.norm() / piece.float().norm().clamp_min(1e-30))
        if (steps <= STEPS if rounded else share <= SHARE) and not index(cover[stack]).any():
            index(cover[stack])[...] = True
            return steps, share
    return -1.0, -1.0


def _pieces(name: str, weight: Tensor, before: Mapping[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """Where the source may hold a tensor of the output, as the name of a tensor there and a view of it."""
    for own in (f"{name}.weight", name):
        if own in before:
            yield own, lambda t: t
            yield own, lambda t: t.T
            return
    match = _EXPERT.fullmatch(name)
    if match is None:
        return
    parent, number = match[1].rpartition(".")[0], int(match[2])  # the source may have another name for the bank
    for stack, tensor in before.items():
        if stack.startswith(f"{match[1]}.") and tensor.ndim == weight.ndim == 2 and len(tensor) > max(weight.shape):
            for turned in (False, True):  # the matrices of all experts, one behind the other
                rows = weight.shape[1] if turned else weight.shape[0]
                yield stack, lambda t, turned=turned, rows=rows: _turned(t[number * rows : (number + 1) * rows], turned)
        if stack.startswith(f"{parent}.") and tensor.ndim == weight.ndim + 1 and len(tensor) > number:
            for turned in (False, True) if weight.ndim == 2 else (False,):
                for part in (slice(None), slice(0, len(weight)), slice(len(weight), None), slice(0, None, 2), slice(1, None, 2)):
                    yield stack, lambda t, turned=turned, part=part: (t[number].T if turned else t[number])[part]
