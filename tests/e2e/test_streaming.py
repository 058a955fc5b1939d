"""Jobs whose model stays on a server: the same bytes as from a folder, whatever the server does and whenever the job is killed."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Child
from fake_hub.server import KINDS, Faults, Hub
from models import SEQLEN, make_checkpoint, word_tokenizer
from moe_families import moe_model

from bigq.cli.main import main
from bigq.errors import ResourceError
from bigq.io.remote import parts, shards
from bigq.io.remote.ranged import Patience

FLAGS = ["--samples", "8", "--seqlen", str(SEQLEN), "--group-size", "32", "--device", "cpu", "--quiet"]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(parts, "THREADS", 4)


@pytest.fixture
def model(hub: Hub, tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=4)
    word_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("terms")
    hub.repositories["owner/m"] = folder
    return folder


def url(hub: Hub) -> str:
    return f"{hub.url}/owner/m/plain"


def run(model: str | Path, out: Path, ids: Path, *more: str) -> int:
    return main(["quantize", str(model), str(out), "--calibration", str(ids), *FLAGS, *more])


def same(out: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir() if path.is_file())
    assert names == sorted(path.name for path in out.iterdir() if path.is_file())
    for name in names:
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    assert not (out / ".bigq" / "fetched").exists()


def data_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("more", [(), ("--read-ahead", "1"), ("--method", "gptaq", "--checkpoint-every", "0"), ("--method", "rtn")])
def test_a_streamed_job_ends_in_the_bytes_of_a_local_one(
    hub: Hub, model: Path, ids_file: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    assert run(model, tmp_path / "local", ids_file, *more) == 0
    assert run(url(hub), tmp_path / "out", ids_file, *more) == 0
    same(tmp_path / "out", tmp_path / "local")
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_job_through_fsspec(model: Path, ids_file: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "local", ids_file) == 0
    assert run(f"file://{model}", tmp_path / "out", ids_file) == 0
    same(tmp_path / "out", tmp_path / "local")


def test_every_byte_is_fetched_about_once(hub: Hub, model: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts overlap tensors of several units and headers are read before; parts here are as small as a tensor."""
    for name, size in (("LARGEST_PART", 2**12), ("SMALLEST_PART", 2**12)):
        monkeypatch.setattr(parts, name, size)
    assert run(url(hub), tmp_path / "out", ids_file) == 0
    headers = sum(hub.ranges[: 2 * len(list(model.glob("*.safetensors")))])
    assert data_bytes(model) <= sum(hub.ranges) <= data_bytes(model) + headers


