"""docs/quality.md, from quality.json and quality_moe.json. Imports neither torch nor bigq."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import moe_section

from quality_bench import comparison
from quality_bench.collected import contestants_of
from quality_bench.settings import CHOOSING, CONTESTANTS, JUDGING, SUBJECTS, Contestant, Subject

#: The subject and setting of the first table; the KL of another setting is beside it.
SHOWN, BESIDE = ("smollm2-prose", "4g64-sym"), "4g64-asym"
#: What else can be asked for: an option, and pairs of contestants, without and with it.
BEYOND: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "--rotate",
        (
            ("bigq best", "bigq best, rotated"),
            *((f"bigq best, {shape}", f"bigq best, rotated, {shape}") for shape in ("by row", "groups of 192", "groups of 128")),
        ),
    ),
    ("--tune-steps 64", (("bigq best", "bigq best, tuned"),)),
    ("--bits-per-weight 3.25", (("bigq, groups of 192", "bigq, 3.25 bits per weight, groups of 192"),)),
)

Row = Mapping[str, Any]


def page(results: Path) -> str:
    dense, experts = (json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in ("quality", "quality_moe"))
    lines = [
        "# Quality, and how it compares with other programs",
        "",
        "<!-- Written by scripts/quality.py --table from docs/results/quality.json and quality_moe.json; do not edit. -->",
        "",
        *presets(dense),
        *against(dense, "default", "Against other programs at their defaults"),
        *against(dense, "best", "Against other programs at their best known settings"),
        *against(dense, "awq", "AWQ in each program", halves=(JUDGING, CHOOSING)),
        *beyond(dense),
        *measured(dense),
        *everything(dense),
        *moe_section.section(experts),
    ]
    return "\n".join(lines)


def found(made: Mapping[str, Any], subject: str, setting: str) -> dict[str, Row]:
    """Contestant → figures."""
    return {row["contestant"]: row for row in made["comparisons"] if (row["subject"], row["setting"]) == (subject, setting)}


def presets(made: Mapping[str, Any]) -> list[str]:
    """The first table: bigq's default and its presets, as far as they were run."""
    rows, beside = found(made, *SHOWN), found(made, SHOWN[0], BESIDE)
    shown = [c for c in CONTESTANTS if c.tool == "bigq" and c.kind in ("default", "preset") and c.name in rows]
    lines = [
        "| preset | options | KL | KL, asymmetric | perplexity | top token | CPU time | memory |",
        "|---" * 8 + "|",
    ]
    for contestant in shown:
        name = "balanced" if contestant.kind == "default" else contestant.name.removeprefix("bigq ")
        options = f"`{contestant.flags}`" if contestant.flags else "none, it is the default"
        other = kl(beside[contestant.name]) if contestant.name in beside else "–"
        lines.append(f"| {name} | {options} | {kl(rows[contestant.name])} | {other} | {cost(rows[contestant.name])} |")
    original = next((run["original_perplexity"] for run in made["runs"] if run["subject"] == SHOWN[0]), None)
    said = f"SmolLM2-135M-Instruct, 4 bits in groups of 64, symmetric if not said; its perplexity is {original:.3f}." if original else ""
    return [*lines, "", said if shown else "No run of these is in the results yet.", ""]


def number(value: float, like: float | None = None, sign: str = "") -> str:
    """With as many decimals as a KL of that size (of ``like``) needs."""
    decimals = 4 if abs(value if like is None else like) >= 0.02 else 5
    return f"{value:{sign}.{decimals}f}".replace("-", "−")


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def kl(row: Row) -> str:
    return f"{number(row['kl'])} ± {number(row['stderr'], row['kl'])}"


def cost(row: Row) -> str:
    """Cells for perplexity, agreement, time and memory."""
    top = f"{100 * row['top1_agreement']:.1f} %"
    return f"{row['perplexity']:.3f} | {top} | {row['cpu_s']:.0f} s | {row['peak_bytes'] / 2**20:.0f} MiB"


