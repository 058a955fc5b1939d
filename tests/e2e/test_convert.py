"""Jobs in every format, and re-packing from one to another: the same codes, scales and zero points, bit for bit, or a refusal."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_checkpoint, random_ids, rewrite, save_ids, shard_of, stored_tensors, streamed_logits

import bigq
from bigq.cli import main
from bigq.config import JobConfig
from bigq.errors import BigqError, ResourceError, UsageError
from bigq.io import writer
from bigq.sched.convert import MARK, convert
from bigq.sched.verify import verify
from bigq.scheme import QuantScheme, Rule

RULES = (Rule(r".*\.1\..*o_proj", None), Rule.parse(r".*\.down_proj:bits=8,group_size=-1"), Rule.parse(r".*\.up_proj:bits=3,sym=false"))
FORMATS = ("gptq", "gptq_v2", "compressed-tensors")


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def job(ids: Path, **changes: Any) -> JobConfig:
    values = {"scheme": QuantScheme(group_size=32, scale_bits=8), "rules": RULES, "calibration": str(ids), "samples": 8, "seqlen": 24}
    return JobConfig(**{**values, "quiet": True, **changes})


def logits(folder: Path) -> torch.Tensor:
    return streamed_logits(folder, random_ids()[:4], 2)


@pytest.fixture(scope="module")
def made(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, format, scheme's changes) → the folder of a finished job; each is run once."""
    ids = save_ids(tmp_path_factory.mktemp("ids") / "ids.safetensors", random_ids())
    known: dict[str, Path] = {}

    def get(family: str, format: str, **scheme: Any) -> Path:
        key = f"{family} {format} {scheme}"
        if key not in known:
            known[key] = tmp_path_factory.mktemp("out")
            changed = QuantScheme(**{"group_size": 32, "scale_bits": 8, **scheme})
            bigq.quantize(str(checkpoint(family)), known[key], job(ids, format=format, scheme=changed))
        return known[key]

    return get


@pytest.mark.parametrize("before", FORMATS)
@pytest.mark.parametrize("after", FORMATS)
def test_what_is_repacked_is_what_a_job_in_that_format_writes(before: str, after: str, made: Callable[..., Path], tmp_path: Path) -> None:
    if before == after:
        with pytest.raises(UsageError, match=f"is in the {after} format already"):
            convert(made("llama", before), tmp_path / "out", after)
        return
    done = convert(made("llama", before), tmp_path / "out", after)
    assert (done.format_before, done.format, done.linears) == (before, after, 3 * 7 - 1)
    got, expected = hashes(tmp_path / "out"), hashes(made("llama", after))
    assert got.keys() == expected.keys()
    differing = {name for name in got if got[name] != expected[name]}
    assert differing <= {"config.json", "quantize_config.json"}, "these tell of what only the job knew"
    assert torch.equal(logits(tmp_path / "out"), logits(made("llama", before)))


