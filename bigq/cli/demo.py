"""``bigq demo``: size and quality of the tiny Llama that ships with the package, at several bit widths."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigq.config import JobConfig
from bigq.data.opening import ASSETS
from bigq.errors import UsageError
from bigq.infer.evaluate import evaluate
from bigq.infer.options import EvalConfig
from bigq.infer.results import Evaluation
from bigq.sched.run import quantize
from bigq.scheme import QuantScheme
from bigq.vocabulary import DtypeName, MethodName

MODEL = ASSETS / "tiny-llama"
BITS = (4, 3, 2)
METHODS: tuple[MethodName, ...] = ("rtn", "gptq")
GROUP_SIZE = -1
CALIBRATION_ROWS = 256
HELDOUT_ROWS = 128
DTYPE: DtypeName = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table: a method at a bit width (16: the original), size in bytes, seconds to quantize."""

    method: str
    bits: int
    result: Evaluation
    size: int
    seconds: float | None
    out: str

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "bits": self.bits,
            "perplexity": self.result.perplexity,
            "kl": self.result.kl,
            "kl_stderr": self.result.kl_stderr,
            "top1_agreement": self.result.top1_agreement,
            "bytes": self.size,
            "seconds": self.seconds,
        }


def demo(out: str, device: str = "auto", *, as_json: bool = False) -> list[Row]:
    """Quantize the shipped model with each method and bit width; print a table, or one JSON object. Raises UsageError."""
    base = Path(out)
    names = {f"{method}-{bits}bit" for bits in BITS for method in METHODS}
    if base.exists() and (not base.is_dir() or any(p.name not in names for p in base.iterdir())):
        raise UsageError(f"{base}: holds files that are not the demo's; choose another folder with --out")
    started = time.monotonic()
    rows: list[Row] = []
    for bits in BITS:
        for method in METHODS:
            print(f"{method} at {bits} bits …", file=sys.stderr, flush=True)
            row, original = _run(method, bits, base / f"{method}-{bits}bit", device)
            rows += [row] if rows else [original, row]
    if as_json:
        settings = {"group_size": GROUP_SIZE, "calibration_rows": CALIBRATION_ROWS, "heldout_tokens": rows[0].result.tokens}
        print(json.dumps({"settings": settings, "rows": [row.to_json() for row in rows]}, indent=2))
    else:
        print(table(rows))
        print(
            f"\n{rows[0].result.tokens} held-out tokens, one scale per row, act-order for gptq, {time.monotonic() - started:.0f} s in total"
        )
    return rows


def demo_config(method: MethodName, bits: int, device: str) -> JobConfig:
    """The job of one row. Forward passes are fp32, to show the rounding of weights and not that of bf16 activations.

    Rounding to nearest is the plain one, on grids that span the weights.
    """
    scheme = QuantScheme(bits=bits, group_size=GROUP_SIZE, scales="minmax" if method == "rtn" else "search")
    return JobConfig(scheme=scheme, method=method, calibration="builtin", samples=CALIBRATION_ROWS, device=device, dtype=DTYPE, quiet=True)


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [f"{'':9} {'bits':>4} {'perplexity':>10} {'KL':>8} {'top-1':>6} {'MiB':>6} {'seconds':>7}  where"]
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        kl, agreement = row.result.kl or 0.0, row.result.top1_agreement or 0.0
        lines.append(
            f"{row.method:9} {row.bits:>4} {row.result.perplexity:>10.3f} {kl:>8.4f} {agreement:>6.1%} "
            f"{row.size / 2**20:>6.2f} {seconds:>7}  {row.out}"
        )
    return "\n".join(lines)


def _run(method: MethodName, bits: int, out: Path, device: str) -> tuple[Row, Row]:
    """(the quantized model's row, the original's row)."""
    began = time.monotonic()
    report = quantize(str(MODEL), out, demo_config(method, bits, device))
    seconds = time.monotonic() - began
    result = evaluate(str(out), EvalConfig(samples=HELDOUT_ROWS, device=device, dtype=DTYPE, quiet=True), baseline=str(MODEL))
    assert result.baseline_perplexity is not None
    same = dataclasses.replace(result, perplexity=result.baseline_perplexity, kl=0.0, kl_stderr=0.0, top1_agreement=1.0)
    row = Row(method=method, bits=bits, result=result, size=report.output_bytes, seconds=seconds, out=str(out))
    return row, Row(method="original", bits=16, result=same, size=report.source_bytes, seconds=None, out=str(MODEL))
