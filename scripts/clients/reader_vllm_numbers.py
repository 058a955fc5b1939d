#!/usr/bin/env python3
"""``reader_vllm.py`` for the formats nvfp4, mxfp4, fp8, fp8-block and w8a8-int8: their Linears and experts are unpacked instead of
repacked for a kernel.

    reader_vllm_numbers.py RESULTS FOLDER…
"""

from __future__ import annotations

from typing import Any

import reader_vllm as base
import torch
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_mxfp4 as mxfp4_experts
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4 as nvfp4_experts
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_fp8 as fp8_experts
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 as int8_experts
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_mxfp4 as mxfp4
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_nvfp4 as nvfp4
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 as fp8
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_int8 as int8
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

#: The numbers of E2M1 by their four bits.
NUMBERS = torch.tensor([sign * size for sign in (1, -1) for size in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])


def weight_of(packed: Tensor, scales: Tensor, factor: Tensor | float) -> Tensor:
    """fp32 [N, K] from bytes [N, K/2], the first number in the low half, and scales [N, G]: E4M3, or exponents as bytes."""
    numbers = NUMBERS[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()]
    wide = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    return (numbers.unflatten(-1, (scales.shape[-1], -1)) * (wide * factor)[..., None]).flatten(-2)


class Unpacking:
    """Stands in for a kernel of 4-bit Linears. Leaves the weight as ``unpacked``; the layer has turned the global scale into a factor."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.unpacked = weight_of(layer.weight.data, layer.weight_scale.data, getattr(layer, "weight_global_scale", 1.0))

    def input_quant_key(self) -> None:
        return None


def unpack_experts(method: Any, layer: nn.Module) -> None:
    """Stands in for the repacking of experts: leaves the weights of w13 and w2 as ``unpacked``, [experts, N, K] each."""
    layer.unpacked = {}
    for name in base.MATRICES:
        packed, scales = (getattr(layer, f"{name}_{part}").data for part in ("weight_packed", "weight_scale"))
        whole = getattr(layer, f"{name}_weight_global_scale", torch.ones(len(packed)))
        # vLLM takes that of the first part for both.
        factors = 1 / whole.data.view(len(packed), -1)[:, :1, None]
        layer.unpacked[name] = weight_of(packed, scales, factors)


def scaled(numbers: Tensor, scales: Tensor) -> Tensor:
    """fp32 [..., N, K] from numbers and scales [..., N, 1], or one scale for each block of 128 × 128."""
    n, k = numbers.shape[-2:]
    wide = scales.float()
    if wide.shape[-2:] != (n, 1):
        wide = wide.repeat_interleave(128, -2)[..., :n, :].repeat_interleave(128, -1)[..., :k]
    return numbers.float() * wide


def unpack_eight_bits(scheme: Any, layer: nn.Module) -> None:
    """Stands in for the last step of a Linear of 8 bits: leaves the weight as ``unpacked``."""
    layer.unpacked = scaled(layer.weight.data, layer.weight_scale.data)


def unpack_experts_of_eight_bits(method: Any, layer: nn.Module) -> None:
    layer.unpacked = {
        name: scaled(getattr(layer, f"{name}_weight").data, getattr(layer, f"{name}_weight_scale").data) for name in base.MATRICES
    }


def main() -> None:
    nvfp4.init_nvfp4_linear_kernel = lambda **_: Unpacking()
    mxfp4.init_mxfp4_linear_kernel = lambda **_: Unpacking()
    nvfp4_experts.select_nvfp4_moe_backend = lambda **_: (NvFp4MoeBackend.MARLIN, MarlinExperts)
    for method in (nvfp4_experts.CompressedTensorsW4A4Nvfp4MoEMethod, mxfp4_experts.CompressedTensorsW4A4Mxfp4MoEMethod):
        method.process_weights_after_loading = unpack_experts
    fp8.init_fp8_linear_kernel = lambda **_: Unpacking()
    fp8.CompressedTensorsW8A8Fp8.process_weights_after_loading = unpack_eight_bits
    int8.CompressedTensorsW8A8Int8.process_weights_after_loading = unpack_eight_bits
    fp8_experts.select_fp8_moe_backend = lambda *_, **__: (None, None)
    int8_experts.select_int8_moe_backend = lambda *_, **__: (None, None)
    for method in (fp8_experts.CompressedTensorsW8A8Fp8MoEMethod, int8_experts.CompressedTensorsW8A8Int8MoEMethod):
        method.process_weights_after_loading = unpack_experts_of_eight_bits
    base.main()


if __name__ == "__main__":
    main()
