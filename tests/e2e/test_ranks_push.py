"""Jobs of several processes that upload their shards: the first process does this, and all of them read what is on the hub only."""

from __future__ import annotations

import functools
import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub.client import use_url
from fake_hub.server import Hub, running_hub
from models import make_checkpoint, random_ids, save_ids
from rank_processes import start

from bigq.inspect.status import status
from bigq.sched import push

NAME = "me/shared"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


def use(url: str) -> None:
    """In a process of a job: the hub's address, the token, and an upload of each shard alone, which the loop waits for."""
    patch = pytest.MonkeyPatch()
    use_url(url, patch)
    patch.setenv("HF_TOKEN", TOKEN)
    for name in ("INTERVAL", "WAITING_SHARDS", "WAITING_BYTES"):
        patch.setattr(push, name, 0)


@pytest.mark.parametrize("killed", [0, 1])
def test_processes_of_a_job_that_uploads(killed: int, hub: Hub, tmp_path: Path) -> None:
    """One is killed when shards are on the hub only. The token is not in any file, nor in what they say."""
    model, ids = make_checkpoint(tmp_path / "m", "llama", num_hidden_layers=3), save_ids(tmp_path / "ids.safetensors", random_ids())

    def words(out: Path) -> list[object]:
        rows = ["--calibration", ids, "--samples", "8", "--seqlen", "24"]
        return ["quantize", model, out, *rows, "--group-size", "32", "--device", "cpu", "--activations", "host"]

    local = start(2, words(tmp_path / "local"), tmp_path / "logs-local")
    assert local.ended() == [0, 0], local.texts
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "local").iterdir() if path.is_file()}

    out, prepare, codes = tmp_path / "out", functools.partial(use, hub.url), []
    pushed = [*words(out), "--push", NAME, "--push-drop"]
    for attempt, faults in enumerate(({killed: "linear.solved:18"}, {})):
        made = start(2, pushed, tmp_path / f"logs-{attempt}", faults, prepare)
        codes.append(made.ended())
        assert all(TOKEN not in text for text in made.texts)
        if not attempt:
            assert status(out).blocks_done == 2 and status(out).pushed > len(list(out.glob("*.safetensors")))
    assert sorted(codes[0]) == [-signal.SIGKILL, 75] and codes[0][killed] != 75 and codes[1] == [0, 0], made.texts
    assert sum(f"the model is in {NAME} on the hub" in text for text in made.texts) == 1

    repository = hub.uploads.repositories[NAME]
    uploaded = {name: hashlib.sha256(data).hexdigest() for name, data in repository.files.items() if name != ".gitattributes"}
    assert uploaded == expected
    assert f"Bearer {TOKEN}" in hub.uploads.authorized
    left = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not left
