"""Jobs with a budget of bits per weight: it holds, what readers fuse is alike, and a killed job ends with the same bytes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import test_memory
from models import make_checkpoint, random_ids, save_ids, stored_tensors
from moe_families import moe_model, random_tokens
from safetensors.torch import save_file
from tinyjob import at_points, hashes

import bigq
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.inspect.verify import verify
from bigq.io.folders import STATE_FOLDER
from bigq.io.formats import read_schemes
from bigq.io.formats.fused import fused_linears
from bigq.job.journal import read_commits, read_job
from bigq.mixed.groups import NOTES
from bigq.mixed.record import BITS_NAME, read_bits
from bigq.model.pager import Pager
from bigq.sched import mixing
from bigq.scheme import QuantScheme, Rule

BLOCKS = 4


class Killed(BaseException):
    """What ends a run at a fault point."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mixed") / "model", "llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ids(tmp_path_factory.mktemp("mixed") / "ids.safetensors", random_ids())


def job(ids: Path, **changes: Any) -> JobConfig:
    values = {"scheme": QuantScheme(group_size=32), "bits_per_weight": 4.0, "calibration": str(ids), "samples": 8, "seqlen": 16}
    return JobConfig(**{**values, "batch": 3, "device": "cpu", "quiet": True, "checkpoint_every": 0.0, **changes})


def bits_of(out: Path) -> dict[str, int]:
    return {record["name"]: record["bits"] for commit in read_commits(out)[0] for record in commit.linears}


def stored_bits_per_weight(out: Path) -> float:
    """Of all codes, scales and zero points, from the files."""
    records = [record for commit in read_commits(out)[0] for record in commit.linears]
    names = {record["name"] for record in records}
    size = sum(
        8 * tensor.nbytes
        for name, tensor in stored_tensors(out).items()
        if name.rpartition(".")[0] in names and (suffix := name.rpartition(".")[2]) not in NOTES and suffix != "bias"
    )
    return size / sum(math.prod(record["shape"]) for record in records)


def require_alike(out: Path) -> None:
    """Parts of fused Linears, and experts of a layer, have the same bits."""
    bits = bits_of(out)
    fused = fused_linears(bits)
    assert fused
    for linear in fused:
        assert len({bits[part] for part in linear.parts}) == 1, linear.name


@pytest.mark.parametrize(("format", "symmetric"), [("gptq", True), ("gptq_v2", False), ("compressed-tensors", True), ("gptq", False)])
def test_the_budget_holds_in_every_format(model: Path, ids: Path, tmp_path: Path, format: str, symmetric: bool) -> None:
    out = tmp_path / "out"
    scheme = QuantScheme(group_size=32, symmetric=symmetric)
    report = bigq.quantize(str(model), out, job(ids, format=format, scheme=scheme, bits_per_weight=4.25))
    found = read_bits(out)
    assert found is not None
    assert stored_bits_per_weight(out) == pytest.approx(found.reached)
    assert 4.0 < found.reached <= 4.25
    assert len(set(bits_of(out).values())) > 1
    require_alike(out)
    schemes = read_schemes(out, json.loads((out / "config.json").read_text())["quantization_config"])
    assert schemes is not None
    assert {name: schemes.scheme(name).bits for name in bits_of(out)} == bits_of(out)
    assert f"of {found.budget:g}: " in report.bits
    assert not verify(out)


def test_a_whole_budget_gives_what_uniform_bits_give(model: Path, ids: Path, tmp_path: Path) -> None:
    """Beyond what the most bits take, all Linears have these."""
    bigq.quantize(str(model), tmp_path / "most", job(ids, bits_per_weight=16))
    bigq.quantize(str(model), tmp_path / "eight", job(ids, bits_per_weight=None, scheme=QuantScheme(bits=8, group_size=32)))
    assert set(bits_of(tmp_path / "most").values()) == {8}
    most, eight = stored_tensors(tmp_path / "most"), stored_tensors(tmp_path / "eight")
    assert most.keys() == eight.keys() and all(most[name].equal(eight[name]) for name in most)


@pytest.mark.parametrize("family", ["mixtral"])
def test_experts_of_a_layer_have_the_same_bits(ids: Path, tmp_path: Path, family: str) -> None:
    source = make_checkpoint(tmp_path / "model", family)
    out = tmp_path / "out"
    bigq.quantize(str(source), out, job(ids))
    found = read_bits(out)
    assert found is not None
    assert stored_bits_per_weight(out) == pytest.approx(found.reached)
    assert found.reached <= 4.0
    require_alike(out)
    assert not verify(out)


def test_the_survey_reads_every_expert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many streams pass through it. The proof that a bank can run expert by expert has read a few before."""
    moe_model("deepseek_v3").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    save_file({"input_ids": random_tokens(16, 32)}, tmp_path / "ids.safetensors")
    loaded: Counter[tuple[str, int]] = Counter()
    load, choose = Pager.load_expert, mixing.choose_bits

    def counted(self: Pager, path: str, e: int, *rest: Any) -> Any:
        loaded[path, e] += 1
        return load(self, path, e, *rest)

    def chosen(*args: Any) -> Any:
        monkeypatch.setattr(Pager, "load_expert", load)
        return choose(*args)

    monkeypatch.setattr(mixing, "choose_bits", chosen)
    monkeypatch.setattr(Pager, "load_expert", counted)
    settings = {"format": "compressed-tensors", "scheme": QuantScheme(group_size=16), "bits_per_weight": 6.2}
    bigq.quantize(str(tmp_path / "model"), tmp_path / "out", job(tmp_path / "ids.safetensors", **settings))
    assert loaded and max(loaded.values()) <= 2 and min(loaded.values()) == 1


PEAK = """
import json, sys
import bigq
source, out, ids = sys.argv[1:]
config = bigq.JobConfig(scheme=bigq.QuantScheme(group_size=128), bits_per_weight=4, calibration=ids, samples=8, seqlen=128, device="cpu",
                        quiet=True)
