"""The second session on a GPU: what it chooses after a crafted first one, and that it keeps the first one's results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Child

sys.path.append(str(ROOT / "scripts"))

import gpu_session
from gpu_steps.aims import AIMS, Aim, as_finding, missed
from gpu_steps.benchmarks import aims_of
from gpu_steps.runner import DEBUG, LONG, PROFILE, Step
from gpu_steps.second import VALUE, ceilings_of, choose, next_stem, read_earlier
from gpu_steps.slices import SLICES, fragmentation, steady_seconds
from gpu_steps.slices import aims_of as aims_of_slice

BOXES = {step.name: step.seconds for step in (*gpu_session.STEPS, *gpu_session.OPTIONAL)}
MACHINE = {"status": "passed", "found": {"ceilings": {"bf16_tflops": 1.0}, "machine": {"device": "H"}, "tools": []}}
MISSED = as_finding([Aim(name="share of time spent waiting", value=0.2, high=0.05)])


def first(**steps: dict[str, Any]) -> dict[str, Any]:
    """A session whose steps passed in 30 s each, but for those given; ``gpu_tests`` is gpu-tests."""
    passed = {name: {"status": "passed", "seconds": 30, "failures": [], "found": {}} for name in VALUE}
    return {"sources": "s", "steps": {"machine": MACHINE} | passed | {name.replace("_", "-"): step for name, step in steps.items()}}


def names(chosen: list[Step]) -> list[str]:
    return [step.name for step in chosen]


def test_what_was_not_brought_to_an_end_comes_before_missed_aims() -> None:
    earlier = first(
        kernels={"status": "failed", "seconds": 30, "failures": ["syrk"], "found": {}},
        gpu_tests={"status": "cut off", "seconds": 100, "failures": [], "found": {}},
        llama={"status": "passed", "seconds": 60, "failures": [], "found": {AIMS: MISSED}},
        large={"status": "not run", "reason": "no time left"},
    )
    chosen, left_out = choose(earlier, BOXES, "other", 340)
    assert names(chosen) == ["kernels", "gpu-tests", "shards", "large", "llama"]
    of = {step.name: step for step in chosen}
    assert "failed (1 findings)" in of["kernels"].reason and of["kernels"].seconds == 50 and of["kernels"].mode == ""
    assert "cut off after 100 s" in of["gpu-tests"].reason and of["gpu-tests"].seconds == BOXES["gpu-tests"]
    assert of["large"].reason == "was not run"
    assert of["llama"].mode == PROFILE and "share of time spent waiting" in of["llama"].reason
    assert set(left_out) <= {"bloom"}


def test_a_step_that_failed_with_the_same_sources_runs_with_blocking_launches() -> None:
    failure = {"status": "failed", "seconds": 10, "failures": ["x: tests/a.py::test_b", "y"], "found": {}}
    for sources, mode in (("s", DEBUG), ("other", "")):
        step = next(step for step in choose(first(gpu_tests=failure), BOXES, sources, 280)[0] if step.name == "gpu-tests")
        assert step.mode == mode and step.focus == ("tests/a.py::test_b",)


def test_a_step_that_was_running_when_the_session_was_killed_is_not_finished_and_one_that_never_began_neither() -> None:
    earlier = first(jobs={"status": "running", "seconds": 170, "failures": [], "found": {}})
    del earlier["steps"]["large"]
    of = {step.name: step for step in choose(earlier, BOXES, "s", 500)[0]}
    assert of["jobs"].seconds == 1.5 * 170 and of["large"].reason == "was not run"


def test_what_is_not_possible_is_not_tried_again() -> None:
    chosen, left_out = choose(first(gpu_tests={"status": "not run", "found": {"not possible": "no pytest"}}), BOXES, "s", 280)
    assert "gpu-tests" not in names(chosen) and "no pytest" in left_out["gpu-tests"]


def test_short_time_goes_to_the_best_evidence_and_says_what_is_left_out() -> None:
    lost = {"status": "not run"}
    earlier = first(bloom=lost, deepseek=lost, llama=lost, qwen3=lost, benchmarks=lost, large=lost)
    chosen, left_out = choose(earlier, BOXES, "s", BOXES["bloom"] + 50)
    assert names(chosen) == ["shards", "bloom"] and set(left_out) >= {"deepseek", "llama", "qwen3", "benchmarks"}
    assert all("no time left" in reason for reason in left_out.values())


def test_layers_with_experts_come_with_their_inputs_and_are_profiled_if_they_are_slow() -> None:
    slow = as_finding([Aim(name="seconds of the median layer", value=20, high=12)])
    earlier = first(
        deepseek={"status": "passed", "seconds": 80, "failures": [], "found": {AIMS: slow}},
        qwen3={"status": "cut off", "seconds": 70, "failures": [], "found": {}},
    )
    chosen, _ = choose(earlier, BOXES, "s", 280)
    assert names(chosen) == ["shards", "qwen3", "deepseek"]
    of = {step.name: step for step in chosen}
    assert of["deepseek"].mode == PROFILE and "seconds of the median layer" in of["deepseek"].reason
    assert of["qwen3"].seconds == 1.5 * 70 and of["qwen3"].mode == ""


def test_missed_benchmarks_are_profiled_and_no_others() -> None:
    rows = [Aim(name="syrk: rate", value=0.5, low=0.7), Aim(name="matvec: rate", value=0.9, low=0.8), Aim(name="syrk: n", value=0, low=1)]
    earlier = first(benchmarks={"status": "passed", "seconds": 60, "failures": [], "found": {AIMS: as_finding(rows)}})
    (step,) = [step for step in choose(earlier, BOXES, "s", 280)[0] if step.name == "benchmarks"]
    assert step.mode == PROFILE and step.focus == ("syrk",)


def test_if_all_is_well_the_sanitizer_and_a_long_slice_run() -> None:
    earlier = first()
    earlier["steps"]["machine"] = {**MACHINE, "found": {**MACHINE["found"], "tools": ["compute-sanitizer"]}}
    chosen, _ = choose(earlier, BOXES, "s", 600)
    assert names(chosen) == ["shards", "sanitizer", "bloom"] and chosen[-1].mode == LONG


def test_ceilings_are_taken_over_on_the_same_device_only() -> None:
    assert ceilings_of(first(), "H") == {"ceilings": {"bf16_tflops": 1.0}, "machine": {"device": "H"}}
    assert ceilings_of(first(), "another") is None and ceilings_of({"steps": {}}, "H") is None


def test_the_last_session_that_ran_a_step_counts_and_numbers_go_on(tmp_path: Path) -> None:
    for name, status in (("results.json", "failed"), ("results-2.json", "passed"), ("results-10.json", "cut off")):
        step = "jobs" if name == "results-2.json" else "large"
        (tmp_path / name).write_text(json.dumps({"sources": name, "steps": {step: {"status": status}}}))
    found = read_earlier(tmp_path)
    assert found["steps"] == {"large": {"status": "cut off"}, "jobs": {"status": "passed"}} and found["sources"] == "results-10.json"
    assert next_stem(tmp_path) == "results-3"
    for content in ("{", "[]", '{"steps": 1}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match="holds no results"):
            read_earlier(tmp_path)
    with pytest.raises(ValueError, match="holds no results"):
        read_earlier(tmp_path / "nothing")


def test_aims_by_hand() -> None:
    step = {"found": {AIMS: as_finding([Aim(name="a", value=1, low=0.9, high=1.1), Aim(name="b", value=float("nan"), high=1)])}}
    assert missed(step) == ["b"] and step["found"][AIMS]["a"] == {"value": 1, "aim": "≥ 0.9, ≤ 1.1", "met": True}
    linears = {"4096 × 4096": {"factor_s": 0.01, "solve_s": 0.03}, "14336 × 57344": {"error": 1}}
    found = {aim.name: aim for aim in aims_of({"ceilings": {"bf16_tflops": 800}, "syrk": {"8192": {"tflops": 600}}, "linears": linears})}
    assert found["syrk: rate over bf16 product's, n = 8192"].row["met"]
    assert not found["linears: factor + solve of 4096 × 4096, seconds"].row["met"] and len(found) == 2


def test_figures_of_a_slice_by_hand() -> None:
    blocks = [{"seconds": float(s)} for s in (20, 25, 40, 52, 57, 63)]
    assert steady_seconds(blocks, 2) == 5.0 and steady_seconds(blocks[:1], 2) is None
    allocator = {"reserved_bytes.all.peak": 10, "allocated_bytes.all.peak": 8, "inactive_split_bytes.all.peak": 1}
    assert fragmentation(allocator) == {"reserved beyond allocated": pytest.approx(0.2), "in unused parts": 0.1} and fragmentation({}) == {}
    result = {"once_s": 60, "extrapolated": {"x": 14.0}, "waiting_share": 0.1, "planned": {"device": 100}, "peaks": {"device_bytes": 80}}
    rows = as_finding(aims_of_slice(SLICES["bloom"], result, 6.0))
    assert [row["met"] for row in rows.values()] == [True, True, False, False]
    assert [row["value"] for row in rows.values()] == [14.0, pytest.approx(8.0), 0.1, 0.8]


@pytest.mark.long
def test_a_second_session_chooses_says_why_and_keeps_the_first_ones_results(child: Child, tmp_path: Path) -> None:
    machine = {"status": "passed", "found": {"ceilings": {"bf16_tflops": 1.0}, "machine": {"revision": "r"}, "tools": []}}
    earlier = first(
        machine=machine,
        large={"status": "not run", "reason": "no time left"},
        benchmarks={"status": "passed", "seconds": 9, "found": {AIMS: as_finding([Aim(name="syrk: rate", value=0, low=1)])}},
        llama={"status": "passed", "seconds": 9, "found": {AIMS: MISSED}},
    )
    text = json.dumps(earlier)
    (tmp_path / "results.json").write_text(text)
    script = ROOT / "scripts/gpu_session.py"
    done = child(script, "--smoke", "--out", tmp_path, "--second", "--limit", "340", env={"OMP_NUM_THREADS": "1"}, timeout=400)
    result = json.loads((tmp_path / "results-2.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr + json.dumps(result)[-3000:]
    assert set(result["steps"]) == {"large", "benchmarks", "llama", "shards"} and (tmp_path / "results.json").read_text() == text
    assert {one["name"]: one["reason"] for one in result["chosen"]}["large"] == "was not run"
    assert result["steps"]["benchmarks"]["found"]["syrk: kernels"]["total"][1] > 0
    assert result["steps"]["llama"]["found"]["ceilings"] == {"bf16_tflops": 1.0}
    assert result["steps"]["llama"]["found"]["kernels_of_one_block"]["operations"]
    markdown = (tmp_path / "results-2.md").read_text()
    assert "- large: was not run" in markdown and "- llama, profile: missed its aims" in markdown and "## Aims" in markdown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs-2.txt.gz", "results-2.json", "results-2.md", "results.json"]


def test_without_first_results_a_second_session_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["--second"], "run without --second first"), (["--second", "--only", "jobs"], "leave out --only")):
        with pytest.raises(SystemExit) as exit:
            gpu_session.parse(["--out", str(tmp_path), "--smoke", *arguments])
        assert exit.value.code == 2 and words in capsys.readouterr().err
