"""The timeline of a job: what it says, and what overlaps on it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bigq
from bigq.errors import UsageError
from bigq.io.prefetch import pieces
from bigq.methods import gptq
from bigq.progress.trace import Trace


def config(ids: Path, **more: Any) -> bigq.JobConfig:
    scheme = bigq.QuantScheme(group_size=32)
    return bigq.JobConfig(scheme=scheme, calibration=str(ids), samples=4, seqlen=40, device="cpu", quiet=True, **more)


def lanes_of(file: Path) -> dict[str, list[tuple[float, float, str]]]:
    """Lane → its (begin, end, name), in seconds."""
    events = json.loads(file.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    lanes: dict[str, list[tuple[float, float, str]]] = {name: [] for name in names.values()}
    for e in events:
        if e["ph"] == "X":
            lanes[names[e["tid"]]].append((e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6, e["name"]))
    return lanes


def test_a_trace_has_a_lane_for_each_kind_of_work(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    report = bigq.quantize(str(checkpoint("llama")), tmp_path / "out", config(ids_file, trace=str(tmp_path / "trace.json")))
    lanes = lanes_of(tmp_path / "trace.json")
    assert {"read", "load", "replay", "hessian", "factor", "solve", "pack", "commit"} <= set(lanes)
    assert len(lanes["pack"]) == len(report.linears)
    assert {name for _, _, name in lanes["solve"]} == {f"model.layers.{i}" for i in range(report.blocks)}
    assert all(0 <= begin <= end for spans in lanes.values() for begin, end, _ in spans)
    solving = sum(end - begin for begin, end, _ in lanes["solve"])
    assert solving == pytest.approx(report.seconds_by_phase["solve"], rel=1e-3)


def test_a_failed_job_leaves_its_trace(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise bigq.errors.NumericsError("no")

    monkeypatch.setattr(gptq, "factorize", broken)
    with pytest.raises(bigq.errors.NumericsError):
        bigq.quantize(str(checkpoint("llama")), tmp_path / "out", config(ids_file, trace=str(tmp_path / "trace.json")))
    assert "hessian" in lanes_of(tmp_path / "trace.json")


def test_a_trace_into_nowhere_is_refused_at_the_start(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--trace .*gone.*folder does not exist"):
        bigq.quantize(str(checkpoint("llama")), tmp_path / "out", config(ids_file, trace=str(tmp_path / "gone" / "trace.json")))
    assert not (tmp_path / "out").exists()


def test_reading_lies_beside_computing(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk and slow blocks, about as slow as each other: together they take little longer than the slower of the two."""

    read_piece = pieces.read_piece

    def slow_read(*args: Any) -> None:
        time.sleep(0.1)
        read_piece(*args)

    factorize = gptq.factorize

    def slow_factor(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.08)
        return factorize(*args, **kwargs)

    monkeypatch.setattr(pieces, "read_piece", slow_read)
    monkeypatch.setattr(gptq, "factorize", slow_factor)
    bigq.quantize(str(checkpoint("llama")), tmp_path / "out", config(ids_file, trace=str(tmp_path / "trace.json"), read_ahead=1))
    lanes = lanes_of(tmp_path / "trace.json")
    layers = sorted({name for _, _, name in lanes["solve"]})
    assert len(layers) > 1
    for this, following in itertools.pairwise(layers):
        begin = max(e for _, e, name in lanes["load"] if name == this)
        end = max(e for _, e, name in lanes["solve"] if name == this)
        reads = [(b, e) for b, e, name in lanes["read"] if name.startswith(following + ".")]
        assert reads and sum(begin <= b and e <= end for b, e in reads) >= len(reads) / 2, f"{following} was not read during {this}"
    first_load = min(b for b, _, name in lanes["load"] if name == layers[1])
    computing = sum(e - b for lane in ("replay", "factor", "solve", "pack") for b, e, name in lanes[lane] if name != layers[0])
    reading = sum(e - b for b, e, name in lanes["read"] if name.startswith(tuple(layers[1:]))) / pieces.THREADS
    whole = max(e for _, e, _ in lanes["replay"] + lanes["pack"]) - first_load
    assert whole <= 1.15 * max(computing, reading) + 0.1


def test_spans_come_from_any_thread_and_in_order() -> None:
    trace = Trace()
    with pytest.raises(ValueError, match="no"), trace.span("write", "b"):
        raise ValueError("no")
    trace.add("read", "a", trace.spans[0].begin - 1, trace.spans[0].begin)
    assert [span.lane for span in trace.spans] == ["write", "read"]
    events = json.loads(trace.to_json())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["read", "write"]
