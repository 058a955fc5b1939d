"""Progress lines and the closing summary."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bigq.progress import Progress
from bigq.report import LinearRecord, Report, device_memory_peak, host_memory, host_memory_peak

CPU = torch.device("cpu")


class Hands:
    """A clock whose hands the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_memory_is_that_of_this_process() -> None:
    assert host_memory() > 10 * 2**20 and 10 * 2**20 < host_memory_peak() < 2**42
    before = host_memory()
    ballast = torch.ones(16 * 2**20)
    assert host_memory() - before > 32 * 2**20
    del ballast
    assert device_memory_peak(CPU) == 0


def run_blocks(stream: io.StringIO, quiet: bool) -> None:
    with Progress(4, CPU, quiet=quiet, stream=stream) as progress:
        progress.block_skipped()
        for index in (1, 2, 3):
            progress.phase("hessians")
            progress.block_done(index, 12.34, ("mlp.down_proj", 0.0123) if index < 3 else None)
        progress.say("all done")


def test_without_a_terminal_each_block_is_one_plain_line(capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    run_blocks(stream, quiet=False)
    text = stream.getvalue()
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["block 2/4", "block 3/4", "block 4/4", "all done"]
    assert all("12.3 s" in line and "host " in line and "eta 0:00" in line for line in lines[:3])
    assert ["worst mlp.down_proj 1.23e-02" in line for line in lines[:3]] == [True, True, False]
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    assert capfd.readouterr() == ("", "")


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    run_blocks(stream, quiet=True)
    assert stream.getvalue() == "" and capfd.readouterr() == ("", "")


def test_the_usual_stream_is_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(1, CPU) as progress:
        progress.block_done(0, 1.0, None)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("block 1/1") and err.count("\n") == 1


def test_time_left_follows_the_blocks_that_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that an earlier run committed take no time and must not make the rest look quick."""
    hands = Hands()
    monkeypatch.setattr(time, "monotonic", hands)
    stream = io.StringIO()
    with Progress(100, CPU, stream=stream) as progress:
        for _ in range(50):
            progress.block_skipped()
        for index in (50, 51):
            hands.now += 90
            progress.block_done(index, 90.0, None)
        hands.now += 180
        progress.block_done(52, 180.0, None)
    assert [line.split("eta ")[1] for line in stream.getvalue().splitlines()] == ["1:13:30", "1:12:00", "1:34:00"]


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
