#!/usr/bin/env python3
"""Draw docs/memory.svg: what quantizing a model takes, beside the model's own size, from docs/results/plan_shapes.json.

python scripts/draw_memory.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURE = ROOT / "docs/results/plan_shapes.json", ROOT / "docs/memory.svg"

MODELS = {"llama-2-7b": "Llama-2-7B", "llama-2-70b": "Llama-2-70B", "bloom-176b": "BLOOM-176B", "llama-3.1-405b": "Llama-3.1-405B"}
#: What a bar shows → (the plan's field, its colour).
BARS = {"source": ("read_bytes", "#9aa5b1"), "GPU memory": ("device_bytes", "#2f6fde"), "host memory": ("host_bytes", "#2a9d6f")}
WIDTH, LEFT, FULL, THICK, STEP = 720, 130, 470, 12, 62


def draw(result: Mapping[str, Any]) -> str:
    """The picture as SVG text; sizes in GB of 10⁹ bytes."""
    plans = result["plans"]
    scale = FULL / max(plans[name]["read_bytes"] for name in MODELS)
    height = 70 + STEP * len(MODELS)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="16" y="24" font-size="15" font-weight="bold">What a job takes, beside the size of its model</text>',
    ]
    at = 16
    for what, (_, colour) in BARS.items():
        lines.append(f'<rect x="{at}" y="36" width="12" height="12" fill="{colour}"/><text x="{at + 18}" y="47">{what}</text>')
        at += 36 + 8 * len(what)
    lines.append(f'<text x="{at}" y="47" fill="#555555">plans for one H100 (predictions), in GB</text>')
    for row, (name, title) in enumerate(MODELS.items()):
        top = 66 + STEP * row
        lines.append(f'<text x="{LEFT - 10}" y="{top + 24}" text-anchor="end">{title}</text>')
        for number, (field, colour) in enumerate(BARS.values()):
            size, y = plans[name][field], top + number * (THICK + 3)
            width = max(1.0, size * scale)
            lines.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{THICK}" fill="{colour}"/>')
            lines.append(f'<text x="{LEFT + width + 6:.1f}" y="{y + 11}" font-size="12">{size / 1e9:.1f}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
