"""The whole-model benchmark on a tiny shape: slices, cut off and stopped, add up to one run; its parts by hand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Child
from safetensors.torch import load_file, save_file

import bigq
from bigq.io.index import INDEX_NAME, Checkpoint

sys.path.append(str(ROOT / "scripts"))

from bench_176b import DONE, MORE, ensure_inputs
from bench_slice import aliased_checkpoint, busy_seconds, enough_time, lanes
from shapes import SHAPES, layout_of, write_config
from slice_results import Share, earlier_slices, lane_rates, rates, read_lines, whole_run

WRAPPER = ROOT / "scripts/bench_176b"
#: 5 of the tiny shape's 6 blocks.
TINY = ["--shape", "tiny", "--blocks", "5", "--device", "cpu", "--samples", "16", "--seqlen", "256"]
OPTIONS = ["--", "--batch", "4"]


def run(work: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(WRAPPER), *TINY, "--work", str(work), "--out", str(out), *more, *OPTIONS]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def committed_blocks(folder: Path) -> int:
    return sum(line["unit"].startswith("block-") for line in read_lines(folder))


@pytest.mark.long
def test_slices_that_were_killed_and_stopped_add_up(child: Child, tmp_path: Path) -> None:
    """No time at all; killed after the first block; a slice that finds its time over after a block; then the rest."""
    work, out = tmp_path / "work", tmp_path / "out"
    assert run(work, out, "--seconds", "0").wait(500) == MORE
    assert json.loads((out / "bench_tiny.json").read_text())["result"]["blocks_done"] == 0
    first = run(work, out)
    deadline = time.monotonic() + 500
    while not any(committed_blocks(folder) for folder in work.glob("job-*/slice-000")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    (job,) = work.glob("job-*")
    killed = committed_blocks(job / "slice-000")
    assert 1 <= killed < 5

    stopped = job / "slice-001"
    write_config(SHAPES["tiny"], stopped / "model", 5 - killed)
    shutil.copy(job / "slice-000/ceilings.json", stopped)
    spec = (job / "slice-000/spec.json").read_text().replace("slice-000", "slice-001")
    (stopped / "spec.json").write_text(json.dumps(json.loads(spec) | {"layers": 5 - killed, "stop_at": 0.0, "launched_at": time.time()}))
    done = child(ROOT / "scripts/bench_slice.py", stopped / "spec.json", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and ("lack of time" in done.stderr or killed == 4), done.stderr
    assert committed_blocks(stopped) == 1 and not (stopped / "out/config.json").exists()

    assert run(work, out).wait(500) == DONE
    written = json.loads((out / "bench_tiny.json").read_text())
    result = written["result"]
    assert result["complete"] and result["blocks_done"] == 5 and result["slices"] == len(written["slices"]) >= 2
    assert not (job / "slice-000/out").exists() and (job / "slice-002").exists() == (out / "bench_tiny.trace.json").exists()
    shares = [Share.of(one["lines"]) for one in written["slices"]]
    assert [share.blocks for share in shares] == [n for n in (killed, 1, 4 - killed) if n]
    assert result["minutes"] * 60 == pytest.approx(result["wall_s"] - sum(share.once for share in shares[1:]))
    assert sum(result["seconds_by_phase"].values()) == pytest.approx(result["minutes"] * 60)
    assert written["command"].endswith("--device cpu --work DIR --out DIR -- --batch 4") and str(tmp_path) not in json.dumps(written)
    assert 0 < result["waiting_share"] < 1 and result["options"] == ["--batch", "4"]
    ((label, minutes),) = result["extrapolated"].items()
    assert "all 6 blocks, from 5 (not measured)" in label
    assert minutes * 60 == pytest.approx(result["once_s"] + 6 * result["seconds_per_block"])
    assert result["rates"]["hessian"]["tflops"] > 0 and result["ceilings"]["bf16_tflops"] > 0
    layout = layout_of(work / "shards-tiny")
    block, rest = (sum(torch.Size(shape).numel() for shape in part.values()) for part in (layout.block, layout.rest))
    assert result["bytes_read"] == 2 * (5 * block + rest) > result["bytes_written"] > 5 * block / 2

    request = {name: result[name] for name in ("shape", "blocks", "samples", "seqlen", "device", "cold", "options")}
    slices = written["slices"]
    assert earlier_slices(None, request, job) == earlier_slices(out / "bench_tiny.json", request, job) == slices
    assert earlier_slices(out / "bench_tiny.json", request, tmp_path / "lost") == slices
    with pytest.raises(SystemExit, match="another request"):
        earlier_slices(out / "bench_tiny.json", request | {"samples": 8}, job)


def test_a_job_on_aliased_blocks_is_the_job_on_a_checkpoint_of_equal_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = ensure_inputs(SHAPES["tiny"], tmp_path / "shards", 2, 32)
    real = tmp_path / "real"
    write_config(SHAPES["tiny"], real, 2)
    blocks = {f"block-{i}.safetensors": renamed(inputs.block, i) for i in range(2)}
    for name, tensors in (blocks | {path.name: load_file(path) for path in inputs.rest}).items():
        save_file(tensors, real / name)
    files = {path.name: load_file(path) for path in real.glob("*.safetensors")}
    index = {"weight_map": {tensor: name for name, tensors in files.items() for tensor in tensors}}
    (real / INDEX_NAME).write_text(json.dumps(index))
    config = bigq.JobConfig(calibration=str(inputs.ids), samples=2, seqlen=32, device="cpu", quiet=True)
    bigq.quantize(str(real), tmp_path / "a", config)

    alias = tmp_path / "alias"
    write_config(SHAPES["tiny"], alias, 2)
    checkpoint = aliased_checkpoint(alias, inputs.rest, inputs.block, inputs.layout.blocks_path, 2)
    monkeypatch.setattr(Checkpoint, "open", classmethod(lambda cls, folder, remote=None: checkpoint))
    bigq.quantize(str(alias), tmp_path / "b", config)
    one, other = ({k: v for path in (tmp_path / x).glob("*.safetensors") for k, v in load_file(path).items()} for x in "ab")
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def renamed(block: Path, i: int) -> dict[str, torch.Tensor]:
    return {name.replace("model.layers.0.", f"model.layers.{i}."): tensor for name, tensor in load_file(block).items()}


def line(unit: str, seconds: float, **phases: float) -> dict[str, Any]:
    return {"unit": unit, "seconds": seconds, "before_clock_s": 1.0, "phases": phases, "shard_bytes": 10}


def test_what_a_job_does_once_is_counted_once() -> None:
    one = [line("rest-0", 3.0, copy=2.0), line("block-0", 7.0, copy=2.0, solve=3.0), line("block-1", 10.0, copy=2.0, solve=6.0)]
    two = [line("rest-0", 4.0, copy=3.0), line("block-0", 9.0, copy=3.0, solve=4.0)]
    shares = [Share.of(one), Share.of(two)]
    assert [(s.blocks, s.seconds, s.once, s.written, s.written_rest) for s in shares] == [(2, 10.0, 3.0, 20, 10), (1, 9.0, 4.0, 10, 10)]
    whole = whole_run(shares)
    assert whole["seconds"] == 10 + 9 - 4 and whole["phases"] == {"copy": 2.0, "solve": 10.0, "none of these": 3.0}


def test_work_behind_the_last_commit_does_not_count_but_an_end_does() -> None:
    lines = [line("block-0", 5.0, solve=4.0)]
    assert Share.of([*lines, {**line("trace", 8.0, solve=7.0), "lanes": {}}]).seconds == 5.0
    assert Share.of([*lines, {**line("end", 6.0), "report_phases": {"solve": 4.5}}]).phases == {"solve": 4.5}


def test_a_torn_line_is_no_progress(tmp_path: Path) -> None:
    (tmp_path / "progress.jsonl").write_text('{"unit": "rest-0"}\n{"unit": "blo')
    assert read_lines(tmp_path) == [{"unit": "rest-0"}]


def test_the_next_block_must_end_in_time() -> None:
    assert enough_time(100.0, 113.0, [60.0, 4.0, 8.0]) and not enough_time(100.0, 112.0, [60.0, 4.0, 8.0])
    assert not enough_time(100.0, 112.0, [8.0])


def test_rates_and_lanes_by_hand() -> None:
    assert busy_seconds([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == 4
    assert busy_seconds([]) == 0
    events = [{"ph": "M"}, *({"ph": "X", "cat": "read", "name": n, "ts": t * 1e6, "dur": 1e6} for n, t in (("a", 0), ("b", 0.5)))]
    had = lanes({"traceEvents": events}, {"a": 3 * 10**9, "b": 10**9})
    assert had == {"read": {"busy_s": 1.5, "bytes": 4 * 10**9}}
    slices = [{"lines": [{"lanes": had | {"commit": {"busy_s": 2.0, "bytes": 0}}}]}]
    assert lane_rates(slices, 10**9) == {"gbs_while_reading": pytest.approx(4 / 1.5), "gbs_while_committing": 0.5}
    found = rates({"solve": 2e12, "factor": 1e12}, {"solve": 4.0}, 10.0, 2.0)
    assert found == {
        "solve": {"tflops": 0.5, "of_bf16_ceiling": 0.25},
        "all": {"tflops": pytest.approx(0.3), "of_bf16_ceiling": pytest.approx(0.15)},
    }
