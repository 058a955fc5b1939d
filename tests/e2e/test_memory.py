"""The promise that the whole program rests on: memory follows the size of a block, not of the model.

Llama-shaped bf16 models of 24 and of 44 blocks of the same width are quantized, each in a child process that reports its
peak resident set (VmHWM: ``ru_maxrss`` would begin with the parent's). Where random addresses and hashes put the heap moves
the peak by as much as a block, so both are fixed where the system lets a program do that, and the median of three counts.
A run's peak is the largest of its blocks' peaks, which differ by 2 MiB with the holes in the heap: of 4 blocks the largest
is 2 MiB lower than of 24. So that this does not count as growth, the smaller model has many, too.
The children compute with one thread: how many there are changes time, not this comparison.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Child
from models import random_ids, save_ids
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, VOCABULARY = 512, 1408, 8, 512
FEW, MANY, MORE = 4, 24, 44
#: Weights of one block in bf16.
BLOCK_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)

HEAD = """
import ctypes, json, os, re, sys
NOW, NO_RANDOMIZE = 0xFFFFFFFF, 0x0040000
personality = ctypes.CDLL(None).personality
if not personality(NOW) & NO_RANDOMIZE and personality(personality(NOW) | NO_RANDOMIZE) >= 0:
    os.execv(sys.executable, sys.orig_argv)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
"""

PROGRAM = f"""{HEAD}
import bigq
source, out, ids = sys.argv[1:]
scheme = bigq.QuantScheme(group_size=128)
config = bigq.JobConfig(scheme=scheme, calibration=ids, samples=8, seqlen=64, device="cpu", quiet=True)
report = bigq.quantize(source, out, config)
print(json.dumps({{"peak": peak(), "told": report.host_peak_bytes, "linears": len(report.linears)}}))
"""

CONVERSION = f"""{HEAD}
from bigq.conversion.convert import convert
done = convert(*sys.argv[1:], "compressed-tensors")
print(json.dumps({{"peak": peak(), "linears": done.linears, "bytes": done.bytes}}))
"""

IDLE = """
import re, torch
import bigq.sched.run, transformers.models.llama.modeling_llama
from bigq.kernels.pick import load_compiled
load_compiled(torch.device("cpu"))
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def random_llama(folder: Path, blocks: int) -> Path:
    """A checkpoint written tensor by tensor; one shard per block."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(blocks)
    weight_map: dict[str, str] = {}

    def save(shard: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.03).to(torch.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, shard))

    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    save("model-rest.safetensors", ends)
    for i in range(blocks):
        names = {f"self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        names |= {f"mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
        names |= {"mlp.down_proj.weight": (HIDDEN, INNER)}
        names |= {f"{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
        save(f"model-{i:02d}.safetensors", {f"model.layers.{i}.{name}": shape for name, shape in names.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_config(folder, blocks)
    return folder


def write_config(folder: Path, blocks: int, **more: Any) -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": blocks,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))


def one_packed_file(folder: Path, blocks: int) -> Path:
    """A gptq checkpoint of 8 bits, all of it in one file, as others write it."""
    folder.mkdir()
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    ends = {f"{name}.weight": ones.expand(VOCABULARY, HIDDEN).clone() for name in ("model.embed_tokens", "lm_head")}
    tensors = {**ends, "model.norm.weight": ones}
    for i in range(blocks):
        shapes = {f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
        for name, (m, n) in shapes.items():
            prefix = f"model.layers.{i}.{name}"
            tensors[f"{prefix}.qweight"] = torch.randint(2**31, (n // 4, m), dtype=torch.int32)
            tensors[f"{prefix}.qzeros"] = torch.full((1, m // 4), 0x7F7F7F7F, dtype=torch.int32)
            tensors[f"{prefix}.scales"] = torch.ones(1, m, dtype=torch.float16)
            tensors[f"{prefix}.g_idx"] = torch.zeros(n, dtype=torch.int32)
        tensors |= {f"model.layers.{i}.{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, blocks, quantization_config={"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True})
    return folder


@pytest.fixture(scope="module")
def peak(child: Child, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], int]:
    """(blocks, hash seed) → the peak of a run that quantizes the model of so many blocks, in bytes."""
    folder = tmp_path_factory.mktemp("memory")
    ids = save_ids(folder / "ids.safetensors", random_ids(8, 64))

    def run(blocks: int, seed: int) -> int:
        source = folder / str(blocks)
        if not source.exists():
            random_llama(source, blocks)
        done = child("-c", PROGRAM, source, folder / "out", ids, env={"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(seed)})
        shutil.rmtree(folder / "out")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["linears"] == 7 * blocks
        assert result["peak"] >= result["told"] > 0.98 * result["peak"]
        return int(result["peak"])

    return run


@pytest.mark.long
def test_peak_follows_the_block_and_not_the_model(peak: Callable[[int, int], int], child: Child) -> None:
    """20 blocks more cost less than one block's bytes, and 24 blocks together less than 60 % of the model's size over
    a process that has only imported everything."""
    found = [(peak(MANY, 1), peak(MORE, 1))]
    if abs(found[0][1] - found[0][0]) >= BLOCK_BYTES:  # now and then the allocator keeps a block's bytes; the median decides
        found += [(peak(MANY, seed), peak(MORE, seed)) for seed in (2, 3)]
    many, more = (int(statistics.median(peaks)) for peaks in zip(*found, strict=True))
    assert abs(more - many) < BLOCK_BYTES, f"{many / 2**20:.1f} MiB for {MANY} blocks, {more / 2**20:.1f} MiB for {MORE}"
    idle = child("-c", IDLE)
    assert idle.returncode == 0, idle.stderr
    assert many - int(idle.stdout) < MANY * BLOCK_BYTES * 0.6


@pytest.mark.long
def test_converting_one_large_file_takes_the_memory_of_a_linear(child: Child, tmp_path: Path) -> None:
    """20 blocks more, all in the same file, cost less than two of them (a byte for each weight here)."""
    peaks = []
    for blocks in (FEW, MANY):
        source = one_packed_file(tmp_path / str(blocks), blocks)
        done = child("-c", CONVERSION, source, tmp_path / f"{blocks}-out", env={"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"})
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["linears"] == 7 * blocks and result["bytes"] > blocks * BLOCK_BYTES / 2
        peaks.append(result["peak"])
    assert abs(peaks[1] - peaks[0]) < BLOCK_BYTES, f"{peaks[0] / 2**20:.1f} MiB for {FEW} blocks, {peaks[1] / 2**20:.1f} MiB for {MANY}"
