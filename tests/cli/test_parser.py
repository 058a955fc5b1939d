"""Errors of a command line: one line that says what is wrong and what was probably meant."""

from __future__ import annotations

import json

import pytest

from bigq.cli.commands import COMMANDS
from bigq.cli.main import main
from bigq.vocabulary import FORMAT_NAMES


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", f"bigq: error: give a command: {', '.join(COMMANDS)}; see bigq --help"),
        ("frobnicate", "bigq: error: frobnicate: unknown command; see bigq --help"),
        ("quantise M O", "bigq: error: quantise: unknown command; did you mean quantize?"),
        ("--verson", "bigq: error: --verson: unknown option; did you mean --version?"),
        ("quantize", "bigq quantize: error: missing: MODEL, OUT; see bigq quantize --help"),
        ("quantize M", "bigq quantize: error: missing: OUT; see bigq quantize --help"),
        ("eval M", "bigq eval: error: missing: --data; see bigq eval --help"),
        ("quantize M O P", "bigq quantize: error: unexpected: P; see bigq quantize --help"),
        ("quantize M O --groupsize 64", "bigq quantize: error: --groupsize: unknown option; did you mean --group-size?"),
        ("quantize --groupsize=64 M", "bigq quantize: error: --groupsize: unknown option; did you mean --group-size?"),
        ("plan M --bit 3", "bigq plan: error: --bit: unknown option; did you mean --bits?"),
        ("plan M --grace 3", "bigq plan: error: --grace: unknown option; see bigq plan --help"),
        ("quantize M O --colour", "bigq quantize: error: --colour: unknown option; see bigq quantize --help"),
        ("status O -v", "bigq status: error: -v: unknown option; see bigq status --help"),
        ("quantize M O --bits", "bigq quantize: error: --bits: needs a value; see bigq quantize --help"),
        ("quantize M O --quiet=yes", "bigq quantize: error: --quiet: takes no value; see bigq quantize --help"),
        ("quantize M O --bits 5", "bigq quantize: error: --bits 5: must be one of 2, 3, 4, 8"),
        ("quantize M O --bits four", "bigq quantize: error: --bits four: must be a whole number"),
        ("quantize M O --group-size 12", "bigq quantize: error: --group-size 12: must be -1 or a positive multiple of 8"),
        ("quantize M O --damping much", "bigq quantize: error: --damping much: must be a number"),
        (
            "quantize M O --format gptqv2",
            f"bigq quantize: error: --format gptqv2: must be one of {', '.join(FORMAT_NAMES)}; did you mean gptq_v2?",
        ),
        ("convert M O --to exl2", f"bigq convert: error: --to exl2: must be one of {', '.join(FORMAT_NAMES)}"),
        ("quantize M O --vram 72", "bigq quantize: error: --vram 72: give a unit, such as 72GiB"),
        ("quantize M O --ram lots", "bigq quantize: error: --ram lots: is not a size; write for instance 72GiB or 80GB"),
        ("quantize M O --sym --asym", "bigq quantize: error: --sym and --asym: contradict each other; give one of them"),
        ("quantize M O --no-lm-head --lm-head", "bigq quantize: error: --no-lm-head and --lm-head: contradict each other; give one of them"),  # noqa: E501
        ("quantize M O --scales mse", "bigq quantize: error: --scales mse: must be one of minmax, search"),
        ("generate M --prompt -x", "bigq generate: error: --prompt -x: a value that begins with a dash is written --prompt=-x"),
    ],
)  # fmt: skip
def test_one_line(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert capsys.readouterr() == ("", said + "\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_asks_for_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--no-such-option"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bigq {command}: error: --no-such-option: unknown option") and error.count("\n") == 1


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_an_error_is_an_event_where_events_were_asked_for(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "M", "O", "--json", "--groupsize", "3"]) == 2
    event = json.loads(capsys.readouterr().err)
    assert (event["event"], event["exit_code"], event["kind"]) == ("error", 2, "UsageError")
    assert event["message"] == "--groupsize: unknown option; did you mean --group-size?"


def test_the_same_value_twice_is_no_contradiction(capsys: pytest.CaptureFixture[str]) -> None:
    from bigq.cli.commands import build_parser

    args = build_parser().parse_args(["quantize", "M", "O", "--asym", "--no-sym", "--bits", "3", "--bits", "4"])
    assert (args.symmetric, args.bits) == (False, 4)


def test_values_that_look_like_options() -> None:
    from bigq.cli.commands import build_parser

    args = build_parser().parse_args(["generate", "M", "--prompt", "- a list", "--seed", "3"])
    assert args.prompt == "- a list"
    assert build_parser().parse_args(["generate", "M", "--prompt=--x"]).prompt == "--x"
    assert build_parser().parse_args(["generate", "M", "--prompt", "-"]).prompt == "-"
    assert build_parser().parse_args(["quantize", "M", "O", "--group-size", "-1"]).group_size == -1
    assert build_parser().parse_args(["status", "--", "-out"]).out == "-out"
