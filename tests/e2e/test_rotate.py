"""Jobs with ``--rotate``: the rotated model computes what the original does, and the output is a plain model that every reader takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_checkpoints import coded_and_decoded
from models import (
    decode,
    logits_of,
    make_checkpoint,
    packed_prefixes,
    random_ids,
    reference_model,
    rewrite,
    stored_tensors,
    streamed_logits,
)

import bigq
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import UnsupportedModelError, UsageError
from bigq.io.writer import OutputTensor, write_shard
from bigq.job.journal import Commit, Journal
from bigq.model.pager import Pager
from bigq.model.rotation.matrices import Rotation
from bigq.model.rotation.roles import STREAM_SEED
from bigq.scheme import QuantScheme, Rule

CPU = torch.device("cpu")
IDS = random_ids(4, 24, seed=5)
#: The largest difference of logits in fp32, relative to their norm.
SAME = 1e-5


def job(ids: Path, **changes: Any) -> JobConfig:
    values = {
        "scheme": QuantScheme(group_size=32),
        "calibration": str(ids),
        "samples": 8,
        "seqlen": 24,
        "batch": 3,
        "device": "cpu",
        "quiet": True,
        "rotate": True,
    }
    return JobConfig(**{**values, **changes})


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def distance(folder: Path, other: Path) -> float:
    one, two = (logits_of(reference_model(f), IDS, 2) for f in (folder, other))
    return float((one - two).norm() / two.norm())


def unquantized(source: Path, out: Path) -> Path:
    """The rotated model as a checkpoint of its own."""
    with torch.no_grad():
        pager = Pager(source, device=CPU, rotate=True)
        out.mkdir()
        write_shard(out / "model.safetensors", [OutputTensor.copy_of(info) for info in pager.checkpoint.tensors.values()])
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"hidden_size": 72, "head_dim": 18}),
        ("mistral", {"num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("phi3", {}),
        ("mixtral", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "-",
)
def test_the_rotated_model_computes_the_same(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """In fp32, by transformers. Its weights are others, or nothing was tried."""
    source = make_checkpoint(tmp_path / "source", family, **changes)
    rotated = unquantized(source, tmp_path / "rotated")
    assert distance(rotated, source) < SAME
    before, after = stored_tensors(source), stored_tensors(rotated)
    assert set(after) == {*before, "lm_head.weight"}
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert same == [name for name in before if name.endswith((".bias", "q_norm.weight", "k_norm.weight")) and name in same]
    assert all(bool((after[name] == 1).all()) for name in after if name.endswith("layernorm.weight") or name == "model.norm.weight")


def test_streaming_computes_with_the_rotated_weights(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The pager's view of the source is the checkpoint that the rotated model would be, bit for bit."""
    source = checkpoint("llama")
    rotated = unquantized(source, tmp_path / "rotated")
    with torch.no_grad():
        viewed, plain = Pager(source, device=CPU, rotate=True), Pager(rotated, device=CPU)
        for name in plain.state_names:
            assert torch.equal(viewed.value_of(name), plain.value_of(name)), name
    assert torch.allclose(streamed_logits(rotated, IDS, 2), logits_of(reference_model(rotated), IDS, 2), atol=1e-6)


@pytest.mark.parametrize(("family", "method"), [("llama", "gptq"), ("llama", "gptaq"), ("phi3", "rtn"), ("mixtral", "gptq")])
def test_packed_weights_are_those_of_the_rotated_model(
    family: str, method: str, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path
) -> None:
    """A job on the rotated checkpoint writes the same bytes: calibration, both streams and packing see the rotated model only.

    Its Linears that stay unquantized are in the output as the rotated model has them.
    """
    source, skipped = checkpoint(family), (Rule(r".*\.o_proj", None),)
    rotated = unquantized(source, tmp_path / "rotated")
    bigq.quantize(str(source), tmp_path / "one", job(ids_file, method=method, rules=skipped))
    bigq.quantize(str(rotated), tmp_path / "other", job(ids_file, method=method, rules=skipped, rotate=False))
    one, other = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "other")
    assert set(one) == set(other) and any(name.endswith("o_proj.weight") for name in one)
    for name, tensor in other.items():
        assert torch.equal(one[name], tensor), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "other")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors", "gguf"])
def test_formats(format: str, ids_file: Path, tmp_path: Path) -> None:
    """8 bits of a tied model come close to the original, whatever the format; verify finds nothing."""
    source, out = make_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True), tmp_path / "out"
    bits = 4 if format == "gguf" else 8
    bigq.quantize(str(source), out, job(ids_file, format=format, scheme=QuantScheme(group_size=32, bits=bits)))
    assert main(["verify", str(out)]) == 0
    found, expected = streamed_logits(out, IDS, 2, "float32"), logits_of(reference_model(source), IDS, 2)
    assert float((found - expected).norm() / expected.norm()) < (0.5 if format == "gguf" else 0.05)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert (out / "model.gguf").exists() == (format == "gguf")


