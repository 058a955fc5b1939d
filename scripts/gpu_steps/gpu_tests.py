"""``pytest -m gpu``, and the kernel and solver tests, which run on the GPU where there is one."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from gpu_steps.setting import ROOT, Findings, NotPossible, Setting

#: pytest's exit status if no test was selected.
NO_TESTS = 5
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
#: Tests that run on the GPU where there is one, though they need none.
ROOMS = ("tests/kernels", "tests/solver")


def run(setting: Setting, found: Findings) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise NotPossible("pytest is not installed")
    if setting.focus:  # tests that failed before
        pytest(found, "failed before", [*PYTEST, "-m", "", *setting.focus])
        return
    marked, missing = possible(marked_files(ROOT / "tests"))
    others, missing_too = possible(path for room in ROOMS for path in sorted((ROOT / room).rglob("test_*.py")))
    found["left out"] = missing | missing_too
    found["files with tests marked gpu"] = marked
    if marked:
        pytest(found, "pytest -m gpu", [*PYTEST, "-m", "gpu", *marked])
    pytest(found, "kernel and solver tests", [*PYTEST, "--maxfail=20", "--durations=12", *others, *how(smoke=setting.smoke)])


def how(*, smoke: bool) -> list[str]:
    """Options of the kernel and solver tests: in 8 processes where pytest-xdist is installed; of a few tests for a smoke run."""
    if smoke:
        return ["-k", "test_pack and words"]
    return ["-n", "8"] if importlib.util.find_spec("xdist") else []


def possible(paths: Iterable[Path]) -> tuple[list[str], dict[str, str]]:
    """Test files that can be imported, relative to the source tree, and what the others lack."""
    good, missing = [], {}
    for path in paths:
        name = str(path.relative_to(ROOT))
        if absent := missing_imports(path):
            missing[name] = f"{', '.join(absent)}: not installed"
        else:
            good.append(name)
    return good, missing


def pytest(found: Findings, name: str, command: list[str]) -> None:
    """Run tests; their output goes to the step's log, so that a step that is cut off keeps it."""
    done = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    last = ""
    for line in done.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
        if line.startswith("FAILED"):
            found.fail(f"{name}: {line.split()[1]}", line.strip())
    found[f"{name}: summary"] = last
    found.require(f"{name}: passed", done.wait() in (0, NO_TESTS))


def marked_files(folder: Path) -> list[Path]:
    """Test files that name the marker. All others are not even imported: some need packages that a GPU machine may lack."""
    return [path for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]


def missing_imports(path: Path) -> list[str]:
    """Top-level packages that a file imports when it is imported itself, and that are not installed."""
    names: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return sorted(package for package in tops(names) if not beside(path, package) and importlib.util.find_spec(package) is None)


def tops(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def beside(path: Path, package: str) -> bool:
    """Whether a module lies where pytest finds it: in the test's folder or in tests/."""
    return any((folder / f"{package}.py").exists() for folder in (path.parent, ROOT / "tests"))
