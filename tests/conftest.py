"""Fixtures that all tests share: one tiny checkpoint per family, built once; calibration ids; child processes; Triton.

Where there is no GPU, Triton kernels run in Triton's interpreter, on CPU tensors. It must know before it is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from fake_hub.server import Hub

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("bigq") is None:
    sys.path.insert(0, str(ROOT))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

#: What the environment of tests holds and ordinary commands should not see.
KEPT_FROM_CHILDREN = ("HF_", "TRANSFORMERS_", "TRITON_INTERPRET")

Child = Callable[..., "subprocess.CompletedProcess[str]"]


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that comes to be in memory of its own."""

    def __init__(self, but: Tensor) -> None:
        super().__init__()
        self.but, self.elements = but.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != self.but:
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return out


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--clients", metavar="DIR", help="virtual environments of other programs, as scripts/clients/venvs DIR makes them")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is none."""
    if not CUDA:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _remembered_plans() -> Iterator[None]:
    """Jobs survey a model once, and measure the machine once; see ``known_surveys``."""
    from known_surveys import remembered_rates, remembered_survey

    from bigq.sched.plan import inputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "survey", remembered_survey(inputs.survey))
        patch.setattr(inputs, "measure", remembered_rates(inputs.measure))
        yield


@pytest.fixture
def plans_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan surveys its model and measures the machine, as without tests."""
    from bigq.machine.ceilings import measure
    from bigq.sched.plan import inputs
    from bigq.sched.plan.survey import survey

    monkeypatch.setattr(inputs, "survey", survey)
    monkeypatch.setattr(inputs, "measure", measure)


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
        kept = {k: v for k, v in os.environ.items() if not k.startswith(KEPT_FROM_CHILDREN)}
        paths = os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = kept | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"} | dict(env or {})
        command = [sys.executable, *map(str, args)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub on 127.0.0.1, without repositories."""
    from fake_hub.server import running_hub

    with running_hub() as server:
        yield server


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run: the GPU, or the CPU with Triton's interpreter."""
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For thousands of tiny operations: waking a second thread for each costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors come filled: with NaN, or with the largest integer."""

    def poison(x: Tensor) -> Tensor:
        return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but fp64 goes through the Triton kernels, in a GPU's memory order, also on the CPU."""
    pytest.importorskip("triton")
    import bigq.kernels
    import bigq.solver

    def use_triton(x: Tensor) -> bool:
        return x.dtype != torch.float64

    def empty_columns(k: int, m: int, dtype: torch.dtype, device: torch.device, batch: Sequence[int] = ()) -> Tensor:
        return torch.empty(*batch, m, k, dtype=dtype, device=device).mT

    # All modules are imported first: one that came later would keep the replacement.
    for package in (bigq.kernels, bigq.solver):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    for name, module in list(sys.modules.items()):
        if name.startswith("bigq."):
            for replacement in (use_triton, empty_columns):
                if hasattr(module, replacement.__name__):
                    monkeypatch.setattr(module, replacement.__name__, replacement)
