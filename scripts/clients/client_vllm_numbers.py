"""vLLM's loader (``reader_vllm_numbers.py``) with the formats nvfp4 and mxfp4, and with experts in fp8 and w8a8-int8."""

from __future__ import annotations

import dataclasses
import itertools

from cases import Case
from client_vllm import CLIENT as VLLM
from client_vllm import DENSE, EXPERTS
from client_vllm_w8a8 import SKIP

FORMATS, EIGHT_BITS = ("nvfp4", "mxfp4"), ("fp8", "w8a8-int8")


def make_cases() -> tuple[Case, ...]:
    return (
        *(_case(family, format) for family, format in itertools.product(("llama", *DENSE, *EXPERTS), FORMATS)),
        *(_case(family, format) for family, format in itertools.product(EXPERTS, EIGHT_BITS)),
        *(_case("llama", format, "-rtn", "--method", "rtn") for format in FORMATS),
        *(_case("llama", format, "-skip", *SKIP) for format in FORMATS),
        *(_case("llama", format, "-head", "--lm-head") for format in FORMATS),
    )


def _case(family: str, format: str, name: str = "", *more: str) -> Case:
    model, flags = DENSE.get(family, {}), ("--format", format, *more)
    return Case(name=f"{family}-{format}{name}", family=family, model=model, flags=flags, reader={"routes": ["loader"]})


CLIENT = dataclasses.replace(VLLM, name="vllm-numbers", reader="reader_vllm_numbers.py", cases=make_cases(), limits={}, venv="vllm")
