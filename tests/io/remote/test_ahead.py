"""Prefetch of tensors that are on a server, to the host and to a slow device, through a small cache and over bad connections."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from fake_hub.server import KINDS, Faults, Hub
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prefetch"))
from slow_copier import SlowCopier

from bigq.io.index import Checkpoint
from bigq.io.prefetch import pieces, to_device
from bigq.io.prefetch.prefetch import Prefetch
from bigq.io.prefetch.to_device import DevicePrefetch, least_budget
from bigq.io.prefetch.to_host import HostPrefetch
from bigq.io.reader import read_tensor
from bigq.io.remote import parts, shards
from bigq.io.remote.http import WebFolder
from bigq.io.remote.parts import PartCache
from bigq.io.remote.ranged import Patience
from bigq.io.remote.shards import RemoteShards


@pytest.mark.parametrize("device", ["host", "device"])
@pytest.mark.parametrize("bad", [False, True])
def test_tensors_arrive_through_the_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, bad: bool) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, value in (("THREADS", 3), ("LARGEST_PART", 4096), ("SMALLEST_PART", 4096)):
        monkeypatch.setattr(parts, name, value)
    monkeypatch.setattr(shards, "PATIENT", Patience(silence=20.0, first=0.005))
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(to_device, "SEGMENT_BYTES", 4096)
    begin = PartCache.__init__
    monkeypatch.setattr(PartCache, "__init__", lambda self, folder, _, fetch: begin(self, folder, 6 * 4096, fetch))
    model, state = tmp_path / "model", tmp_path / "state"
    model.mkdir()
    draw = random.Random(3)
    save_file({f"t{i}": torch.randn(draw.choice((1, 100, 5000, 9000))) for i in range(30)}, model / "model.safetensors")
    hub.repositories["owner/m"] = model
    remote = RemoteShards(WebFolder(f"{hub.url}/owner/m/plain"))
    local, found = Checkpoint.open(model), Checkpoint.open(model, remote)
    infos = list(found.tensors.values())
    hub.faults = Faults(kinds=KINDS if bad else (), share=0.4, stall=0.02)
    with remote.cached(state, 0, lambda _: None):
        remote.follow((info.name, [info]) for info in infos)
        copier = SlowCopier()
        prefetch: Prefetch = HostPrefetch(40_000) if device == "host" else DevicePrefetch(least_budget() + 16 * 1024, copier)
        prefetch.announce(infos)
        for info in infos:
            assert prefetch.take(info).equal(read_tensor(local[info.name])), info.name
            remote.done(info.name)
        prefetch.close()
    assert not state.exists() or not list(state.iterdir())
    assert not bad or len(hub.faults.seen) > 3
