"""Whole jobs in which something is not finite or cannot be solved, stopped or gone on with.

The model overflows in fp16 where token ``TRIGGER`` stands, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    FIRST_ID,
    decode,
    linear_module,
    logits_of,
    make_checkpoint,
    packed_prefixes,
    put_matrix,
    random_ids,
    reference_model,
    rewrite,
    save_ids,
    stored_tensors,
    streamed_logits,
)
from torch import Tensor

import bigq
from bigq.config import JobConfig
from bigq.errors import NumericsError
from bigq.infer.evaluate import EvalConfig, evaluate
from bigq.inspect.verify import verify
from bigq.job.journal import Commit, Journal
from bigq.machine.ceilings import Ceilings, measure
from bigq.methods import gptq as gptq_module
from bigq.sched.plan import inputs
from bigq.scheme import QuantScheme, Rule
from bigq.solver import hessian

ROWS, SEQLEN, TRIGGER = 8, 24, 5
#: Where the trigger stands: at the end of one row.
BAD_ROW = 2


def job(ids: Path, **changes: Any) -> JobConfig:
    values = {
        "scheme": QuantScheme(group_size=32),
        "calibration": str(ids),
        "samples": ROWS,
        "seqlen": SEQLEN,
        "batch": 3,
        "dtype": "float16",
        "on_nonfinite": "skip",
        "device": "cpu",
    }
    return JobConfig(**{**values, **changes})


@pytest.fixture(scope="module", autouse=True)
def _quick_plans() -> Iterator[None]:
    """Plans take the rates of fp32: products of 1024² in fp16 take a CPU 3 s each."""

    def rates(device: torch.device, dtype: torch.dtype) -> Ceilings:
        return measure(device, torch.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "measure", rates)
        yield


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def commits(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ".bigq" / "journal.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = random_ids(ROWS, SEQLEN, seed=1)
    tokens[tokens == TRIGGER] = FIRST_ID
    tokens[BAD_ROW, -1] = TRIGGER
    return save_ids(tmp_path_factory.mktemp("ids") / "ids.safetensors", tokens)


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose first MLP overflows in fp16 for the trigger: input 0 of it is 0 for all other tokens."""
    folder = make_checkpoint(tmp_path_factory.mktemp("fragile") / "model", "llama")
    tensors = stored_tensors(folder)
    embedding = tensors["model.embed_tokens.weight"].clone()
    embedding[:, 0] = 0
    embedding[TRIGGER, 0] = 1000
    rewrite(folder, "model.embed_tokens.weight", embedding)
    silent = tensors["model.layers.0.self_attn.o_proj.weight"].clone()
    silent[0] = 0
    rewrite(folder, "model.layers.0.self_attn.o_proj.weight", silent)
    for name in ("gate_proj", "up_proj"):
        weight = tensors[f"model.layers.0.mlp.{name}.weight"].clone()
        weight[:, 0] = 100
        rewrite(folder, f"model.layers.0.mlp.{name}.weight", weight)
    return folder


@pytest.fixture(scope="module")
def skipped_run(fragile: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("skipped") / "out"
    bigq.quantize(str(fragile), out, job(ids, quiet=True))
    return out


def with_packed(source: Path, out: Path) -> torch.nn.Module:
    """The original model with what ``out`` packed in the place of those Linears."""
    model, tensors = reference_model(source), stored_tensors(out)
    for prefix in packed_prefixes(tensors):
        put_matrix(linear_module(model, prefix), decode(tensors, prefix, 4).weight(torch.float32))
    return model


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("llama", QuantScheme(group_size=-1, order="activation")),
        ("bloom", QuantScheme(group_size=32)),
        ("gpt2", QuantScheme(group_size=32)),
    ],
)
def test_where_all_is_finite_the_bytes_are_the_same(
    family: str, scheme: QuantScheme, checkpoint: Callable[[str], Path], ids: Path, tmp_path: Path
) -> None:
    outs = []
    for how in ("stop", "skip"):
        bigq.quantize(str(checkpoint(family)), tmp_path / how, job(ids, scheme=scheme, dtype="auto", on_nonfinite=how, quiet=True))
        outs.append(hashes(tmp_path / how))
    assert outs[0] == outs[1]


def test_a_job_stops_by_default_and_names_the_linear(fragile: Path, ids: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"^model\.layers\.0\.mlp\.down_proj: .*contain NaN or Inf.*--on-nonfinite skip") as caught:
        bigq.quantize(str(fragile), tmp_path / "out", job(ids, on_nonfinite="stop", quiet=True))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out" / "config.json").exists()