def test_head_of_its_own(ids_file: Path, tmp_path: Path) -> None:
    """A tied head is written by itself, so --lm-head can quantize it."""
    source = make_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True)
    for name, lm_head in (("plain", False), ("packed", True)):
        bigq.quantize(str(source), tmp_path / name, job(ids_file, lm_head=lm_head, scheme=QuantScheme(group_size=32, bits=8)))
    plain, packed = stored_tensors(tmp_path / "plain"), stored_tensors(tmp_path / "packed")
    before = stored_tensors(source)
    turned = Rotation(64, STREAM_SEED).turn(before["model.embed_tokens.weight"])
    assert torch.allclose(plain["model.embed_tokens.weight"], turned, atol=1e-5)
    head = Rotation(64, STREAM_SEED).turn(before["model.embed_tokens.weight"] * before["model.norm.weight"])
    assert torch.allclose(plain["lm_head.weight"], head, atol=1e-5)
    assert "lm_head" in packed_prefixes(packed) and "lm_head.weight" not in packed
    assert torch.allclose(decode(packed, "lm_head", 8).weight(torch.float32), head, atol=0.02)


@pytest.mark.parametrize("commits", [1, 2, 3])
@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_interrupted_job_ends_with_the_same_bytes(
    method: str, commits: int, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    bigq.quantize(str(source), tmp_path / "whole", job(ids_file, method=method))
    commit, done = Journal.commit, []

    def striking(self: Journal, record: Commit) -> None:
        commit(self, record)
        done.append(record.unit)
        if len(done) == commits:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "commit", striking)
        with pytest.raises(KeyboardInterrupt):
            bigq.quantize(str(source), tmp_path / "out", job(ids_file, method=method))
    assert not (tmp_path / "out/config.json").exists()
    with pytest.raises(UsageError, match=r"^--no-rotate: the job in .* was begun with --rotate; resume it with that"):
        bigq.quantize(str(source), tmp_path / "out", job(ids_file, method=method, rotate=False))
    bigq.quantize(str(source), tmp_path / "out")  # the record has the option
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_refused_before_anything_is_written(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^--rotate: .*gpt_neox.* reads the residual stream behind no norm"):
        bigq.quantize(str(checkpoint("gpt_neox")), tmp_path / "out", job(ids_file))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedModelError, match=r"^--rotate: .*post_attention_layernorm weighs features"):
        bigq.plan(str(checkpoint("gemma2")), tmp_path / "out", job(ids_file))


def test_plan_counts_the_head(tmp_path: Path, ids_file: Path) -> None:
    """The output of a tied model grows by a head, and nothing else of it."""
    source = make_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True)
    plain, rotated = (bigq.plan(str(source), tmp_path / "out", job(ids_file, rotate=rotate)) for rotate in (False, True))
    assert rotated.cost.output - plain.cost.output == 128 * 64 * 4
    assert rotated.cost.host > plain.cost.host


def test_outliers_cost_less(ids_file: Path, tmp_path: Path) -> None:
    """Weights of some inputs are 30 times as large as others, and their norms as much smaller: rows of 4 bits lose the others.

    Rotated, such a model is the same as without them.
    """
    source = make_checkpoint(tmp_path / "source", "llama")
    for name, tensor in stored_tensors(source).items():
        if name.endswith("layernorm.weight"):
            tensor[::16] /= 30
        elif any(f".{reader}_proj." in name for reader in ("q", "k", "v", "gate", "up")):
            tensor[:, ::16] *= 30
        rewrite(source, name, tensor)
    expected, errors = logits_of(reference_model(source), IDS, 2), []
    for rotate in (False, True):
        out = tmp_path / f"{rotate}"
        bigq.quantize(str(source), out, job(ids_file, rotate=rotate, scheme=QuantScheme(group_size=-1)))
        errors.append(float((streamed_logits(out, IDS, 2, "float32") - expected).norm() / expected.norm()))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("kind", ["fp8 blocks", "nvfp4"])
def test_weights_of_8_or_4_bits_are_decoded_first(kind: str, ids_file: Path, tmp_path: Path) -> None:
    """The same as from the decoded checkpoint."""
    source = make_checkpoint(tmp_path / "source", "llama", dtype=torch.bfloat16, tie_word_embeddings=True)
    outputs = []
    for i, folder in enumerate(coded_and_decoded(source, tmp_path / "coded", kind)):
        bigq.quantize(str(folder), tmp_path / str(i), job(ids_file))
        outputs.append(stored_tensors(tmp_path / str(i)))
    one, other = outputs
    assert set(one) == set(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
