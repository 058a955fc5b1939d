"""``bigq demo``: what quantization costs, shown on the tiny trained Llama that ships with the package."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bigq.calibration import ASSETS
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.sched.evaluate import EvalConfig, Evaluation, evaluate
from bigq.sched.pipeline import quantize
from bigq.scheme import QuantScheme

MODEL = ASSETS / "tiny-llama"
BITS = (4, 3, 2)
GROUP_SIZE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: a method at a bit width (None for the original), sizes in bytes, seconds to quantize."""

    method: str
    bits: int | None
    result: Evaluation
    size: int
    seconds: float | None
    out: str


def demo(out: str, device: str = "auto") -> int:
    """Quantize the shipped model in every way of the table, print it, and return the exit code."""
    base = Path(out)
    if base.exists() and any(p.name not in {name for _, _, name in _runs()} for p in base.iterdir()):
        raise UsageError(f"{base}: holds other things than the demo's output; choose another folder with --out")
    started = time.monotonic()
    rows: list[Row] = []
    for method, bits, name in _runs():
        print(f"{method} at {bits} bits …", file=sys.stderr, flush=True)
        began = time.monotonic()
        report = quantize(str(MODEL), base / name, demo_config(method, bits, device))
        seconds = time.monotonic() - began
        result = evaluate(str(base / name), EvalConfig(data="builtin", device=device, quiet=True), baseline=str(MODEL))
        if not rows:
            assert result.baseline_perplexity is not None
            original = Evaluation(perplexity=result.baseline_perplexity, tokens=result.tokens, kl=0.0, top1_agreement=1.0)
            rows.append(Row(method="original", bits=None, result=original, size=report.source_bytes, seconds=None, out=str(MODEL)))
        rows.append(Row(method=method, bits=bits, result=result, size=report.output_bytes, seconds=seconds, out=str(base / name)))
    print(table(rows))
    print(f"\n{rows[0].result.tokens} held-out tokens, groups of {GROUP_SIZE}, {time.monotonic() - started:.0f} s in all")
    return 0


def demo_config(method: str, bits: int, device: str) -> JobConfig:
    """The job of one line of the table."""
    scheme = QuantScheme(bits=bits, group_size=GROUP_SIZE)
    return JobConfig(scheme=scheme, method=method, calibration="builtin", samples=256, batch=32, device=device, quiet=True)


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [f"{'':9} {'bits':>4} {'perplexity':>10} {'KL':>8} {'top-1':>6} {'MiB':>6} {'seconds':>7}  where"]
    for row in rows:
        bits = "16" if row.bits is None else str(row.bits)
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        kl, agreement = row.result.kl or 0.0, row.result.top1_agreement or 0.0
        lines.append(
            f"{row.method:9} {bits:>4} {row.result.perplexity:>10.3f} {kl:>8.4f} {agreement:>6.1%} "
            f"{row.size / 2**20:>6.2f} {seconds:>7}  {row.out}"
        )
    return "\n".join(lines)


def _runs() -> list[tuple[str, int, str]]:
    return [(method, bits, f"{method}-{bits}bit") for bits in BITS for method in ("rtn", "gptq")]
