"""A finished job: what makes its folder loadable, and its packed weights read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bigq
from bigq.config import JobConfig
from bigq.io.atomic import copy_file, write_bytes, write_json
from bigq.io.gptq_format import quantization_config, read_linear
from bigq.io.index import INDEX_NAME, read_header, read_json_object
from bigq.io.reader import read_tensor
from bigq.kernels.dequantize import dequantize_packed
from bigq.sched.journal import STATE_FOLDER, Commit, Journal


def finish_folder(source: Path, journal: Journal, config: JobConfig) -> None:
    """Write what makes the folder loadable: side files, quantize_config.json, the index, and last config.json."""
    out = journal.out
    lines = [_json_line(record) for commit in journal.commits for record in commit.linears]
    write_bytes(out / STATE_FOLDER / "linears.jsonl", b"".join(lines))
    for path in sorted(source.iterdir()):
        if path.is_file() and _is_side_file(path.name):
            copy_file(path, out / path.name)
    meta = {
        "quantizer": [f"bigq:{bigq.__version__}"],
        "method": config.method,
        "true_sequential": config.true_sequential,
        "mse": config.scheme.mse,
    }
    left_out = tuple(name for commit in journal.commits for name in commit.left_out)
    quantization = quantization_config(config.scheme, config.rules, config.format_version, left_out, meta)
    write_json(out / "quantize_config.json", quantization)
    weight_map = {name: commit.shard.file for commit in journal.commits for name in commit.shard.tensors}
    total = sum(commit.shard.size for commit in journal.commits)
    write_json(out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    write_json(out / "config.json", read_json_object(source / "config.json") | {"quantization_config": quantization})


class FinishedBlock:
    """The packed Linears of a committed block."""

    def __init__(self, out: Path, commit: Commit) -> None:
        self._tensors, _ = read_header(out / commit.shard.file)

    def weight(self, prefix: str, bits: int, version: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The dequantized weight [m, n] of the Linear whose tensors begin with ``prefix``."""
        stored = read_linear(prefix, lambda n: read_tensor(self._tensors[n]), bits, version)
        words, scales, zeros = (t.to(device) for t in stored)
        return dequantize_packed(words, scales, zeros, bits, dtype)


def _is_side_file(name: str) -> bool:
    """Whether a file of the source belongs beside any checkpoint of it: tokenizer, licence, generation config, code."""
    if name in ("config.json", "quantize_config.json") or name.startswith("."):
        return False
    return not name.endswith((".safetensors", ".index.json", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf", ".onnx"))


def _json_line(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()
