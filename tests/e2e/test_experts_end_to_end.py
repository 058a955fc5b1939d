"""Models with experts, from a checkpoint to a quantized folder: bits, codes, resuming, and what reads the folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import aligned
from moe_families import MOE_FAMILIES, families_and_dtypes, moe_model, random_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import bigq
from bigq.config import JobConfig
from bigq.errors import CheckpointError, Stopped, UsageError
from bigq.infer.evaluate import Stream
from bigq.infer.load import load_model
from bigq.inspect.history import read_history
from bigq.io.formats import FORMATS
from bigq.io.index import Checkpoint
from bigq.io.reader import read_tensor
from bigq.job.stop import Stop
from bigq.kernels.dequantize import dequantize_packed
from bigq.model.pager import Pager
from bigq.reports.write import write_report
from bigq.sched.units import experts as units
from bigq.scheme import QuantScheme, Rule
from bigq.solver.gptq import quantize_linear
from bigq.solver.hessian import HessianSum

CPU = torch.device("cpu")
SCHEME = QuantScheme(bits=4, group_size=16, order="activation")
#: Families whose checkpoints hold every matrix of every expert by itself.
BY_MATRIX = [family for family in MOE_FAMILIES if family not in ("gpt_oss", "granitemoe", "llama4_text")]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    moe_model(family, dtype, **changes).save_pretrained(folder / "model")  # type: ignore[operator]
    save_file({"input_ids": random_tokens(16, 32)}, folder / "ids.safetensors")
    return folder / "model"


def job(folder: Path, **changes: Any) -> JobConfig:
    given = {
        "calibration": str(folder / "ids.safetensors"),
        "samples": 16,
        "seqlen": 32,
        "batch": 4,
        "device": "cpu",
        "format": "compressed-tensors",
        "scheme": SCHEME,
        "quiet": True,
    }
    return JobConfig(**{**given, **changes})


def small_groups(monkeypatch: pytest.MonkeyPatch, model: Path, experts: int = 3) -> None:
    """Let a shard hold so many experts."""
    bank = next(iter(Pager(model, device=CPU).banks.values()))
    weights = sum(part.shape[0] * part.shape[1] for sources in bank.sources.values() for part in sources[0].parts)
    monkeypatch.setattr(units, "GROUP_WEIGHTS", experts * weights)


def streamed(folder: Path, ids: Tensor, batch: int = 4) -> Tensor:
    stream = Stream(Pager(folder, device=CPU), ids, batch)
    with stream.tail_ready():
        return torch.cat([stream.logits(lo, lo + batch) for lo in range(0, len(ids), batch)])


def whole(model: nn.Module, ids: Tensor, batch: int = 4) -> Tensor:
    return torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(batch)])


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


@pytest.mark.parametrize(("family", "dtype"), families_and_dtypes(MOE_FAMILIES))
def test_streamed_logits_are_those_of_the_whole_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, with one expert after the other ("eager"); not with another expert."""
    model = saved(family, tmp_path, dtype)
    ids = random_tokens(8, 16)
    reference = aligned(AutoModelForCausalLM.from_pretrained(model, dtype=dtype, experts_implementation="eager")).eval()
    expected = whole(reference, ids)
    assert torch.equal(streamed(model, ids), expected)
    next(p for name, p in reference.named_parameters() if "experts" in name and p.ndim == 3)[:2] *= 1.05
    assert not torch.equal(whole(reference, ids), expected)


