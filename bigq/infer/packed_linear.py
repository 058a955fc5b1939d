"""A Linear whose weight stays packed, for generation with a quantized model. Knows nothing of checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigq.kernels.dequant_matvec import MAX_VECTORS, dequant_matvec
from bigq.kernels.dequantize import dequantize_packed
from bigq.kernels.grid_spec import PointsName
from bigq.kernels.pick import use_triton


class PackedLinear(nn.Module):
    """``x·Wᵀ + bias`` for W [m, n] of ``bits`` bits. points: what codes stand for.

    words: int32 [n·bits/32, m], codes packed along n. scales: [m, G], fp16 for the kernel; zeros: uint8 [m, G]. bias: [m] or None.
    On a GPU a kernel multiplies few vectors with the packed words of integers. For codebooks, for
    more vectors, and on a CPU, W is dequantized to x's type each time.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, words: Tensor, scales: Tensor, zeros: Tensor, bits: int, bias: nn.Parameter | None, points: PointsName = "int"
    ) -> None:
        super().__init__()
        self.bits, self.points = bits, points
        self.in_features, self.out_features = words.shape[0] * 32 // bits, words.shape[1]
        # One row per group, as the kernel reads them.
        for name, tensor in (("words", words.contiguous()), ("scales", scales.T.contiguous()), ("zeros", zeros.T.contiguous())):
            self.register_buffer(name, tensor, persistent=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[…, n] → […, m], in x's type."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= MAX_VECTORS and self._has_kernel(x.dtype) and use_triton(x):
            y = dequant_matvec(rows.contiguous(), self.words, self.scales, self.zeros, self.bits)
            y = y if self.bias is None else y + self.bias
        else:
            y = nn.functional.linear(rows, self.weight(x.dtype), self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _has_kernel(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.float16, torch.bfloat16) and self.scales.dtype == torch.float16 and self.points == "int"

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W [m, n], dequantized at each call."""
        return dequantize_packed(self.words, self.scales.T, self.zeros.T, self.bits, dtype, self.points)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, bias={self.bias is not None}"
