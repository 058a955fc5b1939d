"""Settings in YAML files: they mean what the command line means, round trips, and what YAML would silently read as something else."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigq.batch.settings import LISTS, job_options, read_settings
from bigq.cli.commands import build_parser
from bigq.cli.job import job_config
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.io.yaml_file import MAX_BYTES, Scalar, read_yaml, write_scalar


def parsed(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["quantize", *words])


def said_by(args: argparse.Namespace) -> dict[str, object]:
    """All that a command line and its file say of a job."""
    names = ["model", "out", "exit_code_on_stop", *LISTS.values(), *(each.name for each in job_options() if each.flag)]
    return {name: getattr(args, name) for name in names}


def from_file(path: Path, text: str, *words: str) -> argparse.Namespace:
    path.write_text(text, encoding="utf-8")
    return parsed(*words, "--config", str(path))


def refused(path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The error about a file, without the place of the file."""
    path.write_text(text, encoding="utf-8")
    assert main(["quantize", "M", "O", "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"bigq quantize: error: {path}: "), err
    return err.removeprefix(f"bigq quantize: error: {path}: ").removesuffix("\n")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "job.yaml"


def test_a_file_gives_the_job_of_the_command_line(file: Path) -> None:
    text = """
model: some/model
out: out/x
bits: 3
sym: false
damping: .05
group-size: -1
lm-head: true
vram: 72GiB
checkpoint-every: never
rule: "a.*:bits=8,sym=true"
skip: [b, 'c\\d+']
calibration: c4:0.7,ultrachat:0.3
exit-code-on-stop: 99
"""
    words = "some/model out/x --bits 3 --asym --damping 0.05 --group-size -1 --lm-head --vram 72GiB --checkpoint-every never "
    words += r"--rule a.*:bits=8,sym=true --skip b --skip c\d+ --calibration c4:0.7,ultrachat:0.3 --exit-code-on-stop 99"
    ours, theirs = from_file(file, text), parsed(*words.split())
    assert job_config(ours) == job_config(theirs)
    assert said_by(ours) == said_by(theirs)


def test_the_command_line_comes_first(file: Path) -> None:
    text = "{model: m, out: o, bits: 3, sym: true, skip: [x], rule: ['a:bits=8'], quiet: true}"
    args = from_file(file, text, "M2", "--bits", "2", "--asym", "--skip", "y")
    config = job_config(args)
    assert (args.model, args.out, args.quiet) == ("M2", "o", True)
    assert (config.scheme.bits, config.scheme.symmetric, [rule.pattern for rule in config.rules]) == (2, False, ["y", "a"])


@pytest.mark.parametrize("words", ["M O --bits 3", "--bits 3 M O", "M --bits 3 O", "--bits 3 -- M O"])
def test_places_may_stand_anywhere(words: str) -> None:
    args = parsed(*words.split())
    assert (args.model, args.out, args.bits) == ("M", "O", 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # Names.
        ("bitz: 4", "line 1: bitz: unknown option; did you mean bits?"),
        ("bits: 4\ngroup_size: 64", "line 2: group_size: unknown option; did you mean group-size?"),
        ("colour: red", "line 1: colour: unknown option; see bigq quantize --help"),
        ("bits: 4\n\nbits: 3", "line 3: bits is there twice; the first one is on line 1"),
        ("asym: true", "line 1: asym: is no name here; write sym: false"),
        ("no-lm-head: true", "line 1: no-lm-head: is no name here; write lm-head: false"),
        ("<<: {bits: 4}", "line 1: <<: unknown option; see bigq quantize --help"),
        ("jobs: []", "is a file of several jobs; run bigq batch {}"),
        # What YAML 1.1 takes for a switch.
        *((f"lm-head: {word}", f"line 1: lm-head: must be true or false, not {word}") for word in ("no", "yes", "on", "Off", "y", "1")),
        ("lm-head: 'true'", "line 1: lm-head: must be true or false, not 'true'"),
        # What YAML 1.1 takes for other numbers: 8, 1000, 90, 16.
        ("samples: 010", "line 1: samples: 010 may mean an octal number; write it without the zeros in front"),
        ("checkpoint-every: 060", "line 1: checkpoint-every: 060 may mean an octal number; write it without the zeros in front"),
        ("samples: 1_000", "line 1: samples: 1_000 must be a number of digits only"),
        ("samples: 1:30", "line 1: samples 1:30: must be a whole number"),
        ("samples: 0x10", "line 1: samples 0x10: must be a whole number"),
        ("samples: 0o10", "line 1: samples 0o10: must be a whole number"),
        ("samples: '128'", "line 1: samples: must be a number, not '128', which is a text"),
        ("samples: 3.0", "line 1: samples 3.0: must be a whole number"),
        ("samples: \u0663", "line 1: samples: \u0663 must be a number of digits only"),
        ("damping: .nan", "line 1: damping .nan: must be a number"),
        ("damping: nan", "line 1: damping nan: must lie between 0 and 1"),
        ("alpha: 2", "line 1: alpha 2: must be between 0 and 1"),
        ("bits: true", "line 1: bits true: must be a whole number"),
        ("bits: 5", "line 1: bits 5: must be one of 2, 3, 4, 8"),
        ("vram: 72", "line 1: vram 72: give a unit, such as 72GiB"),
        ("format: gptqv2", "did you mean gptq_v2?"),
        ("exit-code-on-stop: 4", "line 1: exit-code-on-stop 4: must be from 6 to 125, since other codes have a meaning"),
        # Other kinds of values.
        ("bits: [4]", "line 1: bits: must be one value, not a list"),
        ("bits: {a: 4}", "line 1: bits: must be one value, not a mapping"),
        ("skip: [[a]]", "line 1: skip: must be one value, not a list"),
        ("bits:", "line 1: bits: has no value"),
        ("calibration: ~", "line 1: calibration: has no value"),
        ("calibration: |\n  c4\n", "line 1: calibration: must be on one line"),
        ("rule: 'a:bitz=3'", "line 1: rule 'a:bitz=3': 'bitz=3' is not key=value"),
        ("skip: '('", "line 1: '(' is not a regular expression"),
        ("push: no", "line 1: push no: must be owner/name, a repository on the hub"),
        # Files.
        ("", "is empty"),
        ("- bits", "must hold names with values, such as bits: 4"),
        ("bits: 4\n---\nbits: 3", "line 2: is not YAML: but found another document"),
        ("bits: [4", "line 1: is not YAML: "),
        ("\tbits: 4", "line 1: is not YAML: "),
        ("bits: !!int 4", "line 1: tags such as tag:yaml.org,2002:int are not read"),
        ("bits: !!python/object/apply:os.system [id]", "line 1: tags such as tag:yaml.org,2002:python/object/apply:os.system are not read"),
        ("a: &a [*a]", "line 1: is nested too deeply"),
        ("[" * 5000, "is nested too deeply"),
        ("bits: *nowhere", "line 1: is not YAML: found undefined alias 'nowhere'"),
        ("? [a]\n: 4", "line 1: a name must be a text"),
        ("bits: \"\\UFFFFFFFF\"", "is not YAML: "),
        ("bits: 4\x00", "is not YAML: "),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)  # fmt: skip
def test_what_is_refused(text: str, said: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said.replace("{}", str(file)) in refused(file, text, capsys)


def test_aliases_cost_nothing(file: Path) -> None:
    """Each level names the one below ten times: 10^9 values, if they were copied."""
    levels = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8))]
    file.write_text("\n".join(levels))
    assert read_yaml(file) is not None


