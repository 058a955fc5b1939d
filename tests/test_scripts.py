"""The scripts that need a GPU or a compiler, as far as they go without one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from conftest import ROOT, Child


@pytest.mark.long
def test_every_triton_kernel_compiles_for_sm_90_without_spilling(child: Child, tmp_path: Path) -> None:
    """Triton's interpreter accepts what its compiler does not."""
    pytest.importorskip("triton")
    options = ("--few", "--json", tmp_path / "table.json")
    done = child(ROOT / "scripts/compile_sm90.py", *options, env={"TRITON_CACHE_DIR": str(tmp_path)}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    launches = json.loads((tmp_path / "table.json").read_text())["launches"]
    kernels = {launch["kernel"] for launch in launches.values()}
    defined = {line.split("(")[0].removeprefix("def ") for file in (ROOT / "bigq/kernels/gpu").glob("*.py") for line in kernel_lines(file)}
    assert kernels == defined and len(kernels) >= 7
    assert all(launches[name]["wgmma"] for name in launches if name.startswith(("syrk", "rank_update", "dequant_matvec")))


@pytest.mark.parametrize(
    ("name", "target", "version"),
    [
        ("compile_sm90", "sm_90", "3.9.0"),
        ("compile_sm90_triton-3.6", "sm_90", "3.6.0"),
        ("compile_gfx942", "gfx942", "3.9.0"),
    ],
)
def test_the_committed_tables_hold_every_kernel_and_the_defaults_of_bf16_checkpoints(name: str, target: str, version: str) -> None:
    table = json.loads((ROOT / f"docs/results/{name}.json").read_text(encoding="utf-8"))
    launches = table["launches"]
    assert (table["target"], table["triton"]) == (target, version)
    defined = {line.split("(")[0].removeprefix("def ") for file in (ROOT / "bigq/kernels/gpu").glob("*.py") for line in kernel_lines(file)}
    assert {launch["kernel"] for launch in launches.values()} == defined
    assert {bits for launch in launches for bits in range(7, 12) if f"groups of 128, {bits}-bit scales" in launch} == set(range(7, 12))
    assert next(iter(launches)) == "gptq_block, column loop, 128 columns, 4 bits symmetric, groups of 128, 8-bit scales"
    assert all(launch["shared_bytes"] <= {"sm_90": 227 << 10, "gfx942": 64 << 10}[target] for launch in launches.values())
    assert all(launch["stack_bytes"] <= (128 if "groups of 40" in kind else 32) for kind, launch in launches.items())


def kernel_lines(file: Path) -> list[str]:
    """The ``def`` lines of what is launched: functions under @triton.jit whose name ends in _kernel."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [b for a, b in itertools.pairwise(lines) if a == "@triton.jit" and "_kernel(" in b]
