"""vLLM's engine with the formats fp8 and fp8-block, in fp32 (see ``client_vllm_w8a8``)."""

from __future__ import annotations

import dataclasses

from cases import IN_BLOCKS, Case
from client_vllm import make_case
from client_vllm_engine import HEADS
from client_vllm_w8a8 import CLIENT as W8A8
from client_vllm_w8a8 import SKIP, make_engine_case


def make_cases() -> tuple[Case, ...]:
    return (
        *(make_engine_case(family, "fp8") for family in HEADS),
        make_engine_case("llama", "fp8", "-rtn", "--method", "rtn"),
        # Weights that are corrected more are farther from their source than the check in ``cases.py`` allows.
        make_engine_case("llama", "fp8", "-gptaq", "--method", "gptaq", "--alpha", "0.1"),
        make_engine_case("llama", "fp8", "-skip", *SKIP),
        make_engine_case("llama", "fp8", "-head", "--lm-head"),
        *(_in_blocks(family) for family in HEADS),
        # With three layers, one input near the middle of two numbers became the other one: 0.17 in that row, 0.004 on average.
        _in_blocks("llama", "-rtn", "--method", "rtn", num_hidden_layers=2),
        _in_blocks("llama", "-gptaq", "--method", "gptaq", "--alpha", "0.1"),
        _in_blocks("llama", "-skip", *SKIP),
        _in_blocks("llama", "-head", "--lm-head"),
        _in_blocks("llama", "-partial", "--allow-partial", hidden_size=192),
    )


def _in_blocks(family: str, name: str = "", *more: str, **sizes: int) -> Case:
    case = make_case(family, "fp8-block", 8, 128, True, name, *more)
    heads = {} if family == "llama" else {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    if family == "opt":
        heads = {"num_attention_heads": 4}
    model = {**case.model, **IN_BLOCKS[family], **heads, **sizes}
    return dataclasses.replace(case, model=model, reader={"routes": ["engine"], "dtype": "float32"})


HEAD_IN_BLOCKS = {"llama-fp8-block.*-head": "vLLM takes a row of scales for each token of the vocabulary, not for each block"}
CLIENT = dataclasses.replace(W8A8, name="vllm-fp8", cases=make_cases(), limits=HEAD_IN_BLOCKS)
