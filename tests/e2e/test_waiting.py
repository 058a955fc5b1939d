"""What a job says that it waited for: files that are slow are named, and files that are read beside the computation are not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bigq
from bigq.io.index import TensorInfo
from bigq.io.prefetch import pieces
from bigq.methods import gptq
from bigq.sched import claim, shards
from bigq.sched.rows.tiers import _FileBuffer


def job(ids: Path, **more: Any) -> bigq.JobConfig:
    scheme = bigq.QuantScheme(group_size=32)
    return bigq.JobConfig(scheme=scheme, calibration=str(ids), samples=8, seqlen=40, batch=4, device="cpu", quiet=True, **more)


def line_of(report: bigq.Report) -> str:
    """What the summary says of waiting; it may go on over several lines."""
    return " ".join(report.waiting_lines())


def test_a_slow_disk_is_named_unless_reading_is_hidden(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a block takes about 9 × 20 ms; solving one takes longer, so that threads can read the next meanwhile."""
    reads: list[str] = []
    read_piece = pieces.read_piece

    def slow_read(files: Any, info: TensorInfo, *rest: Any) -> None:
        time.sleep(0.02)
        reads.append(info.name)
        read_piece(files, info, *rest)

    factorize = gptq.factorize

    def slow_factor(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return factorize(*args, **kwargs)

    monkeypatch.setattr(pieces, "read_piece", slow_read)
    monkeypatch.setattr(gptq, "factorize", slow_factor)
    waited = {}
    for blocks in (0, 1):
        reads.clear()
        report = bigq.quantize(str(checkpoint("llama")), tmp_path / str(blocks), job(ids_file, read_ahead=blocks))
        waited[blocks] = report.waiting["reading weights"]
        in_blocks = sum(name.startswith("model.layers.") for name in reads)
        if blocks == 0:
            assert max(report.waiting, key=lambda cause: report.waiting[cause]) == "reading weights"
            assert "): reading weights " in line_of(report)
            # The probe reads block 0 once more, in a phase of its own.
            assert waited[0] >= 0.02 * in_blocks * 3 / 4
        assert sum(report.waiting.values()) < report.seconds
    assert waited[1] < 0.6 * waited[0], "only the first block is waited for"


def test_slow_writing_is_named(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard = shards.write_shard

    def slow(path: Path, tensors: Any) -> Any:
        time.sleep(0.3)
        return write_shard(path, tensors)

    monkeypatch.setattr(shards, "write_shard", slow)
    report = bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids_file))
    assert report.waiting["writing"] >= 0.3 * report.blocks and report.waiting["copying the rest"] >= 0.3
    assert "): writing " in line_of(report)


def test_slow_activations_are_named_and_have_a_lane(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = _FileBuffer._read

    def slow(self: _FileBuffer, lo: int, hi: int) -> torch.Tensor:
        time.sleep(0.02)
        return read(self, lo, hi)

    monkeypatch.setattr(_FileBuffer, "_read", slow)
    trace = tmp_path / "trace.json"
    report = bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids_file, activations="disk", trace=str(trace)))
    assert "): activations " in line_of(report)
    events = json.loads(trace.read_text())["traceEvents"]
    lane = next(e["tid"] for e in events if e["ph"] == "M" and e["args"]["name"] == "activations")
    names = {e["name"] for e in events if e["ph"] == "X" and e["tid"] == lane}
    assert names == {"read 0 … 4", "read 4 … 8", "write 0 … 4", "write 4 … 8"}
    kept = bigq.quantize(str(checkpoint("llama")), tmp_path / "kept", job(ids_file, activations="host"))
    assert "activations" not in kept.waiting, "what lies in memory is not waited for"


def test_nothing_is_gathered_for_a_trace_that_nobody_asked_for(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces: list[claim.Trace] = []

    class Watched(claim.Trace):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            traces.append(self)

    monkeypatch.setattr(claim, "Trace", Watched)
    for file in (None, str(tmp_path / "trace.json")):
        bigq.quantize(str(checkpoint("llama")), tmp_path / str(file is None), job(ids_file, trace=file))
    assert [bool(trace.spans) for trace in traces] == [False, True]
