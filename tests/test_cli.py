"""The command line: help, parsing into configs, and results on stdout with nothing else there."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Child
from models import SEQLEN, random_ids, reference_model, save_ids, word_tokenizer

import bigq
from bigq.cli import build_parser, job_config, main
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.scheme import QuantScheme, Rule


def parsed(*arguments: str) -> JobConfig:
    return job_config(build_parser().parse_args(["quantize", "MODEL", "OUT", *arguments]))


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ([], "quantize eval demo --version"),
        (
            ["quantize"],
            "--bits --group-size --sym --asym --act-order --damping --mse --method --true-sequential --no-true-sequential --rule "
            "--skip --format --calibration --samples --seqlen --seed --batch --device --dtype --trust-remote-code --quiet",
        ),
        (["eval"], "--data --baseline --seqlen --samples --json --batch --device --dtype --trust-remote-code --quiet"),
        (["demo"], "--out --device"),
    ],
    ids=["bigq", "quantize", "eval", "demo"],
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
    program = "import sys, runpy; sys.argv = ['bigq', '--version']\ntry: runpy.run_module('bigq', run_name='__main__')\n"
    program += "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    done = child("-c", program)
    assert done.stdout.splitlines() == [f"bigq {bigq.__version__}", "0 False"], done.stderr


@pytest.mark.parametrize("arguments", [[], ["quantize"], ["quantize", "MODEL"], ["eval", "MODEL"], ["frobnicate"]], ids=" ".join)
def test_incomplete_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and "usage: bigq" in output.err


def test_defaults_are_those_of_the_api() -> None:
    assert parsed() == JobConfig()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--bits 3", {"scheme": QuantScheme(bits=3)}),
        ("--group-size 64", {"scheme": QuantScheme(group_size=64)}),
        ("--group-size -1", {"scheme": QuantScheme(group_size=-1)}),
        ("--sym", {}),
        ("--asym", {"scheme": QuantScheme(symmetric=False)}),
        ("--no-sym", {"scheme": QuantScheme(symmetric=False)}),
        ("--act-order", {"scheme": QuantScheme(act_order=True)}),
        ("--damping 0.05", {"scheme": QuantScheme(damping=0.05)}),
        ("--mse", {"scheme": QuantScheme(mse=True)}),
        ("--method rtn", {"method": "rtn"}),
        ("--no-true-sequential", {"true_sequential": False}),
        ("--true-sequential", {}),
        ("--format gptq_v2", {"format": "gptq_v2"}),
        ("--calibration my.txt", {"calibration": "my.txt"}),
        ("--samples 12", {"samples": 12}),
        ("--seqlen 34", {"seqlen": 34}),
        ("--seed 56", {"seed": 56}),
        ("--batch 7", {"batch": 7}),
        ("--device cuda:1", {"device": "cuda:1"}),
        ("--dtype bfloat16", {"dtype": "bfloat16"}),
        ("--trust-remote-code", {"trust_remote_code": True}),
        ("--quiet", {"quiet": True}),
        ("--skip .*k_proj", {"rules": (Rule(".*k_proj", None),)}),
        ("--rule a.b:bits=8,group_size=32", {"rules": (Rule("a.b", {"bits": 8, "group_size": 32}),)}),
        (
            "--rule x:sym=false,act_order=true,damping=0.5,mse=TRUE",
            {"rules": (Rule("x", {"sym": False, "act_order": True, "damping": 0.5, "mse": True}),)},
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
    kl = (base.exp() * (base - model)).sum(-1).flatten()
    assert result["kl"] == pytest.approx(float(kl.mean()), rel=1e-3) and result["kl"] > 0
    assert result["kl_stderr"] == pytest.approx(float(kl.std(correction=0)) / math.sqrt(len(kl)), rel=1e-3)
    assert result["top1_agreement"] == pytest.approx(float((base.argmax(-1) == model.argmax(-1)).double().mean()))
    assert result["baseline_perplexity"] == pytest.approx(plain_perplexity(checkpoint("llama"), ids), rel=1e-5)
    nll = -model.gather(-1, ids[:, 1:, None]).mean()
    assert result["perplexity"] == pytest.approx(math.exp(float(nll)), rel=1e-4)
    assert result["perplexity"] != result["baseline_perplexity"]


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
    assert output.out.startswith("done in ") and str(tmp_path / "out") in output.out
    assert "worst" in output.out and "host peak" in output.out
    plan, needs, *blocks = [line for line in output.err.splitlines() if line.strip()]
    assert plan.startswith("plan: 3 blocks")
    assert needs.split()[:2] == ["needs", "host"]
    assert [line.split()[:2] for line in blocks] == [["block", f"{i}/3"] for i in (1, 2, 3)]


def test_quiet_says_nothing(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*quantize_command(checkpoint("llama"), tmp_path / "out", ids_file), "--device", "cpu", "--quiet"]) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")
    assert (tmp_path / "out" / "config.json").exists()


def test_whole_process_prints_results_only(checkpoint: Callable[[str], Path], quantized: Path, data: Path, child: Child) -> None:
    """As a child process, with whatever libraries print on their own: one JSON object on stdout, silence on stderr."""
    flags = ["--data", data, "--seqlen", str(SEQLEN), "--device", "cpu", "--json", "--quiet", "--baseline", checkpoint("llama")]
    done = child("-m", "bigq", "eval", quantized, *flags)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"perplexity", "tokens", "baseline_perplexity", "kl", "kl_stderr", "top1_agreement"}
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
