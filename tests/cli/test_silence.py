"""With --json and --quiet, nothing of other libraries reaches stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Child
from tqdm import tqdm
from tqdm.auto import tqdm as auto_tqdm

from bigq.cli.main import main
from bigq.cli.silence import silenced


def make_noise() -> None:
    """As transformers, huggingface_hub and others do it: a handler of their own, the last resort, warnings, bars."""
    library = logging.getLogger("noisy_library")
    handler = logging.StreamHandler(sys.stderr)
    library.addHandler(handler)
    library.setLevel(logging.DEBUG)
    library.warning("Retrying in 1s [Retry 1/5].")
    library.error("thrown while requesting HEAD")
    library.removeHandler(handler)
    logging.getLogger("another").warning("nobody configured me")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
    for bar in (tqdm, auto_tqdm):
        list(bar(range(3), desc="Fetching", disable=False))


#: In a process of its own: pytest catches what is logged and warned of.
PROGRAM = """
import sys
from test_silence import make_noise
from bigq.cli.silence import silenced

with silenced():
    make_noise()
print("loud", file=sys.stderr)
make_noise()
"""


def test_nothing_is_heard_within_and_all_is_as_before_after(child: Child) -> None:
    done = child("-c", PROGRAM, env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])})
    quiet, _, loud = done.stderr.partition("loud\n")
    assert (done.returncode, quiet) == (0, "")
    for part in ("Retrying", "thrown while", "nobody configured", "deprecated", "Fetching"):
        assert part in loud, "or the silence shows nothing"


def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins that make noise, for the modules that do the work."""

    def status(out: Any) -> Any:
        make_noise()
        return types.SimpleNamespace(to_json=lambda: {"out": str(out)}, text=lambda: str(out))

    def plan(*_: Any) -> Any:
        make_noise()
        return types.SimpleNamespace(to_json=dict, table=lambda: "", shortages=())

    for name, contents in {"bigq.inspect.status": {"status": status}, "bigq.sched.plan.inputs": {"plan": plan}}.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("command", ["plan M --device cpu --json", "plan M --device cpu --quiet", "status O --json"])
def test_commands_are_silent(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    noisy(monkeypatch)
    assert main(command.split()) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [json.loads(line)["event"] for line in lines] == (["reading"] if command.startswith("plan") and "--json" in command else [])


def test_bigq_itself_shows_a_live_line_after_a_silent_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with silenced():
        pass
    shown = io.StringIO()
    list(tqdm(range(2), file=shown, desc="shown"))
    assert "shown" in shown.getvalue()
