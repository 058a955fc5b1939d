"""transformers with compressed-tensors, and the w8a8-int8 format. It divides the largest input by 127.5, where vLLM does by 127."""

from __future__ import annotations

from cases import Case, Client
from client_compressed_tensors import fails as fails_in_compressed_tensors
from client_vllm_w8a8 import SKIP, STATIC


def make_cases() -> tuple[Case, ...]:
    return (
        *(_case(family, family) for family in ("llama", "qwen2", "opt", "bloom", "qwen3_moe", "mixtral")),
        _case("llama-rtn", "llama", "--method", "rtn"),
        _case("llama-skip", "llama", *SKIP),
        _case("llama-head", "llama", "--lm-head"),
        *(_case(f"{family}{STATIC[0]}", family, *STATIC[1:]) for family in ("llama", "qwen2", "opt", "bloom")),
        _case("llama-head-skip" + STATIC[0], "llama", "--lm-head", *SKIP, *STATIC[1:]),
    )


def _case(name: str, family: str, *more: str) -> Case:
    flags = ("--bits", "8", "--group-size", "-1", "--sym", "--format", "w8a8-int8", *more)
    return Case(name=f"{name}-w8a8-int8", family=family, flags=flags, reader={"routes": ["transformers"], "largest": 127.5})


NOT_ROUNDED = "transformers does not round the inputs of experts; their weights are right"
LIMITS = {
    "/opt-(w8a8-int8|fp8)$": "compressed-tensors takes all tokens for one where inputs have two dimensions, as those of OPT's fc1 and fc2",
    "/(qwen3_moe|mixtral)-w8a8": NOT_ROUNDED,
}

CLIENT = Client(
    name="w8a8",
    venv="compressed-tensors-transformers-5.23",
    reader="reader_numbers.py",
    cases=make_cases(),
    fails=fails_in_compressed_tensors,
    limits=LIMITS,
)
