"""vLLM's engine with the format nvfp4-w4a4, in fp32, by its emulation (see ``client_vllm_w8a8``)."""

from __future__ import annotations

import dataclasses

from cases import Case
from client_vllm import DENSE
from client_vllm_engine import HEADS
from client_vllm_w8a8 import CLIENT as W8A8
from client_vllm_w8a8 import SKIP


def make_cases() -> tuple[Case, ...]:
    return (
        *(_case(family) for family in HEADS),
        _case("llama", "-gptaq", "--method", "gptaq"),
        _case("llama", "-skip", *SKIP),
        _case("llama", "-head", "--lm-head"),
    )


def _case(family: str, name: str = "", *more: str) -> Case:
    return Case(
        name=f"{family}-nvfp4-w4a4{name}",
        family=family,
        model={**DENSE.get(family, {}), **HEADS[family]},
        flags=("--format", "nvfp4-w4a4", *more),
        reader={"routes": ["emulation"], "dtype": "float32", "inverses": True},
    )


CLIENT = dataclasses.replace(W8A8, name="vllm-w4a4", cases=make_cases())
