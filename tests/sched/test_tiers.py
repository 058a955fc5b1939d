"""Where activations are kept: every tier returns what was put, and a job's output does not depend on the tier."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bigq
from bigq.errors import ResourceError, UsageError
from bigq.sched import tiers
from bigq.sched.tiers import Tier, choose_tier, fastest_tier

CPU = torch.device("cpu")
KINDS = ("host", "disk")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back_as_they_were_put(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    rows = torch.randn(7, 3, 5).to(dtype)
    buffer = Tier(kind, CPU, tmp_path).buffer(7, 15, dtype)
    for lo, hi in ((0, 3), (3, 6), (6, 7)):
        buffer.put(lo, rows[lo:hi])
    assert torch.equal(buffer.get(0, 3), rows[:3].reshape(3, 15)) and torch.equal(buffer.get(6, 7), rows[6:].reshape(1, 15))
    buffer.ahead(3, 6)
    assert torch.equal(buffer.get(3, 6), rows[3:6].reshape(3, 15))
    buffer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_overwrite_inputs_while_the_next_are_read(kind: str, tmp_path: Path) -> None:
    """The order of a pass over the batches, several times over."""
    count = 9
    buffer = Tier(kind, CPU, tmp_path).buffer(count, 2000, torch.float32)
    expected = torch.randn(count, 2000)
    for i in range(count):
        buffer.put(i, expected[i : i + 1])
    for _ in range(4):
        for i in range(count):
            x = buffer.get(i, i + 1).clone()
            if i + 1 < count:
                buffer.ahead(i + 1, i + 2)
            buffer.put(i, 2 * x + 1)
        expected = 2 * expected + 1
    assert torch.equal(torch.cat([buffer.get(i, i + 1) for i in range(count)]), expected)
    buffer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_read_ahead_are_forgotten_when_they_are_overwritten(kind: str, tmp_path: Path) -> None:
    buffer = Tier(kind, CPU, tmp_path).buffer(4, 8, torch.float32)
    buffer.put(0, torch.zeros(4, 8))
    buffer.ahead(1, 3)
    buffer.put(2, torch.ones(1, 8))
    assert buffer.get(1, 3).sum(1).tolist() == [0, 8]
    buffer.close()


def test_the_file_has_no_name_and_takes_its_room_at_once(tmp_path: Path) -> None:
    before = os.statvfs(tmp_path).f_bavail
    buffer = Tier("disk", CPU, tmp_path).buffer(64, 2**18, torch.float32)
    assert list(tmp_path.iterdir()) == []
    assert (before - os.statvfs(tmp_path).f_bavail) * os.statvfs(tmp_path).f_frsize > 48 * 2**20
    buffer.close()


def test_a_full_disk_is_told_before_the_job_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"No space left.*--activations host"):
        Tier("disk", CPU, tmp_path).buffer(4, 8, torch.float32)


def test_a_write_that_fails_is_told_by_a_later_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = Tier("disk", CPU, tmp_path).buffer(16, 8, torch.float32)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def put_all() -> None:
        for i in range(16):
            buffer.put(i, torch.zeros(1, 8))

    monkeypatch.setattr(os, "pwritev", broken)
    with pytest.raises(ResourceError, match="Input/output error"):
        put_all()
    buffer.close()


def test_no_more_than_a_few_writes_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = Tier("disk", CPU, tmp_path).buffer(32, 8, torch.float32)
    for i in range(32):
        buffer.put(i, torch.full((1, 8), float(i)))
        assert len(buffer._writes) <= tiers.WRITES_IN_FLIGHT
    assert torch.equal(buffer.get(0, 32)[:, 0], torch.arange(32.0))
    buffer.close()


@pytest.mark.parametrize(
    ("needed", "device_free", "host_free", "tier"), [(10, 20, 0, "gpu"), (10, 19, 20, "host"), (10, 0, 20, "host"), (10, 0, 19, "disk")]
)
def test_auto_takes_the_first_tier_with_room(needed: int, device_free: int, host_free: int, tier: str) -> None:
    assert fastest_tier(needed, device_free, host_free) == tier


def test_the_gpu_tier_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--activations gpu"):
        choose_tier("gpu", CPU, 1, tmp_path)
    with pytest.raises(UsageError, match="--activations ssd: must be one of"):
        bigq.JobConfig(activations="ssd")


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "falcon"])
def test_the_tiers_give_identical_output(family: str, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    """Families with folded and unfolded rows, with and without shortcuts. A batch that leaves a smaller last one."""
    digests = []
    for kind in KINDS:
        out = tmp_path / kind
        config = bigq.JobConfig(
            scheme=bigq.QuantScheme(group_size=32),
            calibration=str(ids_file),
            samples=7,
            seqlen=40,
            batch=3,
            activations=kind,
            device="cpu",
            quiet=True,
        )
        bigq.quantize(str(checkpoint(family)), out, config)
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*.safetensors"))})
        assert not [p for p in (out / ".bigq").iterdir() if "tmp" in p.name]
    assert digests[0] == digests[1] and len(digests[0]) > 1
