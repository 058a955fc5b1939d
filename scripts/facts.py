"""Facts that every measurement needs (revision, versions, machine), and tables of figures.

Imports neither torch nor bigq: the peak memory of a child starts at its parent's, so scripts that measure memory stay small.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def said(*command: str) -> str:
    """The output of a command, or that it is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return f"{command[0]} is not installed"


def revision(tree: Path = ROOT) -> str:
    """The commit of a source tree, and whether tracked files differ from it. Without git, a hash of this tree's sources."""
    git = ("git", "-C", str(tree))
    commit = said(*git, "rev-parse", "HEAD")
    if not re.fullmatch("[0-9a-f]{40,64}", commit):
        return f"no commit known; sources {source_hash()}"
    return f"{commit} with local changes" if said(*git, "status", "--porcelain", "--untracked-files=no") else commit


def source_hash(*folders: str) -> str:
    """SHA-256 over names and contents of the Python files in folders, bigq's by default: identifies sources where there is no git."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders or ("bigq",) for path in (ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect a measurement."""
    packages = ("torch", "transformers", "triton", "safetensors")
    return {"python": platform.python_version(), **{package: version_of(package) for package in packages}}


def calibration_flags(ids: Path) -> list[str]:
    """Options of ``bigq quantize`` for all rows of a file of token ids."""
    from safetensors import safe_open

    with safe_open(ids, "pt") as file:
        rows, tokens = file.get_slice("input_ids").get_shape()
    return ["--calibration", str(ids), "--samples", str(rows), "--seqlen", str(tokens)]


def version_of(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def host() -> dict[str, Any]:
    """Processor model, number of cores, bytes of memory, kernel."""
    model = platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model, "cores": os.cpu_count(), "memory_bytes": memory, "system": f"{platform.system()} {platform.release()}"}


def status_bytes(pid: int | str, field: str) -> int:
    """A size from /proc/PID/status, such as VmHWM, in bytes; 0 once the process has ended."""
    for line in _lines(Path(f"/proc/{pid}/status")):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def drop_from_cache(path: Path) -> None:
    """Drop the clean pages of a file from the page cache, so that the next read comes from the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def rows(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested dicts as (name, text), with names joined by slashes."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from rows(inner, f"{name} / {key}" if name else str(key))
    else:
        yield name, f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(value: object) -> None:
    """Print nested dicts, one leaf per line."""
    table = list(rows(value))
    width = max(len(name) for name, _ in table)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in table))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
