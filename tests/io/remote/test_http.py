"""Files of the hub and of web servers, against a server that is good or bad; and of file systems that fsspec opens."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub.server import COMMIT, KINDS, Faults, Hub

from bigq.errors import CheckpointError, ResourceError, UsageError
from bigq.io.index import Checkpoint
from bigq.io.reader import read_rows, read_tensor
from bigq.io.remote import http, shards
from bigq.io.remote.http import HubFolder, WebFolder
from bigq.io.remote.objects import ObjectFolder
from bigq.io.remote.ranged import Patience, RangeReader
from bigq.io.remote.shards import RemoteShards
from bigq.io.remote.transport import Transport
from bigq.io.remote.url import is_url, open_url

NAME = "f.safetensors"
DATA = random.Random(1).randbytes(200_000)


@pytest.fixture(autouse=True)
def _used(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process uses the hub, which has a repository of one file."""
    from huggingface_hub import constants

    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / NAME).write_bytes(DATA)
    hub.repositories["owner/m"] = folder
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shards, "QUICK", Patience(silence=5.0, first=0.01))


def web(hub: Hub) -> WebFolder:
    return WebFolder(f"{hub.url}/owner/m/plain")


def of_hub(hub: Hub) -> HubFolder:
    return HubFolder("owner/m", COMMIT)


def read(transport: Transport, start: int, stop: int, silence: float = 5.0) -> bytes:
    found = bytearray()
    reader = RangeReader(transport, Patience(silence=silence, first=0.01))
    reader.read(NAME, reader.status(NAME), start, stop, lambda piece, _: found.extend(piece))
    return bytes(found)


@pytest.mark.parametrize("folder", [web, of_hub])
def test_ranges(hub: Hub, folder: Callable[[Hub], Transport]) -> None:
    transport = folder(hub)
    status = transport.status(NAME)
    assert status.size == len(DATA) and status.version
    for start, stop in ((0, len(DATA)), (0, 1), (len(DATA) - 1, len(DATA)), (77, 100_000)):
        assert read(transport, start, stop) == DATA[start:stop]


@pytest.mark.parametrize("folder", [web, of_hub])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_answers_do_not_change_what_is_read(
    hub: Hub, folder: Callable[[Hub], Transport], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "TIMEOUT", 0.2)
    transport = folder(hub)
    transport.status(NAME)
    hub.faults = Faults(kinds=(kind,), share=0.6, stall=0.5)
    for start in range(0, len(DATA), 40_000):
        assert read(transport, start, start + 40_000) == DATA[start : start + 40_000]
    assert hub.faults.seen[kind] >= 2


def test_the_hub_is_asked_once_where_a_file_is_and_again_where_that_has_expired(hub: Hub) -> None:
    transport = of_hub(hub)
    for _ in range(3):
        read(transport, 5, 50)
    heads = [line for line in hub.requests if line.startswith("HEAD")]
    assert len(heads) == 3  # one for each status
    transport._locations[NAME] = f"{hub.url}/owner/m/plain/expired"
    status = transport.status(NAME)
    transport._locations[NAME] = f"{hub.url}/owner/m/plain/expired"
    found = bytearray()
    RangeReader(transport, Patience(silence=5.0, first=0.01)).read(NAME, status, 0, 10, lambda piece, _: found.extend(piece))
    assert bytes(found) == DATA[:10] and transport._locations[NAME].endswith(f"/resolve/{COMMIT}/{NAME}")


