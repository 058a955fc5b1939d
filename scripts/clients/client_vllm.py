"""vLLM's loader (``reader_vllm.py``), with dense models and models with experts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from cases import Case, Client

#: Changed config values: vLLM refuses a sliding window in some layers only.
DENSE: Mapping[str, Mapping[str, Any]] = {"qwen2": {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 0}, "opt": {}}
ONLY_EXPERTS = ("--skip", r".*self_attn", "--skip", r".*shared_experts", "--skip", r".*layers\.0\.mlp\.(gate|up|gate_up|down)_proj")
EXPERTS = ("qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3")


def make_cases() -> tuple[Case, ...]:
    cases = [
        make_case("llama", format, bits, size, symmetric)
        for format, symmetric in (("gptq", True), ("compressed-tensors", True), ("compressed-tensors", False))
        for bits, size in ((4, 64), (8, -1))
    ]
    cases += [make_case("llama", "compressed-tensors", bits, 32, symmetric) for bits in (2, 3) for symmetric in (True, False)]
    cases += [make_case(family, format, 4, 32, True) for family in DENSE for format in ("gptq_v2", "compressed-tensors")]
    for family, format, bits in itertools.product(EXPERTS, ("compressed-tensors", "gptq"), (4, 8)):
        cases.append(make_case(family, format, bits, 32, True))
    ct, gptq = "compressed-tensors", "gptq"
    cases += [make_case(family, ct, bits, 32, True) for family in ("gpt_oss", "granitemoe", "llama4_text") for bits in (4, 8)]
    cases += [
        make_case("qwen3_moe", ct, 4, 64, True),
        make_case("qwen3_moe", ct, 4, -1, True),
        make_case("mixtral", gptq, 4, -1, True),
        make_case("qwen3_moe", ct, 4, 32, False),
        make_case("qwen3_moe", ct, 8, 32, False),
        make_case("qwen3_moe", ct, 3, 32, True),
        make_case("qwen3_moe", ct, 2, 32, True),
        make_case("mixtral", gptq, 3, 32, True),
        make_case("mixtral", gptq, 4, 32, False),
        *(make_case("deepseek_v3", format, 4, 32, True, "-experts-only", *ONLY_EXPERTS) for format in (ct, gptq)),
        *(make_case(family, ct, 4, 32, True, "-attention-only", "--skip", r".*\.experts") for family in ("gpt_oss", "llama4_text")),
        make_case("gpt_oss", ct, 4, 32, True, "-experts-only", "--skip", r".*self_attn"),
        *(make_case(family, ct, 4, 32, False) for family in ("gpt_oss", "granitemoe", "llama4_text")),
        *(make_case(family, ct, 3, 32, True) for family in ("gpt_oss", "llama4_text")),
        make_case("llama4_text", gptq, 4, 32, True),
        *(make_case("glm4_moe", format, 4, 32, True, "-experts-only", *ONLY_EXPERTS) for format in (ct, gptq)),
        *(make_case("mixtral", format, 4, 32, True, "-attention-only", "--skip", r".*\.experts") for format in (ct, gptq)),
        *(make_case("mixtral", format, 4, 32, True, "-attention-8bit", "--rule", r".*self_attn.*:bits=8") for format in (ct, gptq)),
        *(make_case("qwen3_moe", format, 4, 32, True, "-experts-8bit", "--rule", r".*\.experts.*:bits=8") for format in (ct, gptq)),
    ]
    return tuple(cases)


def make_case(family: str, format: str, bits: int, group_size: int, symmetric: bool, name: str = "", *more: str) -> Case:
    size = f"g{group_size}" if group_size > 0 else "row"
    flags = ("--bits", str(bits), "--group-size", str(group_size), "--sym" if symmetric else "--asym", "--format", format, *more)
    named = f"{family}-{format}-{bits}bit-{size}-{'sym' if symmetric else 'asym'}{name}"
    return Case(name=named, family=family, model=DENSE.get(family, {}), flags=flags, reader={"routes": ["loader"]})


def fails(row: dict[str, Any]) -> str | None:
    """The reason why a row is wrong; None if it is right."""
    if "error" in row:
        return str(row["error"])
    if row["wrong"]:
        return f"{len(row['wrong'])} matrices or more, such as: {row['wrong'][0]}"
    pairs = (("linears", "linears_expected"), ("weights_equal", "linears"), ("plain", "plain_expected"), ("plain_equal", "plain"))
    for found, expected in pairs:
        if row[found] != row[expected]:
            return f"{found} is {row[found]}, {expected} {row[expected]}"
    return None


LIMITS = {
    r"/.*-gptq-(3bit|.*asym)": "vLLM refuses asymmetric gptq, and 2 or 3 bits in it, on any device; compressed-tensors can hold them",
    r"/qwen3_moe-.*-8bit-.*asym": "vLLM has no kernel for experts of 8 bits with zero points",
    r"/gpt_oss-.*asym": "vLLM's code for gpt_oss does not take zero points of experts",
    r"/llama4_text-gptq|/llama4_text-.*asym": "vLLM reorders the rows of queries and keys, but not in gptq, and no zero points",
}

CLIENT = Client(name="vllm", reader="reader_vllm.py", cases=make_cases(), fails=fails, limits=LIMITS)