def test_one_row_overflows(fragile: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything is quantized all the same, and the other rows' logits are as near the original's as those of a sound job."""
    out = tmp_path / "out"
    report = bigq.quantize(str(fragile), out, job(ids))
    assert len(report.linears) == 3 * 7 and not report.left_out
    said = capsys.readouterr().err
    lost = [int(n) for n in re.findall(r"block \d: the outputs of (\d+) calibration tokens are not finite", said)]
    assert len(lost) == 2 and 1 <= lost[0] <= lost[1] <= SEQLEN
    tokens = random_ids(4, SEQLEN, seed=9)
    tokens[tokens == TRIGGER] = FIRST_ID
    original = logits_of(reference_model(fragile), tokens, 4)
    got = streamed_logits(out, tokens, 4, "float32")
    assert torch.equal(got, logits_of(with_packed(fragile, out), tokens, 4))
    bigq.quantize(str(fragile), tmp_path / "sound", job(ids, dtype="float32", quiet=True))
    sound = streamed_logits(tmp_path / "sound", tokens, 4, "float32")
    assert torch.isfinite(got).all()
    assert float((got - original).square().mean()) < 1.5 * float((sound - original).square().mean())


@pytest.mark.parametrize("changes", [{"activations": "disk"}, {"read_ahead": 1}], ids=str)
def test_how_the_job_is_run_changes_nothing(changes: dict[str, Any], fragile: Path, ids: Path, skipped_run: Path, tmp_path: Path) -> None:
    bigq.quantize(str(fragile), tmp_path / "out", job(ids, quiet=True, **changes))
    assert hashes(tmp_path / "out") == hashes(skipped_run)


def interrupt(number: int, source: Path, out: Path, config: JobConfig) -> None:
    """Run a job that is stopped right after so many commits."""
    commit, done = Journal.commit, []

    def striking(self: Journal, record: Commit) -> None:
        commit(self, record)
        done.append(record.unit)
        if len(done) == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "commit", striking)
        with pytest.raises(KeyboardInterrupt):
            bigq.quantize(str(source), out, config)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_an_interrupted_job_leaves_out_the_same_tokens(number: int, fragile: Path, ids: Path, skipped_run: Path, tmp_path: Path) -> None:
    interrupt(number, fragile, tmp_path / "out", job(ids, quiet=True))
    assert bigq.quantize(str(fragile), tmp_path / "out", job(ids, quiet=True)).resumed_blocks == number - 1
    assert hashes(tmp_path / "out") == hashes(skipped_run)


def test_a_job_that_stopped_can_be_gone_on_with(fragile: Path, ids: Path, skipped_run: Path, tmp_path: Path) -> None:
    """Until it stopped, both ways do the same."""
    with pytest.raises(NumericsError):
        bigq.quantize(str(fragile), tmp_path / "out", job(ids, on_nonfinite="stop", quiet=True))
    bigq.quantize(str(fragile), tmp_path / "out", job(ids, quiet=True))
    assert hashes(tmp_path / "out") == hashes(skipped_run)


def indefinite(patch: pytest.MonkeyPatch, linear: str) -> None:
    """Let every factorization of this Linear's Hessian fail."""
    factorize, upper_cholesky_ = gptq_module.factorize, hessian.upper_cholesky_

    def chosen(h: Tensor, *, name: str, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(hessian, "upper_cholesky_", (lambda _: False) if linear in name else upper_cholesky_)
            return factorize(h, name=name, **options)

    patch.setattr(gptq_module, "factorize", chosen)


@pytest.mark.parametrize("linear", ["self_attn.o_proj", "mlp.up_proj"])
def test_a_linear_that_cannot_be_factored_stays_as_it_is(
    linear: str,
    checkpoint: Callable[[str], Path],
    ids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle block; so it does in a job that is taken up again, and where the output is read."""
    source, out = checkpoint("llama"), tmp_path / "out"
    indefinite(monkeypatch, f"layers.1.{linear}")
    report = bigq.quantize(str(source), out, job(ids, dtype="auto"))
    left = ["gate_proj", "up_proj"] if linear == "mlp.up_proj" else ["o_proj"]
    left = [f"model.layers.1.{linear.partition('.')[0]}.{name}" for name in left]
    assert list(report.left_out) == left and len(report.linears) == 3 * 7 - len(left)
    said = capsys.readouterr().err
    for name in left:
        assert f"block 2: {name} stays unquantized: its Hessian is not positive definite even with damping 1\n" in said
    assert [commit["left_out"] for commit in commits(out)] == [[], [], left, []]
    assert commits(out)[2]["skipped"] == dict.fromkeys(left, "its Hessian is not positive definite even with damping 1")
    tensors, original = stored_tensors(out), stored_tensors(source)
    for name in left:
        assert torch.equal(tensors[f"{name}.weight"], original[f"{name}.weight"]) and f"{name}.qweight" not in tensors
    dynamic = json.loads((out / "config.json").read_text())["quantization_config"]["dynamic"]
    assert [re.fullmatch(pattern.removeprefix("-:"), name) is not None for pattern, name in zip(dynamic, left, strict=True)] == [
        True
    ] * len(left)
    tokens = random_ids(2, SEQLEN, seed=9)
    assert torch.equal(streamed_logits(out, tokens, 2), logits_of(with_packed(source, out), tokens, 2))
    interrupt(3, source, tmp_path / "again", job(ids, dtype="auto", quiet=True))
    bigq.quantize(str(source), tmp_path / "again", job(ids, dtype="auto", quiet=True))
    assert hashes(tmp_path / "again") == hashes(out)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_where_nothing_could_be_quantized_the_folder_is_a_plain_checkpoint(
    format: str, checkpoint: Callable[[str], Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    indefinite(monkeypatch, "layers.1.self_attn.o_proj")
    bigq.quantize(str(source), out, job(ids, format=format, quiet=True, rules=(Rule(r"(?!model\.layers\.1\.self_attn\.o_proj)", None),)))
    assert "quantization_config" not in json.loads((out / "config.json").read_text()) and not (out / "quantize_config.json").exists()
    original = stored_tensors(source)
    assert all(torch.equal(tensor, original[name]) for name, tensor in stored_tensors(out).items()) and verify(out) == []
    tokens = random_ids(2, SEQLEN, seed=9)
    assert torch.equal(streamed_logits(out, tokens, 2), streamed_logits(source, tokens, 2))


def overflowing(folder: Path, block: int) -> Path:
    """A llama in one of whose blocks every token overflows in fp16 before ``down_proj``."""
    make_checkpoint(folder, "llama")
    for name in ("gate_proj", "up_proj"):
        weight = stored_tensors(folder)[f"model.layers.{block}.mlp.{name}.weight"]
        rewrite(folder, f"model.layers.{block}.mlp.{name}.weight", weight * 3000)
    return folder


def test_a_linear_that_sees_nothing_finite_stays_as_it_is(ids: Path, tmp_path: Path) -> None:
    source, out = overflowing(tmp_path / "model", 2), tmp_path / "out"
    report = bigq.quantize(str(source), out, job(ids, quiet=True))
    assert report.left_out == ("model.layers.2.mlp.down_proj",)
    (reason,) = commits(out)[3]["skipped"].values()
    assert reason == "the calibration inputs of all tokens contain NaN or Inf"
    tokens = random_ids(2, SEQLEN, seed=9)
    got = streamed_logits(out, tokens, 2, "float32")
    assert torch.isfinite(got).all() and torch.equal(got, logits_of(with_packed(source, out), tokens, 2))


def test_a_job_with_nothing_finite_left_stops(ids: Path, tmp_path: Path) -> None:
    source, out = overflowing(tmp_path / "model", 0), tmp_path / "out"
    with pytest.raises(NumericsError, match=r"^model\.layers\.0: its outputs contain NaN or Inf for every calibration token") as caught:
        bigq.quantize(str(source), out, job(ids, quiet=True))
    assert caught.value.exit_code == 3 and not (out / "config.json").exists()


def test_an_evaluation_whose_head_overflows_says_so(ids: Path, tmp_path: Path) -> None:
    """Of the model or of the baseline. In another dtype there are figures."""
    plain, source = (make_checkpoint(tmp_path / name, "llama", num_hidden_layers=1) for name in ("plain", "model"))
    rewrite(source, "lm_head.weight", stored_tensors(source)["lm_head.weight"] * 1e5)
    how: dict[str, Any] = {"data": str(ids), "samples": 2, "seqlen": SEQLEN, "device": "cpu", "quiet": True}
    said = "logits contain NaN or Inf; use another --dtype (bfloat16 has more range than float16)"
    for model, baseline in ((source, None), (source, plain), (plain, source)):
        with pytest.raises(NumericsError) as caught:
            evaluate(str(model), EvalConfig(dtype="float16", **how), baseline=None if baseline is None else str(baseline))
        assert str(caught.value) == f"{source}: {said}"
    found = evaluate(str(source), EvalConfig(dtype="bfloat16", **how), baseline=str(plain))
    assert found.kl is not None and found.kl_stderr is not None and found.kl > 0 and found.kl_stderr > 0
