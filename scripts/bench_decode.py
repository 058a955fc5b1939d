#!/usr/bin/env python3
"""Measure how fast weights of quantized sources are decoded on this CPU: stored bytes a second, in memory.

python scripts/bench_decode.py --json docs/results/decode.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from facts import revision
from torch import Tensor

from bigq.io.sources.coded import Coding
from bigq.io.sources.integers import AwqIntegers

#: Outputs and inputs of the matrix: those of an expert of DeepSeek-V3.
M, N = 2048, 7168
ROUNDS = 7


def weights() -> Mapping[str, tuple[Any, list[Tensor]]]:
    """Storage → its decoder, and the stored parts of a matrix."""
    halves = torch.randint(256, (M, N // 2), dtype=torch.uint8)
    fp8 = torch.randn(M, N).to(torch.float8_e4m3fn)
    words = torch.randint(-(2**31), 2**31 - 1, (N, M // 8), dtype=torch.int32)
    return {
        "fp8 E4M3, blocks of 128 × 128": (Coding((128, 128)), [fp8, torch.rand(M // 128, N // 128)]),
        "fp8 E5M2, rows": (Coding((1, N)), [torch.randn(M, N).to(torch.float8_e5m2), torch.rand(M, 1)]),
        "int8, rows": (Coding((1, N)), [torch.randint(-128, 127, (M, N), dtype=torch.int8), torch.rand(M, 1)]),
        "MXFP4": (Coding((1, 32)), [halves, torch.randint(118, 124, (M, N // 32), dtype=torch.uint8)]),
        "NVFP4": (Coding((1, 16)), [halves, torch.rand(M, N // 16).to(torch.float8_e4m3fn), torch.tensor(0.01)]),
        "AWQ, groups of 128": (
            AwqIntegers(),
            [words, torch.randint(2**31, (N // 128, M // 8), dtype=torch.int32), torch.rand(N // 128, M).half()],
        ),
    }


def seconds(run: Callable[[], object]) -> float:
    run()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    rates: dict[str, dict[str, float]] = {}
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for name, (coding, parts) in weights().items():
            taken = seconds(lambda coding=coding, parts=parts: coding.decode(parts, torch.bfloat16))  # type: ignore[misc]
            size = sum(part.nbytes for part in parts)
            rates.setdefault(name, {})[str(threads)] = round(size / taken / 1e9, 2)
            print(f"{name:32} {threads} threads: {size / taken / 1e9:6.2f} GB/s", flush=True)
    if args.json is not None:
        facts = {"command": "python scripts/bench_decode.py --json docs/results/decode.json", "revision": revision()}
        args.json.write_text(json.dumps({**facts, "matrix": [M, N], "gb_per_s_by_threads": rates}, indent=2) + "\n")


if __name__ == "__main__":
    main()