@pytest.mark.parametrize(("family", "dtype"), families_and_dtypes(BY_MATRIX))
def test_a_quantized_model(family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sound, made again with holes it has the same bytes, and read whole it computes what it computes streamed."""
    model, out = saved(family, tmp_path, dtype), tmp_path / "out"
    small_groups(monkeypatch, model)
    report = bigq.quantize(str(model), out, job(tmp_path))
    banks = Pager(model, device=CPU).banks
    names = {name for bank in banks.values() for name in bank.linears()}
    assert names and names <= {record["name"] for record in report.linears}
    assert bigq.verify(out) == []
    made = hashes(out)
    shards = [name for name in made if name.endswith(".safetensors")]
    assert len(shards) > 2 + len(banks)
    for lost in ([shards[-1]], shards[1::2], shards[2:5]):
        for name in lost:
            (out / name).unlink()
        bigq.quantize(str(model), out, job(tmp_path))
        assert hashes(out) == made, lost
    ids = random_tokens(8, 16)
    logits = streamed(out, ids)
    assert torch.equal(whole(load_model(out, device="cpu"), ids), logits)
    assert not torch.equal(logits, streamed(model, ids))


def dequantized(out: Path, name: str) -> Tensor:
    checkpoint, format = Checkpoint.open(out), FORMATS["compressed-tensors"]
    words, scales, zeros = format.read(name, lambda key: read_tensor(checkpoint[key]), SCHEME)
    return dequantize_packed(words, scales, zeros, SCHEME.bits, torch.float32)


class Seen:
    """The inputs of modules of an in-memory model."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Any]] = {}

    def hook(self, name: str) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.inputs.setdefault(name, []).append((args, kwargs))

        return before


@pytest.mark.parametrize(("family", "names"), [("qwen3_moe", ("gate_proj", "up_proj", "down_proj")), ("mixtral", ("w1", "w3", "w2"))])
def test_codes_are_those_of_gptq_in_memory(family: str, names: tuple[str, str, str], tmp_path: Path) -> None:
    """A plain loop over the model's own modules: attention's Linears as bigq solved them, then every expert's by hand."""
    model, out = saved(family, tmp_path, num_hidden_layers=1), tmp_path / "out"
    bigq.quantize(str(model), out, job(tmp_path))
    reference = aligned(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager")).eval()
    block = reference.model.layers[0]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(block.self_attn, name).weight.copy_(dequantized(out, f"model.layers.0.self_attn.{name}"))
    seen = Seen()
    handle = block.mlp.experts.register_forward_pre_hook(seen.hook("bank"), with_kwargs=True)
    for part in random_tokens(16, 32).split(4):
        reference(input_ids=part, use_cache=False)
    handle.remove()
    calls = [(*args, *kwargs.values()) for args, kwargs in seen.inputs["bank"]]
    tokens, chosen = torch.cat([call[0] for call in calls]), torch.cat([call[1] for call in calls])
    prefix = "model.layers.0.mlp.experts" if family == "qwen3_moe" else "model.layers.0.block_sparse_moe.experts"

    def solved(weights: list[Tensor], x: Tensor) -> list[Tensor]:
        hessian = HessianSum(x.shape[1], CPU)
        hessian.add(x)
        finished = hessian.finish()
        return [quantize_linear(w, finished, SCHEME).dequantize() for w in weights]

    for e in range(len(block.mlp.experts.down_proj)):
        x = tokens[torch.where(e == chosen.T)[1]]
        assert len(x)
        gate, up = solved(list(block.mlp.experts.gate_up_proj[e].chunk(2)), x)
        (down,) = solved([block.mlp.experts.down_proj[e]], nn.functional.silu(x @ gate.T) * (x @ up.T))
        for name, expected in zip(names, (gate, up, down), strict=True):
            found = dequantized(out, f"{prefix}.{e}.{name}")
            # The products above may round in another order, which moves a code at most here and there.
            same = (found == expected).float().mean()
            assert same > 0.995, (e, name)
            assert name == names[2] or torch.equal(found, expected), (e, name)


@pytest.mark.parametrize("at_once", [None, 2, 3])
def test_a_stopped_bank_goes_on_where_it_was(at_once: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is stopped between two experts, also of a batch, keeps the groups that are complete, and ends in the same bytes."""
    model = saved("qwen3_moe", tmp_path)
    small_groups(monkeypatch, model, experts=2)
    bigq.quantize(str(model), tmp_path / "whole", job(tmp_path))
    stop, solved = Stop(0.0), []
    take = units.BankWork.take

    def counted(self: units.BankWork, expert: Any) -> Any:
        records = take(self, expert)
        solved.append(expert.number)
        if len(solved) == 5:
            stop.request("the test")
        return records

    monkeypatch.setattr(units.BankWork, "take", counted)
    with pytest.raises(Stopped):
        bigq.quantize(str(model), tmp_path / "out", job(tmp_path, experts_at_once=at_once), stop=stop)
    monkeypatch.undo()
    small_groups(monkeypatch, model, experts=2)
    journal = (tmp_path / "out" / ".bigq" / "journal.jsonl").read_text()
    assert [line.count('"experts-0-') for line in journal.splitlines()].count(1) == 2
    bigq.quantize(str(model), tmp_path / "out", job(tmp_path))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize(("family", "dtype"), [("qwen3_moe", torch.float32), ("deepseek_v3", torch.bfloat16)])
def test_experts_side_by_side_give_the_same_bytes(family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of any size, in groups of three; also where a job goes on with holes or with another number, which it says."""
    model = saved(family, tmp_path, dtype)
    small_groups(monkeypatch, model)
    bigq.quantize(str(model), tmp_path / "alone", job(tmp_path))
    made = hashes(tmp_path / "alone")
    for at_once in (1, 2, 4):
        out = tmp_path / str(at_once)
        bigq.quantize(str(model), out, job(tmp_path, experts_at_once=at_once))
        assert hashes(out) == made, at_once
    shards = [name for name in made if name.endswith(".safetensors")]
    for lost, changes in ((shards[1::2], {}), (shards[2:5], {"experts_at_once": 3}), ([shards[-1]], {"activations": "disk"})):
        for name in lost:
            (out / name).unlink()
        bigq.quantize(str(model), out, job(tmp_path, **changes))
        assert hashes(out) == made, lost
    runs = [json.loads(line) for line in (out / ".bigq" / "runs.jsonl").read_text().splitlines()]
    assert [any("--experts-at-once was 4" in note for note in run["notes"]) for run in runs] == [False, False, True, False]


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_tiers_give_the_same_bytes(tier: str, tmp_path: Path) -> None:
    model = saved("deepseek_v3", tmp_path, torch.bfloat16)
    bigq.quantize(str(model), tmp_path / "plain", job(tmp_path))
    bigq.quantize(str(model), tmp_path / tier, job(tmp_path, activations=tier))
    assert hashes(tmp_path / tier) == hashes(tmp_path / "plain")


def test_experts_left_out(tmp_path: Path) -> None:
    """With --skip they are copied as they are; the rest is quantized with their outputs in it."""
    model, out = saved("qwen3_moe", tmp_path), tmp_path / "out"
    report = bigq.quantize(str(model), out, job(tmp_path, rules=(Rule(pattern=".*experts.*", overrides=None),)))
    assert not any("experts" in record["name"] for record in report.linears)
    before, after = Checkpoint.open(model), Checkpoint.open(out)
    names = [name for name in before if ".experts." in name]
    assert names and all(torch.equal(read_tensor(before[name]), read_tensor(after[name])) for name in names)
    assert bigq.verify(out) == []
    assert torch.isfinite(streamed(out, random_tokens(4, 16))).all()


def test_only_experts(tmp_path: Path) -> None:
    model, out = saved("qwen3_moe", tmp_path), tmp_path / "out"
    report = bigq.quantize(str(model), out, job(tmp_path, rules=(Rule(pattern=".*self_attn.*", overrides=None),)))
    assert report.linears and all(".experts." in record["name"] for record in report.linears)
    assert bigq.verify(out) == []


@pytest.mark.parametrize("pattern", [r".*experts\.3\..*", r".*experts\.\d+\.down_proj"])
def test_a_bank_is_treated_alike(pattern: str, tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path)
    with pytest.raises(UsageError, match="of all experts of a layer together, which needs one scheme"):
        bigq.quantize(str(model), tmp_path / "out", job(tmp_path, rules=(Rule(pattern=pattern, overrides=None),)))
    assert not list((tmp_path).glob("out/*.safetensors"))


def test_settings_that_readers_do_not_see_are_those_of_the_whole_bank(tmp_path: Path) -> None:
    """One damping for all experts; the pattern that the message gives works."""
    model = saved("qwen3_moe", tmp_path, num_hidden_layers=1)
    one = (Rule(pattern=r".*experts\.3\..*", overrides={"damping": 0.05}),)
    with pytest.raises(UsageError, match="must treat all matrices of all experts in a bank alike") as caught:
        bigq.quantize(str(model), tmp_path / "out", job(tmp_path, rules=one))
    assert not list((tmp_path).glob("out/*.safetensors"))
    pattern = str(caught.value).rpartition("use a pattern such as ")[2]
    report = bigq.quantize(str(model), tmp_path / "out", job(tmp_path, rules=(Rule(pattern=pattern, overrides={"damping": 0.05}),)))
    assert {record["damping"] for record in report.linears if ".experts." in record["name"]} == {0.05}


def test_missing_matrices_of_experts(tmp_path: Path) -> None:
    """Of one expert, then of all; with the tensors the same command works."""
    model = saved("qwen3_moe", tmp_path, num_hidden_layers=1)
    (shard,) = model.glob("*.safetensors")
    tensors = load_file(shard)
    for lost, says in (
        (lambda name: "experts.2.up_proj" in name, r"the checkpoint holds 8 tensors like .*, but 7 of another matrix of the same experts"),
        (lambda name: ".experts." in name and "down_proj" in name, r"tensor model\.layers\.0\.mlp\.experts\.down_proj is missing"),
    ):
        save_file({name: tensor for name, tensor in tensors.items() if not lost(name)}, shard, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=says):
            bigq.quantize(str(model), tmp_path / "out", job(tmp_path))
    save_file(tensors, shard, metadata={"format": "pt"})
    bigq.quantize(str(model), tmp_path / "out", job(tmp_path))
    assert bigq.verify(tmp_path / "out") == []


@pytest.mark.parametrize("method", ["rtn"])
def test_methods_without_rows(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = saved("mixtral", tmp_path), tmp_path / "out"
    small_groups(monkeypatch, model)
    bigq.quantize(str(model), out, job(tmp_path, method=method))
    assert bigq.verify(out) == []
    made = hashes(out)
    (out / sorted(name for name in made if name.endswith(".safetensors"))[-1]).unlink()
    bigq.quantize(str(model), out, job(tmp_path, method=method))
    assert hashes(out) == made


def test_without_true_sequential(tmp_path: Path) -> None:
    """A bank sees the inputs behind quantized attention even then."""
    model, out = saved("qwen2_moe", tmp_path), tmp_path / "out"
    bigq.quantize(str(model), out, job(tmp_path, true_sequential=False))
    made = hashes(out)
    (out / sorted(name for name in made if name.endswith(".safetensors"))[2]).unlink()
    bigq.quantize(str(model), out, job(tmp_path, true_sequential=False))
    assert hashes(out) == made and bigq.verify(out) == []


def test_the_plan_counts_experts(tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path)
    plan = bigq.plan(str(model), tmp_path / "out", job(tmp_path))
    report = bigq.quantize(str(model), tmp_path / "out", job(tmp_path))
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    headers = sum(len(json.dumps(name)) + 90 for name in Checkpoint.open(tmp_path / "out"))
    assert abs(plan.cost.output - written) < headers + 0.1 * written
    assert report.planned_host_bytes == bigq.plan(str(model), tmp_path / "out", job(tmp_path)).cost.host or report.planned_host_bytes > 0
    (shape,) = {block.banks for block in plan.shape.blocks}
    assert (shape[0].experts, shape[0].chosen) == (8, 2)


def test_reports_sum_experts_up(tmp_path: Path) -> None:
    """A line for each matrix of a layer's experts: their mean error, and the bits of all of them."""
    model, out = saved("qwen3_moe", tmp_path, num_hidden_layers=1), tmp_path / "out"
    report = bigq.quantize(str(model), out, job(tmp_path))
    history = read_history(out)
    errors: dict[str, list[float]] = {}
    for record in report.linears:
        if ".experts." in record["name"]:
            errors.setdefault(record["name"].rpartition(".")[2], []).append(record["relative_error"])
    found = {linear.name: linear for linear in history.linears if "experts" in linear.name}
    assert set(found) == {f"mlp.experts.*.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    for name, linear in found.items():
        assert linear.count == 8 and linear.weights == 8 * 32 * 64
        assert linear.error == pytest.approx(sum(errors[name.rpartition(".")[2]]) / 8)
        assert len(linear.tokens) == 8 and sum(linear.tokens) == 16 * 32 * 2 and linear.rounded == 0
    assert history.linear_bits is not None and 4 < history.linear_bits < 8
    tokens = sorted(next(iter(found.values())).tokens)
    page = re.sub(r"<[^>]+>", " ", write_report(out).read_text(encoding="utf-8"))
    row = ["0", "8", str(tokens[0]), f"{(tokens[3] + tokens[4]) / 2:g}", str(tokens[-1]), "0", "of", "24"]
    assert " ".join(row) in " ".join(page.split())
