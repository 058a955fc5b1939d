"""vLLM's loader with the awq format."""

from __future__ import annotations

import dataclasses
import itertools

from cases import Case
from client_vllm import CLIENT as VLLM
from client_vllm import EXPERTS, ONLY_EXPERTS, make_case


def make_cases() -> tuple[Case, ...]:
    cases = [make_case("llama", "awq", 4, size, symmetric) for size, symmetric in itertools.product((-1, 32, 64), (True, False))]
    cases += [make_case(family, "awq", 4, 32, False) for family in ("qwen2", "opt", "bloom", *EXPERTS, "granitemoe", "llama4_text")]
    cases += [
        make_case("llama", "awq", 4, 32, False, "-head", "--lm-head"),
        make_case("llama", "awq", 4, 32, True, "-skip", "--skip", r".*layers\.1\.(self_attn|mlp\.(gate|up)_proj)"),
        make_case("llama", "awq", 4, 32, True, "-rule-sym", "--rule", r".*\.o_proj$:sym=false"),
        make_case("mixtral", "awq", 4, 32, True),
        make_case("mixtral", "awq", 4, 32, False, "-attention-only", "--skip", r".*\.experts"),
        *(make_case(family, "awq", 4, 32, False, "-experts-only", *ONLY_EXPERTS) for family in ("deepseek_v3", "glm4_moe")),
    ]
    return tuple(cases)


LIMITS = {
    r"/bloom-": "vLLM's code for BLOOM reorders the rows of queries, keys and values, which awq stores as columns",
    r"/llama4_text-": "vLLM reorders the rows of queries and keys, but not in awq",
}

CLIENT = dataclasses.replace(VLLM, name="vllm-awq", venv="vllm", cases=make_cases(), limits=LIMITS)
