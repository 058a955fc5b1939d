"""Files for schedulers (scripts/slurm, scripts/k8s, scripts/sky.yaml), with stand-ins for srun, scontrol and bigq.

scripts/slurm_check.py runs them on an emulated Slurm; its results are in docs/results/slurm.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from bigq import errors

SLURM = ROOT / "scripts/slurm"
FILES = ("one", "array", "multinode")
TABLE = """# MODEL OUT OPTIONS

  # more
/m/a /o/a --bits 4
/m/b   /o/b   --skip '.*\\.o_proj' --rule "a b" $HOME *
"""
#: Codes that come again however often a job is started.
FINAL = (errors.UsageError.exit_code, errors.DataError.exit_code, errors.ResourceError.exit_code)

BIGQ = """#!/bin/sh
printf '%s\\n' "$@" > "$SEEN/bigq"
env > "$SEEN/environment"
exit $CODE
"""
SRUN = """#!/bin/sh
printf '%s\\n' "$@" > "$SEEN/srun"
while case $1 in -*) true;; *) false;; esac; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf 'n7\\nn8\\n'; else echo "$@" > "$SEEN/requeue"; exit 1; fi
"""


class Run:
    """What a script did. words: what bigq was called with."""

    def __init__(self, script: list[str], seen: Path, environment: dict[str, str]) -> None:
        seen.mkdir()
        for name, text in (("bigq", BIGQ), ("srun", SRUN), ("scontrol", SCONTROL)):
            (seen / "bin").mkdir(exist_ok=True)
            (seen / "bin" / name).write_text(text)
            (seen / "bin" / name).chmod(0o755)
        base = {"PATH": f"{seen / 'bin'}:{os.environ['PATH']}", "SEEN": str(seen), "HOME": "/h"}
        done = subprocess.run(script, env={**base, **environment}, capture_output=True, text=True, check=False, cwd=seen)
        self.seen, self.code, self.told = seen, done.returncode, done.stderr

    def lines(self, name: str) -> list[str]:
        path = self.seen / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def words(self) -> list[str]:
        return self.lines("bigq")

    @property
    def requeued(self) -> bool:
        return (self.seen / "requeue").exists()


def submitted(file: str, seen: Path, *arguments: object, **environment: object) -> Run:
    """Run a file as Slurm does, with what Slurm sets."""
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_CPUS_PER_TASK": "6", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_NODELIST": "n[7-8]", "CODE": "0"}
    values = {name: str(value) for name, value in environment.items()}
    return Run(["bash", str(SLURM / f"{file}.sbatch"), *map(str, arguments)], seen, {**slurm, **values})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.txt"
    path.write_text(TABLE)
    return path


def arguments(file: str, table: Path) -> list[object]:
    return [table] if file == "array" else ["/m", "/o"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("code", [0, 1, *FINAL, errors.Stopped.exit_code, 130, 137])
def test_only_a_job_that_can_be_resumed_goes_back_to_the_queue(file: str, code: int, table: Path, tmp_path: Path) -> None:
    made = submitted(file, tmp_path / "seen", *arguments(file, table), CODE=code)
    assert (made.code, made.requeued) == (code, code == 75), made.told
    assert not made.requeued or made.lines("requeue") == ["requeue 12345"]


@pytest.mark.parametrize("file", FILES)
def test_a_job_does_not_come_back_for_ever(file: str, table: Path, tmp_path: Path) -> None:
    assert submitted(file, tmp_path / "a", *arguments(file, table), CODE=75, SLURM_RESTART_COUNT=99).requeued
    assert not submitted(file, tmp_path / "b", *arguments(file, table), CODE=75, SLURM_RESTART_COUNT=100).requeued


@pytest.mark.parametrize("file", ["one", "multinode"])
def test_arguments_and_environment_say_the_same(file: str, tmp_path: Path) -> None:
    expected = ["quantize", "/m x", "/o", "--grace", "100", "--bits", "3"]
    assert submitted(file, tmp_path / "a", "/m x", "/o", "--bits", "3").words == expected
    named = submitted(file, tmp_path / "b", "--bits", "3", MODEL="/m x", OUT="/o")
    assert named.words == expected
    assert "OMP_NUM_THREADS=6" in named.lines("environment") and "--cpus-per-task=6" in named.lines("srun")
    without = submitted(file, tmp_path / "c")
    assert without.code == 2 and "usage: sbatch" in without.told and not without.words and not without.requeued


def test_each_line_of_a_table_is_a_job_and_nothing_in_it_is_expanded(table: Path, tmp_path: Path) -> None:
    first = submitted("array", tmp_path / "a", table, "--samples", "8", SLURM_ARRAY_TASK_ID=1)
    assert first.words == ["quantize", "--grace", "100", "--samples", "8", "/m/a", "/o/a", "--bits", "4"]
    second = submitted("array", tmp_path / "b", TABLE=table)
    assert second.words == ["quantize", "--grace", "100", "/m/b", "/o/b", "--skip", r".*\.o_proj", "--rule", "a b", "$HOME", "*"]
    third = submitted("array", tmp_path / "c", table, SLURM_ARRAY_TASK_ID=3)
    assert third.code == 2 and "job 3 has no line MODEL OUT OPTIONS" in third.told and not third.words


def test_processes_of_several_nodes_know_where_to_meet(tmp_path: Path) -> None:
    def port(seen: str, restarts: int) -> int:
        made = submitted("multinode", tmp_path / seen, "/m", "/o", SLURM_RESTART_COUNT=restarts, INTERFACE="ib0")
        found = dict(line.split("=", 1) for line in made.lines("environment") if "=" in line)
        assert found["MASTER_ADDR"] == "n7" and found["GLOO_SOCKET_IFNAME"] == found["NCCL_SOCKET_IFNAME"] == "ib0"
        assert "--kill-on-bad-exit=0" in made.lines("srun")
        return int(found["MASTER_PORT"])

    ports = [port("a", 0), port("b", 1)]
    assert len(set(ports)) == 2 and all(10000 <= number < 30000 for number in ports)


def directives(file: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (SLURM / f"{file}.sbatch").read_text(), re.MULTILINE))


@pytest.mark.parametrize("file", FILES)
def test_the_signal_reaches_the_program_in_time(file: str) -> None:
    found = directives(file)
    assert "requeue" in found and found["open-mode"] == "append"
    name, _, seconds = found["signal"].partition("@")
    (grace,) = re.findall(r"\$\{GRACE:-(\d+)\}", (SLURM / f"{file}.sbatch").read_text())
    assert name == "TERM" and int(grace) < int(seconds)


def kubernetes() -> dict[str, dict[str, Any]]:
    return {part["kind"]: part for part in yaml.safe_load_all((ROOT / "scripts/k8s/job.yaml").read_text())}


def test_a_pod_runs_the_line_with_its_number(tmp_path: Path, table: Path) -> None:
    parts = kubernetes()
    pod = parts["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    script = [*container["command"], *container["args"]]
    made = Run(script, tmp_path / "seen", {"TABLE": str(table), "JOB_COMPLETION_INDEX": "1", "CODE": "75"})
    assert made.code == 75 and made.words[:5] == ["quantize", "--grace", "100", "/m/b", "/o/b"] and made.words[-1] == "*"
    lines = [line for line in parts["ConfigMap"]["data"]["table.txt"].splitlines() if not line.startswith("#")]
    assert len(lines) == parts["Job"]["spec"]["completions"]
    assert pod["terminationGracePeriodSeconds"] > 100 and pod["restartPolicy"] == "Never"


def test_pods_and_managed_jobs_continue_after_the_same_codes() -> None:
    rules = kubernetes()["Job"]["spec"]["podFailurePolicy"]["rules"]
    actions = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])}
    assert actions == {**dict.fromkeys(FINAL, "FailIndex"), 75: "Ignore"}
    assert {"type": "DisruptionTarget", "status": "True"} in [each for rule in rules for each in rule.get("onPodConditions", [])]
    task = yaml.safe_load((ROOT / "scripts/sky.yaml").read_text())
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75], "max_restarts_on_errors": 0}
    assert "--grace 100 $OPTIONS" in task["run"]


RESULT = json.loads((ROOT / "docs/results/slurm.json").read_text(encoding="utf-8"))


def test_the_committed_result_holds_every_scenario_and_all_outputs_are_equal() -> None:
    found = RESULT["scenarios"]
    assert len(found) == 13 and "local changes" not in RESULT["revision"]
    assert all(each.get("equal", True) and each.get("as_expected", True) for each in found.values())
    assert sum(each.get("equal", False) for each in found.values()) == 11
    assert {name for name, each in found.items() if each["requeued"] == 0} == {"one_wrong", "one_cancelled", "torchrun_asked"}
    assert set(RESULT["schemas"]) == {"scripts/k8s/job.yaml", "scripts/sky.yaml"}


def test_the_page_about_clusters_shows_the_committed_result() -> None:
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    for each in RESULT["scenarios"].values():
        seconds = f"{each['seconds_until_it_went_on']:.0f}" if "equal" in each else "–"
        assert f"| {each['what']} | {each['requeued']} | {seconds} | {'yes' if 'equal' in each else '–'} |\n" in page
