"""Checkpoints whose weights are stored as fp8, int8 or fp4 numbers and scales, and the same models decoded by these formats' definitions.

The definitions are written out element by element in fp64, from what the formats' authors publish; nothing of bigq is used.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

#: Rows and columns that share a scale in blocks: neither divides the tiny models' matrices.
BLOCK = (24, 40)
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)

#: What a weight is stored as: name without ".weight" → its tensors, and the weight that they stand for.
Stored = tuple[dict[str, Tensor], Tensor]
Store = Callable[[str, Tensor, torch.Generator], Stored]


def _value(numbers: Tensor, scales: Tensor) -> Tensor:
    """Numbers times scales of the same shape: the product in fp32, then in bf16."""
    return (numbers.double() * scales.double()).float().to(torch.bfloat16)


def _spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of each element [m, n]."""
    rows, columns = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    return scales[rows[:, None], columns[None, :]]


def _blocks_of_fp8(name: str, weight: Tensor, generator: torch.Generator, *, e8m0: str | None = None) -> Stored:
    m, n = weight.shape
    grid = torch.zeros(math.ceil(m / BLOCK[0]), math.ceil(n / BLOCK[1]))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            part = weight[i * BLOCK[0] : (i + 1) * BLOCK[0], j * BLOCK[1] : (j + 1) * BLOCK[1]]
            grid[i, j] = part.float().abs().max() / 448
    stored: Tensor = grid
    if e8m0 is not None:
        exponents = grid.log2().ceil() + 127
        grid = torch.exp2(exponents - 127)
        stored = exponents.to(torch.uint8)
        stored = stored.view(torch.float8_e8m0fnu) if e8m0 == "dtype" else stored
    spread = _spread(grid, BLOCK, weight.shape)
    codes = (weight.float() / spread).to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": stored}, _value(codes, spread)


def _rows_of_fp8(name: str, weight: Tensor, generator: torch.Generator) -> Stored:
    scales = (weight.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (weight.float() / scales.float()).to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scales}, _value(codes, scales.expand_as(weight))


def _columns_of_fp8(name: str, weight: Tensor, generator: torch.Generator) -> Stored:
    """A parameter of all experts [experts, inputs, outputs]: a scale for each output."""
    scales = (weight.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (weight.float() / scales.float()).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scales}, _value(codes, scales.expand_as(weight))


def _rows_of_int8(name: str, weight: Tensor, generator: torch.Generator) -> Stored:
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    codes = (weight.float() / scales).round().to(torch.int8)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scales}, _value(codes, scales.expand_as(weight))


def _whole_fp8(name: str, weight: Tensor, generator: torch.Generator) -> Stored:
    scale = weight.float().abs().max() / 57344
    codes = (weight.float() / scale).to(torch.float8_e5m2)
    tensors = {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.tensor(0.02)}
    return tensors, _value(codes, scale.expand_as(weight))


def _whole_e4m3(name: str, weight: Tensor, generator: torch.Generator) -> Stored:
    scale = (weight.float().abs().max() / 448).to(torch.bfloat16)
    codes = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
    tensors = {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale, f"{name}.activation_scale": torch.tensor(0.02)}
    return tensors, _value(codes, scale.expand_as(weight))


def _random_halves(m: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bytes [m, n/2] and the numbers that they stand for, the first one in the low half."""
    codes = torch.randint(16, (m, n), generator=generator)
    return (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8), _E2M1[codes]


def _nvfp4(name: str, weight: Tensor, generator: torch.Generator, *, modelopt: bool) -> Stored:
    m, n = weight.shape
    halves, numbers = _random_halves(m, n, generator)
    scales = (0.5 + torch.rand(m, n // 16, generator=generator) * 400).to(torch.float8_e4m3fn)
    whole = torch.tensor(0.0001 if modelopt else 7001.0)
    own = scales.float() * whole if modelopt else scales.float() / whole
    value = _value(numbers, _spread(own, (1, 16), weight.shape))
    if modelopt:
        return {f"{name}.weight": halves, f"{name}.weight_scale": scales, f"{name}.weight_scale_2": whole}, value
    return {f"{name}.weight_packed": halves, f"{name}.weight_scale": scales, f"{name}.weight_global_scale": whole[None]}, value


def _mxfp4_packed(name: str, weight: Tensor, generator: torch.Generator) -> Stored:
    m, n = weight.shape
    halves, numbers = _random_halves(m, n, generator)
    exponents = torch.randint(119, 125, (m, n // 32), dtype=torch.uint8, generator=generator)
    own = torch.exp2(exponents.double() - 127)
    return {f"{name}.weight_packed": halves, f"{name}.weight_scale": exponents}, _value(numbers, _spread(own, (1, 32), weight.shape))


def _mxfp4_experts(name: str, weight: Tensor, generator: torch.Generator) -> Stored:
    """A parameter [experts, inputs, outputs], stored as [experts, outputs, inputs / 32, 16] bytes."""
    experts, n, m = weight.shape
    halves, numbers = _random_halves(experts * m, n, generator)
    exponents = torch.randint(119, 125, (experts, m, n // 32), dtype=torch.uint8, generator=generator)
    spread = torch.exp2(exponents.double() - 127).repeat_interleave(32, 2)
    value = _value(numbers.view(experts, m, n), spread).transpose(1, 2).contiguous()
    return {f"{name}_blocks": halves.view(experts, m, n // 32, 16), f"{name}_scales": exponents}, value


def _words(numbers: Tensor) -> Tensor:
    """4-bit numbers [k, n] as int32 words [k, n/8], the first number in the lowest bits."""
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int64)
    for place in range(8):
        words |= numbers[:, place::8].long() << (4 * place)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def _random_integers(m: int, n: int, group: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [m, n], fp16 scales and zero points [m, n/group]."""
    codes = torch.randint(16, (m, n), generator=generator)
    scales = (0.01 + torch.rand(m, n // group, generator=generator) / 20).half()
    return codes, scales, torch.randint(1, 16, (m, n // group), generator=generator)


def _gptq(name: str, weight: Tensor, generator: torch.Generator, *, ordered: bool) -> Stored:
    m, n = weight.shape
    codes, scales, zeros = _random_integers(m, n, 16, generator)
    groups = torch.arange(n) // 16
    groups = groups if ordered else groups[torch.randperm(n, generator=generator)]
    value = _value(codes - zeros[:, groups], scales[:, groups])
    tensors = {"qweight": _words(codes).T, "qzeros": _words(zeros.T - 1), "scales": scales.T, "g_idx": groups.int()}
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}, value


def _awq(name: str, weight: Tensor, generator: torch.Generator) -> Stored:
    """8 outputs in a word: its lowest bits hold output 0, the next ones output 2."""
    m, n = weight.shape
    codes, scales, zeros = _random_integers(m, n, 16, generator)
    order = torch.tensor([8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8] for i in range(m)])
    value = _value(codes - zeros.repeat_interleave(16, 1), scales.repeat_interleave(16, 1))
    tensors = {"qweight": _words(codes.T[:, order]), "qzeros": _words(zeros.T[:, order]), "scales": scales.T}
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}, value


def _packed_int4(name: str, weight: Tensor, generator: torch.Generator) -> Stored:
    """Symmetric: a code of 8 stands for 0."""
    m, n = weight.shape
    codes, scales, _ = _random_integers(m, n, 32, generator)
    scales = scales.to(torch.bfloat16)
    value = _value(codes - 8, scales.repeat_interleave(32, 1))
    tensors = {"weight_packed": _words(codes), "weight_scale": scales, "weight_shape": torch.tensor([m, n], dtype=torch.int32)}
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}, value


_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }
    },
}


