"""bitsandbytes, by itself and through transformers, with PEFT on top."""

from __future__ import annotations

import itertools
from typing import Any

from cases import Case, Client

#: Readers sum the same fp32 products in another order.
LOGITS_TOLERANCE = 1e-5
ROUTES = ("transformers",)
_RTN, _GPTQ = ("--method", "rtn", "--scales", "minmax"), ("--method", "gptq")


def make_cases() -> tuple[Case, ...]:
    cases = []
    for family, kind in itertools.product(("llama", "qwen2", "opt", "bloom"), ("nf4", "fp4")):
        format = ("--format", f"bnb-{kind}")
        given = {"qwen2": ("--order", "activation"), "opt": ("--order", "natural")}.get(family, ())
        trained = ("peft",) if family == "llama" else ()
        routes = ROUTES + trained
        cases.append(Case(name=f"{family}-{kind}-gptq", family=family, flags=(*format, *_GPTQ, *given), reader={"routes": routes}))
        if family != "bloom":  # its names in files differ from those in the model
            routes = (*ROUTES, "quantize")
            cases.append(Case(name=f"{family}-{kind}-rtn", family=family, flags=(*format, *_RTN), reader={"routes": routes}))
    nf4 = ("--format", "bnb-nf4")
    special: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
        ("bias", {"attention_bias": True, "mlp_bias": True}, nf4),
        ("tied", {"tie_word_embeddings": True}, nf4),
        ("searched-rtn", {}, (*nf4, "--method", "rtn")),
        ("minmax", {}, (*nf4, "--scales", "minmax", "--sweeps", "0")),
        ("skip-all-blocks", {}, (*nf4, "--skip", r".*\.o_proj$")),
        ("skip-one-block", {}, (*nf4, "--skip", r"model\.layers\.1\.")),
        ("odd-width", {"intermediate_size": 96}, nf4),
    )
    return (*cases, *(Case(name=f"llama-nf4-{n}", family="llama", model=m, flags=f, reader={"routes": ROUTES}) for n, m, f in special))


def fails(row: dict[str, Any]) -> str | None:
    """The reason why a row is wrong; None if it is right."""
    if "error" in row:
        return str(row["error"])
    if row["route"] == "peft":
        return _training_fails(row)
    for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if row.get(keys):
            return f"{len(row[keys])} {keys.replace('_', ' ')}, such as {row[keys][0]}"
    if row["linears"] != row["linears_expected"]:
        return f"the reader has {row['linears']} packed Linears, expected {row['linears_expected']}"
    if row["weights_equal"] != row["linears_expected"]:
        return f"{row['linears_expected'] - row['weights_equal']} Linears have other values"
    if not row.get("logits_rel_diff", 0) < LOGITS_TOLERANCE:
        return f"logits differ by {row['logits_rel_diff']:.2g} of their norm"
    return None


def _training_fails(row: dict[str, Any]) -> str | None:
    losses = row["losses"]
    if not losses[-1] < losses[0]:
        return f"the loss went from {losses[0]} to {losses[-1]}"
    if row["lora_parameters_with_gradient"] != row["lora_parameters"]:
        return f"{row['lora_parameters'] - row['lora_parameters_with_gradient']} adapters had no gradient"
    return None if row["base_unchanged"] else "training changed the packed weights"


CLIENT = Client(
    name="bitsandbytes",
    reader="reader_bitsandbytes.py",
    cases=make_cases(),
    fails=fails,
    environment={"PYTHONWARNINGS": "ignore"},
)
