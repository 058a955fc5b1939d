"""One exit code for each kind of absence, in every command that can meet it. The codes are those of ``bigq.errors``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from models import SEQLEN

import bigq
from bigq import errors
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.io.folders import STATE_FOLDER
from bigq.job.owner import Owner
from bigq.scheme import QuantScheme

USAGE, DATA, ENVIRONMENT, BUSY = 2, 3, 4, 5


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def job(model: Path, ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job, in a folder of its own, for a report lies beside it."""
    out = tmp_path_factory.mktemp("job") / "out"
    config = JobConfig(
        scheme=QuantScheme(group_size=32), format="gptq_v2", calibration=str(ids_file), samples=4, seqlen=SEQLEN, device="cpu", quiet=True
    )
    bigq.quantize(str(model), out, config)
    return out


@pytest.fixture
def exit_code(model: Path, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str]]:
    """Run a command line; MODEL, JOB, NEW and NOWHERE stand for a model, a finished job, an empty folder and a path that is not there."""
    (tmp_path / "new").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    places = {"MODEL": model, "JOB": job, "NEW": tmp_path / "new", "NOWHERE": tmp_path / "nowhere", "FULL": tmp_path / "full"}

    def run(line: str) -> tuple[int, str]:
        words = [re.sub("|".join(places), lambda match: str(places[match[0]]), word) for word in line.split()]
        capsys.readouterr()
        code = main(words)
        lines = capsys.readouterr().err.splitlines()
        assert code == 0 or lines[-1].startswith("bigq: error: "), lines
        return code, lines[-1] if lines else ""

    return run


ABSENT = [
    # A model.
    (DATA, "quantize NOWHERE NEW --device cpu", "nowhere: no such folder"),
    (DATA, "plan NOWHERE --device cpu", "nowhere: no such folder"),
    (DATA, "eval NOWHERE --data builtin --device cpu", "nowhere: no such folder"),
    (DATA, "eval MODEL --data builtin --baseline NOWHERE --device cpu", "nowhere: no such folder"),
    (DATA, "generate NOWHERE --prompt x --device cpu", "nowhere: no such folder"),
    (DATA, "convert NOWHERE NEW --to gptq", "nowhere: no such folder"),
    # What a folder needs to be a model.
    (DATA, "quantize FULL NEW --device cpu", "config.json"),
    (DATA, "plan FULL --device cpu", "config.json"),
    (DATA, "eval FULL --data builtin --device cpu", "config.json"),
    (DATA, "generate FULL --prompt x --device cpu", "config.json"),
    (DATA, "convert FULL NEW --to gptq", "config.json"),
    # A text.
    (DATA, "quantize MODEL NEW --device cpu --group-size 32 --calibration NOWHERE", "nowhere"),
    (DATA, "eval MODEL --device cpu --data NOWHERE", "nowhere"),
    # A job.
    (USAGE, "verify NOWHERE", "nowhere: holds no job"),
    (USAGE, "status NOWHERE", "nowhere: holds no job"),
    (USAGE, "report NOWHERE", "nowhere: holds no job"),
    (USAGE, "report NOWHERE --model-card", "nowhere: holds no job"),
    (USAGE, "verify FULL", "full: holds no job"),
    (USAGE, "status FULL", "full: holds no job"),
    (USAGE, "report FULL", "full: holds no job"),
    # A place for the output.
    (USAGE, "quantize MODEL FULL --device cpu", "not empty"),
    (USAGE, "convert JOB FULL --to gptq", "not empty"),
    (USAGE, "quantize MODEL NEW --device cpu --trace NOWHERE/t.json", "folder does not exist"),
    (USAGE, "report JOB --out NOWHERE/report.html", "folder does not exist"),
    (USAGE, "convert JOB NOWHERE/deep/m.gguf --to gguf", "nowhere"),
    (USAGE, "demo --out FULL --device cpu", "full"),
    # A device.
    (ENVIRONMENT, "quantize MODEL NEW --device cuda:99", "cuda:99"),
    (ENVIRONMENT, "plan MODEL --device cuda:99 --group-size 32", "cuda:99"),
    (ENVIRONMENT, "eval MODEL --data builtin --device cuda:99", "cuda:99"),
    (ENVIRONMENT, "generate MODEL --prompt x --device cuda:99", "cuda:99"),
]


@pytest.mark.parametrize(("code", "line", "said"), ABSENT, ids=[line for _, line, _ in ABSENT])
def test_what_is_missing(code: int, line: str, said: str, exit_code: Callable[[str], tuple[int, str]]) -> None:
    found, message = exit_code(line)
    assert found == code and said in message, message


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("gguf", "quantize MODEL NEW --format gguf --device cpu --group-size 32"),
        ("gguf", "convert JOB NEW/m.gguf --to gguf"),
        ("matplotlib", "report JOB"),
    ],
)
def test_a_missing_package(package: str, line: str, exit_code: Callable[[str], tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    found, message = exit_code(line)
    extra = "report" if package == "matplotlib" else package
    assert found == ENVIRONMENT and re.search(rf"pip install '?bigq\[{extra}\]", message), message


@pytest.mark.parametrize("line", ["quantize MODEL JOB --device cpu", "report JOB --model-card"])
def test_a_folder_in_use(line: str, job: Path, exit_code: Callable[[str], tuple[int, str]]) -> None:
    owner = Owner(job / STATE_FOLDER, dict, steal=False, say=lambda text: None)
    try:
        found, message = exit_code(line)
    finally:
        owner.release("finished", {})
    assert found == BUSY and "another bigq job is writing to this folder" in message, message


def test_a_plan_that_does_not_fit(exit_code: Callable[[str], tuple[int, str]], capsys: pytest.CaptureFixture[str], model: Path) -> None:
    assert exit_code("plan MODEL --device cpu --group-size 32 --ram 300GiB --disk 100GiB") == (0, f"reading {model} …")
    found, message = exit_code("plan MODEL --device cpu --group-size 32 --ram 1MiB")
    assert found == ENVIRONMENT and "the job does not fit: " in message
    assert main(["plan", str(model), "--device", "cpu", "--group-size", "32", "--ram", "1MiB"]) == ENVIRONMENT
    assert "short" in capsys.readouterr().out, "the plan is printed first"


def test_the_table_of_codes_is_that_of_the_classes() -> None:
    text = errors.__doc__ or ""
    listed = {int(code) for code in re.findall(r"^    (\d+) ", text.partition("Exit codes")[2], re.MULTILINE)}
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BigqError)]
    assert {kind.exit_code for kind in classes} - {1} <= listed == {0, 2, 3, 4, 5, 75, 130, 141}
    for kind in classes:
        assert kind.__name__ in text
        shown = re.search(rf"{kind.__name__} +(\d+) ", text)
        assert shown is None or int(shown[1]) == kind.exit_code
