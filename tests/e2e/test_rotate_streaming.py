"""Rotated models whose shards stay on a server: the head is made of the embedding, which another unit needs too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub.server import Hub
from models import SEQLEN, make_checkpoint
from moe_families import moe_model

from bigq.cli.main import main
from bigq.io.remote import parts


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(parts, "THREADS", 4)
    monkeypatch.setattr(parts, "LARGEST_PART", 2**13)
    monkeypatch.setattr(parts, "SMALLEST_PART", 2**13)


def tied(folder: Path) -> Path:
    return make_checkpoint(folder, "llama", tie_word_embeddings=True)


def experts(folder: Path) -> Path:
    moe_model("qwen3_moe").save_pretrained(folder, max_shard_size="300KB")  # type: ignore[operator]
    return folder


@pytest.mark.parametrize("make", [tied, experts], ids=lambda make: make.__name__)
def test_a_streamed_job_ends_in_the_bytes_of_a_local_one(make: Callable[[Path], Path], hub: Hub, ids_file: Path, tmp_path: Path) -> None:
    source = make(tmp_path / "model")
    hub.repositories["owner/m"] = source
    flags = ["--samples", "8", "--seqlen", str(SEQLEN), "--group-size", "32", "--device", "cpu", "--quiet", "--rotate"]
    for model, out in ((str(source), "local"), (f"{hub.url}/owner/m/plain", "streamed")):
        assert main(["quantize", model, str(tmp_path / out), "--calibration", str(ids_file), *flags]) == 0
    names = sorted(path.name for path in (tmp_path / "local").iterdir() if path.is_file())
    assert names == sorted(path.name for path in (tmp_path / "streamed").iterdir() if path.is_file())
    for name in names:
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name
