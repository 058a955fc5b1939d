"""vLLM's loader (``reader_vllm_fp4.py``) with the formats nvfp4 and mxfp4."""

from __future__ import annotations

import dataclasses
import itertools

from cases import Case
from client_vllm import CLIENT as VLLM
from client_vllm import DENSE, EXPERTS
from client_vllm_w8a8 import SKIP

FORMATS = ("nvfp4", "mxfp4")


def make_cases() -> tuple[Case, ...]:
    return (
        *(_case(family, format) for family, format in itertools.product(("llama", *DENSE, *EXPERTS), FORMATS)),
        *(_case("llama", format, "-rtn", "--method", "rtn") for format in FORMATS),
        *(_case("llama", format, "-skip", *SKIP) for format in FORMATS),
        *(_case("llama", format, "-head", "--lm-head") for format in FORMATS),
    )


def _case(family: str, format: str, name: str = "", *more: str) -> Case:
    model, flags = DENSE.get(family, {}), ("--format", format, *more)
    return Case(name=f"{family}-{format}{name}", family=family, model=model, flags=flags, reader={"routes": ["loader"]})


CLIENT = dataclasses.replace(VLLM, name="vllm-fp4", reader="reader_vllm_fp4.py", cases=make_cases(), limits={}, venv="vllm")
