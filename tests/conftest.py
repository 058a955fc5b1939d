"""Fixtures that all tests share: one tiny checkpoint per family, built once; calibration ids; child processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("bigq") is None:
    sys.path.insert(0, str(ROOT))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Child = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family → its tiny fp32 checkpoint of several shards. To be read only: tests that damage one copy it first."""
    from models import make_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        path = folder / family
        return path if path.exists() else make_checkpoint(path, family)

    return get


@pytest.fixture(scope="session")
def ids_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 × 40 random token ids."""
    from models import random_ids, save_ids

    return save_ids(tmp_path_factory.mktemp("ids") / "ids.safetensors", random_ids())


@pytest.fixture(scope="session")
def child() -> Child:
    """Run ``python ARGS…`` in a process of its own, able to import bigq and kept off the network and the user's caches."""

    def run(*args: str | Path, env: Mapping[str, str] | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        paths = os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = kept | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"} | dict(env or {})
        command = [sys.executable, *map(str, args)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)

    return run
