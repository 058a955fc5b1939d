"""Options of a job that have no effect, and what a job says first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Child

from bigq.cli.commands import COMMANDS, build_parser
from bigq.cli.job import idle_options, job_config
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.scheme import QuantScheme

IDLE_WITH_RTN = "--damping --calibration --samples --seqlen --seed --batch --activations --checkpoint-every"


def notes(line: str, device: str = "cpu", before: JobConfig | None = None) -> list[str]:
    args = build_parser().parse_args(line.split())
    settings = None if before is None else json.loads(json.dumps(before.frozen()))
    return idle_options(args, job_config(args, settings), device)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", []),
        ("--bits 3 --scales search --order activation --damping 0.1 --samples 8", []),
        ("--method gptaq --alpha 0.7", []),
        ("--rule x:scales=search", []),
        ("--method rtn", []),
        ("--method rtn --scales search", []),
        ("--method rtn --order activation", ["--order: no effect with --method rtn"]),
        ("--method rtn --order natural", ["--order: no effect with --method rtn"]),
        (
            "--method rtn --damping 0.1 --calibration c4 --samples 8 --seqlen 9 --seed 1 --batch 2 --activations host --checkpoint-every 0",
            [
                f"{flag}: no effect with --method rtn"
                for flag in IDLE_WITH_RTN.split()
            ],
        ),
        ("--vram 8GiB", ["--vram: no effect on a CPU"]),
        (
            "--method rtn --no-true-sequential --vram 8GiB",
            ["--no-true-sequential: no effect with --method rtn", "--vram: no effect on a CPU"],
        ),
    ],
)  # fmt: skip
def test_options_without_effect_are_noted(options: str, said: list[str]) -> None:
    assert notes(f"quantize M O {options}") == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--alpha 0.7", "--alpha 0.7: no effect without --method gptaq; add that, or leave out --alpha"),
        ("--method rtn --alpha 0.7", "--alpha 0.7: no effect without --method gptaq; add that, or leave out --alpha"),
    ],
)
def test_options_that_ask_for_another_job_are_refused(options: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as caught:
        notes(f"quantize M O {options}")
    assert str(caught.value) == said
    for command in ("quantize", "plan"):
        assert main([command, str(tmp_path), str(tmp_path / "out"), *options.split()]) == 2
        assert capsys.readouterr().err == f"bigq: error: {said}\n", "before anything is read"


def test_a_gpu_uses_its_budget() -> None:
    assert notes("quantize M O --vram 8GiB", "cuda") == [] and notes("quantize M O --vram 8GiB", "") == []


def test_what_the_resumed_job_has_counts() -> None:
    """Its method is not typed again."""
    assert notes("quantize M O --alpha 0.5", before=JobConfig(method="gptaq")) == []
    assert notes("quantize M O --alpha 0.3", before=JobConfig(method="gptaq")) == []
    assert notes("quantize M O", before=JobConfig(method="rtn", scheme=QuantScheme(order="activation"))) == [], "only what was typed"
    assert notes("quantize M O --samples 8", before=JobConfig(method="rtn")) == ["--samples: no effect with --method rtn"]


def test_a_plan_for_another_gpu() -> None:
    assert notes("plan M --on h100 --vram 8GiB", "cuda") == []
    assert notes("plan M --on h100 --device cpu", "cuda") == ["--device: no effect with --on h100"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_note_is_a_line_or_an_event(as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(tmp_path), "--method", "rtn", "--samples", "3", "--device", "cpu", "--vram", "1GiB"]
    assert main([*command, *["--json"] * as_json]) == 3, "there is no model"
    lines = capsys.readouterr().err.splitlines()
    if as_json:
        events = [json.loads(line) for line in lines]
        assert [event["event"] for event in events] == ["reading", "note", "note", "error"]
        assert events[0]["model"] == str(tmp_path) and events[0]["v"] == 1
        assert [event["message"] for event in events[1:3]] == ["--samples: no effect with --method rtn", "--vram: no effect on a CPU"]
    else:
        assert lines[:3] == [
            f"reading {tmp_path} …",
            "note: --samples: no effect with --method rtn",
            "note: --vram: no effect on a CPU",
        ]


def test_quiet_has_no_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path), "--method", "rtn", "--samples", "3", "--device", "cpu", "--quiet"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("bigq: error: ") and error.count("\n") == 1


# The first line.

#: Imports that take seconds are announced on stderr; here each says when it begins.
WATCHED = """
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "huggingface_hub"):
            print("import", name, file=sys.stderr, flush=True)

sys.meta_path.insert(0, Watch())
from bigq.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ("quantize MODEL OUT", "reading MODEL …"),
        ("quantize MODEL OUT --json", '"event": "reading"'),
        ("plan MODEL", "reading MODEL …"),
        ("plan MODEL OUT --json", '"event": "reading"'),
        ("eval MODEL --data builtin", "reading MODEL …"),
        ("generate MODEL --prompt x", "reading MODEL …"),
        ("convert MODEL OUT --to gptq_v2", "reading MODEL …"),
    ],
)
def test_the_first_line_comes_before_torch_is_imported(command: str, first: str, tmp_path: Path) -> None:
    """The child is ended when it has said enough: what follows takes seconds."""
    words = [str(tmp_path / word.lower()) if word in ("MODEL", "OUT") else word for word in command.split()]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", WATCHED, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env
    ) as run:
        assert run.stderr is not None
        lines = [run.stderr.readline() for _ in range(2)]
        run.kill()
    assert first.replace("MODEL", str(tmp_path / "model")) in lines[0], lines
    assert lines[1].startswith("import "), lines


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_needs_no_torch(command: str, child: Child) -> None:
    program = "import sys\nfrom bigq.cli.main import main\ntry: main(sys.argv[1:])\n"
    program += "except SystemExit as e: print(e.code, sorted({'torch', 'transformers', 'numpy', 'tqdm'} & set(sys.modules)))"
    done = child("-c", program, *command.split(), "--help")
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr


def test_the_general_help_needs_no_options(child: Child) -> None:
    """Declarations cost milliseconds, of which ``bigq --help`` has few."""
    program = "import sys\nfrom bigq.cli.main import main\ntry: main(['--help'])\n"
    program += "except SystemExit: print([name for name in ('dataclasses', 'bigq.config') if name in sys.modules])"
    assert child("-c", program).stdout.splitlines()[-1] == "[]"