def test_texts_stay_what_the_file_holds(file: Path) -> None:
    """Where a text is expected, YAML's other readings of it do not count."""
    file.write_text("{model: 3.10, out: no, calibration: 2024-01-01, text-field: 010, trace: 1_000}")
    found = read_settings(file)
    assert (found.model, found.out) == ("3.10", "no")
    assert found.values == {"calibration": "2024-01-01", "text_field": "010", "trace": "1_000"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "cannot be read: No such file or directory"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: os.mkfifo(path), "is not a regular file"),
        (lambda path: path.write_bytes(b"bits: 4\n\nout: \xff"), "line 3: is not UTF-8"),
        (lambda path: path.write_bytes(b"#" * (MAX_BYTES + 1)), f"has more than {MAX_BYTES} bytes"),
    ],
    ids=["missing", "folder", "pipe", "latin", "large"],
)
def test_files_that_cannot_be_read(make: object, said: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(file)  # type: ignore[operator]
    assert main(["quantize", "M", "O", "--config", str(file)]) == 2
    assert capsys.readouterr().err == f"bigq quantize: error: {file}: {said}\n"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\udc80\x7f\x85\u2028\ufeff:#'\"\\ -"))))
def test_any_text_is_written_so_that_it_is_read_again(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(write_scalar(text).encode())
    found = read_yaml(path)
    assert isinstance(found, Scalar) and found.text == text and found.quoted


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>'\"%@`#,?~<= \n\t\\Ux0\x00\ufeff\x85")))
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode())
    said = f"{path}: "
    try:
        read_yaml(path)
    except UsageError as error:
        said = str(error)
    assert said.startswith(f"{path}: ") and "\n" not in said


PRINTED = [
    "",
    "--quality best --bits 3",
    "--quality fast --order natural",
    "--method rtn --scales minmax --group-size -1",
    "--method gptaq --alpha 0.3 --tune-steps 4",
    "--bits 4 --samples 128",
    "--format fp8",
    "--asym --lm-head --no-true-sequential --rotate",
    "--vram 72GiB --ram 3.5g --checkpoint-every never --grace 1e-3 --trace t.json --fetch-cache 1GB",
    r"--skip .*\.k_proj --rule a:bits=8,sym=false --rule 'b c:damping=1e-3' --skip no",
    "--calibration texts/*.txt --text-field null --push o/n --push-drop --quiet --steal-lock --exit-code-on-stop 99",
]


@pytest.mark.parametrize("options", PRINTED)
def test_a_printed_file_makes_the_same_job(options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = "my model", str(tmp_path / "o#ut: \u202e'x'")
    words = [*shlex.split(options), model, out]
    assert main(["quantize", *words, "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert not Path(out).exists(), "it makes nothing"
    before, after = parsed(*words), parsed("--config", str(printed))
    assert (after.model, after.out) == (model, out)
    assert job_config(after) == job_config(before)
    assert said_by(after) == said_by(before)
    assert main(["quantize", "--config", str(printed), "--print-config"]) == 0
    assert capsys.readouterr().out == printed.read_text()


def test_the_comments_of_a_printed_file_are_settings_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without #, each default gives the job of nobody's options."""
    assert main(["quantize", "M", str(tmp_path / "out"), "--print-config"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    bare = [line.removeprefix("# ") for line in lines if ": " in line and ":  #" not in line and not line.endswith(":")]
    assert len(bare) > 20
    args = from_file(tmp_path / "bare.yaml", "\n".join(bare))
    assert job_config(args) == JobConfig()


def test_a_printed_file_holds_what_out_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that are not given come from the job in OUT; in another folder the file makes the same one."""
    from bigq.cli import job

    words = r"M O --bits 3 --asym --samples 9 --method rtn --skip a\d --rule b:bits=8 --format gptq_v2"
    was = job_config(parsed(*words.split()))
    frozen = json.loads(json.dumps(was.frozen()))
    monkeypatch.setattr(job, "_settings_before", lambda out: frozen)
    assert main(["quantize", "M", "O", "--print-config", "--samples", "7"]) == 0
    args = from_file(tmp_path / "p.yaml", capsys.readouterr().out)
    found = job_config(args)
    assert (found.samples, found.scheme, found.rules, found.method, found.format) == (7, was.scheme, was.rules, "rtn", "gptq_v2")


def test_a_plan_reads_the_file_too(file: Path) -> None:
    file.write_text("{model: m, bits: 3, grace: 5}")
    args = build_parser().parse_args(["plan", "--config", str(file)])
    assert (args.model, args.out, args.bits) == ("m", None, 3)


def test_values_print_as_they_were_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "M", "O", "--vram", "72GiB", "--text-field", "no", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert '\nvram: "72GiB"\n' in printed and '\ntext-field: "no"\n' in printed and "\n# sym: true\n" in printed
