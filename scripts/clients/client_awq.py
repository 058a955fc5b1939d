"""Readers of the awq format: transformers, which has GPTQModel's Linears for it, and GPTQModel by itself."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

from cases import Case
from client_gptqmodel import CLIENT as GPTQMODEL
from client_gptqmodel import fails as fails_as_gptq

ROUTES = ("transformers", "gptqmodel")
#: GPTQModel's torch kernel for awq multiplies in fp16.
LOGITS_TOLERANCE = 4e-3


def flags(group_size: int, symmetric: bool, *more: str) -> tuple[str, ...]:
    return ("--group-size", str(group_size), "--sym" if symmetric else "--asym", "--format", "awq", *more)


def make_cases() -> tuple[Case, ...]:
    cases = [
        _case(f"llama-{'row' if size == -1 else f'g{size}'}-{'sym' if symmetric else 'asym'}", "llama", flags(size, symmetric))
        for size, symmetric in itertools.product((-1, 32, 64), (True, False))
    ]
    cases += [_case(f"{family}-g32-asym", family, flags(32, False)) for family in ("qwen2", "opt", "bloom")]
    cases += [_case(name, "llama", given, **model) for name, model, given in SPECIAL]
    return (*cases, _case("qwen3_moe-experts", "qwen3_moe", flags(32, False)))


def _case(name: str, family: str, given: tuple[str, ...], **model: Any) -> Case:
    return Case(name=name, family=family, model=model, flags=given, reader={"routes": ROUTES})


#: Special models and rules: (name, config values, options).
SPECIAL: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("llama-bias", {"attention_bias": True, "mlp_bias": True}, flags(32, False)),
    ("llama-tied", {"tie_word_embeddings": True}, flags(32, False)),
    ("llama-rtn", {}, flags(32, True, "--method", "rtn")),
    ("llama-gptaq-act", {}, flags(32, False, "--method", "gptaq", "--order", "activation")),
    ("llama-minmax", {}, flags(32, True, "--scales", "minmax")),
    ("llama-rule-sym", {}, flags(32, True, "--rule", r".*\.o_proj$:sym=false")),
    ("llama-head", {}, flags(32, False, "--lm-head")),
    ("llama-skip-all-blocks", {}, flags(32, False, "--skip", r".*\.o_proj$")),
    ("llama-skip-one-block", {}, flags(32, False, "--skip", r"model\.layers\.1\.")),
)

fails = functools.partial(fails_as_gptq, tolerance=LOGITS_TOLERANCE)

LIMITS = {
    r"^transformers/bloom-": "transformers expects scales of BLOOM's activations, which only AWQ's own method makes",
    r"^transformers/.*-head": "transformers keeps every output head unquantized in awq",
    r"^transformers/.*-experts": "transformers looks for experts without quantization, so that they stay random",
}

CLIENT = dataclasses.replace(GPTQMODEL, name="awq", venv="gptqmodel", cases=make_cases(), fails=fails, limits=LIMITS)
