"""The command line: help, parsing into configs, and results on stdout with nothing else there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Child
from models import SEQLEN, random_ids, reference_model, save_ids, word_tokenizer

import bigq
from bigq.cli.commands import build_parser, subparser
from bigq.cli.job import job_config
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import BigqError, CheckpointError, ResourceError, UsageError
from bigq.infer.evaluate import EvalConfig
from bigq.options import table
from bigq.progress.terminal import HEAD, TAIL, one_line
from bigq.scheme import QuantScheme, Rule


def parsed(*arguments: str, before: JobConfig | None = None) -> JobConfig:
    settings = None if before is None else json.loads(json.dumps(before.frozen()))
    return job_config(build_parser().parse_args(["quantize", "MODEL", "OUT", *arguments]), settings)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ([], "quantize plan eval generate verify status demo --version"),
        (
            ["quantize"],
            "--bits --group-size --sym --no-sym --asym --order --damping --scales --method --lm-head --no-lm-head "
            "--true-sequential --no-true-sequential --rule --skip --format --scale-bits "
            "--on-nonfinite --calibration --samples --seqlen --seed --vram --ram "
            "--disk --activations --read-ahead --checkpoint-every --batch --experts-at-once --device --dtype --trust-remote-code "
            "--no-trust-remote-code "
            "--quiet --grace --steal-lock --trace --json",
        ),
        (["plan"], "--on --json --bits --order --on-nonfinite --vram --checkpoint-every --batch --device"),
        (["eval"], "--data --baseline --seqlen --samples --json --batch --device --dtype --trust-remote-code --quiet"),
        (
            ["generate"],
            "--prompt --chat --max-new-tokens --temperature --top-p --seed --device --dtype --trust-remote-code --quiet",
        ),
        (["verify"], "OUT"),
        (["status"], "OUT --json"),
        (["demo"], "--out --device"),
    ],
    ids=["bigq", "quantize", "plan", "eval", "generate", "verify", "status", "demo"],
)
def test_help_names_every_flag(command: list[str], flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    output = capsys.readouterr()
    assert output.err == ""
    for flag in flags.split():
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", output.out), flag


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"bigq {bigq.__version__}\n"


def test_version_of_the_module_is_quick_and_needs_no_torch(child: Child) -> None:
    program = "import atexit, sys, runpy; sys.argv = ['bigq', '--version']; atexit.register(lambda: print('torch' in sys.modules))\n"
    program += "runpy.run_module('bigq', run_name='__main__')"
    done = child("-c", program)
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"bigq {bigq.__version__}", "False"]), done.stderr


@pytest.mark.parametrize("arguments", [[], ["quantize"], ["quantize", "MODEL"], ["eval", "MODEL"], ["frobnicate"]], ids=" ".join)
def test_incomplete_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and re.fullmatch(r"bigq( \w+)?: error: .*; see bigq( \w+)? --help\n", output.err)


def test_defaults_are_those_of_the_api() -> None:
    assert parsed() == JobConfig()


def flags_of(command: str) -> dict[str, argparse.Action]:
    """The flags of a subcommand by what they set, those first that have a default in their help."""
    found: dict[str, argparse.Action] = {}
    for action in subparser(build_parser(), command).filled()._actions:
        if action.option_strings:
            found.setdefault(action.dest, action)
    return found


@pytest.mark.parametrize(
    ("command", "configs"),
    [("quantize", [JobConfig(), QuantScheme()]), ("plan", [JobConfig(), QuantScheme()]), ("eval", [EvalConfig()])],
    ids=["quantize", "plan", "eval"],
)
def test_defaults_in_the_help_are_those_of_the_api(command: str, configs: list[Any]) -> None:
    """And the parser itself has none, so that what was not given can be told from what was."""
    flags, shown = flags_of(command), 0
    for config in configs:
        for field in dataclasses.fields(config):
            default = getattr(config, field.name)
            if field.name in flags and field.name not in ("data", "rules", "trace"):
                action = flags[field.name]
                assert action.default is None, field.name
                found = re.search(r" \(default: (.*)\)$", action.help or "")
                words = {"on": True, "off": False}
                assert found is not None, field.name
                if default is None:
                    assert found[1] == table(type(config))[field.name].unset != "", f"{field.name}: what happens without it is said"
                else:
                    value = words[found[1]] if isinstance(default, bool) else type(default)(found[1])
                    assert value == default, field.name
                    shown += 1
            elif command == "quantize" and field.name not in flags:
                assert field.name in ("scheme", "min_zero", "points", "scale_form", "chosen_rules"), "every other field has an option"
    assert shown > 3
    assert all(flags[name].default is None for name in ("rules", "skip", "trace") if name in flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--bits 3", {"scheme": QuantScheme(bits=3)}),
        ("--group-size 64", {"scheme": QuantScheme(group_size=64)}),
        ("--group-size -1", {"scheme": QuantScheme(group_size=-1)}),
        ("--sym", {}),
        ("--asym", {"scheme": QuantScheme(symmetric=False)}),
        ("--no-sym", {"scheme": QuantScheme(symmetric=False)}),
        ("--order group", {}),
        ("--order activation", {"scheme": QuantScheme(order="activation")}),
        ("--order natural", {"scheme": QuantScheme(order="natural")}),
        ("--scales search", {}),
        ("--quality balanced", {}),
        ("--quality fast", {"scheme": QuantScheme(order="activation", scales="minmax", sweeps=0)}),
        ("--quality best", {"method": "gptaq", "scheme": QuantScheme(sweeps=4)}),
        ("--quality best --method gptq --order natural", {"scheme": QuantScheme(order="natural", sweeps=4)}),
        ("--order natural --quality fast", {"scheme": QuantScheme(order="natural", scales="minmax", sweeps=0)}),
        ("--sweeps 7", {"scheme": QuantScheme(sweeps=7)}),
        ("--no-trust-remote-code", {}),
        ("--damping 0.05", {"scheme": QuantScheme(damping=0.05)}),
        ("--scales minmax", {"scheme": QuantScheme(scales="minmax")}),
        ("--scale-bits 8", {"scheme": QuantScheme(scale_bits=8)}),
        ("--method rtn", {"method": "rtn"}),
        ("--no-true-sequential", {"true_sequential": False}),
        ("--true-sequential", {}),
        ("--lm-head", {"lm_head": True}),
        ("--format gptq_v2", {"format": "gptq_v2"}),
        ("--calibration my.txt", {"calibration": "my.txt"}),
        ("--samples 12", {"samples": 12}),
        ("--seqlen 34", {"seqlen": 34}),
        ("--seed 56", {"seed": 56}),
        ("--batch 7", {"batch": 7}),
        ("--experts-at-once 3", {"experts_at_once": 3}),
        ("--device cuda:1", {"device": "cuda:1"}),
        ("--dtype bfloat16", {"dtype": "bfloat16"}),
        ("--trust-remote-code", {"trust_remote_code": True}),
        ("--quiet", {"quiet": True}),
        ("--on-nonfinite skip", {"on_nonfinite": "skip"}),
        ("--vram 2GiB --ram 3GB --disk 5kB", {"vram": 2 * 2**30, "ram": 3 * 10**9, "disk": 5000}),
        ("--checkpoint-every 0", {"checkpoint_every": 0.0}),
        ("--checkpoint-every 2.5", {"checkpoint_every": 2.5}),
        ("--checkpoint-every never", {"checkpoint_every": None}),
        ("--grace 5", {"grace": 5.0}),
        ("--steal-lock", {"steal_lock": True}),
        ("--trace t.json", {"trace": "t.json"}),
        ("--skip .*k_proj", {"rules": (Rule(".*k_proj", None),)}),
        ("--rule a.b:bits=8,group_size=32", {"rules": (Rule("a.b", {"bits": 8, "group_size": 32}),)}),
        (
            "--rule x:sym=false,order=activation,damping=0.5,scales=search",
            {"rules": (Rule("x", {"sym": False, "order": "activation", "damping": 0.5, "scales": "search"}),)},
        ),
        ("--rule (?:a|b):bits=2", {"rules": (Rule("(?:a|b)", {"bits": 2}),)}),
        ("--rule a:bits=2 --skip b --rule c:bits=3", {"rules": (Rule("b", None), Rule("a", {"bits": 2}), Rule("c", {"bits": 3}))}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flags_become_settings(flags: str, expected: dict[str, Any]) -> None:
    """Each flag sets what it says and nothing else."""
    assert parsed(*flags.split()) == JobConfig(**expected)


@pytest.mark.parametrize("rule", ["", "a", "a:", ":bits=4", "a:bits", "a:bits=x", "a:nothing=1", "a:sym=1", "[:bits=4"])
def test_bad_rules(rule: str) -> None:
    with pytest.raises(UsageError):
        parsed("--rule", rule)


@pytest.mark.parametrize("value", ["often", "-1", "nan", "inf", ""])
def test_checkpoint_every_is_seconds_or_never(value: str) -> None:
    with pytest.raises(UsageError, match="--checkpoint-every"):
        parsed(f"--checkpoint-every={value}")


# What is not given is as before.

BEFORE = JobConfig(
    scheme=QuantScheme(bits=3, group_size=32, symmetric=False, order="activation", damping=0.5, scales="search"),
    rules=(Rule("a", None), Rule("b", {"bits": 8}), Rule("c", None)),
    method="rtn",
    format="gptq_v2",
    true_sequential=False,
    calibration="builtin",
    samples=7,
    seqlen=40,
    seed=3,
    batch=2,
    dtype="float16",
    trust_remote_code=True,
    on_nonfinite="skip",
)


def test_nothing_given_is_everything_as_before() -> None:
    assert parsed(before=BEFORE) == BEFORE


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("--group-size 64", {"scheme": dataclasses.replace(BEFORE.scheme, group_size=64)}),
        ("--bits 4", {"scheme": dataclasses.replace(BEFORE.scheme, bits=4)}),
        ("--damping 0.01", {"scheme": dataclasses.replace(BEFORE.scheme, damping=0.01)}),
        ("--sym", {"scheme": dataclasses.replace(BEFORE.scheme, symmetric=True)}),
        ("--asym", {}),
        ("--no-sym", {}),
        ("--order natural", {"scheme": dataclasses.replace(BEFORE.scheme, order="natural")}),
        ("--scales minmax", {"scheme": dataclasses.replace(BEFORE.scheme, scales="minmax")}),
        ("--method gptq", {"method": "gptq"}),
        ("--quality best", {"method": "gptaq", "scheme": dataclasses.replace(BEFORE.scheme, order="group", sweeps=4)}),
        ("--format gptq", {"format": "gptq"}),
        ("--true-sequential", {"true_sequential": True}),
        ("--calibration c4", {"calibration": "c4"}),
        ("--samples 128", {"samples": 128}),
        ("--seqlen 2048", {"seqlen": 2048}),
        ("--seed 0", {"seed": 0}),
        ("--batch 8", {"batch": 8}),
        ("--dtype auto", {"dtype": "auto"}),
        ("--no-trust-remote-code", {"trust_remote_code": False}),
        ("--on-nonfinite stop", {"on_nonfinite": "stop"}),
        ("--skip x", {"rules": (Rule("x", None), Rule("b", {"bits": 8}))}),
        ("--rule x:bits=2 --rule y:bits=3", {"rules": (Rule("a", None), Rule("c", None), Rule("x", {"bits": 2}), Rule("y", {"bits": 3}))}),
        ("--rule x:bits=2 --skip y", {"rules": (Rule("y", None), Rule("x", {"bits": 2}))}),
        ("--device cpu --quiet --ram 1GiB", {"device": "cpu", "quiet": True, "ram": 2**30}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_given_changes_that_and_nothing_else(flags: str, changes: dict[str, Any]) -> None:
    """Defaults, too, can be asked for."""
    assert parsed(*flags.split(), before=BEFORE) == dataclasses.replace(BEFORE, **changes)


@pytest.mark.long
def test_a_job_in_natural_order_keeps_it(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    """Although act-order is the default: the order is decided when a job begins."""
    given = ["--calibration", str(ids_file), "--samples", "4", "--seqlen", "8", "--group-size", "32", "--device", "cpu", "--quiet"]
    job = ["quantize", str(checkpoint("llama")), str(tmp_path / "out"), *given]
    assert main([*job, "--order", "natural"]) == 0
    shards = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    next((tmp_path / "out").glob("model-00002-*")).unlink()
    assert main(job) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")} == shards
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["static_groups"] is False
    with pytest.raises(UsageError, match="--order natural"):
        bigq.quantize(
            checkpoint("llama"),
            tmp_path / "out",
            JobConfig(scheme=QuantScheme(group_size=32), calibration=str(ids_file), samples=4, seqlen=8, device="cpu"),
        )


def test_settings_that_make_no_sense_are_told_with_the_folder() -> None:
    args = build_parser().parse_args(["quantize", "MODEL", "some/OUT"])
    with pytest.raises(CheckpointError, match=r"^some/OUT: its job\.json: settings\.scheme is missing"):
        job_config(args, {})


# bigq eval.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ids(tmp_path_factory.mktemp("data") / "ids.safetensors", random_ids(5, seed=7))


@pytest.fixture(scope="module")
def quantized(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    scheme = QuantScheme(group_size=32, bits=3)
    config = JobConfig(scheme=scheme, calibration=str(ids_file), samples=16, seqlen=SEQLEN, quiet=True)
    bigq.quantize(str(checkpoint("llama")), out, config)
    return out


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, float]:
    """What ``bigq eval … --json`` prints: exactly one JSON object on stdout."""
    capsys.readouterr()
    assert main(["eval", *map(str, arguments), "--seqlen", str(SEQLEN), "--device", "cpu", "--json"]) == 0
    output = capsys.readouterr().out
    assert output.endswith("}\n") and output.count("\n") == 1
    value: dict[str, float] = json.loads(output)
    return value


def plain_perplexity(model: Path, ids: torch.Tensor) -> float:
    """By transformers' own loss, row by row."""
    whole = reference_model(model)
    with torch.no_grad():
        losses = [float(whole(input_ids=row[None], labels=row[None]).loss) for row in ids]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_perplexity_is_transformers_own(
    family: str, checkpoint: Callable[[str], Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluated(capsys, checkpoint(family), "--data", data)
    assert set(result) == {"perplexity", "tokens"}
    assert result["tokens"] == 5 * (SEQLEN - 1)
    assert result["perplexity"] == pytest.approx(plain_perplexity(checkpoint(family), random_ids(5, seed=7)), rel=1e-5)


def test_a_model_against_itself(checkpoint: Callable[[str], Path], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluated(capsys, checkpoint("llama"), "--data", data, "--baseline", checkpoint("llama"))
    assert set(result) == {"perplexity", "tokens", "baseline_perplexity", "kl", "kl_stderr", "top1_agreement"}
    assert result["perplexity"] == result["baseline_perplexity"]
    assert (result["kl"], result["kl_stderr"], result["top1_agreement"]) == (0, 0, 1)


def test_a_quantized_model_against_the_original(
    quantized: Path, checkpoint: Callable[[str], Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """KL(baseline ‖ model), its standard error and the agreement, against plain formulas on the whole distributions."""
    from models import streamed_logits

    result = evaluated(capsys, quantized, "--data", data, "--baseline", checkpoint("llama"))
    ids = random_ids(5, seed=7)
    model = torch.log_softmax(streamed_logits(quantized, ids, 5)[:, :-1].double(), -1)
    with torch.no_grad():
        base = torch.log_softmax(reference_model(checkpoint("llama"))(input_ids=ids).logits[:, :-1].double(), -1)
    kl = (base.exp() * (base - model)).sum(-1).mean(-1)
    assert result["kl"] == pytest.approx(float(kl.mean()), rel=1e-3) and result["kl"] > 0
    assert result["kl_stderr"] == pytest.approx(float(kl.std()) / math.sqrt(len(kl)), rel=1e-3), "by row"
    assert result["top1_agreement"] == pytest.approx(float((base.argmax(-1) == model.argmax(-1)).double().mean()))
    assert result["baseline_perplexity"] == pytest.approx(plain_perplexity(checkpoint("llama"), ids), rel=1e-5)
    nll = -model.gather(-1, ids[:, 1:, None]).mean()
    assert result["perplexity"] == pytest.approx(math.exp(float(nll)), rel=1e-4)
    assert result["perplexity"] != result["baseline_perplexity"]


def test_one_row_does_not_tell_its_error(
    quantized: Path, checkpoint: Callable[[str], Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluated(capsys, quantized, "--data", data, "--baseline", checkpoint("llama"), "--samples", "1")
    assert set(result) == {"perplexity", "tokens", "baseline_perplexity", "kl", "top1_agreement"} and result["kl"] > 0


def test_eval_does_not_depend_on_the_batch(checkpoint: Callable[[str], Path], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluated(capsys, checkpoint("llama"), "--data", data, "--batch", "2")
    two = evaluated(capsys, checkpoint("llama"), "--data", data, "--batch", "5")
    assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-5)


def test_eval_samples(checkpoint: Callable[[str], Path], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluated(capsys, checkpoint("llama"), "--data", data, "--samples", "2")
    assert result["tokens"] == 2 * (SEQLEN - 1)
    assert result["perplexity"] == pytest.approx(plain_perplexity(checkpoint("llama"), random_ids(5, seed=7)[:2]), rel=1e-5)


def test_eval_for_people(checkpoint: Callable[[str], Path], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(checkpoint("llama"))
    assert main(["eval", folder, "--data", str(data), "--seqlen", str(SEQLEN), "--baseline", folder, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()[:-1]) for line in lines] == [
        "perplexity",
        "tokens",
        "baseline perplexity",
        "kl",
        "kl stderr",
        "top1 agreement",
    ]
    assert lines[1].split()[-1] == str(5 * (SEQLEN - 1))


def test_eval_of_a_text(checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer of the model's folder makes the rows."""
    model = tmp_path / "m"
    shutil.copytree(checkpoint("llama"), model)
    word_tokenizer().save_pretrained(model)
    ids = random_ids(3, seed=11)
    (tmp_path / "t.txt").write_text("\n".join(f"w{i}" for i in ids.flatten().tolist()))
    result = evaluated(capsys, model, "--data", tmp_path / "t.txt")
    assert result["tokens"] == 3 * (SEQLEN - 1)
    assert result["perplexity"] == pytest.approx(plain_perplexity(model, ids), rel=1e-5)


# bigq quantize.


def quantize_command(model: Path, out: Path, ids: Path) -> list[str]:
    return ["quantize", str(model), str(out), "--calibration", str(ids), "--samples", "8", "--seqlen", "24", "--group-size", "32"]


def test_quantize_tells_progress_on_stderr_and_the_outcome_on_stdout(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*quantize_command(checkpoint("llama"), tmp_path / "out", ids_file), "--device", "cpu"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("done in ") and f"{tmp_path.name[-15:]}/out\n" in output.out, "a long path loses its middle"
    assert "worst" in output.out and "host peak" in output.out
    reading, plan, *lines = [line for line in output.err.splitlines() if line.strip()]
    blocks = [line for line in lines if not line.startswith("  ")]
    assert reading == f"reading {checkpoint('llama')} …"
    assert plan.startswith("plan: 3 blocks")
    assert any(line.split()[:2] == ["needs:", "host"] for line in lines)
    assert any(line.startswith("  read by: transformers") for line in lines)
    assert [line.split()[:2] for line in blocks] == [["block", f"{i}/3"] for i in (1, 2, 3)]


def test_quiet_says_nothing(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*quantize_command(checkpoint("llama"), tmp_path / "out", ids_file), "--device", "cpu", "--quiet"]) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_job_is_taken_up_without_its_flags(
    checkpoint: Callable[[str], Path], quantized: Path, ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``quantized`` was made with 3 bits, 16 rows and groups of 32: asked for nothing, it is whole; asked for 4 bits, refused."""
    out = tmp_path / "out"
    shutil.copytree(quantized, out)
    command = ["quantize", str(checkpoint("llama")), str(out), "--device", "cpu"]
    assert main(command) == 0
    assert "3 of 3 blocks were already done" in capsys.readouterr().out
    assert main([*command, "--bits", "4"]) == 2
    assert "bits" in capsys.readouterr().err
    assert main([*command, "--bits", "3", "--group-size", "32", "--samples", "16"]) == 0


def test_a_plan_is_for_the_job_that_out_holds(
    checkpoint: Callable[[str], Path], quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*arguments: str) -> tuple[int, int]:
        assert main(["plan", str(checkpoint("llama")), *arguments, "--group-size", "32", "--device", "cpu", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["rows"], found["seqlen"]

    assert planned(str(quantized)) == (16, SEQLEN)
    assert planned(str(quantized), "--samples", "8") == (8, SEQLEN)
    assert planned() != (16, SEQLEN)


def test_a_damaged_job_is_told(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".bigq").mkdir()
    for damage in ("{", "{}", '{"settings": {}}'):
        (tmp_path / ".bigq" / "job.json").write_text(damage)
        assert main(["quantize", "MODEL", str(tmp_path)]) == 3
        error = capsys.readouterr().err
        assert error.startswith(f"bigq: error: {tmp_path}") and "job.json" in error and error.count("\n") == 1


# bigq verify, bigq status, faults: with stand-ins for the modules that do the work.


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    parent, _, last = name.rpartition(".")
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules[parent], last, module, raising=False)


def test_verify_of_a_sound_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Path] = []

    def verify(out: Path, *, trust_remote_code: bool) -> list[str]:
        assert not trust_remote_code
        asked.append(out)
        return []

    stand_in(monkeypatch, "bigq.inspect.verify", verify=verify)
    assert main(["verify", "some/out"]) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("some/out: sound\n", "")
    assert asked == [Path("some/out")]


@pytest.mark.parametrize(("problems", "count"), [(["a.safetensors: gone"], "one problem"), (["a\x1b[2J: b", "c"], "2 problems")])
def test_verify_of_a_damaged_folder(
    problems: list[str], count: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "bigq.inspect.verify", verify=lambda out, **_: problems)
    assert main(["verify", "some/out"]) == 3
    output = capsys.readouterr()
    assert output.out.splitlines() == [problem.replace("\x1b", "\\x1b") for problem in problems]
    assert output.err.startswith(f"bigq: error: some/out: has {count};") and output.err.count("\n") == 1


def test_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def status(out: Path) -> Any:
        return types.SimpleNamespace(to_json=lambda: {"out": str(out), "blocks": 3}, text=lambda: f"{out}\n3 blocks \x07of 5")

    stand_in(monkeypatch, "bigq.inspect.status", status=status)
    assert main(["status", "some/out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": "some/out", "blocks": 3}
    assert main(["status", "some/out"]) == 0
    assert capsys.readouterr().out == "some/out\n3 blocks \\x07of 5\n"


def test_the_exit_code_is_the_error_s_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A signal's among them, which has one of its own."""

    class Stopped(BigqError):
        exit_code = 75

    def status(out: Path) -> None:
        raise Stopped("stopped by SIGTERM; run the same command again")

    stand_in(monkeypatch, "bigq.inspect.status", status=status)
    assert main(["status", "out"]) == 75
    assert capsys.readouterr().err == "bigq: error: stopped by SIGTERM; run the same command again\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "model", "out"], "interrupted; run the same command again to resume"),
        (["eval", "model", "--data", "builtin"], "interrupted; run the same command again"),
    ],
)
def test_an_interrupt_says_whether_it_can_be_resumed(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bigq.sched.run.quantize", interrupted)
    monkeypatch.setattr("bigq.infer.evaluate.evaluate", interrupted)
    assert main(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"bigq: {said}"


def test_faults_are_armed_where_the_environment_asks_for_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    armed: list[str] = []

    def arm(spec: str) -> None:
        if spec == "nonsense":
            raise UsageError("BIGQ_FAULT=nonsense: is no fault")
        armed.append(spec)

    stand_in(monkeypatch, "bigq.faults", arm=arm)
    stand_in(monkeypatch, "bigq.inspect.verify", verify=lambda out, **_: [])
    for spec in ("", "kill:3", "nonsense"):
        monkeypatch.setenv("BIGQ_FAULT", spec)
        assert main(["verify", "out"]) == (2 if spec == "nonsense" else 0)
    assert armed == ["kill:3"]
    assert capsys.readouterr().err == "bigq: error: BIGQ_FAULT=nonsense: is no fault\n"


# What is printed, and where to.


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – ü → 漢", "plain – ü → 漢"),
        ("a\nb\r\tc\0", r"a\nb\r\tc\x00"),
        ("\x1b[31mred\x9b", r"\x1b[31mred\x9b"),
        ("\udcff\u202e\u2028", r"\udcff\u202e\u2028"),
    ],
)
def test_one_line(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_one_line_is_bounded_and_keeps_both_ends() -> None:
    assert one_line("x" * (HEAD + TAIL)) == "x" * (HEAD + TAIL)
    line = one_line("begun" + "\n" * 5000 + "ended")
    assert line.startswith("begun\\n") and line.endswith("\\nended") and len(line) == HEAD + TAIL + 3


@pytest.mark.parametrize("flag", ["--ram", "--nonsense", "--rule", "--bits"])
def test_an_error_is_one_printable_line(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "MODEL", flag, "\x1b]0;title\x07\nTraceback\udcff" + "x" * 5000]) == 2
    error = capsys.readouterr().err
    line = error[error.index("error: ") :]
    assert line.count("\n") == 1 and "\x1b" not in error and "\x07" not in error and "\udcff" not in error
    assert flag in line and len(line) < 2100


#: A whole program whose command does nothing but print.
VERIFIES = """
import sys, types
sys.modules["bigq.inspect.verify"] = types.SimpleNamespace(verify=lambda out, **_: ["a", "b"][: int(str(out))])
from bigq.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def verifying(*arguments: str, **streams: Any) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and stderr, as far as they come here."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(Path(bigq.__file__).parents[1])}
    whole = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    done = subprocess.run([sys.executable, "-c", VERIFIES, *arguments], env=env, timeout=60, check=False, **whole)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def broken_pipe() -> Any:
    """A pipe that nobody reads from."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("arguments", [["--version"], ["verify", "0"], ["verify", "1"]], ids=" ".join)
def test_nobody_reads_the_output(arguments: list[str], broken_pipe: int) -> None:
    """141 is what a shell says of a program that SIGPIPE ended."""
    assert verifying(*arguments, stdout=broken_pipe) == (141, None, b"")


def test_nobody_reads_the_errors(broken_pipe: int) -> None:
    assert verifying("verify", "2", stderr=broken_pipe) == (3, b"a\nb\n", None)
    assert verifying("verify", stderr=broken_pipe) == (2, b"", None)


def test_a_full_disk_takes_no_output() -> None:
    with open("/dev/full", "w") as full:
        code, _, error = verifying("verify", "0", stdout=full)
        assert code == ResourceError.exit_code
        assert error.startswith(b"bigq: error: stdout cannot be written: No space left") and error.count(b"\n") == 1
        assert verifying("verify", "2", stderr=full) == (3, b"a\nb\n", None)


def test_closed_streams_do_not_become_files_of_the_job(child: Child, tmp_path: Path) -> None:
    """The first file that is opened would get a closed stream's number, and with it what libraries print there."""
    program = VERIFIES.replace("sys.exit(", "print(").replace("import sys", "import os, sys")
    program += f"fd = os.open({str(tmp_path / 'told')!r}, os.O_CREAT | os.O_WRONLY)\nos.write(fd, str(fd > 2).encode())"
    closing = "import os, sys; [os.close(fd) for fd in range(3)]; os.execv(sys.executable, sys.argv[1:])"
    done = child("-c", closing, sys.executable, "-c", program, "verify", "2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "told").read_text() == "True"


def test_a_terminal_without_the_characters(child: Child) -> None:
    done = child("-m", "bigq", "quantize", "--help", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and r"REGEX:key=value,\u2026" in done.stdout, done.stderr


def test_whole_process_prints_results_only(checkpoint: Callable[[str], Path], quantized: Path, data: Path, child: Child) -> None:
    """As a child process, with whatever libraries print on their own: one JSON object on stdout, silence on stderr."""
    flags = ["--data", data, "--seqlen", str(SEQLEN), "--device", "cpu", "--json", "--quiet", "--baseline", checkpoint("llama")]
    done = child("-m", "bigq", "eval", quantized, *flags)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"perplexity", "tokens", "baseline_perplexity", "kl", "kl_stderr", "top1_agreement"}
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["generate ./missing --prompt x", "convert ./missing OUT --to awq", "demo"])
def test_commands_that_processes_do_not_share(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused before anything is read; in one process, as advised, the model is what is missed."""
    places = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**places, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    words = command.split()
    assert main(words) == UsageError.exit_code
    assert capsys.readouterr().err == f"bigq: error: bigq {words[0]}: 2 processes cannot share it; start it in one process\n"
    if "./missing" in words:
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert main(words) == CheckpointError.exit_code
        assert "missing" in capsys.readouterr().err
