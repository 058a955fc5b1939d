"""Whether a folder is finished and complete, so that nothing is left to do in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import bigq
from bigq.io.atomic import TEMP_SUFFIX
from bigq.job.finish import complete_commits


@pytest.fixture
def out(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    config = bigq.JobConfig(scheme=bigq.QuantScheme(group_size=32), method="rtn", device="cpu", quiet=True)
    bigq.quantize(checkpoint("llama"), tmp_path / "out", config)
    return tmp_path / "out"


def test_a_finished_folder_is_complete(out: Path) -> None:
    commits = complete_commits(out)
    assert commits is not None and [commit.unit for commit in commits] == ["rest-0", "block-0", "block-1", "block-2"]


@pytest.mark.parametrize(
    "change",
    [
        lambda out: (out / "config.json").unlink(),
        lambda out: (out / "config.json").write_text("{}"),
        lambda out: (out / "model-00002-of-00004.safetensors").unlink(),
        lambda out: os.utime(out / "model-00002-of-00004.safetensors", (1, 1)),
        lambda out: (out / ".bigq" / "manifest.json").unlink(),
        lambda out: (out / ".bigq" / "batches.json").write_text("{"),
        lambda out: (out / f"x{TEMP_SUFFIX}").write_text("of a killed run"),
        lambda out: (out / ".bigq" / "activations-00001.safetensors").write_text("of a killed run"),
    ],
    ids=["config", "other config", "shard", "time of a shard", "manifest", "batches", "temporary file", "activations"],
)
def test_what_a_run_would_mend_or_remove_is_not_complete(change: Callable[[Path], object], out: Path) -> None:
    change(out)
    assert complete_commits(out) is None
