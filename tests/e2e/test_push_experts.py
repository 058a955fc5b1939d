"""Experts that are uploaded while their block is solved: what is read again stays, and what is dropped is read from the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub.client import use_hub
from fake_hub.server import Hub, running_hub
from moe_families import moe_model, random_tokens
from safetensors.torch import save_file
from tinyjob import at_points, hashes

import bigq
from bigq import faults
from bigq.config import JobConfig
from bigq.errors import ResourceError
from bigq.inspect.verify import verify
from bigq.sched import push
from bigq.sched.units import experts
from bigq.scheme import QuantScheme

NAME = "me/experts"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as server:
        use_hub(server, monkeypatch)
        yield server
    faults.disarm()


def config(folder: Path, **changes: Any) -> JobConfig:
    given = {"calibration": str(folder / "ids.safetensors"), "samples": 8, "seqlen": 32, "batch": 4, "checkpoint_every": None}
    return JobConfig(**{"scheme": QuantScheme(group_size=16), "device": "cpu", "disk": 2**50, "quiet": True, **given, **changes})


@pytest.mark.long
def test_experts_in_groups(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert is a shard. A job that fails in the second block goes on from the hub, with the bytes of a local job."""
    monkeypatch.setattr(experts, "GROUP_WEIGHTS", 1)
    for name in ("INTERVAL", "WAITING_SHARDS", "WAITING_BYTES"):
        monkeypatch.setattr(push, name, 0)
    with torch.no_grad():
        moe_model("qwen3_moe").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    save_file({"input_ids": random_tokens(16, 32)}, tmp_path / "ids.safetensors")
    bigq.quantize(tmp_path / "model", tmp_path / "local", config(tmp_path))
    expected = hashes(tmp_path / "local")
    shards = [name for name in expected if name.endswith(".safetensors")]
    out, given = tmp_path / "out", config(tmp_path, push=NAME, push_drop=True)
    counts: list[int] = []
    faults.arm(f"journal.opened:{len(shards)}:EIO")
    with pytest.raises(ResourceError, match="Input/output error"):
        bigq.quantize(tmp_path / "model", out, given)
    faults.disarm()
    assert len(hub.uploads.repositories[NAME].files) > len(shards) // 2
    with at_points({("journal.opened", 1): lambda: counts.append(len(list(out.glob("*.safetensors"))))}):
        bigq.quantize(tmp_path / "model", out, given)
    assert counts and counts[0] < len(shards)
    files = hub.uploads.repositories[NAME].files
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != ".gitattributes"} == expected
    assert not list(out.glob("*.safetensors")) and verify(out) == []
    assert hub.ranges, "the first block was read from the hub"
