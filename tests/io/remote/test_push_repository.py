"""A repository that files are uploaded to: what is asked of the hub, what is sent, and which answers another try may change."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub.client import use_hub
from fake_hub.server import Hub, running_hub

from bigq.errors import BigqError, ResourceError, UsageError
from bigq.io.remote import push
from bigq.io.remote.push import HubRepository, Local
from bigq.io.remote.ranged import Closed, Patience

QUICK = Patience(silence=0.5, first=0.01, longest=0.05)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as server:
        use_hub(server, monkeypatch)
        yield server


@pytest.fixture
def repository(hub: Hub) -> HubRepository:
    hub.uploads.add("me/x")
    return HubRepository("me/x", QUICK)


def local(folder: Path, name: str, data: bytes) -> Local:
    (folder / name).write_bytes(data)
    return Local(name=name, path=folder / name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_large_and_small_files_in_one_commit(hub: Hub, repository: HubRepository, tmp_path: Path) -> None:
    """What is there already is neither sent nor committed again."""
    files = [local(tmp_path, "a.safetensors", b"large"), local(tmp_path, "config.json", b"{}")]
    commit, held = repository.upload(files, "two files")
    stored = hub.uploads.repositories["me/x"]
    assert commit == stored.head and stored.messages == ["initial commit", "two files"]
    assert held["a.safetensors"].sha256 == files[0].sha256 and held["config.json"].sha256 is None
    assert all(file.is_held(held[file.name]) for file in files)
    assert hub.uploads.puts == [5]
    assert repository.upload(files, "again")[0] == commit and stored.messages[-1] == "two files"
    files[1] = local(tmp_path, "config.json", b"[]")
    assert repository.upload(files, "third")[0] == stored.head != commit
    assert hub.uploads.puts == [5] and stored.files["config.json"] == b"[]"


def test_bytes_that_differ(tmp_path: Path, hub: Hub, repository: HubRepository) -> None:
    small, large = local(tmp_path, "a.json", b"{}"), local(tmp_path, "a.safetensors", b"xx")
    _, held = repository.upload([small, large], "both")
    assert small.is_held(held["a.json"]) and large.is_held(held["a.safetensors"]) and not small.is_held(None)
    assert not local(tmp_path, "a.json", b"[]").is_held(held["a.json"])
    assert not local(tmp_path, "a.safetensors", b"xy").is_held(held["a.safetensors"])
    assert not local(tmp_path, "a.safetensors", b"xyz").is_held(held["a.safetensors"])


def test_many_files_are_asked_about_in_few_requests(hub: Hub, repository: HubRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.uploads.repositories["me/x"].put(**{f"{i}.json": b"{}" for i in range(23)})
    monkeypatch.setattr(push, "NAMES_AT_ONCE", 10)
    found = repository.held([*(f"{i}.json" for i in range(23)), "absent.json"], repository.head())
    assert len(found) == 23 and hub.uploads.asked == ["paths-info"] * 3
    assert sorted(repository.names()) == sorted([".gitattributes", *(f"{i}.json" for i in range(23))])


def test_waits_that_the_hub_asks_for_are_no_silence(hub: Hub, repository: HubRepository, tmp_path: Path) -> None:
    """A job whose commits of this hour are used up waits for the next one, if that takes longer than its patience."""
    said: list[str] = []
    repository.say = said.append
    hub.uploads.retry_after = "0.3"
    hub.uploads.faults = [("commit", "429")] * 6
    began = time.monotonic()
    repository.upload([local(tmp_path, "a.json", b"{}")], "one")
    assert time.monotonic() - began > 6 * 0.3 > QUICK.silence
    assert len(said) == 1 and said[0].startswith("warning: me/x: the hub answered with status 429; trying again, in ")


def test_a_silent_hub_is_given_up(hub: Hub, repository: HubRepository, tmp_path: Path) -> None:
    hub.uploads.faults = [("commit", "503")] * 1000
    with pytest.raises(
        ResourceError, match=r"me/x: the hub does not take it: the hub answered with status 503, for \d+ s; the job can go on"
    ):
        repository.upload([local(tmp_path, "a.json", b"{}")], "one")


@pytest.mark.parametrize(
    ("step", "status", "said"),
    [
        ("commit", "400", "--push me/x: the hub answered with status 400: .*; check the repository"),
        ("commit", "401", "--push me/x: the hub does not let you write there .*; log in with 'hf auth login'"),
        ("commit", "403", "--push me/x: the hub does not let you write there"),
        ("preupload", "404", "--push me/x/a.json: the hub answered with status 404"),
        ("paths-info", "404", "--push me/x: the hub answered with status 404"),
    ],
)
def test_answers_that_no_other_try_changes(step: str, status: str, said: str, hub: Hub, repository: HubRepository, tmp_path: Path) -> None:
    hub.uploads.faults = [(step, status)]
    with pytest.raises(BigqError, match=said) as error:
        repository.upload([local(tmp_path, "a.json", b"{}")], "one")
    assert isinstance(error.value, ResourceError) and "\n" not in str(error.value)
    assert hub.uploads.asked.count(step) == 1
    repository.upload([local(tmp_path, "a.json", b"{}")], "one")


def test_a_name_that_no_repository_has(hub: Hub) -> None:
    with pytest.raises(UsageError, match=r"--push me/x..y: is not a repository's name; give --push owner/name"):
        HubRepository("me/x..y", QUICK).prepare()


def test_a_file_that_is_gone(repository: HubRepository, tmp_path: Path) -> None:
    file = local(tmp_path, "a.safetensors", b"x")
    file.path.unlink()
    with pytest.raises(ResourceError, match=r"a.safetensors: cannot be read for its upload: .*; run the same command again"):
        repository.upload([file], "one")


def test_a_closed_repository_asks_nothing(hub: Hub, repository: HubRepository, tmp_path: Path) -> None:
    """Also one that is waiting for its next try."""
    hub.uploads.retry_after = "60"
    hub.uploads.faults = [("commit", "429")]
    timer = threading.Timer(0.2, repository.close)
    timer.start()
    began = time.monotonic()
    with pytest.raises(Closed):
        repository.upload([local(tmp_path, "a.json", b"{}")], "one")
    assert time.monotonic() - began < 20
    with pytest.raises(Closed):
        repository.head()


def test_the_client_does_not_wait_for_ever(repository: HubRepository) -> None:
    from huggingface_hub.utils import get_session

    assert get_session().timeout.read is not None
