"""vLLM's loader (``reader_vllm_numbers.py``) with the formats nvfp4, mxfp4 and fp8-block, and with experts in fp8 and w8a8-int8."""

from __future__ import annotations

import dataclasses
import itertools

from cases import IN_BLOCKS, Case
from client_vllm import CLIENT as VLLM
from client_vllm import DENSE, EXPERTS
from client_vllm_fp8 import HEAD_IN_BLOCKS
from client_vllm_w8a8 import SKIP

FORMATS, EIGHT_BITS = ("nvfp4", "mxfp4", "fp8-block"), ("fp8", "w8a8-int8")


def make_cases() -> tuple[Case, ...]:
    return (
        *(_case(family, format) for family, format in itertools.product(("llama", *DENSE, *EXPERTS), FORMATS)),
        *(_case(family, format) for family, format in itertools.product(EXPERTS, EIGHT_BITS)),
        *(_case("llama", format, "-rtn", "--method", "rtn") for format in FORMATS),
        *(_case("llama", format, "-skip", *SKIP) for format in FORMATS),
        *(_case("llama", format, "-head", "--lm-head") for format in FORMATS),
        _case("llama", "fp8-block", "-partial", "--allow-partial", hidden_size=192),
    )


def _case(family: str, format: str, name: str = "", *more: str, **sizes: int) -> Case:
    flags = ("--format", format, *more)
    model = {**DENSE.get(family, {}), **(IN_BLOCKS[family] if format == "fp8-block" else {}), **sizes}
    return Case(name=f"{family}-{format}{name}", family=family, model=model, flags=flags, reader={"routes": ["loader"]})


CLIENT = dataclasses.replace(
    VLLM, name="vllm-numbers", reader="reader_vllm_numbers.py", cases=make_cases(), limits=HEAD_IN_BLOCKS, venv="vllm"
)
