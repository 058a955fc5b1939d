"""The part of docs/quality.md on models with experts, from docs/results/quality_moe.json. Imports neither torch nor bigq."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

#: The ways that others are compared with.
OWN = {"silu": "bigq", "few": "bigq, few tokens", "relu": "bigq, ReLU"}


def section(result: Mapping[str, Any]) -> list[str]:
    """Lines, without an empty one before them."""
    calibration, held_out, settings = result["calibration"], result["held_out"], result["settings"]
    own = [run for run in result["runs"] if run["way"] == OWN["silu"]]
    perplexity = own[0]["original_perplexity"]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("llmcompressor", "gptqmodel") if name in result["versions"])
    rows = f"{calibration['rows']} × {calibration['tokens_per_row']}"
    lines = [
        "## A model with experts",
        "",
        f"`scripts/train_moe.py` trains a model of Qwen3-MoE's structure on {result['model']['tokens'] / 1e6:.1f} million bytes:",
        f"4 layers of 32 experts, 2 of them for each token, 3.4 million parameters, perplexity {perplexity:.3f}.",
        f"It was quantized on {rows} tokens, symmetric, in groups of {settings['group_size']}, with act-order: the same tokens",
        f"for every program, {len(calibration['seeds'])} draws.",
        tokens_line(own),
        f"All compute in fp32 ({versions}); routers and output heads stay unquantized.",
        "",
        "bigq makes an expert's Hessians from the tokens that are routed to it, and rounds an expert without any to nearest.",
        "llm-compressor sends all tokens through every expert unless told otherwise. GPTQModel rounds an expert to nearest",
        "that has less than 0.5 % of the tokens. Rows that begin with bigq change that or other rules; but for damping, bigq",
        "has no options for them.",
        "",
        f"A cell is the mean KL divergence from the original per token, in nats, over {held_out['windows']} windows of held-out",
        "text, and how much higher than bigq's it is, ± the larger of its standard errors over windows and over draws.",
        "Bold: more than two standard errors over windows in every draw.",
        "",
        *table(result["comparisons"], OWN["silu"]),
        "",
        f"The same with {calibration['few_rows']} × {calibration['tokens_per_row']} tokens:",
        tokens_line([run for run in result["runs"] if run["way"] == OWN["few"]]),
        "",
        *table(result["comparisons"], OWN["few"]),
        "",
        *advice(result["comparisons"]),
        "",
        f"The same model with ReLU, trained on for {settings['relu_steps']} steps, has inputs that are 0 in all tokens of an expert:",
        dead_line(result["runs"]),
        "Other programs set the weights of such inputs to 0; bigq rounds them to nearest.",
        "",
        *table(result["comparisons"], OWN["relu"]),
        "",
    ]
    if result["runs_missing"]:
        lines += [f"Of {len(result['runs']) + len(result['runs_missing'])} runs, {len(result['runs_missing'])} are missing.", ""]
    return lines


def advice(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to do where experts have few tokens, with the KLs at 3 bits that say so."""
    kl = {row["way"]: statistics.fmean(row["kl"]) for row in rows if row["bits"] == 3}
    few, more, damped = kl[OWN["few"]], kl[OWN["silu"]], kl[f"{OWN['few']}, damping 0.1"]
    return [
        "Calibrate until most experts have more tokens than inputs; the summary of a job says how many they saw. From the few",
        f"tokens to the many, KL at 3 bits is {few:.4f} → {more:.4f}.",
        f"Where that takes too long, use `--damping 0.1`: {few:.4f} → {damped:.4f}.",
    ]


def tokens_line(own: Sequence[Mapping[str, Any]]) -> str:
    """How many tokens the experts of all layers have, over the draws."""
    spreads = [run["tokens_of_experts"] for run in own]
    median = statistics.fmean(s["median"] for s in spreads)
    without = statistics.fmean(s["without"] for s in spreads)
    return (
        f"An expert is given {min(s['min'] for s in spreads)} to {max(s['max'] for s in spreads)} tokens, the median is {median:.0f};"
        f" {without:.0f} of 128 are given none."
    )


def dead_line(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many inputs of down projections are dead."""
    found = [run for run in runs if run["way"] == OWN["relu"]]
    inputs, matrices = (statistics.fmean(run[key] for run in found) for key in ("dead_inputs", "matrices_with_dead_inputs"))
    return f"{inputs:.0f} of 8192 inputs of down projections, in {matrices:.0f} of 128 matrices."


def table(rows: Sequence[Mapping[str, Any]], own: str) -> list[str]:
    """A row for each way that is compared with ``own``, and a column for each number of bits."""
    mine = [row for row in rows if row["way"] == own or row.get("compared_with") == own]
    bits = sorted({row["bits"] for row in mine}, reverse=True)
    lines = ["| | " + " | ".join(f"{b} bits" for b in bits) + " |", "|---" * (len(bits) + 1) + "|"]
    for way in dict.fromkeys(row["way"] for row in mine):
        cells = [next((cell(row) for row in mine if (row["way"], row["bits"]) == (way, b)), "–") for b in bits]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def cell(row: Mapping[str, Any]) -> str:
    """The KL over the draws, and how much higher than bigq's it is."""
    kl = f"{statistics.fmean(row['kl']):.5f}"
    if "higher_by" not in row:
        return kl
    found = f"{100 * row['higher_by']:+.1f} ± {100 * row['stderr']:.1f} %"
    return f"{kl}, {found}" if row["verdict"] == "within noise" else f"{kl}, **{found}**"
