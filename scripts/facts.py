"""What a measurement is worth nothing without: revision, versions and machine; and how its figures are shown.

Imports neither torch nor bigq: a child's peak memory starts from its parent's, so those who measure stay small.
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
    """What a command prints, or that it is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return f"{command[0]} is not there"


def revision() -> str:
    """The commit that the source tree is at, and whether tracked files differ from it; without git, a hash of the sources."""
    git = ("git", "-C", str(ROOT))
    commit = said(*git, "rev-parse", "HEAD")
    if not re.fullmatch("[0-9a-f]{40,64}", commit):
        return f"no commit known; sources {source_hash()}"
    return f"{commit} with local changes" if said(*git, "status", "--porcelain", "--untracked-files=no") else commit


def source_hash() -> str:
    """SHA-256 over names and contents of bigq's Python files: tells which sources ran where there is no git."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "bigq").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of Python and of the packages that the time is spent in."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def host() -> dict[str, Any]:
    """Model and number of the processor's cores, bytes of memory, kernel."""
    model = platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model, "cores": os.cpu_count(), "memory_bytes": memory, "system": f"{platform.system()} {platform.release()}"}


def status_bytes(pid: int | str, field: str) -> int:
    """A size that /proc/PID/status tells, such as VmHWM, in bytes; 0 once the process is gone."""
    for line in _lines(Path(f"/proc/{pid}/status")):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def drop_from_cache(path: Path) -> None:
    """Let the system forget the clean pages of a file, so that it is read from the disk again."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def rows(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested dicts as lines of a table."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from rows(inner, f"{name} / {key}" if name else str(key))
    else:
        yield name, f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(value: object) -> None:
    """Nested dicts on stdout, a leaf on each line."""
    table = list(rows(value))
    width = max(len(name) for name, _ in table)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in table))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
