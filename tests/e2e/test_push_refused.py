"""Uploads that are refused before anything is computed: options, logins, and repositories with files of others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub.client import use_hub
from fake_hub.server import Hub, running_hub
from tinyjob import TinyJob, make_job, quick

import bigq
from bigq.config import JobConfig
from bigq.errors import BigqError, ResourceError, UsageError

NAME = "me/tiny"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyJob]:
    with quick():
        yield make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as server:
        use_hub(server, monkeypatch)
        yield server


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"push": None}, "--push-drop: no effect without --push; add that, or leave out --push-drop"),
        ({"format": "gguf"}, "--push-drop: removes the shards that a GGUF file is made from; leave out --push-drop"),
        ({"push": "tiny"}, "--push tiny: must be owner/name, a repository on the hub"),
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        JobConfig(**{"push": NAME, "push_drop": True, **changes})
    assert str(error.value) == said


def refused(job: TinyJob, out: Path, kind: type[BigqError], said: str) -> None:
    with pytest.raises(kind, match=said):
        bigq.quantize(str(job.source), out, job.config(quiet=True, push=NAME, push_drop=True))
    assert not out.exists(), "nothing was begun"


@pytest.mark.parametrize("denied", ["no login", "no rights", "read only"])
def test_a_repository_that_may_not_be_written_to(denied: str, job: TinyJob, hub: Hub, tmp_path: Path) -> None:
    """Refused before anything is computed."""
    if denied == "read only":
        hub.uploads.add(NAME)
    hub.uploads.writers = () if denied != "no login" else None
    hub.uploads.faults = [("create", "401")] if denied == "no login" else []
    reason = r"\(no rights\)" if denied == "no rights" else ".*"
    refused(
        job, tmp_path / "out", ResourceError, f"--push {NAME}: the hub does not let you write there {reason}; log in with 'hf auth login'"
    )


def test_a_repository_with_files_of_others(job: TinyJob, hub: Hub, tmp_path: Path) -> None:
    repository = hub.uploads.add(NAME, **{"README.md": b"mine", "model-00001-of-00003.safetensors": b"x", "pytorch_model.bin": b"x"})
    refused(job, tmp_path / "out", UsageError, f"--push {NAME}: holds model-00001-of-00003.safetensors and 1 more files, which the job in")
    repository.remove("pytorch_model.bin")
    repository.remove("model-00001-of-00003.safetensors")
    bigq.quantize(str(job.source), tmp_path / "out", job.config(quiet=True, push=NAME))
    assert "config.json" in repository.files and repository.files["README.md"] == b"mine"


def test_the_source_is_no_place_for_the_output(hub: Hub, job: TinyJob, tmp_path: Path) -> None:
    hub.repositories[NAME] = job.source
    with pytest.raises(UsageError, match=f"--push {NAME}: is the repository that MODEL is read from; name another one"):
        bigq.quantize(NAME, tmp_path / "out", job.config(quiet=True, push=NAME))
    assert "create" not in hub.uploads.asked


def test_offline(hub: Hub, job: TinyJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(job, tmp_path / "out", ResourceError, f"--push {NAME}: HF_HUB_OFFLINE forbids asking the hub; unset it, or leave out --push")
