"""vLLM's engine with the fp8-block format, in fp32. Its kernels for CPUs need AMX; a product in fp32 stands in for them
(``reader_vllm_engine.py``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cases import IN_BLOCKS, Case
from client_vllm import DENSE
from client_vllm_w8a8 import CLIENT as W8A8
from client_vllm_w8a8 import SKIP

#: Heads whose queries, keys and values have whole blocks.
HEADS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "opt": {"num_attention_heads": 4},
}


def make_cases() -> tuple[Case, ...]:
    return (
        *(_case(family) for family in HEADS),
        # With three layers, one input near the middle of two numbers became the other one: 0.17 in that row, 0.004 on average.
        _case("llama", "-rtn", "--method", "rtn", num_hidden_layers=2),
        # Weights that are corrected more are farther from their source than the check in ``cases.py`` allows.
        _case("llama", "-gptaq", "--method", "gptaq", "--alpha", "0.1"),
        _case("llama", "-skip", *SKIP),
        _case("llama", "-head", "--lm-head"),
        _case("llama", "-partial", "--allow-partial", hidden_size=192),
    )


def _case(family: str, name: str = "", *more: str, **sizes: int) -> Case:
    model = {**DENSE.get(family, {}), **IN_BLOCKS[family], **HEADS[family], **sizes}
    reader = {"routes": ["engine"], "dtype": "float32"}
    return Case(name=f"{family}{name}", family=family, model=model, flags=("--format", "fp8-block", *more), reader=reader)


#: Of the engine and of the loader.
HEAD = {"/llama-head": "vLLM takes a row of scales for each token of the vocabulary, not for each block"}
CLIENT = dataclasses.replace(W8A8, name="vllm-fp8-block", cases=make_cases(), limits=HEAD)
