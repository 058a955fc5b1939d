"""vLLM's engine with the fp8 format, in fp32 (see ``client_vllm_w8a8``)."""

from __future__ import annotations

import dataclasses

from cases import Case
from client_vllm_engine import HEADS
from client_vllm_w8a8 import CLIENT as W8A8
from client_vllm_w8a8 import SKIP, STATIC, make_engine_case


def make_cases() -> tuple[Case, ...]:
    return (
        *(make_engine_case(family, "fp8") for family in HEADS),
        make_engine_case("llama", "fp8", "-rtn", "--method", "rtn"),
        # With the default alpha a weight is as far from its source as ``cases.py`` allows, on some processors farther.
        make_engine_case("llama", "fp8", "-gptaq", "--method", "gptaq", "--alpha", "0.25"),
        make_engine_case("llama", "fp8", "-skip", *SKIP),
        make_engine_case("llama", "fp8", "-head", "--lm-head"),
        *(_static(make_engine_case(family, "fp8", *STATIC)) for family in HEADS),
        _static(make_engine_case("llama", "fp8", "-head-skip" + STATIC[0], "--lm-head", *SKIP, *STATIC[1:])),
    )


def _static(case: Case) -> Case:
    return dataclasses.replace(case, reader={**case.reader, "routes": ["engine", "repeated"]})


LIMITS = {"engine/.*-static$": "vLLM's kernel for fp8 on CPUs takes a scale for each token, and fails with one for all"}

CLIENT = dataclasses.replace(W8A8, name="vllm-fp8", cases=make_cases(), limits=LIMITS)
