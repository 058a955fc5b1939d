"""Plans of jobs of several processes against what two of them exchange, choose and need."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Child
from models import make_checkpoint, random_ids, save_ids
from rank_processes import LIMIT, places, start
from test_memory import random_llama

from bigq.cli.main import main

pytestmark = pytest.mark.usefixtures("plans_of_their_own")

COUNT = 2
#: What uses collective operations, and the phase that a plan counts them in; none for JSON.
PHASES = {
    ("bigq.machine.process_group", "ProcessGroup.tensor_"): "hessian",
    ("bigq.machine.process_group", "ProcessGroup.triangle_"): "hessian",
    ("bigq.machine.process_group", "ProcessGroup.dealt_triangles_"): "hessian",
    ("bigq.machine.process_group", "ProcessGroup.joined"): "solve",
    ("bigq.machine.process_group", "ProcessGroup._gathered"): "",
    ("bigq.solver.hessian", "upper_cholesky_shared_"): "factor",
    ("bigq.solver.scaling", "InputStatistics.reduce"): "scale",
    ("bigq.sched.solve.fold", "agreed"): "scale",
    ("bigq.sched.solve.expert_scales", "agreed"): "scale",
}
#: Inputs from which on factors are shared in ``rank_processes.start``.
SMALL = 1


def count_exchanges(folder: Path) -> None:
    """Write down what this process receives from others, as torch.distributed sees it. Called before its command line runs."""
    importlib.import_module("bigq.sched.plan.costs.ranks").SHARED_FROM = SMALL  # type: ignore[attr-defined]
    distributed: Any = importlib.import_module("torch.distributed")
    phases: list[str] = []
    counted: dict[str, dict[str, int | None]] = {}

    def mark(module: str, name: str, phase: str) -> None:
        *path, last = name.split(".")
        owner: Any = functools.reduce(getattr, path, importlib.import_module(module))
        real = getattr(owner, last)

        def marked(*given: object) -> object:
            phases.append(phase)
            try:
                return real(*given)
            finally:
                phases.pop()

        setattr(owner, last, marked)

    def count(name: str, received: Callable[[Any, Any], int]) -> None:
        real = getattr(distributed, name)

        def counting(output: Any, mine: Any, *sizes: Any) -> object:
            if phases[-1]:
                of_phase: Any = counted.setdefault(phases[0], {"received_bytes": 0, "operations": 0, "seconds": None})
                of_phase["received_bytes"] += received(output, mine)
                of_phase["operations"] += 1
                (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(counted))
            return real(output, mine, *sizes)

        setattr(distributed, name, counting)

    for place, phase in PHASES.items():
        mark(*place, phase)
    count("all_to_all_single", lambda output, mine: output.nbytes * (COUNT - 1) // COUNT)  # as much from each of them
    count("all_gather", lambda parts, mine: sum(part.nbytes for part in parts) - mine.nbytes)


def words(model: Path, ids: Path, *more: str) -> list[str]:
    return [str(model), "--calibration", str(ids), "--device", "cpu", *more]


def run_both(folder: Path, model: Path, ids: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plan of ``bigq plan --ranks 2``, and of the job itself."""
    assert main(["plan", *words(model, ids, *more), "--ranks", str(COUNT), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    source, *options = words(model, ids, *more)
    job = start(
        COUNT, ["quantize", source, folder / "out", *options, "--json"], folder / "logs", prepare=functools.partial(count_exchanges, folder)
    )
    assert job.ended() == [0] * COUNT, job.texts
    return planned, plan_in(job.texts[0].splitlines())


def plan_in(events: Sequence[str]) -> dict[str, Any]:
    """The plan among the events of a job."""
    found: dict[str, Any] = next(event["plan"] for line in events if (event := json.loads(line)).get("event") == "plan")
    return found


CASES = {
    "the shipped model": (None, ["--samples", "8", "--seqlen", "64"]),
    "an odd number of rows": (None, ["--samples", "5", "--seqlen", "64", "--skip", ".*down_proj", "--rule", ".*(q|k|v|qkv)_proj:bits=8"]),
    "two models": ("llama", ["--samples", "8", "--seqlen", "24", "--group-size", "32", "--method", "gptaq", "--lm-head"]),
    "experts": ("mixtral", ["--samples", "8", "--seqlen", "24", "--group-size", "32", "--experts-at-once", "3"]),
    "scaled inputs": ("llama", ["--samples", "8", "--seqlen", "64", "--group-size", "32", "--method", "awq", "--format", "awq"]),
    "scales inside experts": ("mixtral", ["--samples", "8", "--seqlen", "64", "--group-size", "32", "--method", "awq"]),
    "all solve all": ("llama", ["--samples", "8", "--seqlen", "24", "--group-size", "64", "--format", "bnb-nf4"]),
}


LONG = ("an odd number of rows", "all solve all")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long) if case in LONG else case for case in CASES])
def test_the_bytes_and_operations_of_a_plan_are_those_of_its_job(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, for the process that receives most; and all that the two plans choose is the same."""
    monkeypatch.setattr("bigq.sched.plan.costs.ranks.SHARED_FROM", SMALL)
    monkeypatch.setattr("bigq.machine.ranks.BAND_ROWS", 24)
    family, options = CASES[case]
    model = ROOT / "bigq/assets/tiny-llama" if family is None else make_checkpoint(tmp_path / "m", family, num_hidden_layers=2)
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(8, 64))
    planned, own = run_both(tmp_path, model, ids, capsys, *options)
    counted = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(COUNT)]
    most, expected = max(counted, key=lambda one: one["hessian"]["received_bytes"]), copy.deepcopy(planned["ranks"]["traffic"])
    if case == "scales inside experts":  # how many tokens are sampled follows from the routing
        assert most["scale"].pop("received_bytes") == pytest.approx(expected["scale"].pop("received_bytes"), rel=0.3)
    assert most == expected
    assert family == "mixtral" or counted[0] == counted[1], "uneven shares of experts are not padded"
    for name in ("count", "hosts", "rows", "traffic", "received_bytes", "operations", "reads", "links"):
        assert own["ranks"][name] == planned["ranks"][name]
    for name in ("rows", "batch", "experts_at_once", "activations", "memo", "kept_rows", "written_bytes", "disk_bytes"):
        assert own[name] == planned[name], name


@pytest.mark.long
def test_the_peak_of_a_process_is_within_a_tenth_of_its_plan(child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first, which packs and writes, on a model whose Hessians take more than the libraries; and the job's plan is bigq plan's."""
    import test_memory

    monkeypatch.setattr(test_memory, "HIDDEN", 1024)
    monkeypatch.setattr(test_memory, "INNER", 4096)
    model = random_llama(tmp_path / "model", 1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(8, 512))
    options = ["--samples", "8", "--seqlen", "512"]
    source, *more = words(model, ids, *options)
    command = [sys.executable, "-m", "bigq", "quantize", source, str(tmp_path / "out"), *more, "--json"]
    # Not forked ones, which hold no pages of libraries before they use them.
    environments = [os.environ | place | {"OMP_NUM_THREADS": "1"} for place in places(COUNT)]
    job = [subprocess.Popen(command, env=each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for each in environments]
    (told, events), _ = [process.communicate(timeout=LIMIT) for process in job]
    assert [process.returncode for process in job] == [0] * COUNT, events
    report, own = json.loads(told), plan_in(events.splitlines())
    assert report["host_peak_bytes"] == pytest.approx(report["planned_host_bytes"], rel=0.1)
    assert report["planned_host_bytes"] == own["host_bytes"]
    done = child("-m", "bigq", "plan", *words(model, ids, *options), "--ranks", str(COUNT), "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned["host_bytes"] == pytest.approx(own["host_bytes"], rel=0.05)