def against(made: Mapping[str, Any], kind: str, title: str, halves: Sequence[str] = (JUDGING,)) -> list[str]:
    """bigq's contestant of a kind beside others', for subjects of these halves."""
    there = contestants_of(made, CONTESTANTS)
    candidates = [c for c in there if c.tool == "bigq" and (c.kind == kind or c.name == f"bigq {kind}")]
    ours = next((c for c in candidates if c.kind == "preset"), candidates[0] if candidates else None)
    peers = [c for c in there if c.tool != "bigq" and c.kind == kind]
    if ours is None or not peers:
        return []
    lines = [f"## {title}", ""]
    said = "the difference of the draws that both have, bold beyond twice its standard error"
    chosen = f" {ours.name} was chosen with {' and '.join(_chosen_with(made, kind))}." if CHOOSING in halves else ""
    lines += [*wrapped(f"A cell is the KL, and how much it differs from {ours.name}'s: {said}.{chosen}"), ""]
    lines += [f"| | {ours.name} | " + " | ".join(c.name for c in peers) + " |", "|---" * (len(peers) + 2) + "|"]
    for subject in (s for s in SUBJECTS if s.half in halves):
        for setting in made["subjects"].get(subject.name, {}).get("settings", ()):
            rows = found(made, subject.name, setting)
            if ours.name in rows and any(c.name in rows for c in peers):
                cells = [kl(rows[ours.name]), *(versus(made, subject, setting, ours, c) for c in peers)]
                lines.append(f"| {subject.name}, {setting} | {' | '.join(cells)} |")
    spent = costs(made, [ours, *peers])
    return [*lines, "", *([*spent, ""] if spent else [])]


def _chosen_with(made: Mapping[str, Any], kind: str) -> list[str]:
    """The subjects of the choosing half on which contestants of a kind were run."""
    names = {c.name for c in CONTESTANTS if c.kind == kind}
    there = {run["subject"] for run in made["runs"] if run["contestant"] in names}
    return [s.name for s in SUBJECTS if s.half == CHOOSING and s.name in there]


def versus(made: Mapping[str, Any], subject: Subject, setting: str, ours: Contestant, peer: Contestant) -> str:
    """KL of a peer and its difference from ours, computed from the windows; bold beyond two standard errors."""
    runs = [run for run in made["runs"] if run["contestant"] in (ours.name, peer.name)]
    both = comparison.by_contestant(runs).get((subject.name, setting), {})
    if peer.name not in both:
        return "–"
    theirs = comparison.mean_of([both[peer.name][draw]["kl_of_windows"] for draw in sorted(both[peer.name])])
    compared = comparison.difference(both[peer.name], both[ours.name])
    if compared is None:
        return number(theirs.mean)
    change, draws = compared
    text = f"{number(change.mean, theirs.mean, '+')} ± {number(change.stderr, theirs.mean)}"
    bold = f"**{text}**" if abs(change.mean) > 2 * change.stderr else text
    return f"{number(theirs.mean)}, {bold}" + ("" if draws > 1 else " (one draw)")


def beyond(made: Mapping[str, Any]) -> list[str]:
    """Options that no preset has, each beside the same job without it."""
    known = {contestant.name: contestant for contestant in CONTESTANTS}
    rows = []
    for option, pairs in BEYOND:
        for without, given in pairs:
            for subject, setting in ((s, name) for s in SUBJECTS for name in made["subjects"].get(s.name, {}).get("settings", ())):
                there = found(made, subject.name, setting)
                if without in there and given in there:
                    compared = versus(made, subject, setting, known[without], known[given])
                    spent = f"{there[without]['cpu_s']:.0f} s, {there[given]['cpu_s']:.0f} s"
                    rows.append(f"| `{option}` | {subject.name}, {setting} | {without} | {kl(there[without])} | {compared} | {spent} |")
    said = (
        "Options that no preset has, each beside the same job without it: its KL, and how much that differs on the draws that both have, "
        "bold beyond twice its standard error. Where a name says by row or groups of another size, it is that instead of the setting's."
    )
    head = ["| option | | without | KL | with | CPU time |", "|---" * 6 + "|"]
    return ["## Options beyond the presets", "", *wrapped(said), "", *head, *rows, ""] if rows else []


