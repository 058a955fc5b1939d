"""A job that was stopped anywhere goes on where it was, and ends with the same bytes as one that never stopped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from models import VOCABULARY, make_checkpoint, random_ids, rewrite, save_ids, shard_of, stored_tensors

import bigq
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import BusyError, CheckpointError, UsageError
from bigq.io import atomic
from bigq.job import finish
from bigq.job import journal as journal_module
from bigq.job.journal import Commit, Journal
from bigq.methods import gptq as gptq_module
from bigq.sched import shards, solving
from bigq.scheme import QuantScheme, Rule

#: What decides the output's bytes, besides the default: rules that leave some Linears out and give others more bits.
RULES = (Rule(r".*\.o_proj", None), Rule.parse(r".*\.down_proj:bits=8,sym=false"))


def job(ids: Path, **changes: Any) -> JobConfig:
    values = {"scheme": QuantScheme(group_size=32), "calibration": str(ids), "samples": 8, "seqlen": 24, "batch": 3, "quiet": True}
    return JobConfig(**{**values, **changes})


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of everything in an output folder that is not the job's own record."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def stop_after(monkeypatch: pytest.MonkeyPatch, commits: int, error: BaseException) -> None:
    """Let ``error`` strike right after the given commit of the next run became durable."""
    commit = Journal.commit
    done: list[str] = []

    def striking(self: Journal, record: Commit) -> None:
        commit(self, record)
        done.append(record.unit)
        if len(done) == commits:
            raise error

    monkeypatch.setattr(Journal, "commit", striking)


def count_solves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of what gets factored from now on."""
    factorize = gptq_module.factorize
    labels: list[str] = []

    def counting(h: torch.Tensor, *, name: str, **options: Any) -> Any:
        labels.append(name)
        return factorize(h, name=name, **options)

    monkeypatch.setattr(gptq_module, "factorize", counting)
    return labels


