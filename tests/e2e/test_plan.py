"""``bigq plan``, and jobs that keep to their plan: predicted peaks, refusals, what a budget changes."""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Child
from models import make_checkpoint, random_ids, save_ids
from test_memory import random_llama

from bigq.cli.main import main

pytestmark = pytest.mark.usefixtures("plans_of_their_own")

MIB = 2**20

CONFIGS: dict[str, dict[str, Any]] = {
    "bloom-176b": {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 14336, "n_layer": 70, "n_head": 112, "seq_length": 2048},
    "llama-3.1-405b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "llama-2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
#: Parameters, in billions.
SIZES = {"bloom-176b": 176.2, "llama-3.1-405b": 405.9, "llama-2-7b": 6.74}


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def plan(child: Child, model: Path | str, *flags: str) -> dict[str, Any]:
    done = child("-m", "bigq", "plan", model, "--json", *flags)
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


@pytest.mark.parametrize("name", ["bloom-176b", "llama-3.1-405b", pytest.param("llama-2-7b", marks=pytest.mark.long)])
def test_a_config_alone_is_enough_however_large_the_model(name: str, child: Child, tmp_path: Path) -> None:
    """Five seconds are promised. CPU time is compared, which other processes beside this one change less; most is importing."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name] | {"dtype": "bfloat16"}))
    begun = cpu_seconds_of_children()
    found = plan(child, tmp_path, "--on", "h100", "--disk", "1TB", "--ram", "64GiB")
    assert cpu_seconds_of_children() - begun < 9
    assert found["read_bytes"] == pytest.approx(2 * SIZES[name] * 1e9, rel=0.05)
    assert found["shortages"] == []
    assert found["device_bytes"] < 80e9
    assert found["rows"] == 128
    assert found["seqlen"] == 2048
    assert found["written_bytes"] < 0.3 * found["read_bytes"]
    assert found["seconds_at_least"] > 5


def test_the_table_names_what_is_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["bloom-176b"] | {"dtype": "bfloat16"}))
    assert main(["plan", str(tmp_path), "--on", "a100", "--vram", "20GiB", "--ram", "4GB", "--disk", "50GB"]) == 4
    printed, said = capsys.readouterr()
    assert said.splitlines()[-1].startswith(f"bigq: error: {tmp_path}: the job does not fit: ")
    short = [line for line in printed.splitlines() if line.strip().startswith("short")]
    assert [line.split()[1] for line in short] == ["device", "host", "disk:"] and max(map(len, printed.splitlines())) <= 60
    assert "A100" in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--on", "tpu"], "--on tpu"), (["--ram", "lots"], "--ram lots"), (["--activations", "gpu", "--device", "cpu"], "--activations gpu")],
)
def test_flags_that_make_no_sense(flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama-2-7b"] | {"dtype": "bfloat16"}))
    assert main(["plan", str(tmp_path), *flags]) == 2
    assert words in capsys.readouterr().err


PROGRAM = """
import json, sys
import bigq
source, out, ids, rows, seqlen, order, scales, method = sys.argv[1:]
scheme = bigq.QuantScheme(group_size=128, order=order, scales=scales)
config = bigq.JobConfig(scheme=scheme, method=method, calibration=ids, samples=int(rows), seqlen=int(seqlen), device="cpu", quiet=True)
report = bigq.quantize(source, out, config)
print(json.dumps({"peak": report.host_peak_bytes, "planned": report.planned_host_bytes, "written": report.output_bytes}))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("hidden", "inner", "rows", "seqlen", "order", "scales", "method"),
    [
        (512, 1408, 48, 256, "natural", "minmax", "gptq"),
        (1024, 4096, 8, 512, "activation", "minmax", "gptq"),
        (1024, 4096, 8, 512, "group", "search", "gptq"),
        (2048, 5632, 4, 256, "natural", "minmax", "gptq"),
        (512, 1408, 48, 256, "natural", "minmax", "gptaq"),
        (2048, 5632, 4, 256, "natural", "minmax", "gptaq"),
    ],
    ids=[
        "many tokens",
        "wide, act-order",
        "wide, groups, search",
        "large",
        "many tokens, gptaq",
        "large, gptaq",
    ],
)
def test_the_peak_is_within_a_tenth_of_the_plan(
    hidden: int,
    inner: int,
    rows: int,
    seqlen: int,
    order: str,
    scales: str,
    method: str,
    child: Child,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of host memory on a CPU. More than the libraries is at stake in each shape."""
    import test_memory

    monkeypatch.setattr(test_memory, "HIDDEN", hidden)
    monkeypatch.setattr(test_memory, "INNER", inner)
    source = random_llama(tmp_path / "model", 1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(rows, seqlen))
    done = child("-c", PROGRAM, source, tmp_path / "out", ids, str(rows), str(seqlen), order, scales, method, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["peak"] == pytest.approx(result["planned"], rel=0.1)
    idle = child("-c", test_memory.IDLE)
    assert result["peak"] - int(idle.stdout) > 40 * MIB
    flags = ["--samples", str(rows), "--seqlen", str(seqlen), "--device", "cpu", "--method", method]
    predicted = plan(child, source, *flags, "--order", order, "--scales", scales)
    assert predicted["host_bytes"] == pytest.approx(result["planned"], rel=0.05)
    assert result["written"] == pytest.approx(predicted["written_bytes"], rel=0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plan") / "llama", "llama")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ids(tmp_path_factory.mktemp("plan-ids") / "ids.safetensors", random_ids(8, 32))


def job(model: Path, out: Path, ids: Path, *flags: str) -> list[str]:
    fixed = ["--calibration", str(ids), "--samples", "8", "--seqlen", "32", "--group-size", "32", "--device", "cpu"]
    return ["quantize", str(model), str(out), *fixed, *flags]


REFUSED = {
    "nothing to do": ("llama", ["--skip", ".*"], "--skip: no Linear would be quantized"),
    "no such family in llama.cpp": ("bloom", ["--format", "gguf", "--group-size", "32"], "bigq writes no GGUF files of model type 'bloom'"),
    "no such blocks in GGUF": ("llama", ["--format", "gguf", "--bits", "3", "--group-size", "32"], "GGUF has no blocks for 3 bits"),
    "stored transposed": ("gpt2", ["--format", "compressed-tensors", "--group-size", "32"], "are stored transposed"),
    "groups that do not fit": ("llama", ["--group-size", "40"], "which group size 40 does not divide"),
    "a rule for nothing": ("llama", ["--group-size", "32", "--skip", "o_proj"], "matches no Linear"),
    "a hidden rule": ("llama", ["--group-size", "32", "--skip", ".*mlp", "--rule", ".*up_proj:bits=8"], "has no effect"),
    "part of a fused Linear": ("llama", ["--group-size", "32", "--rule", ".*q_proj:sym=false"], "use '.*(q|k|v|qkv)_proj'"),
    "a rule for the head": ("llama", ["--group-size", "32", "--rule", "lm_head:bits=8"], "add --lm-head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_quantize_refuses_the_plan_refuses(
    case: str, checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, flags, says = REFUSED[case]
    for command in (["plan", str(checkpoint(family))], ["quantize", str(checkpoint(family)), str(tmp_path / "out"), "--quiet"]):
        assert main([*command, *flags]) in (2, 3)
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flag", "size"), [("--ram", "100MB"), ("--disk", "10KB")])
def test_a_job_that_cannot_fit_is_refused_before_anything_is_written(
    flag: str, size: str, model: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(job(model, out, ids, flag, size)) == 4
    last = capsys.readouterr().err.splitlines()[-1]
    assert flag in last
    assert "more needed" in last
    assert not out.exists()
    advised = re.search(rf"give {flag} (\S+) or more", last)
    assert advised is not None
    assert main(job(model, out, ids, flag, advised[1], "--quiet")) == 0


def test_the_group_size_that_is_advised_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For all Linears at once: of 192, 320 and 192 inputs; and for those of a rule."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    changed = CONFIGS["llama-2-7b"] | heads | {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    command = ["plan", str(tmp_path), "--samples", "8", "--seqlen", "32", "--device", "cpu"]
    assert main(command) == 2
    assert capsys.readouterr().err.endswith(
        "self_attn.q_proj and 5 more have 192 inputs, which group size 128 does not divide, and model.layers.0.mlp.down_proj has "
        "320 inputs, which group size 128 does not divide; use --group-size 64\n"
    )
    assert main([*command, "--group-size", "64"]) == 0
    rule = ".*mlp:group_size="
    capsys.readouterr()
    assert main([*command, "--group-size", "64", "--rule", f"{rule}48"]) == 2
    assert capsys.readouterr().err.endswith(f"which group size 48 does not divide; use group_size=32 in --rule '{rule}48'\n")
    assert main([*command, "--group-size", "64", "--rule", f"{rule}32"]) == 0


def test_a_job_prints_its_plan_and_keeps_to_it(model: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(job(model, tmp_path / "out", ids)) == 0
    printed = capsys.readouterr()
    assert "plan: 3 blocks, 8 × 32 tokens\n  text:    ids.safetensors: 8 rows of 256 token ids\n" in printed.err
    assert "\n  run:     activations in host memory, batch 8," in printed.err
    assert "\n  read by: transformers (with optimum, gptqmodel),\n           GPTQModel, vLLM\n" in printed.err
    assert "(planned " in printed.out


def test_a_plan_counts_what_rules_decide(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the Linears of three blocks, and of the output head where that is quantized."""
    rules = ["--skip", ".*o_proj", "--rule", ".*mlp:bits=8"]
    assert main(["plan", str(model), "--group-size", "32", "--device", "cpu", *rules]) == 0
    assert "  rules:   9 Linears at 8 bits, 3 left out\n" in capsys.readouterr().out
    assert main(["plan", str(model), "--group-size", "32", "--device", "cpu", "--lm-head", "--rule", "lm_head:bits=8", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["rules"] == [{"pattern": "lm_head", "overrides": {"bits": 8}, "linears": 1}]
    assert [reader["reader"] for reader in value["readers"] if reader["loads"]] == ["GPTQModel", "vLLM"]


def test_the_batch_of_a_job_begun_is_kept(model: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not given again, it is as before, though the machine's own choice would be another."""
    assert main(job(model, tmp_path / "out", ids, "--batch", "3")) == 0
    (tmp_path / "out" / "config.json").unlink()  # what is finished needs no plan
    assert main(job(model, tmp_path / "out", ids)) == 0
    assert capsys.readouterr().err.count("batch 3") == 2


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
def test_without_memo_the_output_is_the_same(family: str, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's output kept and given back: the output projection's own, with the residual added (bloom), with extras (gemma2)."""
    import dataclasses

    from bigq.sched.plan import inputs

    source = make_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16)
    assert main(job(source, tmp_path / "with", ids, "--batch", "3", "--quiet")) == 0
    real = inputs.make_plan

    def without(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        assert found.choice.memo
        return dataclasses.replace(found, choice=dataclasses.replace(found.choice, memo=False))

    monkeypatch.setattr(inputs, "make_plan", without)
    assert main(job(source, tmp_path / "without", ids, "--batch", "3", "--quiet")) == 0
    shards = sorted(p.name for p in (tmp_path / "with").glob("*.safetensors"))
    assert len(shards) > 3
    for name in shards:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_the_times_of_a_summary_add_up_to_its_wall_time(model: Path, ids: Path, tmp_path: Path) -> None:
    """Start-up and calibration are stages of their own; what the caller did before is part of the start-up."""
    import bigq
    from bigq.sched import run

    config = bigq.JobConfig(scheme=bigq.QuantScheme(group_size=32), calibration=str(ids), samples=8, seqlen=32, device="cpu", quiet=True)
    report = run.quantize(str(model), tmp_path / "out", config, started=time.monotonic() - 5)
    assert list(report.seconds_before) == ["start-up", "calibration", "planning"] and report.seconds_before["start-up"] >= 5
    times = report.times()
    assert sum(times.values()) == pytest.approx(report.seconds) and set(times) > {"start-up", "calibration", "solve", "other"}
    assert times["other"] < 0.5 * (report.seconds - 5)
    assert "read by: transformers" in report.summary() and max(map(len, report.summary().splitlines())) <= 60