def costs(made: Mapping[str, Any], contestants: Iterable[Contestant]) -> list[str]:
    """One line: CPU time and memory of each on the model of the first table."""
    rows = found(made, *SHOWN)
    parts = [
        f"{c.name} {rows[c.name]['cpu_s']:.0f} s and {rows[c.name]['peak_bytes'] / 2**20:.0f} MiB" for c in contestants if c.name in rows
    ]
    return wrapped(f"CPU time and peak memory on {SHOWN[0]}, {SHOWN[1]}: {'; '.join(parts)}.") if parts else []


def measured(made: Mapping[str, Any]) -> list[str]:
    programs = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if name not in ("python", "triton"))
    lines = [
        "## What was measured",
        "",
        *wrapped(
            "All programs quantize the same bf16 checkpoints, computing in fp32 on a CPU with one thread, on the same rows of tokens; "
            "draws have no row in common. Transformers runs the quantized weights in fp32, and the distribution at each held-out token is "
            "compared with the original's: KL is their mean divergence in nats (lower is better), top token how often both have the same "
            "first choice. Errors are by window, not by token; they contain the spread between draws as a component of its own, but with "
            f"one draw they are over the windows alone. Times are without imports. {programs}."
        ),
        "",
        *wrapped(
            f"Settings of bigq are chosen on one half ({CHOOSING}) of models and texts and compared with others on the other half "
            f"({JUDGING})."
        ),
        "",
        *wrapped(
            "A later revision of bigq than those that are named for a subject may give other figures. Since 1ee1e5f damping leaves out the "
            "largest twentieth of a Linear's inputs; before, all inputs counted."
        ),
        "",
        "| subject | half | model | text | calibration | held out | perplexity | revisions of bigq |",
        "|---" * 8 + "|",
    ]
    perplexity = {run["subject"]: run["original_perplexity"] for run in made["runs"]}
    for name, subject in made["subjects"].items():
        rows = subject["calibration"]
        held = " × ".join(map(str, subject["windows"]))
        model = subject["model"].get("from") or f"`{subject['model'].get('command', 'scripts/train_moe.py')}`"
        cells = [subject["half"], model, subject["corpus"], f"{rows['rows']} × {rows['tokens_per_row']}", held, f"{perplexity[name]:.3f}"]
        cells.append(", ".join(revisions(made, name)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", *([f"{made['runs_missing']} runs of the whole table were not made."] if made["runs_missing"] else []), ""]


def revisions(made: Mapping[str, Any], subject: str) -> list[str]:
    """Those of bigq's runs with a subject, in the order of its runs."""
    return list(
        dict.fromkeys(run["revision"][:7] for run in made["runs"] if run["subject"] == subject and run["contestant"].startswith("bigq"))
    )


def everything(made: Mapping[str, Any]) -> list[str]:
    """Every contestant at every place, by increasing KL."""
    lines = ["## All figures", ""]
    for place in dict.fromkeys((row["subject"], row["setting"]) for row in made["comparisons"]):
        lines += [f"### {place[0]}, {place[1]}", ""]
        lines += ["| | draws | KL | between draws | against bigq | perplexity | top token | CPU time | memory |", "|---" * 9 + "|"]
        for row in found(made, *place).values():
            spread = "–" if row["of_draws"] is None else number(row["of_draws"], row["kl"])
            change = "–"
            if "difference" in row:
                change = f"{number(row['difference'], row['kl'], '+')} ± {number(row['difference_stderr'], row['kl'])}"
            lines.append(f"| {row['contestant']} | {len(row['draws'])} | {kl(row)} | {spread} | {change} | {cost(row)} |")
        lines.append("")
    return lines