report = bigq.quantize(source, out, config)
print(json.dumps({"peak": report.host_peak_bytes, "planned": report.planned_host_bytes}))
"""


@pytest.mark.long
def test_the_peak_of_a_job_with_a_survey_is_within_a_tenth_of_the_plan(
    child: Callable[..., CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The survey takes more than the job here: all Linears of a block are there twice, and its streams."""
    monkeypatch.setattr(test_memory, "HIDDEN", 2048)
    monkeypatch.setattr(test_memory, "INNER", 5632)
    source = test_memory.random_llama(tmp_path / "model", 1)
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(8, 128))
    words = [str(source), "--bits-per-weight", "4", "--calibration", str(ids), "--samples", "8", "--seqlen", "128", "--json"]
    told = child("-m", "bigq", "plan", *words, "--device", "cpu")
    assert told.returncode == 0, told.stderr
    phases = {phase["phase"]: phase["host_bytes"] for phase in json.loads(told.stdout)["phases"]}
    done = child("-c", PEAK, source, tmp_path / "out", ids, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["planned"] >= 0.95 * phases["survey"]
    assert result["peak"] == pytest.approx(result["planned"], rel=0.1)


def test_rules_of_the_user_come_first(model: Path, ids: Path, tmp_path: Path) -> None:
    rules = (Rule(r".*\.o_proj", None), Rule.parse(r".*\.down_proj:bits=8"))
    bigq.quantize(str(model), tmp_path / "out", job(ids, rules=rules, bits_per_weight=5))
    bits = bits_of(tmp_path / "out")
    assert not any(name.endswith("o_proj") for name in bits)
    assert {bits[name] for name in bits if name.endswith("down_proj")} == {8}
    assert stored_bits_per_weight(tmp_path / "out") <= 5


POINTS = [
    ("job.written", 1),
    ("survey.block", 1),
    ("survey.block", BLOCKS),
    ("bits.written", 1),
    ("linear.solved", 3),
    ("block.replayed", 2),
]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[0]}-{point[1]}")
def test_a_job_that_is_killed_ends_with_the_same_bytes(
    model: Path, ids: Path, tmp_path: Path, undisturbed: dict[str, str], point: tuple[str, int]
) -> None:
    def kill() -> None:
        raise Killed

    out = tmp_path / "out"
    with at_points({point: kill}), pytest.raises(Killed):
        bigq.quantize(str(model), out, job(ids))
    assert not (out / "config.json").exists()
    with at_points({}):
        bigq.quantize(str(model), out, job(ids))
    assert hashes(out) == undisturbed


@pytest.fixture(scope="module")
def undisturbed(model: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("mixed") / "out"
    bigq.quantize(str(model), out, job(ids))
    return hashes(out)


def test_the_choice_is_frozen(model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that goes on surveys nothing, whether or not its options are given again; and another budget is refused."""

    def stop() -> None:
        raise Killed

    out = tmp_path / "out"
    with at_points({("bits.written", 1): stop}), pytest.raises(Killed):
        bigq.quantize(str(model), out, job(ids))
    monkeypatch.setattr("bigq.sched.run.with_bits", None)
    with pytest.raises(UsageError, match=r"--bits-per-weight 5.*: the job in .* was begun with --bits-per-weight 4"):
        bigq.quantize(str(model), out, job(ids, bits_per_weight=5))
    with at_points({("block.replayed", 1): stop}), pytest.raises(Killed):
        bigq.quantize(str(model), out)
    bigq.quantize(str(model), out, job(ids))
    frozen = read_job(out)
    found = read_bits(out)
    assert frozen is not None and found is not None
    assert frozen["settings"]["chosen_rules"] == len(found.rules) == len(frozen["settings"]["rules"])
    assert json.loads((out / STATE_FOLDER / "job.json").read_text())["settings"]["rules"] == []


def test_a_choice_that_was_changed_is_found(model: Path, ids: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bigq.quantize(str(model), out, job(ids))
    path = out / STATE_FOLDER / BITS_NAME
    path.write_text(path.read_text().replace('"bits": 4', '"bits": 8', 1))
    assert any(BITS_NAME in str(problem) for problem in verify(out))


def test_what_is_refused(model: Path, ids: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--bits-per-weight 2\.1: .* are 2\.563 bits per weight; use --bits-per-weight 2\.563 or more"):
        bigq.quantize(str(model), tmp_path / "out", job(ids, bits_per_weight=2.1))
    with pytest.raises(UsageError, match="no effect, since the bits of no Linear are left to choose"):
        bigq.quantize(str(model), tmp_path / "out", job(ids, rules=(Rule.parse(".*:bits=4"),)))
    assert not (tmp_path / "out").exists()
    assert main(["plan", str(model), "--method", "rtn", "--group-size", "32", "--bits-per-weight", "4"]) == 2


def test_the_plan_names_the_budget(model: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = [str(model), str(out), "--group-size", "32", "--calibration", str(ids), "--samples", "8", "--seqlen", "16"]
    assert main(["plan", *words, "--bits-per-weight", "4"]) == 0
    assert "at most 4 per quantized weight: a survey" in capsys.readouterr().out
    assert main(["quantize", *words, "--bits-per-weight", "4", "--device", "cpu"]) == 0
    assert main(["plan", *words]) == 0
    told = capsys.readouterr().out
    assert "at most 4 per quantized weight" in told and "survey" not in told.partition("at most 4")[2].splitlines()[0]
    assert "Linears at 3 bits" in told or "at 3 bits" in told
