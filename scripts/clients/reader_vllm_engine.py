#!/usr/bin/env python3
"""Run bigq's output with vLLM's engine on a CPU, in the client's virtual environment without bigq.

    reader_vllm_engine.py RESULTS FOLDER…

Every folder and route is run by a process of its own. Route "engine": the log-probability of every token of the case's rows, given those
before it, in the case's dtype, and those of bigq's weights in fp32 (original_mean_diff: of the unquantized weights and these).
Route "repeated": the same, with the static scale of fp8 inputs repeated for each token where vLLM multiplies. Its kernel for CPUs takes
one for each token only, and fails with one for all. That vLLM reads the scale, and rounds inputs by it, stays its own.
Route "emulation": the same, with vLLM's own emulation for nvfp4 with rounded inputs, which it does not choose on a CPU.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    TORCHDYNAMO_DISABLE="1",
)

import torch
import vllm.model_executor.kernels.linear as linear_kernels
import vllm.model_executor.kernels.linear.scaled_mm.cpu as int8_on_cpu
import vllm.model_executor.kernels.linear.scaled_mm.pytorch as fp8_in_torch
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_nvfp4 as nvfp4
from safetensors import safe_open
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearLayerConfig
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.platforms import PlatformEnum

# vLLM's kernels for AMX take no fp32, and failed in fp16 on the machine of the results; oneDNN's take both.
int8_on_cpu.check_cpu_sgl_kernel = lambda *_: False
ROUTES = ("engine", "repeated", "emulation")


class PlainProduct(Fp8BlockScaledMMLinearKernel):
    """Stands in for the product of fp8 numbers in blocks, for which vLLM has CPU kernels with AMX only. vLLM itself rounds the inputs, and
    loads the weights and their scales."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
        n, k = B.shape
        weight = B.float() * Bs.float().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        return (A.float() * As.float().repeat_interleave(128, 1)[:, :k]) @ weight.T


linear_kernels._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] = [PlainProduct]

PACKAGES = ("vllm-cpu", "compressed-tensors", "transformers", "torch", "safetensors")


def repeat_scales() -> None:
    """Let the kernel for fp8 with a scale for each row of weights take one scale for all tokens."""
    kernel = fp8_in_torch.ChannelWiseTorchFP8ScaledMMLinearKernel
    multiply = kernel.apply_scaled_mm

    def with_repeated(self: Any, *, A: Tensor, As: Tensor, **more: Any) -> Tensor:
        return multiply(self, A=A, As=As.reshape(1, 1).expand(len(A), 1) if As.numel() == 1 else As, **more)

    kernel.apply_scaled_mm = with_repeated


def logprobs(folder: Path, ids: Tensor, dtype: str) -> Tensor:
    """fp32 [N, T − 1] of the tokens [N, T] but the first."""
    engine = LLM(
        str(folder),
        dtype=dtype,
        max_model_len=64,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    ask = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    done = engine.generate([{"prompt_token_ids": row.tolist()} for row in ids], ask, use_tqdm=False)
    pairs = [zip(row[1:], out.prompt_logprobs[1:], strict=True) for row, out in zip(ids, done, strict=True)]
    return torch.tensor([[given[int(token)].logprob for token, given in pair] for pair in pairs])


def of_next(logits: Tensor, ids: Tensor) -> Tensor:
    """The log-probability of each token but the first, [N, T − 1], from logits [N, T, V]."""
    return logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)


def read(folder: Path, route: str) -> dict[str, Any]:
    began = time.monotonic()
    row: dict[str, Any] = {"case": folder.name, "route": route}
    if route == "repeated":
        repeat_scales()
    if route == "emulation":
        nvfp4.init_nvfp4_linear_kernel = lambda **_: EmulationNvFp4LinearKernel(NvFp4LinearLayerConfig())
    with safe_open(folder / "expected.safetensors", "pt") as file:
        dtype = json.loads((folder / "case.json").read_text())["dtype"]
        ids, logits, original = (file.get_tensor(name) for name in ("ids", "logits", "original"))
    try:
        expected, unquantized = (of_next(given, ids) for given in (logits, original))
        difference = (logprobs(folder / "out", ids, dtype) - expected).abs()
        row |= {"tokens": difference.numel(), "logprob_mean_diff": float(difference.mean()), "logprob_max_diff": float(difference.max())}
        row["original_mean_diff"] = float((unquantized - expected).abs().mean())
    except Exception as error:  # any error of the reader is a finding
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row | {"seconds": round(time.monotonic() - began, 2)}


def main() -> None:
    results, *words = sys.argv[1:]
    torch.set_num_threads(2)
    if words[-1] not in ROUTES:
        for folder in words:
            for route in json.loads((Path(folder) / "case.json").read_text())["routes"]:
                subprocess.run([sys.executable, __file__, results, folder, route], check=True, stdout=sys.stderr)
    else:
        row = read(Path(words[0]), words[1])
        with Path(results).open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main()
