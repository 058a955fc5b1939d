"""transformers with compressed-tensors, and the fp8-block format."""

from __future__ import annotations

import dataclasses

from cases import IN_BLOCKS, Case
from client_floats import CLIENT as FLOATS
from client_vllm_w8a8 import SKIP
from client_w8a8 import NOT_ROUNDED

FAMILIES = ("llama", "qwen2", "opt", "bloom", "qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3")


def make_cases(routes: tuple[str, ...], families: tuple[str, ...]) -> tuple[Case, ...]:
    """For any reader that loads weights."""

    def case(family: str, name: str = "", *more: str, **sizes: int) -> Case:
        flags, model = ("--format", "fp8-block", *more), {**IN_BLOCKS[family], **sizes}
        return Case(name=f"{family}{name}", family=family, model=model, flags=flags, reader={"routes": list(routes)})

    return (
        *(case(family) for family in families),
        case("llama", "-rtn", "--method", "rtn"),
        case("llama", "-skip", *SKIP),
        case("llama", "-head", "--lm-head"),
        # 192 outputs are a block and a half. Linears of 192 inputs stay unquantized.
        case("llama", "-partial", "--allow-partial", hidden_size=192),
    )


CLIENT = dataclasses.replace(
    FLOATS,
    name="fp8-block",
    cases=make_cases(("transformers",), FAMILIES),
    limits={"/(qwen3_moe|mixtral|glm4_moe|deepseek_v3)": NOT_ROUNDED},
)