@pytest.mark.parametrize("family", ["qwen2", "opt", "bloom"])
def test_other_families(family: str, made: Callable[..., Path], tmp_path: Path) -> None:
    """With biases and tied embeddings."""
    convert(made(family, "gptq_v2", symmetric=False), tmp_path / "ct", "compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "back", "gptq_v2")
    before, after = stored_tensors(made(family, "gptq_v2", symmetric=False)), stored_tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(tmp_path / "ct"), logits(tmp_path / "back"))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_a_compressed_tensors_job_is_verified_and_taken_up(
    symmetric: bool, made: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    out = made("llama", "compressed-tensors", symmetric=symmetric)
    assert verify(out) == [], "sound"
    expected = hashes(out)
    shards = sorted(out.glob("*.safetensors"))
    shards[2].unlink()
    assert any(shards[2].name in line for line in verify(out))
    bigq.quantize(str(checkpoint("llama")), out)
    assert hashes(out) == expected


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_verify_looks_at_every_tensor_of_a_compressed_tensors_job(suffix: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Values that the hashes of a forged record would pass."""
    from bigq.io.formats import FORMATS as KNOWN
    from bigq.sched.scan import scan_shard

    ids = save_ids(tmp_path / "ids.safetensors", random_ids())
    bigq.quantize(str(checkpoint("llama")), tmp_path / "out", job(ids, format="compressed-tensors"))
    name = f"model.layers.1.mlp.up_proj.{suffix}"
    path = shard_of(tmp_path / "out", name)
    assert scan_shard(path, KNOWN["compressed-tensors"]).problems == ()
    tensor = stored_tensors(tmp_path / "out")[name]
    wrong = {"weight_scale": -tensor, "weight_shape": tensor + 1}.get(suffix, tensor[:-1].clone())
    rewrite(tmp_path / "out", name, wrong)
    assert any(name.rpartition(".")[0] in problem for problem in scan_shard(path, KNOWN["compressed-tensors"]).problems)


def test_scales_follow_the_type_of_the_checkpoint(tmp_path: Path) -> None:
    ids = save_ids(tmp_path / "ids.safetensors", random_ids())
    for dtype, bits in (("bfloat16", 8), ("float16", 11), ("float32", 11)):
        source = make_checkpoint(tmp_path / dtype, "llama", dtype=getattr(torch, dtype), num_hidden_layers=1)
        out = tmp_path / f"{dtype}-out"
        bigq.quantize(str(source), out, job(ids, scheme=QuantScheme(group_size=32), rules=()))
        scales = torch.cat([t.flatten() for name, t in stored_tensors(out).items() if name.endswith(".scales")])
        pattern = scales.view(torch.int16) % (1 << (11 - 8))
        assert bool((pattern == 0).all()) == (bits == 8)
        assert json.loads((out / ".bigq" / "job.json").read_text())["settings"]["scheme"]["scale_bits"] == bits
        assert verify(out) == []


# What does not fit is refused, and leaves nothing behind.


def refused(source: Path, out: Path, to: str, match: str, error: type[BigqError] = UsageError) -> None:
    with pytest.raises(error, match=match):
        convert(source, out, to)
    assert not [*out.parent.glob("out*")], "something is left"


def test_a_zero_point_of_zero_does_not_fit_the_first_version(made: Callable[..., Path], tmp_path: Path) -> None:
    source = made("llama", "gptq_v2", symmetric=False)
    zeros = {name: t for name, t in stored_tensors(source).items() if name.endswith(".qzeros")}
    assert zeros
    name = "model.layers.0.self_attn.q_proj.qzeros"
    copy = tmp_path / "copy"
    os.makedirs(copy)
    for path in source.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    rewrite(copy, name, torch.zeros_like(zeros[name]))
    refused(copy, tmp_path / "out", "gptq", r"model\.layers\.0\.self_attn\.q_proj: has zero points of 0.*gptq_v2")


def test_scales_that_do_not_fit_the_models_type_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "llama", dtype=torch.bfloat16, num_hidden_layers=1)
    ids = save_ids(tmp_path / "ids.safetensors", random_ids())
    bigq.quantize(str(source), tmp_path / "fine", job(ids, scheme=QuantScheme(group_size=32, scale_bits=11)))
    refused(tmp_path / "fine", tmp_path / "out", "compressed-tensors", r"scales do not fit torch\.bfloat16.*--scale-bits 8")
    with pytest.raises(UsageError, match=r"scales do not fit torch\.bfloat16"):
        bigq.quantize(
            str(source), tmp_path / "job", job(ids, scheme=QuantScheme(group_size=32, scale_bits=11), format="compressed-tensors")
        )


def test_linears_stored_transposed_do_not_fit_compressed_tensors(
    made: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    refused(made("gpt2", "gptq"), tmp_path / "out", "compressed-tensors", r"c_attn is stored transposed \(Conv1D\)")
    ids = save_ids(tmp_path / "ids.safetensors", random_ids())
    with pytest.raises(UsageError, match="stored transposed"):
        bigq.quantize(str(checkpoint("gpt2")), tmp_path / "job", job(ids, format="compressed-tensors"))
    assert not (tmp_path / "job").exists()


def test_what_is_not_packed_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    refused(checkpoint("llama"), tmp_path / "out", "gptq", "is not quantized")


def test_a_folder_in_use_is_left_alone(made: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        convert(made("llama", "gptq"), tmp_path / "there", "gptq_v2")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    with pytest.raises(UsageError, match="in the way"):
        convert(made("llama", "gptq"), tmp_path / "out", "gptq_v2")
    assert (tmp_path / "there" / "mine").read_text() == (tmp_path / "out.partial" / "mine").read_text() == "x"


def test_what_a_killed_conversion_left_is_cleared_away(made: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / MARK).touch()
    (tmp_path / "out.partial" / "half").write_text("x")
    (tmp_path / "out").mkdir()
    convert(made("llama", "gptq"), tmp_path / "out", "gptq_v2")
    assert not (tmp_path / "out.partial").exists()
    assert hashes(tmp_path / "out").keys() == hashes(made("llama", "gptq_v2")).keys()


def test_a_disk_that_fills_up_leaves_nothing(made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def point(name: str) -> None:
        if name == "shard.piece":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.faults, "point", point)
    refused(made("llama", "gptq"), tmp_path / "out", "gptq_v2", "No space left.*free some space", ResourceError)


def test_a_disk_too_small_is_told_before(made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigq.sched import convert as module

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refused(made("llama", "gptq"), tmp_path / "out", "gptq_v2", "of disk space are free there", ResourceError)


def test_the_command_line(made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(made("llama", "gptq")), str(tmp_path / "out"), "--to", "compressed-tensors"]) == 0
    told = capsys.readouterr()
    assert "20 Linears, gptq → compressed-tensors" in told.out and "model-00001-of" in told.err
    assert main(["convert", str(made("llama", "gptq")), str(tmp_path / "out2"), "--to", "gptq_v2", "--quiet"]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "")
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "out2"), "--to", "gptq"]) == 2