@pytest.fixture(scope="module")
def whole(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """(family, settings) → the hashes of an uninterrupted run's output; each is run once."""
    known: dict[str, dict[str, str]] = {}

    def get(family: str, **changes: Any) -> dict[str, str]:
        key = f"{family} {changes}"
        if key not in known:
            out = tmp_path_factory.mktemp("whole") / "out"
            bigq.quantize(str(checkpoint(family)), out, job(ids_file, **changes))
            known[key] = hashes(out)
        return known[key]

    return get


@pytest.mark.parametrize("commits", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_interrupted_job_ends_with_the_same_bytes(
    family: str,
    commits: int,
    checkpoint: Callable[[str], Path],
    whole: Callable[..., dict[str, str]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Commit 1 is what lies outside the blocks, commits 2 to 4 are the three blocks."""
    source, out = checkpoint(family), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, commits, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            bigq.quantize(str(source), out, job(ids_file))
    assert not (out / "config.json").exists() and not (out / "model.safetensors.index.json").exists()
    assert len(list(out.glob("*.safetensors"))) == commits
    with monkeypatch.context() as patch:
        solved = count_solves(patch)
        report = bigq.quantize(str(source), out, job(ids_file))
    assert report.resumed_blocks == commits - 1
    assert len(solved) == 4 * (4 - commits)
    assert len(report.linears) == (3 * 7 if family == "llama" else 3 * 4)
    assert hashes(out) == whole(family)


@pytest.mark.parametrize(
    "changes",
    [
        {"rules": RULES},
        {"format": "gptq_v2", "scheme": QuantScheme(group_size=32, bits=3, symmetric=False, order="activation")},
        {"true_sequential": False},
        {"method": "rtn"},
        {"dtype": "bfloat16"},
        {"scheme": QuantScheme(group_size=-1, bits=2, scales="search")},
    ],
    ids=["rules", "v2", "together", "rtn", "bf16", "mse"],
)
def test_every_setting_resumes_to_the_same_bytes(
    changes: dict[str, Any],
    checkpoint: Callable[[str], Path],
    whole: Callable[..., dict[str, str]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            bigq.quantize(str(source), out, job(ids_file, **changes))
    bigq.quantize(str(source), out, job(ids_file, **changes))
    assert hashes(out) == whole("llama", **changes)
    assert hashes(out) != whole("llama")


@pytest.mark.parametrize("read_ahead", [0, 1], ids=["one thing at a time", "files beside the computation"])
def test_interrupted_between_every_pair_of_commits(
    read_ahead: int,
    checkpoint: Callable[[str], Path],
    whole: Callable[..., dict[str, str]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four runs, each of which gets one commit further."""
    source, out = checkpoint("llama"), tmp_path / "out"
    for done in range(1, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, 1, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                bigq.quantize(str(source), out, job(ids_file, read_ahead=read_ahead))
        assert len(list(out.glob("*.safetensors"))) == done
    bigq.quantize(str(source), out, job(ids_file, read_ahead=read_ahead))
    assert hashes(out) == whole("llama")


def test_stopped_between_shard_and_journal(
    checkpoint: Callable[[str], Path],
    whole: Callable[..., dict[str, str]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shard that no journal line vouches for is made again."""
    source, out = checkpoint("llama"), tmp_path / "out"
    write_shard = shards.write_shard

    def striking(path: Path, tensors: Any) -> Any:
        record = write_shard(path, tensors)
        if "00003" in path.name:
            raise KeyboardInterrupt
        return record

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", striking)
        with pytest.raises(KeyboardInterrupt):
            bigq.quantize(str(source), out, job(ids_file))
    assert len(list(out.glob("*.safetensors"))) == 3
    assert bigq.quantize(str(source), out, job(ids_file)).resumed_blocks == 1
    assert hashes(out) == whole("llama")


@pytest.mark.parametrize("failing", ["quantize_config.json", "model.safetensors.index.json", "config.json"])
def test_stopped_while_finishing(
    failing: str,
    checkpoint: Callable[[str], Path],
    whole: Callable[..., dict[str, str]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is written last, config.json comes after it."""
    source, out = checkpoint("llama"), tmp_path / "out"
    write_bytes = atomic.write_bytes

    def striking(path: Path, data: bytes) -> None:
        if path.name == failing:
            raise KeyboardInterrupt
        write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_bytes", striking)
        patch.setattr(finish, "write_bytes", striking)
        with pytest.raises(KeyboardInterrupt):
            bigq.quantize(str(source), out, job(ids_file))
    assert not (out / "config.json").exists()
    bigq.quantize(str(source), out, job(ids_file))
    assert hashes(out) == whole("llama")


def interrupted(source: Path, out: Path, config: JobConfig, monkeypatch: pytest.MonkeyPatch, commits: int = 3) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, commits, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            bigq.quantize(str(source), out, config)


def test_damaged_shard_is_made_again(
    checkpoint: Callable[[str], Path],
    whole: Callable[..., dict[str, str]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One flipped bit in a committed shard: it is made again, and nothing else."""
    source, out = checkpoint("llama"), tmp_path / "out"
    interrupted(source, out, job(ids_file), monkeypatch)
    shard = out / "model-00002-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with monkeypatch.context() as patch:
        solved = count_solves(patch)
        assert bigq.quantize(str(source), out, job(ids_file)).resumed_blocks == 1
    assert {label.split(".")[2] for label in solved} == {"0", "2"}
    assert hashes(out) == whole("llama")


def test_missing_shard_is_made_again(
    checkpoint: Callable[[str], Path],
    whole: Callable[..., dict[str, str]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    interrupted(source, out, job(ids_file), monkeypatch)
    (out / "model-00003-of-00004.safetensors").unlink()
    assert bigq.quantize(str(source), out, job(ids_file)).resumed_blocks == 1
    assert hashes(out) == whole("llama")


@pytest.mark.parametrize("tail", [b'{"unit": "block-1", "fi', b"\x00" * 50, b"null\n", b'{"unit": "block-2"}\n'])
def test_torn_journal_line(
    tail: bytes,
    checkpoint: Callable[[str], Path],
    whole: Callable[..., dict[str, str]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a power failure may leave at the journal's end is cut off; so are leftover temporary files."""
    source, out = checkpoint("llama"), tmp_path / "out"
    interrupted(source, out, job(ids_file), monkeypatch, commits=2)
    with open(out / ".bigq" / "journal.jsonl", "ab") as file:
        file.write(tail)
    leftover = out / f"model-00003-of-00004.safetensors{journal_module.TEMP_SUFFIX}"
    leftover.write_bytes(b"half a shard")
    assert bigq.quantize(str(source), out, job(ids_file)).resumed_blocks == 1
    assert not leftover.exists()
    assert hashes(out) == whole("llama")
    lines = (out / ".bigq" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["unit"] for line in lines] == ["rest-0", "block-0", "block-1", "block-2"]


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("--bits 3", {"scheme": QuantScheme(group_size=32, bits=3)}),
    ("--order natural", {"scheme": QuantScheme(group_size=32, order="natural")}),
    ("--damping 0.02", {"scheme": QuantScheme(group_size=32, damping=0.02)}),
    ("--rule", {"rules": RULES}),
    ("--method rtn", {"method": "rtn"}),
    ("--format gptq_v2", {"format": "gptq_v2"}),
    ("--no-true-sequential", {"true_sequential": False}),
    ("--samples 7", {"samples": 7}),
    ("--seqlen 23", {"seqlen": 23}),
    ("--seed 1", {"seed": 1}),
    ("--dtype bfloat16", {"dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("named", "changes"), CHANGES, ids=lambda value: str(value)[:60])
def test_changed_setting_is_refused(
    named: str,
    changes: dict[str, Any],
    checkpoint: Callable[[str], Path],
    whole: Callable[..., dict[str, str]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By name; the job as it was begun can still be finished."""
    source, out = checkpoint("llama"), tmp_path / "out"
    interrupted(source, out, job(ids_file), monkeypatch, commits=2)
    before = hashes(out)
    with pytest.raises(UsageError, match=rf"{named}\b") as error:
        bigq.quantize(str(source), out, job(ids_file, **changes))
    assert str(out) in str(error.value)
    assert hashes(out) == before
    bigq.quantize(str(source), out, job(ids_file))
    assert hashes(out) == whole("llama")


def test_changed_calibration_text_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same file name, other tokens."""
    source, out = checkpoint("llama"), tmp_path / "out"
    ids = save_ids(tmp_path / "ids.safetensors", random_ids())
    interrupted(source, out, job(ids), monkeypatch)
    save_ids(ids, random_ids(seed=1))
    with pytest.raises(UsageError, match="calibration"):
        bigq.quantize(str(source), out, job(ids))


def test_another_model_is_refused(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(checkpoint("llama"), out, job(ids_file), monkeypatch)
    with pytest.raises(UsageError, match=r"source|config"):
        bigq.quantize(str(checkpoint("mistral")), out, job(ids_file))


def test_same_model_with_another_config_is_refused(ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_checkpoint(tmp_path / "m", "llama"), tmp_path / "out"
    interrupted(source, out, job(ids_file), monkeypatch)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(UsageError, match="config"):
        bigq.quantize(str(source), out, job(ids_file))


def test_same_shapes_with_other_weights_do_not_mix(ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source was fetched anew in the meantime and its weights are others: blocks of two models must not be mixed."""
    source, out = make_checkpoint(tmp_path / "m", "llama"), tmp_path / "out"
    interrupted(source, out, job(ids_file), monkeypatch)
    make_checkpoint(source, "llama", seed=1)
    with pytest.raises(UsageError, match="source"):
        bigq.quantize(str(source), out, job(ids_file))


def test_device_may_change_quiet_may_change(
    checkpoint: Callable[[str], Path], whole: Callable[..., dict[str, str]], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a job runs and what it tells does not decide its bytes."""
    source, out = checkpoint("llama"), tmp_path / "out"
    interrupted(source, out, job(ids_file, device="auto"), monkeypatch)
    bigq.quantize(str(source), out, job(ids_file, device="cpu", quiet=False))
    assert hashes(out) == whole("llama")


def test_finished_job_run_again_changes_nothing(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    first = bigq.quantize(str(source), out, job(ids_file))
    before, times = hashes(out), {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    solved = count_solves(monkeypatch)
    second = bigq.quantize(str(source), out, job(ids_file))
    assert not solved
    assert hashes(out) == before
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")} == times
    assert second.resumed_blocks == 3 and second.linears == first.linears


def test_finished_job_refuses_other_settings_and_stays(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    bigq.quantize(str(source), out, job(ids_file))
    before = hashes(out)
    with pytest.raises(UsageError, match="bits"):
        bigq.quantize(str(source), out, job(ids_file, scheme=QuantScheme(bits=8, group_size=32)))
    assert hashes(out) == before


def test_output_does_not_depend_on_the_folder(
    checkpoint: Callable[[str], Path], whole: Callable[..., dict[str, str]], ids_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "somewhere" / "else"
    bigq.quantize(str(checkpoint("llama")), out, job(ids_file))
    assert hashes(out) == whole("llama")


def test_failed_job_resumes_after_repair(ids_file: Path, tmp_path: Path) -> None:
    """A damaged last block stops the job with what came before committed; the repaired source finishes it."""
    source, out = make_checkpoint(tmp_path / "m", "llama"), tmp_path / "out"
    name = "model.layers.2.mlp.down_proj.weight"
    victim = shard_of(source, name)
    good = victim.read_bytes()
    rewrite(source, name, torch.full((64, 96), float("inf")))
    with pytest.raises(bigq.BigqError, match="NaN or Inf"):
        bigq.quantize(str(source), out, job(ids_file))
    assert not (out / "config.json").exists()
    victim.write_bytes(good)
    assert bigq.quantize(str(source), out, job(ids_file)).resumed_blocks == 2
    fresh = tmp_path / "fresh"
    bigq.quantize(str(source), fresh, job(ids_file))
    assert hashes(out) == hashes(fresh)


def test_job_json_damaged_is_told(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    interrupted(source, out, job(ids_file), monkeypatch)
    (out / ".bigq" / "job.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"job\.json"):
        bigq.quantize(str(source), out, job(ids_file))


def test_interrupt_on_the_command_line(
    checkpoint: Callable[[str], Path],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 130 and how to go on; the same command does."""
    out = tmp_path / "out"
    command = ["quantize", str(checkpoint("llama")), str(out), "--calibration", str(ids_file), "--samples", "8", "--seqlen", "24"]
    command += ["--group-size", "32", "--device", "cpu"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        assert main(command) == 130
    output = capsys.readouterr()
    assert output.out == "" and "run the same command again" in output.err and "Traceback" not in output.err
    assert main(command) == 0
    assert "1 of 3 blocks were already done" in capsys.readouterr().out


def test_killed_process_resumes(tmp_path: Path) -> None:
    """SIGKILL at an arbitrary moment of a job in a process of its own."""
    source = make_checkpoint(tmp_path / "m", "llama", num_hidden_layers=8)
    ids = save_ids(tmp_path / "ids.safetensors", random_ids())
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bigq", "quantize", str(source), str(out), "--calibration", str(ids), "--samples", "16"]
    command += ["--seqlen", "40", "--group-size", "32", "--batch", "8", "--device", "cpu", "--quiet"]
    journal = out / ".bigq" / "journal.jsonl"
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert not (out / "config.json").exists()
    config = job(ids, samples=16, seqlen=40, batch=8)
    report = bigq.quantize(str(source), out, config)
    assert 3 <= report.resumed_blocks < 8
    assert len({r["name"] for r in report.linears}) == 8 * 7
    fresh = tmp_path / "fresh"
    bigq.quantize(str(source), fresh, config)
    assert hashes(out) == hashes(fresh)


def test_two_jobs_in_one_folder(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused while the first runs, and the first is not disturbed."""
    source, out = checkpoint("llama"), tmp_path / "out"
    commit = Journal.commit
    refused: list[str] = []

    def meddling(self: Journal, record: Commit) -> None:
        commit(self, record)
        if record.unit == "block-1":
            with pytest.raises(BusyError, match="another bigq job") as error:
                bigq.quantize(str(source), out, job(ids_file))
            refused.append(str(error.value))

    monkeypatch.setattr(Journal, "commit", meddling)
    bigq.quantize(str(source), out, job(ids_file))
    assert len(refused) == 1 and str(out) in refused[0] and str(os.getpid()) in refused[0]
    assert stored_tensors(out)["model.embed_tokens.weight"].shape[0] == VOCABULARY


def test_nothing_said_means_as_before(
    checkpoint: Callable[[str], Path], whole: Callable[..., dict[str, str]], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    interrupted(source, out, job(ids_file, rules=RULES), monkeypatch)
    bigq.quantize(str(source), out)
    assert hashes(out) == whole("llama", rules=RULES)


def test_another_batch_is_allowed_and_told(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    interrupted(source, out, job(ids_file), monkeypatch, commits=2)
    bigq.quantize(str(source), out, job(ids_file, batch=4, quiet=False))
    assert "--batch was 3" in capsys.readouterr().err
    runs = [json.loads(line) for line in (out / ".bigq" / "runs.jsonl").read_text().splitlines()]
    assert [run["committed"] for run in runs] == [0, 2]
    assert runs[0]["notes"] == [] and any("--batch was 3" in note for note in runs[1]["notes"])


@pytest.mark.parametrize("every", [0.0, None, 1e9], ids=["each block", "never", "rarely"])
@pytest.mark.parametrize("activations", ["host", "disk"])
def test_saved_activations_spare_the_replay(
    every: float | None,
    activations: str,
    checkpoint: Callable[[str], Path],
    whole: Callable[..., dict[str, str]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted after the second block's shard: with a checkpoint the first block need not be replayed, and the bytes are the same."""
    source, out = checkpoint("llama"), tmp_path / "out"
    config = job(ids_file, checkpoint_every=every, activations=activations)
    interrupted(source, out, config, monkeypatch)
    saved = [path.name for path in (out / ".bigq").glob("activations-*")]
    assert saved == (["activations-00001.safetensors"] if every == 0 else [])
    replayed: list[int] = []
    propagate = solving.propagate

    def counting(index: int, *args: Any, **named: Any) -> None:
        replayed.append(index)
        propagate(index, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(solving, "propagate", counting)
        solved = count_solves(patch)
        bigq.quantize(str(source), out, config)
    assert replayed == ([1] if every == 0 else [0, 1])
    assert {label.split(".")[2] for label in solved} == {"2"}
    assert hashes(out) == whole("llama")
    assert not list((out / ".bigq").glob("activations-*")) and not (out / ".bigq" / "checkpoints.json").exists()


@pytest.mark.parametrize("damage", ["activations", "record", "gone"])
def test_damaged_checkpoints_cost_time_only(
    damage: str,
    checkpoint: Callable[[str], Path],
    whole: Callable[..., dict[str, str]],
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    config = job(ids_file, checkpoint_every=0.0)
    interrupted(source, out, config, monkeypatch, commits=4)
    state = out / ".bigq"
    saved = sorted(state.glob("activations-*"))
    assert [path.name for path in saved] == ["activations-00001.safetensors", "activations-00002.safetensors"]
    (out / "model-00004-of-00004.safetensors").unlink()
    if damage == "gone":
        saved[1].unlink()
    else:
        path = saved[1] if damage == "activations" else state / "checkpoints.json"
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        path.write_bytes(data)
    bigq.quantize(str(source), out, config)
    assert hashes(out) == whole("llama")


def test_shard_in_the_middle_is_made_again_alone(
    checkpoint: Callable[[str], Path], whole: Callable[..., dict[str, str]], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finished folder too; while it is incomplete, it cannot be loaded."""
    source, out = checkpoint("llama"), tmp_path / "out"
    bigq.quantize(str(source), out, job(ids_file))
    (out / "model-00003-of-00004.safetensors").unlink()
    with monkeypatch.context() as patch:
        solved = count_solves(patch)
        stop_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            bigq.quantize(str(source), out)
    assert {label.split(".")[2] for label in solved} == {"1"}
    assert not (out / "config.json").exists() and not (out / "model.safetensors.index.json").exists()
    bigq.quantize(str(source), out)
    assert hashes(out) == whole("llama")


def test_journal_line_in_the_middle_is_damaged(
    checkpoint: Callable[[str], Path], whole: Callable[..., dict[str, str]], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    interrupted(source, out, job(ids_file), monkeypatch, commits=4)
    path = out / ".bigq" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1].replace(b"0", b"1", 1), *lines[2:]]))
    with monkeypatch.context() as patch:
        solved = count_solves(patch)
        bigq.quantize(str(source), out, job(ids_file))
    assert {label.split(".")[2] for label in solved} == {"0"}
    assert hashes(out) == whole("llama")
    runs = [json.loads(line) for line in (out / ".bigq" / "runs.jsonl").read_text().splitlines()]
    assert any("journal.jsonl" in note for note in runs[-1]["notes"])


@pytest.mark.parametrize("what", ["shard touched", "shard replaced", "config"])
def test_source_that_changes_during_the_job(
    what: str, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[..., dict[str, str]]
) -> None:
    """Nothing that was made from it is committed; put back, the job goes on."""
    source, out = make_checkpoint(tmp_path / "m", "llama"), tmp_path / "out"
    victim = source / "config.json" if what == "config" else shard_of(source, "model.layers.1.mlp.down_proj.weight")
    kept, times = victim.read_bytes(), victim.stat()
    solve_block = solving.solve_block

    def meddling(job: Any, *args: Any, **kwargs: Any) -> Any:
        if job.index == 1:
            if what == "shard replaced":
                victim.unlink()
            victim.write_bytes(kept)
        yield from solve_block(job, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(solving, "solve_block", meddling)
        with pytest.raises(CheckpointError, match="changed or replaced while") as error:
            bigq.quantize(str(source), out, job(ids_file))
    assert str(victim) in str(error.value)
    assert [json.loads(line)["unit"] for line in (out / ".bigq" / "journal.jsonl").read_text().splitlines()] == ["rest-0", "block-0"]
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    bigq.quantize(str(source), out, job(ids_file))
    assert hashes(out) == whole("llama")


def test_with_several_threads_too(ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model that is large enough for its products and sums to be shared out between threads."""
    source = make_checkpoint(tmp_path / "m", "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = job(ids_file, samples=16, seqlen=40, batch=8)
        bigq.quantize(str(source), tmp_path / "whole", config)
        interrupted(source, tmp_path / "out", config, monkeypatch, commits=2)
        bigq.quantize(str(source), tmp_path / "out", config)
    finally:
        torch.set_num_threads(before)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
