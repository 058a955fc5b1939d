"""What every step gets: where it runs, and where its findings go."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Exit status of a step that this machine cannot run.
NOT_POSSIBLE = 3


class NotPossible(Exception):
    """This machine cannot run the step; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """work: a folder that all steps share. smoke: tiny sizes on the CPU. mode, focus: as in ``runner.Step``."""

    step: str
    work: Path
    smoke: bool
    mode: str = ""
    focus: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda:0"

    @property
    def ceilings(self) -> Path:
        """The machine's ceilings, as scripts/ceilings.py prints them. The step machine measures them; the others read them."""
        return self.work / "ceilings.json"

    def found(self, step: str) -> Path:
        """The file of a step's findings."""
        return self.work / f"{step}.json"


def need(*packages: str) -> None:
    """Raises NotPossible if a package that another process of the step imports is not installed."""
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise NotPossible(f"{', '.join(missing)}: not installed")


class Findings:
    """The findings of a step. Each is in the file as soon as it is known, so a step that is stopped keeps what it found."""

    def __init__(self, path: Path) -> None:
        self.values: dict[str, Any] = {}
        self.failures: list[str] = []
        self._path, self._begun = path, time.monotonic()
        self._write()

    def __setitem__(self, name: str, value: Any) -> None:
        self.values[name] = value
        self._write()
        print(f"[{time.monotonic() - self._begun:.1f} s] {name}: {value}", flush=True)

    def fail(self, name: str, reason: Any) -> None:
        self.failures.append(name)
        self[name] = reason

    def check(self, name: str, value: float, limit: float) -> None:
        """Record a value. More than the limit, or NaN, is a failure."""
        row = {"value": value if math.isfinite(value) else str(value), "limit": limit}
        if value <= limit:
            self[name] = row
        else:
            self.fail(name, row)

    def require(self, name: str, holds: bool) -> None:
        if holds:
            self[name] = True
        else:
            self.fail(name, False)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """An error inside is a failure of this name, and does not stop the step."""
        begun = time.monotonic()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{name}: error", f"{type(error).__name__}: {error}"[:500])
        print(f"[{time.monotonic() - self._begun:.1f} s] {name} took {time.monotonic() - begun:.1f} s", flush=True)

    def _write(self) -> None:
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text(json.dumps({"failures": self.failures, "found": self.values}, ensure_ascii=False))
        partial.rename(self._path)
