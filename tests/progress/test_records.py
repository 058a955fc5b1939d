"""Memory, records and the closing summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from bigq.progress.records import LinearRecord, Report, device_memory, device_memory_peak, host_memory, host_memory_peak

CPU = torch.device("cpu")


def test_memory_is_that_of_this_process() -> None:
    assert host_memory() > 10 * 2**20 and 10 * 2**20 < host_memory_peak() < 2**42
    before = host_memory()
    ballast = torch.ones(16 * 2**20)
    assert host_memory() - before > 32 * 2**20
    del ballast
    assert device_memory_peak(CPU) == 0 and device_memory(CPU) is None


def report(**changes: Any) -> Report:
    linears: tuple[Mapping[str, Any], ...] = (
        {"name": "layers.0.q", "relative_error": 0.001},
        {"name": "layers.1.down", "relative_error": 0.02},
        {"name": "layers.1.up", "relative_error": 0.003},
    )
    values: dict[str, Any] = {
        "out": "somewhere/out",
        "blocks": 8,
        "linears": linears,
        "seconds": 65.43,
        "seconds_by_phase": {"read": 1.26, "solve": 60.0},
        "source_bytes": 3 * 2**30,
        "output_bytes": 768 * 2**20,
        "host_peak_bytes": 5 * 2**30 + 2**29,
        "device_peak_bytes": 0,
        "planned_host_bytes": 6 * 2**30,
        "planned_device_bytes": 3 * 2**30,
        "resumed_blocks": 0,
    }
    return Report(**{**values, **changes})


def test_summary_tells_sizes_times_memory_and_the_worst_linear() -> None:
    text = report().summary()
    for said in [
        "done in 65.4 s: somewhere/out",
        "3.00 GiB → 768.0 MiB (25 %)",
        "solve 60.0 s, read 1.3 s",
        "host peak 5.50 GiB (planned 6.00 GiB)",
    ]:
        assert said in text
    assert "layers.1.down: relative error 2.00e-02" in text and "layers.1.up" not in text
    assert "device" not in text and "kept" not in text and "already" not in text


def test_summary_tells_what_only_some_jobs_have() -> None:
    text = report(device_peak_bytes=2**31, resumed_blocks=3, left_out=("a", "b", "c", "d", "e"), linears=()).summary()
    assert "device peak 2.00 GiB (planned 3.00 GiB)" in text
    assert "(3 of 8 blocks were there already)" in text
    assert "kept    5 Linears unquantized: a, b, c, d …" in text
    assert "worst" not in text and report(linears=()).worst is None


def test_summary_tells_how_long_the_device_waited_and_for_what() -> None:
    waiting = {"writing": 0.26, "reading weights": 0.9, "activations": 0.004}
    assert "\n  waiting 1.2 s of 65.4 s (1.8 %): reading weights 0.9 s, writing 0.3 s\n" in report(waiting=waiting).summary()
    assert "\n  waiting 0.0 s of 65.4 s (0.0 %)\n" in report().summary()


def test_summary_tells_a_batch_that_was_halved() -> None:
    assert "batch   8 → 4 → 2 rows: the device ran out of memory" in report(batches=(8, 4, 2)).summary()
    assert "batch" not in report(batches=(8,)).summary()


def test_linear_record_is_plain_json() -> None:
    record = LinearRecord(
        name="q",
        bits=4,
        group_size=128,
        shape=(64, 32),
        loss=0.5,
        relative_error=0.01,
        damping=0.01,
        seconds={"factor": 0.12345678, "solve": 1.0},
    )
    assert json.loads(json.dumps(record.to_json())) == {
        "name": "q",
        "bits": 4,
        "group_size": 128,
        "shape": [64, 32],
        "loss": 0.5,
        "relative_error": 0.01,
        "damping": 0.01,
        "seconds": {"factor": 0.123457, "solve": 1.0},
    }


def test_report_is_plain_json() -> None:
    value = json.loads(json.dumps(report(left_out=("a",), batches=(8, 4)).to_json()))
    assert value["worst"] == "layers.1.down" and len(value["linears"]) == 3 and value["batches"] == [8, 4] and value["left_out"] == ["a"]
    assert value["seconds_by_phase"] == {"read": 1.26, "solve": 60.0} and value["out"] == "somewhere/out"
    assert report(linears=()).to_json()["worst"] is None
