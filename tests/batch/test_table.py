"""Files of jobs: what they hold, and what is refused before any job begins."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from bigq.batch.table import read_batch
from bigq.cli.commands import build_parser
from bigq.cli.job import job_config
from bigq.cli.main import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two folders that look like models."""
    for name in ("m1", "m2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_jobs_and_a_matrix(folder: Path) -> None:
    (folder / "b.yaml").write_text("""
defaults: {model: m1, samples: 8, skip: [x], device: cpu}
jobs:
  - {out: o/a, bits: 3}
  - {out: -b, model: m2, skip: [y, z], samples: 9, steal-lock: false, sym: false}
matrix:
  models: [m1, owner/m3@v1]
  settings:
    w4: {bits: 4}
    w3: {bits: 3, rule: ["a:bits=8"]}
  out: o/{model}-{settings}
""")
    jobs = read_batch(folder / "b.yaml")
    assert [(job.index, job.model, job.out) for job in jobs] == [
        (0, "m1", "o/a"),
        (1, "m2", "-b"),
        (2, "m1", "o/m1-w4"),
        (3, "m1", "o/m1-w3"),
        (4, "owner/m3@v1", "o/m3@v1-w4"),
        (5, "owner/m3@v1", "o/m3@v1-w3"),
    ]
    args = build_parser().parse_args(jobs[1].words())
    assert (args.model, args.out, args.steal_lock) == ("m2", "-b", None)
    config = job_config(args)
    assert (config.samples, config.scheme.symmetric, [rule.pattern for rule in config.rules]) == (9, False, ["y", "z"])
    config = job_config(build_parser().parse_args(jobs[5].words()))
    assert (config.samples, config.scheme.bits, [rule.pattern for rule in config.rules]) == (8, 3, ["x", "a"])


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        # The file.
        ("bits: 4", 2, "b.yaml: holds no jobs; write them under jobs: or matrix:, or run bigq quantize --config b.yaml"),
        ("jobs: []", 2, "b.yaml: holds no jobs"),
        ("jobs: 3", 2, "b.yaml: line 1: jobs must be a list"),
        ("jobs: [3]", 2, "b.yaml: line 1: a job must hold names with values"),
        ("jobs: [{model: m1, out: o}]\ndefault: {}", 2, "b.yaml: line 2: default: must be one of defaults, jobs, matrix; did"),
        ("defaults: {out: o}\njobs: [{model: m1}]", 2, "b.yaml: line 1: out: unknown option"),
        ("jobs:\n- out: o", 2, "b.yaml: line 2: model is missing"),
        ("jobs:\n- model: m1", 2, "b.yaml: line 2: out is missing"),
        ("jobs:\n- model: m1\n  out: o\n  bitz: 3", 2, "b.yaml: line 4: bitz: unknown option; did you mean bits?"),
        ("jobs:\n- {model: m1, out: p, exit-code-on-stop: 99}", 2, "b.yaml: line 2: exit-code-on-stop: unknown option"),
        # Options that do not go together.
        ("jobs:\n- {model: m1, out: o}\n- {model: m1, out: p, alpha: 0.3}", 2, "b.yaml: line 3: --alpha 0.3: no effect without"),
        ("jobs: [{model: m1, out: o, push-drop: true}]", 2, "b.yaml: line 1: --push-drop: no effect without --push"),
        # Folders.
        ("jobs:\n- {model: m1, out: o}\n- {model: m2, out: ./x/../o/}", 2, "b.yaml: line 3: out: ./x/../o/ is the folder of"),
        ("jobs:\n- {model: m1, out: o/p/q}\n- {model: m2, out: o}", 2, "b.yaml: line 2: out: o/p/q lies in that of the job on line 3"),
        ("jobs:\n- {model: m1, out: o}\n- {model: m2, out: m1/x}", 2, "b.yaml: line 3: out: m1/x lies in the model of the job on line 2"),
        ("jobs:\n- {model: m1, out: m2}\n- {model: m2, out: o}", 2, "b.yaml: line 3: model: m2 is or lies in the out of the job on line 2"),
        ("jobs:\n- {model: m1, out: full}", 2, "b.yaml: line 2: full: OUT is not empty and holds no bigq job"),
        # Models.
        ("jobs:\n- {model: m1, out: o}\n- {model: ./m9, out: p}", 3, "b.yaml: line 3: ./m9: no such folder"),
        ("jobs:\n- {model: m1, out: o}\n- {model: full, out: p}", 3, "b.yaml: line 3: full/config.json: missing"),
        ("jobs:\n- {model: a/b/c, out: o}", 3, "b.yaml: line 2: a/b/c: no such folder"),
        ("jobs:\n- {model: owner/name, out: o}", 4, "b.yaml: line 2: owner/name: no such folder, and the hub cannot be reached"),
        # A matrix.
        ("matrix: {models: [m1], settings: {a: {}}}", 2, "b.yaml: line 1: matrix: out is missing"),
        ("matrix: {models: [m1], settings: {a: {}}, out: 'o', x: 1}", 2, "b.yaml: line 1: x: must be one of models, settings, out"),
        ("matrix: {models: [m1], settings: {a: {}}, out: 'o{name}'}", 2, "b.yaml: line 1: out: {name} stands for nothing; use {model}"),
        ("matrix: {models: [m1, m2], settings: {a: {}}, out: 'o'}", 2, "b.yaml: line 1: out: o is the folder of the job on line 1 too"),
        ("matrix: {models: [[m1]], settings: {a: {}}, out: 'o'}", 2, "b.yaml: line 1: a model must be one name"),
        ("matrix:\n  models: [m1]\n  settings:\n    a: {bitz: 3}\n  out: o", 2, "b.yaml: line 4: bitz: unknown option"),
        ("matrix:\n  models: [m1]\n  settings:\n    a: {out: x}\n  out: o", 2, "b.yaml: line 4: out: unknown option"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)  # fmt: skip
def test_what_is_refused(text: str, code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "full").mkdir()
    (folder / "full" / "letter.txt").write_text("dear")
    (folder / "b.yaml").write_text(text)
    assert main(["batch", "b.yaml"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"bigq: error: {said}"), err
    assert sorted(path.name for path in folder.iterdir()) == ["b.yaml", "full", "m1", "m2"], "nothing was begun"


@pytest.mark.parametrize(
    ("index", "variables", "said"),
    [
        ("2", {}, "--index 2: b.yaml has the jobs 0 to 1"),
        ("-1", {}, "--index -1: b.yaml has the jobs 0 to 1"),
        ("x", {}, "--index x: b.yaml has the jobs 0 to 1"),
        ("auto", {}, "--index auto: neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set; give a number"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "7"}, "--index auto: SLURM_ARRAY_TASK_ID=7: b.yaml has the jobs 0 to 1"),
        ("auto", {"JOB_COMPLETION_INDEX": "9"}, "--index auto: JOB_COMPLETION_INDEX=9: b.yaml has the jobs 0 to 1"),
    ],
)
def test_an_index_that_is_none(
    index: str, variables: dict[str, str], said: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (folder / "b.yaml").write_text("jobs: [{model: m1, out: a}, {model: m1, out: b}]")
    assert main(["batch", "b.yaml", f"--index={index}"]) == 2
    assert said in capsys.readouterr().err


def test_of_other_jobs_only_folders_are_looked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task of an array does not ask the hub for the models of all tasks."""
    (folder / "b.yaml").write_text("jobs: [{model: owner/name, out: a}, {model: ./m9, out: b}, {model: m1, out: c}]")
    assert main(["batch", "b.yaml", "--index", "2"]) == 3
    assert "./m9: no such folder" in capsys.readouterr().err


def test_a_file_of_jobs_that_have_not_begun(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "b.yaml").write_text("jobs: [{model: m1, out: a}, {model: owner/name, out: b}]")
    assert main(["status", "b.yaml"]) == 0
    assert capsys.readouterr().out == "b.yaml: 2 waiting\n    0  waiting   a\n    1  waiting   b\n".replace("waiting   ", "waiting     ")
    assert main(["status", "b.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"waiting": 2} and found["jobs"][1] == {
        "index": 1, "model": "owner/name", "out": "b", "state": "waiting", "message": None, "status": None,
    }  # fmt: skip


def test_a_page_is_for_files_of_jobs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "b.yaml").write_text("jobs: [{model: m1, out: a}]")
    for words, said in (
        (["a", "--html", "x.html"], "--html x.html: a is no file of jobs; run bigq report a"),
        (["b.yaml", "--html", "b.yaml"], "--html b.yaml: is the file of jobs itself; name another"),
        (["b.yaml", "--html", "a/x.html"], "--html a/x.html: its folder does not exist"),
        (["b.yaml", "--html", "m1"], "--html m1: is a folder; name a file, such as m1/report.html"),
    ):
        assert main(["status", *words]) == 2
        assert capsys.readouterr().err.startswith(f"bigq: error: {said}")


def test_the_examples_of_the_page_are_read(tmp_path: Path) -> None:
    one, many = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/batch.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "one.yaml").write_text(one)
    (tmp_path / "many.yaml").write_text(many)
    args = build_parser().parse_args(["quantize", "--config", str(tmp_path / "one.yaml")])
    config = job_config(args)
    assert (args.out, config.scheme.bits, config.checkpoint_every, len(config.rules)) == ("out/llama-3bit", 3, None, 2)
    outs = [job.out for job in read_batch(tmp_path / "many.yaml")]
    assert outs == ["out/mistral", "out/mistral-best", *(f"out/Qwen3-{size}-{name}" for size in ("8B", "14B") for name in ("w4", "w3"))]