def test_the_login_goes_to_the_hub_only(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    transport = of_hub(hub)
    assert transport._credentials(f"{hub.url}/x")["authorization"] == "Bearer hf_secret"
    assert transport._credentials("https://storage.example/x?signature=1") == {}


@pytest.mark.parametrize("folder", [web, of_hub])
def test_files_that_are_missing_or_changed_are_errors_at_once(hub: Hub, folder: Callable[[Hub], Transport]) -> None:
    transport = folder(hub)
    status = transport.status(NAME)
    with pytest.raises(CheckpointError, match=r"/absent\.safetensors: "):
        RangeReader(transport, Patience(silence=5.0)).status("absent.safetensors")
    (hub.repositories["owner/m"] / NAME).write_bytes(DATA[:-1])
    with pytest.raises(CheckpointError, match="changed while it was read; the source is no longer the same model"):
        list(transport.stream(NAME, status, 0, 10))


def test_a_web_file_with_other_bytes_of_the_same_length_has_changed(hub: Hub) -> None:
    transport = web(hub)
    status = transport.status(NAME)
    (hub.repositories["owner/m"] / NAME).write_bytes(DATA[::-1])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        list(transport.stream(NAME, status, 0, 10))


@pytest.mark.parametrize("status", [401, 403, 451])
def test_statuses_that_no_patience_helps(hub: Hub, status: int) -> None:
    """A login that is missing, or access that is denied."""
    stored = of_hub(hub).status(NAME)
    hub.denied = status
    with pytest.raises(ResourceError, match=rf"status {status}; check the address and your login"):
        RangeReader(web(hub), Patience(silence=9.0)).status(NAME)
    with pytest.raises(
        ResourceError, match=rf"owner/m/f\.safetensors: the hub answered with status {status}; check the name and your login"
    ):
        RangeReader(of_hub(hub), Patience(silence=9.0)).read(NAME, stored, 0, 9, lambda *_: None)


def test_a_server_without_ranges_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_range", lambda start, stop: {})
    transport = web(hub)
    status = transport.status(NAME)
    with pytest.raises(ResourceError, match=r"f\.safetensors: the server does not send parts of files, .*; download the model first"):
        list(transport.stream(NAME, status, 0, 10))
    assert b"".join(transport.stream(NAME, status, 0, len(DATA))) == DATA


def test_no_server_is_an_error_after_the_patience() -> None:
    with pytest.raises(ResourceError, match=r"http://127\.0\.0\.1:9/m/f\.safetensors: cannot be fetched: .*; check the network"):
        read(WebFolder("http://user:secret@127.0.0.1:9/m?key=secret"), 0, 5, silence=0.2)


def test_offline_is_an_error_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import _http

    _http.close_session()
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE"):
        of_hub(hub).status(NAME)
    _http.close_session()


def test_file_systems_of_fsspec(tmp_path: Path) -> None:
    folder = tmp_path / "objects"
    folder.mkdir()
    (folder / NAME).write_bytes(DATA)
    transport = ObjectFolder(f"file://{folder}")
    assert read(transport, 10, 1000) == DATA[10:1000]
    assert transport.whole(NAME, 10**6) == DATA and transport.whole("absent", 10) is None and transport.names() == [NAME]
    with pytest.raises(ResourceError, match="more than 10 bytes"):
        transport.whole(NAME, 10)
    status = transport.status(NAME)
    with pytest.raises(CheckpointError, match=r"absent: is not there; check the address"):
        transport.status("absent")
    (folder / NAME).write_bytes(DATA[::-1])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        list(transport.stream(NAME, status, 0, 10))
    with pytest.raises(UsageError, match="nosuch://x"):
        ObjectFolder("nosuch://x")


@pytest.fixture
def model(checkpoint: Callable[[str], Path], hub: Hub) -> Path:
    folder = hub.repositories["owner/m"]
    shutil.rmtree(folder)
    shutil.copytree(checkpoint("llama"), folder)
    (folder / "LICENSE").write_text("terms")
    return folder


@pytest.mark.parametrize("way", ["hub", "web", "objects"])
def test_a_remote_checkpoint_is_that_of_its_folder(hub: Hub, model: Path, way: str) -> None:
    """The same tensors and the same fingerprint, so that a job may go on from either."""
    local = Checkpoint.open(model)
    if way == "hub":
        folder, remote = model, RemoteShards(of_hub(hub))
        remote.fetch_headers(sorted(path.name for path in model.glob("*.safetensors")))
    else:
        folder, remote = open_url(f"{hub.url}/owner/m/plain" if way == "web" else f"file://{model}")
        assert (folder / "LICENSE").read_text() == "terms" and not list(folder.glob("*.safetensors"))
    found = Checkpoint.open(folder, remote)
    assert found.fingerprint == local.fingerprint and list(found) == list(local) and not found.files
    assert remote.sizes == {path.name: path.stat().st_size for path in model.glob("*.safetensors")} or way != "hub"
    for name in local:
        assert read_tensor(found[name]).equal(read_tensor(local[name]))
    name = "model.embed_tokens.weight"
    rows = read_tensor(local[name]).argsort(0)[:3, 0].sort().values
    assert read_rows(found[name], rows).equal(read_rows(local[name], rows))
    one, other = found.sample([name]), found.sample(["model.norm.weight"])
    assert one.startswith("remote-") and one != other and one == found.sample([name])


def test_urls() -> None:
    for model in ("s3://b/m", "https://h/m", "gs://b", "file:///m"):
        assert is_url(model)
    for model in ("owner/name", "/a/b", "owner/name@main", "C:/m", "://x"):
        assert not is_url(model)


def test_small_files_that_are_gone_are_removed_here_too(hub: Hub, model: Path) -> None:
    folder, _ = open_url(f"{hub.url}/owner/m/plain")
    (model / "LICENSE").unlink()
    again, _ = open_url(f"{hub.url}/owner/m/plain")
    assert again == folder and not (folder / "LICENSE").exists()
    (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"plain/config\.json: missing; MODEL must be the URL of a folder"):
        open_url(f"{hub.url}/owner/m/plain")
