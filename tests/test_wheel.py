"""The wheel that is built from the source tree holds what it must: licences, type marker, the shipped model, and no tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "bigq")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, since setuptools writes into its source tree, and with the setuptools at hand, since that needs no network."""
    pytest.importorskip("setuptools", minversion="77")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, tree]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("bigq-*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_every_module_and_asset_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    package = [path for path in (ROOT / "bigq").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.relative_to(ROOT).as_posix() for path in package} <= names
    assert {"bigq/py.typed", "bigq/assets/tiny-llama/config.json", "bigq/assets/heldout.txt"} <= names


def test_nothing_else_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    assert {Path(name).parts[0] for name in wheel.namelist()} == {"bigq", f"bigq-{version()}.dist-info"}


def test_licences_are_in_the_wheel(wheel: zipfile.ZipFile, metadata: Message) -> None:
    folder = f"bigq-{version()}.dist-info/licenses"
    assert wheel.read(f"{folder}/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert wheel.read(f"{folder}/bigq/assets/LICENSE-PSF.txt") == (ROOT / "bigq/assets/LICENSE-PSF.txt").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "bigq" and metadata["Version"] == version()
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra") or ()) == {"cpu", "gguf", "parquet", "report", "test", "dev"}
    assert str(metadata.get_payload()).startswith("# bigq\n")


def test_the_command_is_installed(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"bigq-{version()}.dist-info/entry_points.txt").decode()
    assert text.split() == ["[console_scripts]", "bigq", "=", "bigq.cli.main:program"]


def version() -> str:
    from bigq.version import __version__

    return __version__
