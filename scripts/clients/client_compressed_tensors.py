"""compressed-tensors, directly and through transformers: its newest version, and the newest transformers that loads all cases."""

from __future__ import annotations

import itertools
from typing import Any

from cases import Case, Client

BITS = (2, 3, 4, 8)
GROUPS = (-1, 32, 64)
ROUTES = ("transformers", "unpack")

#: Readers sum the same fp32 products in another order.
LOGITS_TOLERANCE = 1e-5


def flags(bits: int, group_size: int, sym: bool, act_order: bool = False) -> tuple[str, ...]:
    chosen = ["--bits", str(bits), "--group-size", str(group_size), "--sym" if sym else "--asym"]
    return (*chosen, *(["--order", "activation"] if act_order else []), "--format", "compressed-tensors")


_FOUR = flags(4, 32, True)
#: Outputs that are no multiples of 32, nor of what a word of zero points holds; inputs that fill whole words only.
_ODD: dict[str, Any] = {"intermediate_size": 200, "vocab_size": 131}
#: Special models and rules: (name, family, config values, options).
SPECIAL: tuple[tuple[str, str, dict[str, Any], tuple[str, ...]], ...] = (
    ("llama-bias-sym", "llama", {"attention_bias": True, "mlp_bias": True}, _FOUR),
    ("llama-tied-sym", "llama", {"tie_word_embeddings": True}, _FOUR),
    ("llama-rtn-sym", "llama", {}, (*_FOUR, "--method", "rtn")),
    ("llama-rules-sym", "llama", {}, (*_FOUR, "--rule", r".*down_proj$:bits=8", "--rule", r".*(gate|up)_proj$:group_size=-1,bits=3")),
    ("llama-skip-all-blocks-sym", "llama", {}, (*_FOUR, "--skip", r".*\.o_proj$")),
    ("llama-skip-one-block-sym", "llama", {}, (*_FOUR, "--skip", r"model\.layers\.1\.")),
    ("llama-odd-sizes-asym", "llama", _ODD, (*flags(4, 8, False), "--lm-head")),
    ("llama-odd-sizes-8bit-sym", "llama", _ODD, (*flags(8, -1, True), "--lm-head")),
    ("llama-odd-sizes-3bit-asym", "llama", {"intermediate_size": 224, "vocab_size": 131}, (*flags(3, 32, False), "--lm-head")),
    ("llama-head-sym", "llama", {}, (*_FOUR, "--lm-head")),
    ("bloom-rule-sym", "bloom", {}, (*_FOUR, "--rule", r".*dense_h_to_4h$:bits=3,group_size=-1")),
)


#: Models with experts: (name, family, options).
_EIGHT, _EXPERTS_ONLY = flags(8, 32, True), ("--skip", r".*self_attn", "--skip", r".*shared_experts")
EXPERTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    *((f"{family}-4bit-g32-sym", family, _FOUR) for family in ("qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3")),
    ("qwen3_moe-8bit-g32-sym", "qwen3_moe", _EIGHT),
    ("qwen3_moe-3bit-row-sym", "qwen3_moe", flags(3, -1, True)),
    ("qwen3_moe-2bit-g64-sym-act", "qwen3_moe", flags(2, 64, True, act_order=True)),
    ("mixtral-attention-8bit-sym", "mixtral", (*_FOUR, "--rule", r".*self_attn.*:bits=8")),
    ("qwen3_moe-experts-8bit-sym", "qwen3_moe", (*_FOUR, "--rule", r".*\.experts:bits=8")),
    ("deepseek_v3-experts-only-sym", "deepseek_v3", (*_FOUR, *_EXPERTS_ONLY)),
    ("qwen3_moe-4bit-g32-asym-experts", "qwen3_moe", flags(4, 32, False)),
    ("qwen3_moe-attention-only", "qwen3_moe", (*_FOUR, "--skip", r".*\.experts")),
    ("qwen3_moe-experts-of-two-schemes", "qwen3_moe", (*_FOUR, "--rule", r".*\.0\.mlp\.experts:bits=8")),
)


#: Vision-language models, whose towers are copied.
COMPOSITE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "mistral3", "internvl", "idefics3", "smolvlm")


def make_cases() -> tuple[Case, ...]:
    cases = []
    for i, (bits, sym, act_order) in enumerate(itertools.product(BITS, (True, False), (False, True))):
        cases.append(_case("llama", bits, GROUPS[(i + i // 4) % 3], sym, act_order))
    for family, (bits, sym) in itertools.product(("qwen2", "opt", "bloom"), ((4, True), (8, True), (3, False), (4, False))):
        cases.append(_case(family, bits, 32, sym, False))
    cases += [Case(name=n, family=f, model=m, flags=given, reader={"routes": ROUTES}) for n, f, m, given in SPECIAL]
    # Read as a whole only: some files name Linears otherwise than the model does, and transformers renames them.
    cases += [Case(name=f"{kind}-composite-sym", family=kind, flags=_FOUR, reader={"routes": ROUTES[:1]}) for kind in COMPOSITE]
    return (*cases, *(Case(name=n, family=f, flags=given, reader={"routes": ROUTES}) for n, f, given in EXPERTS))


def _case(family: str, bits: int, group_size: int, sym: bool, act_order: bool) -> Case:
    size = f"g{group_size}" if group_size > 0 else "row"
    name = f"{family}-{bits}bit-{size}-{'sym' if sym else 'asym'}{'-act' if act_order else ''}"
    return Case(name=name, family=family, flags=flags(bits, group_size, sym, act_order), reader={"routes": ROUTES})


def fails(row: dict[str, Any]) -> str | None:
    """The reason why a row is wrong; None if it is right."""
    if "error" in row:
        return str(row["error"])
    for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if row.get(keys):
            return f"{len(row[keys])} {keys.replace('_', ' ')}, such as {row[keys][0]}"
    if row["linears"] != row["linears_expected"]:
        return f"the reader has {row['linears']} packed Linears, expected {row['linears_expected']}"
    for kind in ("codes_equal", "weights_equal"):
        if row.get(kind, row["linears_expected"]) != row["linears_expected"]:
            return f"{row['linears_expected'] - row[kind]} Linears unpack to other values"
    if not row.get("logits_rel_diff", 0) < LOGITS_TOLERANCE:
        return f"logits differ by {row['logits_rel_diff']:.2g} of their norm"
    return None


LIMITS = {
    r"^transformers/.*-asym-experts$": "transformers unpacks experts without zero points",
    r"^transformers/.*-attention-only$": "transformers takes all experts for packed ones",
    r"^transformers/.*-two-schemes$": "transformers unpacks all experts by one scheme",
}

CLIENT = Client(
    name="compressed-tensors",
    reader="reader_compressed_tensors.py",
    cases=make_cases(),
    fails=fails,
    limits=LIMITS,
    environment={"PYTHONWARNINGS": "ignore"},
)
