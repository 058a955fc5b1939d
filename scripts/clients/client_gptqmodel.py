"""Readers of the gptq formats: GPTQModel, directly and through transformers with optimum, and PEFT on top of that."""

from __future__ import annotations

import itertools
from typing import Any

from cases import Case, Client

BITS = (2, 3, 4, 8)
GROUPS = (-1, 32, 64)
ROUTES = ("transformers", "gptqmodel")

#: Readers sum the same fp32 products in another order.
LOGITS_TOLERANCE = 1e-5


def flags(bits: int, group_size: int, sym: bool, act_order: bool, version: int) -> tuple[str, ...]:
    chosen = ["--bits", str(bits), "--group-size", str(group_size), "--sym" if sym else "--asym"]
    chosen += ["--order", "activation"] if act_order else []
    return (*chosen, "--format", "gptq" if version == 1 else "gptq_v2")


def full() -> list[tuple[int, int, bool, bool, int]]:
    """Every combination of bits, symmetry, act-order and format; group sizes take turns."""
    combinations = itertools.product(BITS, (True, False), (False, True), (1, 2))
    return [(bits, GROUPS[(i + i // 4) % 3], sym, act, version) for i, (bits, sym, act, version) in enumerate(combinations)]


def covering(group_sizes: tuple[int, int]) -> list[tuple[int, int, bool, bool, int]]:
    """Eight runs in which every pair of settings occurs (an orthogonal array: one factor of four levels, four of two)."""
    runs = []
    for a, b, c in itertools.product((0, 1), repeat=3):
        group_size = group_sizes[a ^ b ^ c]
        runs.append((BITS[2 * a + b], group_size, not c, bool(a ^ c), 1 + (b ^ c)))
    return runs


def setting_name(bits: int, group_size: int, sym: bool, act_order: bool, version: int) -> str:
    return f"{bits}bit-{f'g{group_size}' if group_size > 0 else 'row'}-{'sym' if sym else 'asym'}{'-act' if act_order else ''}-v{version}"


def make_cases() -> tuple[Case, ...]:
    settings = [("llama", s) for s in full()]
    settings += [(family, s) for family, groups in (("qwen2", (-1, 32)), ("opt", (32, 64)), ("bloom", (-1, 64))) for s in covering(groups)]
    cases = [
        Case(name=f"{family}-{setting_name(*s)}", family=family, flags=flags(*s), reader={"routes": routes(family, *s)})
        for family, s in settings
    ]
    both = {"routes": ROUTES}
    cases += [Case(name=name, family=family, model=model, flags=given, reader=both) for name, family, model, given in SPECIAL]
    return (*cases, *(Case(name=f"{family}-experts", family=family, flags=_FOUR, reader=both) for family in EXPERTS))


def routes(family: str, bits: int, group_size: int, sym: bool, act_order: bool, version: int) -> tuple[str, ...]:
    trains = family == "llama" and sym and not act_order and version == 1
    return (*ROUTES, "peft") if trains else ROUTES


_FOUR = flags(4, 32, True, False, 1)
#: Special models and rules: (name, family, config values, options).
SPECIAL: tuple[tuple[str, str, dict[str, Any], tuple[str, ...]], ...] = (
    ("llama-bias", "llama", {"attention_bias": True, "mlp_bias": True}, _FOUR),
    ("llama-tied", "llama", {"tie_word_embeddings": True}, _FOUR),
    ("llama-rtn", "llama", {}, (*_FOUR, "--method", "rtn")),
    ("llama-mse", "llama", {}, (*_FOUR, "--scales", "search")),
    ("llama-rule-bits", "llama", {}, (*_FOUR, "--rule", r".*down_proj$:bits=8")),
    ("llama-rule-group", "llama", {}, (*_FOUR, "--rule", r".*mlp\..*:group_size=64")),
    ("llama-rule-sym", "llama", {}, (*_FOUR, "--rule", r".*\.o_proj$:sym=false")),
    ("llama-head", "llama", {}, (*_FOUR, "--lm-head")),
    ("llama-skip-all-blocks", "llama", {}, (*_FOUR, "--skip", r".*\.o_proj$")),
    ("llama-skip-one-block", "llama", {}, (*_FOUR, "--skip", r"model\.layers\.1\.")),
    ("bloom-rule-bits", "bloom", {}, (*_FOUR, "--rule", r".*dense_h_to_4h$:bits=3,group_size=-1,sym=false")),
)


#: Families with experts.
EXPERTS = ("qwen3_moe", "deepseek_v3", "mixtral", "glm4_moe")


def fails(row: dict[str, Any], tolerance: float = LOGITS_TOLERANCE) -> str | None:
    """The reason why a row is wrong; None if it is right. tolerance: of the logits, relative to their norm."""
    if "error" in row:
        return str(row["error"])
    for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if row.get(keys):
            return f"{len(row[keys])} {keys.replace('_', ' ')}, such as {row[keys][0]}"
    if row["linears"] != row["linears_expected"]:
        return f"the reader has {row['linears']} packed Linears, expected {row['linears_expected']}"
    if row["weights_equal"] != row["linears_expected"]:
        return f"{row['linears_expected'] - row['weights_equal']} Linears unpack to other values"
    if not row["logits_rel_diff"] < tolerance:
        return f"logits differ by {row['logits_rel_diff']:.2g} of their norm"
    return _training_fails(row) if row["route"] == "peft" else None


def _training_fails(row: dict[str, Any]) -> str | None:
    losses = row["losses"]
    if not all(loss == loss and abs(loss) != float("inf") for loss in losses) or not losses[-1] < losses[0]:
        return f"the loss went from {losses[0]} to {losses[-1]}"
    if row["lora_parameters_with_gradient"] != row["lora_parameters"]:
        return f"{row['lora_parameters'] - row['lora_parameters_with_gradient']} adapters had no gradient"
    return None if row["base_unchanged"] else "training changed the packed weights"


LIMITS = {
    r"^(transformers|peft)/.*-head": "optimum packs the Linears of blocks only, so that the head is not found; GPTQModel.load reads it",
    r"^(transformers|peft)/.*-rule-(bits|group)": "optimum, by which transformers loads, gives all Linears the same bits and group size",
    r"^transformers/.*-experts": "transformers looks for experts without quantization, so that they stay random",
    r"^gptqmodel/mixtral-experts": "GPTQModel looks for experts under other names than checkpoints of this family have",
    r"^gptqmodel/glm4_moe-experts": "GPTQModel's code for experts of this family fails with transformers 5.23",
    r"^gptqmodel/.*-asym.*-v1$": "GPTQModel refuses asymmetric v1 outputs of other programs; write them with --format gptq_v2",
}

CLIENT = Client(
    name="gptqmodel",
    reader="reader_gptqmodel.py",
    cases=make_cases(),
    fails=fails,
    limits=LIMITS,
    environment={"GPTQMODEL_CPU_WORKERS": "2", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"},
)