@pytest.mark.long
def test_a_model_with_experts_and_a_cache_that_is_far_too_small(
    hub: Hub, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not stay is fetched again; the bytes stay the same."""
    monkeypatch.setattr(parts, "LARGEST_PART", 2**14)
    monkeypatch.setattr(parts, "SMALLEST_PART", 2**14)
    monkeypatch.setattr(shards.PartCache, "__init__", _small(shards.PartCache.__init__, 4 * 2**14))
    folder = tmp_path / "experts"
    moe_model("qwen3_moe").save_pretrained(folder, max_shard_size="300KB")  # type: ignore[operator]
    hub.repositories["owner/m"] = folder
    assert run(folder, tmp_path / "local", ids_file) == 0
    assert run(url(hub), tmp_path / "out", ids_file) == 0
    same(tmp_path / "out", tmp_path / "local")


def _small(begin: Callable[..., None], limit: int) -> Callable[..., None]:
    return lambda self, folder, _, fetch: begin(self, folder, limit, fetch)


def test_a_bad_server_changes_nothing(hub: Hub, model: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PATIENT", Patience(silence=30.0, first=0.01))
    monkeypatch.setattr(parts, "SMALLEST_PART", 2**13)
    monkeypatch.setattr(parts, "LARGEST_PART", 2**13)
    assert run(model, tmp_path / "local", ids_file) == 0
    hub.faults = Faults(kinds=KINDS, share=0.4, stall=0.05)
    assert run(url(hub), tmp_path / "out", ids_file) == 0
    same(tmp_path / "out", tmp_path / "local")
    assert set(hub.faults.seen) == set(KINDS)


@pytest.mark.long
def test_a_server_that_is_gone_ends_the_job_which_resumes(
    hub: Hub, model: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shards, "PATIENT", Patience(silence=0.3, first=0.01))
    monkeypatch.setattr(parts, "SMALLEST_PART", 2**13)
    monkeypatch.setattr(parts, "LARGEST_PART", 2**13)
    assert run(model, tmp_path / "local", ids_file) == 0
    headers = 2 * len(list(model.glob("*.safetensors")))
    hub.faults = Faults(kinds=("error",), after=headers + int(0.7 * data_bytes(model) / 2**13))
    monkeypatch.setattr(shards.PartCache, "__init__", _small(shards.PartCache.__init__, 30 * 2**13))
    assert run(url(hub), tmp_path / "out", ids_file) == ResourceError.exit_code
    said = capsys.readouterr().err
    assert "/owner/m/plain/model-0000" in said and "cannot be fetched: the server answered with status 503" in said
    assert "check the network, then run the same command again" in said
    assert not (tmp_path / "out" / "config.json").exists() and list((tmp_path / "out").glob("model-*"))
    hub.faults = Faults()
    assert run(url(hub), tmp_path / "out", ids_file) == 0
    same(tmp_path / "out", tmp_path / "local")


def test_a_model_that_changes_on_the_server_ends_the_job(
    hub: Hub, model: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch = shards.RemoteShards._fetch
    last = max(model.glob("*.safetensors"))
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    before = threading.Lock()

    def changing(self: shards.RemoteShards, *args: object) -> None:
        with before:
            if self._cache is not None and last.read_bytes() != content:
                last.write_bytes(content)
        fetch(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(shards.RemoteShards, "_fetch", changing)
    assert run(url(hub), tmp_path / "out", ids_file) == 3
    assert f"plain/{last.name}: changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_finished_job_and_a_job_that_goes_on_from_a_folder(
    hub: Hub, model: Path, ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(url(hub), out, ids_file) == 0
    before = len(hub.ranges)
    assert main(["quantize", url(hub), str(out), "--calibration", str(ids_file), *FLAGS[:-1]]) == 0
    assert "is finished already" in capsys.readouterr().err
    assert len(hub.ranges) - before == 2 * len(list(model.glob("*.safetensors")))  # sizes and headers
    shard = sorted(out.glob("model-*"))[2]
    shard.unlink()
    assert main(["quantize", str(model), str(out), "--calibration", str(ids_file), *FLAGS[:-1]]) == 0
    said = capsys.readouterr().err
    assert "the first shards were made from a model on a server: headers and config are the same, weights are not compared" in said
    assert main(["verify", str(out)]) == 0


def test_the_plan_of_a_url(hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--json", "--seqlen", "32", "--samples", "4", "--group-size", "32", "--device", "cpu"]
    assert main(["plan", url(hub), str(tmp_path / "out"), *flags, "--bandwidth", "1kB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fetch"] == {"way": "stream", "bytes": data_bytes(model), "cache_bytes": 32 * 2**20, "bytes_per_second": 1000}
    assert found["seconds_at_least"] == data_bytes(model) / 1000
    assert main(["plan", str(model), str(tmp_path / "out"), *flags]) == 0
    local = json.loads(capsys.readouterr().out)
    assert local["fetch"] is None and not local["warnings"]
    assert main(["plan", str(model), str(tmp_path / "out"), *flags, "--fetch", "stream"]) == 0
    warned = json.loads(capsys.readouterr().out)
    assert warned["warnings"] == ["--fetch stream has no effect: all shards of MODEL are on this machine"]
    assert found["disk_bytes"] == local["disk_bytes"] + 32 * 2**20
    assert main(["plan", url(hub), str(tmp_path / "out"), *flags, "--fetch", "download"]) == 2
    assert "--fetch download: MODEL is a URL, which is always streamed; leave out --fetch" in capsys.readouterr().err


def test_only_quantize_and_plan_take_urls(hub: Hub, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", url(hub), "--data", "builtin"]) == 2
    assert "only bigq quantize and bigq plan read a model from a URL" in capsys.readouterr().err


@pytest.mark.long
def test_the_hub_is_streamed_from_where_the_disk_cannot_hold_the_model(hub: Hub, ids_file: Path, child: Child, tmp_path: Path) -> None:
    """A job that has begun so goes on so. Nothing of the shards is in the hub's cache."""
    folder = make_checkpoint(tmp_path / "model", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=3, shard="20MB")
    word_tokenizer().save_pretrained(folder)
    hub.repositories["owner/m"] = folder
    environment = hub.environment(tmp_path / "hf")
    flags = [flag for flag in FLAGS if flag != "--quiet"]
    command = ["-m", "bigq", "quantize", "owner/m", tmp_path / "out", "--calibration", ids_file, *flags, "--disk", "45MB"]
    done = child(*command, env=environment | {"BIGQ_FAULT": "block.solved:2"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "through a cache of " in done.stderr
    done = child(*command[:-2], env=environment)
    assert done.returncode == 0, done.stderr
    assert "through a cache of " in done.stderr
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    assert run(folder, tmp_path / "local", ids_file) == 0
    same(tmp_path / "out", tmp_path / "local")
    done = child(*command[:4], tmp_path / "other", *command[5:-2], env=environment)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "hf").rglob("*.safetensors"))
    same(tmp_path / "other", tmp_path / "local")
