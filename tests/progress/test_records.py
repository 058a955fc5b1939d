"""Memory, records and the closing summary."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bigq.progress import records
from bigq.progress.records import LinearRecord, Report, Stages, device_memory, device_memory_peak, host_memory, host_memory_peak

CPU = torch.device("cpu")


def test_memory_is_that_of_this_process() -> None:
    assert host_memory() > 10 * 2**20 and 10 * 2**20 < host_memory_peak() < 2**42
    before = host_memory()
    # Pages of its own: the heap may hold as much from tests before this one.
    with mmap.mmap(-1, 64 * 2**20) as ballast:
        ballast.write(bytes(64 * 2**20))
        assert host_memory() - before > 32 * 2**20
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
        "  size:    3.00 GiB → 768.0 MiB (25 %)",
        "  time:    solve 60.0 s, other 4.2 s, read 1.2 s",
        "  memory:  host peak 5.50 GiB (planned 6.00 GiB)",
    ]:
        assert said in text.splitlines()
    assert "layers.1.down: relative error 2.00e-02" in text and "layers.1.up" not in text
    assert not any(word in text for word in ("device", "kept", "resumed", "read by", "note"))


def test_summary_tells_what_only_some_jobs_have() -> None:
    notes = ("vLLM does not load asymmetric gptq; use --format compressed-tensors",)
    changes = {"left_out": ("a", "b", "c", "d", "e"), "linears": (), "read_by": ("transformers", "vLLM"), "reader_notes": notes}
    text = report(device_peak_bytes=2**31, resumed_blocks=3, **changes).summary()
    assert "device peak 2.00 GiB (planned 3.00 GiB)" in text
    assert "  resumed: 3 of 8 blocks were already done" in text
    assert "  kept:    5 Linears unquantized:\n           a, b, c, d, …" in text
    assert (
        "  read by: transformers, vLLM\n  note:    vLLM does not load asymmetric gptq; use --format\n           compressed-tensors" in text
    )
    assert "worst" not in text and report(linears=()).worst is None
    assert "  read by: no program" in report(reader_notes=notes).summary()


def test_no_line_of_the_summary_wraps_at_60_columns() -> None:
    name = "model.language_model.layers.117.mlp.experts.255.gate_up_proj_of_some_length"
    text = report(
        out="/a/folder/" * 20,
        seconds=123456.78,
        seconds_before={"start-up": 123.4, "calibration": 1234.5},
        seconds_by_phase={f"phase{i}": 1000.0 * i for i in range(9)},
        waiting={f"reading some kind of file {i}": 10.0 for i in range(5)},
        linears=({"name": name, "relative_error": 0.5},),
        left_out=(name,) * 5,
        batches=tuple(2**i for i in range(12, 0, -1)),
        device_peak_bytes=2**40,
        resumed_blocks=3,
        read_by=("transformers (with optimum, gptqmodel)", "GPTQModel", "vLLM (CUDA: Machete or Conch)"),
        reader_notes=("a reader " * 20,),
    ).summary()
    assert max(map(len, text.splitlines())) <= 60
    assert "relative error 5.00e-01" in text and "proj_of_some_length" in text


@pytest.mark.parametrize(
    ("seconds", "before", "phases"),
    [
        (65.43, {}, {"read": 1.26, "solve": 60.0}),
        (10.0, {"start-up": 3.333, "calibration": 3.333}, {"solve": 3.333}),
        (0.3, {"a": 0.04, "b": 0.04}, {"c": 0.04, "d": 0.04, "e": 0.14}),
        (5.0, {"a": 1.25, "b": 1.25}, {"c": 1.25, "d": 1.25}),
        (1000.0, {"a": 0.01}, {f"p{i}": 7.7777 for i in range(20)}),
        (0.01, {}, {"a": 0.004}),
        (65.45, {}, {"a": 65.4, "b": 0.049}),
    ],
)
def test_times_sum_to_the_total(seconds: float, before: dict[str, float], phases: dict[str, float]) -> None:
    """Exactly as values, and as they are printed to the tenth that the summary begins with."""
    made = report(seconds=seconds, seconds_before=before, seconds_by_phase=phases)
    assert sum(made.times().values()) == pytest.approx(seconds)
    text = made.summary()
    times = re.search(r"  time:(.*?)\n  waiting:", text, re.DOTALL)
    assert times is not None
    printed = {name: float(value) for name, value in re.findall(r"(\S+) ([\d.]+) s", times[1])}
    total = re.match(r"done in ([\d.]+) s", text)
    assert total is not None and sum(printed.values()) == pytest.approx(float(total[1]), abs=1e-6)
    for name, value in printed.items():
        if name != "other":
            assert value == pytest.approx({**before, **phases}[name], abs=0.1)
    assert all(value > 0 for value in printed.values())


def test_stages_are_parts_of_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([13.0, 17.0, 18.5])
    monkeypatch.setattr(records.time, "monotonic", lambda: next(clock))
    stages = Stages(10.0)
    for name in ("start-up", "calibration", "start-up"):
        stages.ended(name)
    assert stages.seconds == {"start-up": 4.5, "calibration": 4.0}


def test_summary_tells_how_long_the_device_waited_and_for_what() -> None:
    waiting = {"writing": 0.26, "reading weights": 0.9, "activations": 0.004}
    lines = "\n  waiting: 1.2 s of 65.4 s (1.8 %): reading weights 0.9 s,\n           writing 0.3 s\n"
    assert lines in report(waiting=waiting).summary()
    assert "\n  waiting: 0.0 s of 65.4 s (0.0 %)\n" in report().summary()


def test_summary_tells_a_batch_that_was_halved() -> None:
    assert "batch:   8 → 4 → 2 rows: the device ran out of memory" in report(batches=(8, 4, 2)).summary()
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
        dead_inputs=3,
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
        "dead_inputs": 3,
        "seconds": {"factor": 0.123457, "solve": 1.0},
    }


def test_report_is_plain_json() -> None:
    value = json.loads(json.dumps(report(left_out=("a",), batches=(8, 4)).to_json()))
    assert value["worst"] == "layers.1.down" and len(value["linears"]) == 3 and value["batches"] == [8, 4] and value["left_out"] == ["a"]
    assert value["seconds_by_phase"] == {"read": 1.26, "solve": 60.0} and value["out"] == "somewhere/out"
    assert report(linears=()).to_json()["worst"] is None
