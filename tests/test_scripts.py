"""The scripts that need a GPU or a compiler, as far as they go without one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from conftest import ROOT, Child


def test_every_triton_kernel_compiles_for_sm_90_without_spilling(child: Child, tmp_path: Path) -> None:
    """Triton's interpreter accepts what its compiler does not."""
    pytest.importorskip("triton")
    done = child(ROOT / "scripts/compile_sm90.py", "--json", tmp_path / "table.json", env={"TRITON_CACHE_DIR": str(tmp_path)}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    launches = json.loads((tmp_path / "table.json").read_text())["launches"]
    kernels = {launch["kernel"] for launch in launches.values()}
    defined = {line.split("(")[0].removeprefix("def ") for file in (ROOT / "bigq/kernels/gpu").glob("*.py") for line in kernel_lines(file)}
    assert kernels == defined and len(kernels) >= 7
    assert all(launches[name]["wgmma"] for name in launches if name.startswith(("syrk", "rank_update", "dequant_matvec")))


def kernel_lines(file: Path) -> list[str]:
    """The ``def`` lines of what is launched: functions under @triton.jit whose name ends in _kernel."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [b for a, b in itertools.pairwise(lines) if a == "@triton.jit" and "_kernel(" in b]
