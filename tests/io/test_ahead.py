"""Reading ahead: the same tensors, within the budget, beside the computation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bigq
from bigq.errors import CheckpointError, NumericsError
from bigq.io import ahead
from bigq.io.ahead import ReadAhead
from bigq.io.index import Checkpoint, TensorInfo
from bigq.io.reader import read_tensor


@pytest.fixture
def infos(tmp_path: Path) -> list[TensorInfo]:
    """Ten tensors of 4000 bytes."""
    generator = torch.Generator().manual_seed(0)
    save_file({f"t{i}": torch.randn(10, 100, generator=generator) for i in range(10)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    return [checkpoint[f"t{i}"] for i in range(10)]


@pytest.mark.parametrize("budget", [0, 4000, 13_000, 10**6])
def test_tensors_are_what_the_reader_reads_and_the_budget_holds(infos: list[TensorInfo], budget: int) -> None:
    reader = ReadAhead(budget)
    reader.announce(infos[:5])
    reader.announce(infos)
    for info in infos:
        assert torch.equal(reader.take(info), read_tensor(info))
    assert reader.peak == min(budget // 4000, 10) * 4000
    reader.announce(infos[:1])
    assert torch.equal(reader.take(infos[0]), read_tensor(infos[0])) and reader.peak <= budget
    reader.close()


def test_what_was_announced_is_read_without_being_asked_for(infos: list[TensorInfo], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    begun = threading.Event()

    def recorded(info: TensorInfo) -> torch.Tensor:
        read.append(info.name)
        if len(read) == 3:
            begun.set()
        return read_tensor(info)

    monkeypatch.setattr(ahead, "read_tensor", recorded)
    reader = ReadAhead(12_000)
    reader.announce(infos)
    assert begun.wait(10)
    reader.close()
    assert sorted(read) == ["t0", "t1", "t2"]


def test_errors_come_out_where_the_tensor_is_taken(infos: list[TensorInfo]) -> None:
    with open(infos[0].file, "r+b") as file:
        file.seek(infos[3].start)
        file.write(b"\xff" * 4)
        file.truncate(max(info.stop for info in infos) - 1)
    last = max(infos, key=lambda info: info.stop)
    reader = ReadAhead(10**6)
    reader.announce(infos)
    assert torch.equal(reader.take(infos[1]), read_tensor(infos[1]))
    with pytest.raises(NumericsError, match="t3"):
        reader.take(infos[3])
    with pytest.raises(CheckpointError, match="sooner than its header says"):
        reader.take(last)
    reader.close()


def test_a_job_reads_the_next_block_while_it_solves_one(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a slow disk, time spent reading lies within time spent on the block before; the output does not change."""
    reads: list[tuple[float, float]] = []

    def slow(info: TensorInfo) -> torch.Tensor:
        begun = time.monotonic()
        time.sleep(0.02)
        tensor = read_tensor(info)
        reads.append((begun, time.monotonic()))
        return tensor

    monkeypatch.setattr(ahead, "read_tensor", slow)
    seconds, counts, outputs = {}, {}, {}
    for blocks in (0, 1):
        out = tmp_path / str(blocks)
        scheme = bigq.QuantScheme(group_size=32)
        reads.clear()
        report = bigq.quantize(
            str(checkpoint("llama")),
            out,
            bigq.JobConfig(scheme=scheme, calibration=str(ids_file), samples=8, seqlen=40, read_ahead=blocks, device="cpu", quiet=True),
        )
        seconds[blocks], counts[blocks] = report.seconds_by_phase["load"], len(reads)
        outputs[blocks] = {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
    assert counts[0] == counts[1] > 0
    assert outputs[0] == outputs[1]
    assert seconds[1] < 0.8 * seconds[0]


def test_a_negative_number_of_blocks_is_refused() -> None:
    with pytest.raises(bigq.errors.UsageError, match="--read-ahead -1"):
        bigq.JobConfig(read_ahead=-1)