def _compressed(format: str, strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(BLOCK)}

#: How weights are stored, and the quantization_config that says so.
STORAGES: Mapping[str, tuple[Store, dict[str, Any]]] = {
    "fp8 blocks": (_blocks_of_fp8, _FP8),
    "fp8 blocks, byte exponents": (lambda *given: _blocks_of_fp8(*given, e8m0="byte"), _FP8),
    "fp8 blocks, E8M0 exponents": (lambda *given: _blocks_of_fp8(*given, e8m0="dtype"), _FP8),
    "fp8 rows": (_rows_of_fp8, _compressed("float-quantized", "channel")),
    "fp8 rows of FBGEMM": (_rows_of_fp8, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "fp8 tensor": (_whole_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8 tensor of Mistral": (_whole_e4m3, {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    "int8 rows": (_rows_of_int8, _compressed("int-quantized", "channel")),
    "nvfp4": (lambda *given: _nvfp4(*given, modelopt=False), _compressed("nvfp4-pack-quantized", "tensor_group")),
    "nvfp4 of ModelOpt": (lambda *given: _nvfp4(*given, modelopt=True), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "mxfp4": (_mxfp4_packed, _compressed("mxfp4-pack-quantized", "group")),
    "gptq": (
        lambda *given: _gptq(*given, ordered=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False},
    ),
    "gptq, groups in any order": (
        lambda *given: _gptq(*given, ordered=False),
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True},
    ),
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}),
    "int4 experts": (_packed_int4, _INT4),
    "fp8 experts": (_columns_of_fp8, {"quant_method": "fbgemm_fp8"}),
    "mxfp4 experts": (_mxfp4_experts, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
}


def _is_stored_so(name: str, tensor: Tensor, storage: str) -> bool:
    """Whether a weight of a tiny model is quantized: Linears of blocks but routers, or parameters of experts. Towers are not."""
    if "vision" in name or "audio" in name:
        return False
    if storage in ("mxfp4 experts", "fp8 experts"):
        return tensor.ndim == 3
    if storage == "int4 experts":
        return ".experts." in name
    inside = ".layers." in name and (name.endswith("_proj.weight") or "kv_a_proj" in name)
    return tensor.ndim == 2 and inside


def coded_and_decoded(plain: Path, folder: Path, storage: str) -> tuple[Path, Path]:
    """A coded copy of a plain bf16 checkpoint, and the plain checkpoint of the same weights: two folders below ``folder``."""
    store, said = STORAGES[storage]
    generator = torch.Generator().manual_seed(1)
    coded, decoded = folder / "coded", folder / "decoded"
    for made in (coded, decoded):
        shutil.copytree(plain, made)
    changed = 0
    weight_map: dict[str, str] = {}
    for shard in sorted(path.name for path in plain.glob("*.safetensors")):
        tensors, values = {}, {}
        for name, tensor in load_file(plain / shard).items():
            if _is_stored_so(name, tensor, storage):
                parts, values[name] = store(name.removesuffix(".weight"), tensor, generator)
                tensors |= parts
                changed += 1
            else:
                tensors[name] = values[name] = tensor
        save_file({name: t.contiguous() for name, t in tensors.items()}, coded / shard, metadata={"format": "pt"})
        save_file(values, decoded / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    assert changed > 3, f"only {changed} weights are stored as {storage}"
    config = json.loads((plain / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    if (index := coded / "model.safetensors.index.json").exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return coded, decoded
