"""vLLM's engine, with its own kernels on a CPU (``reader_vllm_engine.py``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cases import Case, Client
from client_vllm import DENSE, make_case

#: vLLM's attention on a CPU takes heads of multiples of 32.
HEADS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"head_dim": 32},
    "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    "opt": {"num_attention_heads": 2},
}

#: The engine computes in fp16, which alone makes a mean difference of up to 0.002. Weights of 4 bits differ by ten times that.
LOGPROB_TOLERANCE = 0.004


def make_cases() -> tuple[Case, ...]:
    cases = (
        make_case("llama", "awq", 4, 32, False),
        make_case("llama", "awq", 4, 64, True),
        make_case("llama", "awq", 4, -1, False),
        make_case("llama", "awq", 4, 32, True, "-skip", "--skip", r".*layers\.1\.(self_attn|mlp\.(gate|up)_proj)"),
        *(make_case(family, "awq", 4, 32, False) for family in DENSE),
    )
    return tuple(
        dataclasses.replace(case, model={**case.model, **HEADS[case.family]}, reader={"routes": ["engine"], "dtype": "float16"})
        for case in cases
    )


def fails(row: dict[str, Any]) -> str | None:
    """The reason why a row is wrong; None if it is right."""
    if "error" in row:
        return str(row["error"])
    found = row["logprob_mean_diff"]
    if not found < LOGPROB_TOLERANCE:
        return f"log-probabilities differ by {found:.2g} on average"
    return None if row["original_mean_diff"] > 2 * found else "log-probabilities are as near to those of the unquantized weights"


CLIENT = Client(name="vllm-engine", reader="reader_vllm_engine.py", cases=make_cases(), fails=fails, venv="vllm")
