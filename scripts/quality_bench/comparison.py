"""Differences between contestants on the same windows and draws, and their standard errors. Imports neither torch nor bigq.

KL[d, w] of draw d and window w, difference D = A − B. With D[d, w] = μ + draw[d] + window[w] + rest[d, w], the variance of the mean over
d and w is σ²draw/d + σ²window/w + σ²rest/(d·w). The components are those of a two-way table without repetition (by mean squares, not below
0). With one draw nothing is known about draws, and the error is that over the windows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: (subject, setting) of a run.
Place = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """mean: over draws and windows. stderr: of the mean, with both. of_draws: the standard deviation between draws alone, None of one."""

    mean: float
    stderr: float
    of_draws: float | None


def mean_of(table: Sequence[Sequence[float]]) -> Mean:
    """table: a row for each draw, all of the same windows."""
    draws, windows = len(table), len(table[0])
    mean = statistics.fmean(statistics.fmean(row) for row in table)
    by_window = [statistics.fmean(column) for column in zip(*table, strict=True)]
    if draws == 1:
        return Mean(mean=mean, stderr=math.sqrt(statistics.variance(by_window) / windows), of_draws=None)
    by_draw = [statistics.fmean(row) for row in table]
    rest = [[value - d - w + mean for value, w in zip(row, by_window, strict=True)] for row, d in zip(table, by_draw, strict=True)]
    square_rest = sum(value**2 for row in rest for value in row) / ((draws - 1) * (windows - 1))
    square_draws, square_windows = windows * statistics.variance(by_draw), draws * statistics.variance(by_window)
    variance_draws = max(0.0, square_draws - square_rest) / windows
    variance_windows = max(0.0, square_windows - square_rest) / draws
    variance = variance_draws / draws + variance_windows / windows + square_rest / (draws * windows)
    return Mean(mean=mean, stderr=math.sqrt(variance), of_draws=math.sqrt(variance_draws))


def setting_name(record: Mapping[str, Any]) -> str:
    return f"{record['bits']}g{record['group_size']}-{'sym' if record['symmetric'] else 'asym'}"


def by_contestant(records: Iterable[Mapping[str, Any]]) -> dict[Place, dict[str, dict[int, Mapping[str, Any]]]]:
    """(subject, setting) → contestant → draw → record."""
    found: dict[Place, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for record in records:
        place = (record["subject"], setting_name(record))
        found.setdefault(place, {}).setdefault(record["contestant"], {})[record["draw"]] = record
    return found


def difference(ours: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]]) -> tuple[Mean, int] | None:
    """ours − theirs in KL over the draws that both have, and how many these are; None without any."""
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    pairs = [(ours[draw]["kl_of_windows"], theirs[draw]["kl_of_windows"]) for draw in both]
    return mean_of([[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]), len(both)


def row(name: str, draws: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]] | None) -> dict[str, Any]:
    """Figures of a contestant in one place, and how they differ from a reference's."""
    records = [draws[draw] for draw in sorted(draws)]
    kl = mean_of([record["kl_of_windows"] for record in records])
    made: dict[str, Any] = {"contestant": name, "draws": sorted(draws), "kl": kl.mean, "stderr": kl.stderr, "of_draws": kl.of_draws}
    for key in ("perplexity", "top1_agreement", "cpu_s", "peak_bytes"):
        made[key] = statistics.fmean(record[key] for record in records)
    if reference is not None and reference is not draws and (compared := difference(draws, reference)):
        made |= {"difference": compared[0].mean, "difference_stderr": compared[0].stderr, "common_draws": compared[1]}
    return made


def rows(records: Iterable[Mapping[str, Any]], against: str) -> dict[Place, list[dict[str, Any]]]:
    """For each place, contestants by increasing KL. Differences are from the one called ``against``."""
    made = {}
    for place, contestants in by_contestant(records).items():
        reference = contestants.get(against)
        made[place] = sorted((row(name, draws, reference) for name, draws in contestants.items()), key=lambda each: each["kl"])
    return made


def summary(records: Iterable[Mapping[str, Any]], against: str) -> str:
    """Text for the terminal."""
    lines = []
    for (subject, setting), found in rows(records, against).items():
        lines += [
            f"{subject} {setting}",
            f"{'':32} {'KL':>8} {'±':>7} {'draws':>7} {'− ' + against:>18} {'ppl':>8} {'top1':>6} {'CPU s':>7}  MiB",
        ]
        for each in found:
            change = f"{each['difference']:+.5f} ± {each['difference_stderr']:.5f}" if "difference" in each else ""
            spread = f"{each['of_draws']:7.5f}" if each["of_draws"] is not None else f"{'one':>7}"
            figures = f"{each['kl']:8.5f} {each['stderr']:7.5f} {spread} {change:>18} {each['perplexity']:8.3f}"
            lines.append(
                f"{each['contestant']:32} {figures} {each['top1_agreement']:6.4f} {each['cpu_s']:7.1f} {each['peak_bytes'] / 2**20:4.0f}"
            )
        lines.append("")
    return "\n".join(lines)
