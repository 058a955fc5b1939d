#!/usr/bin/env python3
"""How KL falls with calibration tokens, and with their number per row: bigq's default at 4 bits on SmolLM2, documentation as text.

    python scripts/calibration_tokens.py --work DIR --json docs/results/calibration_tokens.json [--models DIR]

Each point is measured with two draws of rows, without a row in common, as far as the text has so many, and judged on the windows of
``quality.py``. A run that is done is kept in WORK/runs and not made again. Models and texts lie in WORK/models, or where --models says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts")]

from facts import host, versions
from quality_bench import collected, comparison, corpora, subjects
from quality_bench.runs import Bench
from quality_bench.settings import SUBJECTS, Contestant, Run, Setting, Subject
from safetensors.torch import save_file
from transformers import AutoTokenizer

#: (rows, tokens of each): more and more rows; then as many tokens in shorter and in longer rows.
POINTS = ((2, 256), (8, 256), (32, 256), (128, 256), (256, 256), (128, 64), (8, 1024), (4, 2048), (16, 2048), (32, 2048))
#: At most; a point with more than half of the text has one.
DRAWS = 2
SETTING = Setting(bits=4, group_size=64, symmetric=True)


def subject(rows: int, seqlen: int) -> Subject:
    """SmolLM2 on documentation, calibrated with so many tokens."""
    docs = next(each for each in SUBJECTS if each.name == "smollm2-docs")
    return dataclasses.replace(docs, name=f"smollm2-docs-{rows}x{seqlen}", rows=rows, seqlen=seqlen)


def prepare(models: Path, point: Subject) -> int:
    """MODELS/texts/POINT: as ``subjects.prepare`` does, with fewer draws. Returns how many."""
    folder = models / "texts" / point.name
    corpus, tokenizer = corpora.CORPORA[point.corpus](), AutoTokenizer.from_pretrained(subjects.prepare_model(models, point.model))
    count = min(DRAWS, len(corpora.tokens(corpus.calibration, tokenizer, point.seqlen)) // point.rows)
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(corpora.draws(corpus.calibration, tokenizer, point.rows, point.seqlen, count)):
        save_file({"input_ids": rows.contiguous()}, folder / f"ids-{number}.safetensors")
    save_file({"input_ids": corpora.windows(corpus.heldout, tokenizer, point.windows, point.window)}, folder / "windows.safetensors")
    (folder / "facts.json").write_text(json.dumps({"corpus": point.corpus, "text": corpus.facts()}) + "\n")
    return count


def summarized(found: list[dict[str, Any]], rows: int, seqlen: int) -> dict[str, Any]:
    """A point's figures over its draws."""
    figures = comparison.row("bigq", {record["draw"]: record for record in found}, None)
    return {"rows": rows, "tokens_per_row": seqlen, "tokens": rows * seqlen} | collected.rounded(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, outputs and records of runs")
    parser.add_argument("--models", type=Path, help="folder of prepared models and texts (default: WORK/models)")
    parser.add_argument("--json", type=Path, required=True, help="result file")
    args = parser.parse_args()
    models = (args.models or args.work / "models").resolve()
    bench = Bench(models=models, work=args.work.resolve(), tree=ROOT)
    points, runs = [], []
    for rows, seqlen in POINTS:
        point = subject(rows, seqlen)
        made = [Run(subject=point, contestant=Contestant(name="bigq"), setting=SETTING, draw=d) for d in range(prepare(models, point))]
        if problems := bench.make(made):
            sys.exit(problems[0])
        found = collected.records(bench.work, made)
        points.append(summarized(found, rows, seqlen))
        runs += found
        print(f"{rows:4} × {seqlen:4}: KL {points[-1]['kl']:.4f} ± {points[-1]['stderr']:.4f}, {points[-1]['cpu_s']:.0f} s", flush=True)
    result = {
        "command": "python scripts/calibration_tokens.py --work DIR --json docs/results/calibration_tokens.json",
        "revisions": sorted({run["revision"] for run in runs}),
        "versions": versions(),
        "host": host(),
        "model": "SmolLM2-135M-Instruct",
        "setting": SETTING.name,
        "points": points,
    }
    args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
