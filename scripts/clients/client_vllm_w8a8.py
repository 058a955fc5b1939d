"""vLLM's engine with the w8a8-int8 format, in fp32: what rounds inputs to 8 bits makes large differences of those between fp16 and fp32."""

from __future__ import annotations

import dataclasses
from typing import Any

from cases import Case
from client_vllm import make_case
from client_vllm_engine import CLIENT as ENGINE
from client_vllm_engine import HEADS

#: An input near the middle of two integers may become the other one, which then differs by a 127th of the largest.
LOGPROB_TOLERANCE = 0.003
STATIC = ("-static", "--input-scales", "static")
SKIP = ("--skip", r".*layers\.1\.(self_attn|mlp\.(gate|up)_proj)")


def make_engine_case(family: str, format: str, name: str = "", *more: str) -> Case:
    """For formats of 8 bits in whole rows."""
    case = make_case(family, format, 8, -1, True, name, *more)
    return dataclasses.replace(case, model={**case.model, **HEADS[family]}, reader={"routes": ["engine"], "dtype": "float32"})


def make_cases() -> tuple[Case, ...]:
    return (
        *(make_engine_case(family, "w8a8-int8") for family in HEADS),
        make_engine_case("llama", "w8a8-int8", "-rtn", "--method", "rtn"),
        make_engine_case("llama", "w8a8-int8", "-gptaq", "--method", "gptaq"),
        make_engine_case("llama", "w8a8-int8", "-skip", *SKIP),
        make_engine_case("llama", "w8a8-int8", "-head", "--lm-head"),
        *(make_engine_case(family, "w8a8-int8", *STATIC) for family in HEADS),
        make_engine_case("llama", "w8a8-int8", "-head-skip" + STATIC[0], "--lm-head", *SKIP, *STATIC[1:]),
    )


def fails(row: dict[str, Any]) -> str | None:
    """The reason why a row is wrong; None if it is right."""
    if "error" in row:
        return str(row["error"])
    found = row["logprob_mean_diff"]
    if not found < LOGPROB_TOLERANCE:
        return f"log-probabilities differ by {found:.2g} on average"
    return None if row["original_mean_diff"] > 2 * found else "log-probabilities are as near to those of the unquantized weights"


CLIENT = dataclasses.replace(ENGINE, name="vllm-w8a8", cases=make_cases(), fails=fails)
