"""Experts that a checkpoint stores as one tensor for all, quantized matrix by matrix, or copied as they are: three families."""

from __future__ import annotations

import dataclasses
import hashlib
import json
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
from bigq.errors import UsageError
from bigq.infer.evaluate import Stream
from bigq.infer.load import load_model
from bigq.io.formats import FORMATS
from bigq.io.index import Checkpoint
from bigq.io.reader import read_tensor
from bigq.kernels.dequantize import dequantize_packed
from bigq.model.pager import Pager
from bigq.sched.units import experts as units
from bigq.scheme import QuantScheme, Rule
from bigq.solver.gptq import quantize_linear
from bigq.solver.hessian import HessianSum

CPU = torch.device("cpu")
#: Scales of ranges: a search among nearly equal scales would follow the last bit of a Hessian, whose sums the job orders by itself.
SCHEME = QuantScheme(bits=4, group_size=16, order="activation", scales="minmax")
FAMILIES = ["gpt_oss", "granitemoe", "llama4_text"]
DTYPES = [torch.float32, torch.bfloat16]
#: Of each family: the path of a block's bank, what its matrices are called, and their shapes.
BANKS = {
    "gpt_oss": "model.layers.{}.mlp.experts",
    "granitemoe": "model.layers.{}.block_sparse_moe.experts",
    "llama4_text": "model.layers.{}.feed_forward.experts",
}
_HALVES = ("gate_proj", "up_proj", "down_proj")
MATRICES = {"gpt_oss": ("w13", "w2"), "granitemoe": _HALVES, "llama4_text": _HALVES}
SHAPES = {"gpt_oss": {(192, 64), (64, 96)}, "granitemoe": {(96, 64), (64, 96)}, "llama4_text": {(32, 64), (64, 32)}}
#: The tensors of the source that hold all experts, and those of biases.
_MERGED = ("experts.gate_up_proj", "experts.down_proj")
WHOLE = {"gpt_oss": _MERGED, "granitemoe": ("input_linear.weight", "output_linear.weight"), "llama4_text": _MERGED}
ATTENTION = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
BIASES = ("experts.gate_up_proj_bias", "experts.down_proj_bias")
EXPERTS, BLOCKS = 4, 2


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


def small_groups(monkeypatch: pytest.MonkeyPatch, experts: int, family: str) -> None:
    """Let a shard hold so many experts."""
    monkeypatch.setattr(units, "GROUP_WEIGHTS", experts * 3 * 64 * (32 if family == "llama4_text" else 96))


def skip(pattern: str) -> tuple[Rule, ...]:
    return (Rule(pattern=pattern, overrides=None),)


def streamed(folder: Path, ids: Tensor, batch: int = 4) -> Tensor:
    stream = Stream(Pager(folder, device=CPU), ids, batch)
    with stream.tail_ready():
        return torch.cat([stream.logits(lo, lo + batch) for lo in range(0, len(ids), batch)])


def whole(model: nn.Module, ids: Tensor, batch: int = 4) -> Tensor:
    return torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(batch)])


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def shards(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.safetensors"))


def linears(family: str) -> set[str]:
    return {f"{BANKS[family].format(i)}.{e}.{name}" for i in range(BLOCKS) for e in range(EXPERTS) for name in MATRICES[family]}


def dequantized(out: Path, prefix: str, dtype: torch.dtype) -> Tensor:
    checkpoint, format = Checkpoint.open(out), FORMATS["compressed-tensors"]
    words, scales, zeros = format.read(prefix, lambda key: read_tensor(checkpoint[key]), SCHEME)
    return dequantize_packed(words, scales, zeros, SCHEME.bits, dtype)


def inputs_of_experts(calls: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """What every expert receives, for a bank that is called with tokens and their experts, or with all tokens once for every expert.

    Tokens of all calls are in bigq's order, as sums of Hessians depend on it in their last bits.
    """
    if len(calls[0]) == 1:
        return [torch.cat(parts) for parts in zip(*([x[x.ne(0).any(-1)] for x in call[0].chunk(EXPERTS)] for call in calls), strict=True)]
    tokens, chosen = torch.cat([call[0] for call in calls]), torch.cat([call[1] for call in calls])
    return [tokens[torch.where(e == chosen.T)[1]] for e in range(EXPERTS)]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_are_those_of_gptq_in_memory(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every expert by hand, from the model's own tensors, behind attention as bigq solved it: the same weights, bit for bit."""
    one_block = {"num_hidden_layers": 1} | ({"no_rope_layers": [1]} if family == "llama4_text" else {})
    model, out = saved(family, tmp_path, dtype, **one_block), tmp_path / "out"
    bigq.quantize(str(model), out, job(tmp_path))
    reference = aligned(AutoModelForCausalLM.from_pretrained(model, dtype=dtype, experts_implementation="eager")).eval()
    block = reference.model.layers[0]
    for name in ATTENTION:
        block.get_parameter(f"{name}.weight").copy_(dequantized(out, f"model.layers.0.{name}", dtype))
    bank, calls = reference.get_submodule(BANKS[family].format(0)), []
    bank.register_forward_pre_hook(lambda module, args, kwargs: calls.append((*args, *kwargs.values())), with_kwargs=True)
    for part in random_tokens(16, 32).split(4):
        reference(input_ids=part, use_cache=False)
    given = inputs_of_experts(calls)
    scheme = dataclasses.replace(SCHEME, scale_bits=8 if dtype == torch.bfloat16 else None)

    def solved(weight: Tensor, x: Tensor) -> Tensor:
        """[outputs, inputs]."""
        hessian = HessianSum(x.shape[1], CPU)
        hessian.add(x)
        return quantize_linear(weight, hessian.finish(), scheme).dequantize(dtype)

    for e in range(EXPERTS):
        x = given[e]
        assert len(x) > 50
        prefix = f"{BANKS[family].format(0)}.{e}"
        if family == "gpt_oss":
            # Parameters are [inputs, outputs]; gate and up are every other output.
            first = solved(bank.gate_up_proj[e].T, x)
            inner = bank._apply_gate(x @ first.T.contiguous() + bank.gate_up_proj_bias[e])
            expected = {"w13_": first, "w2_": solved(bank.down_proj[e].T, inner)}
        else:
            turned = family == "llama4_text"
            first = solved(bank.gate_up_proj[e].T if turned else bank.gate_up_proj[e], x)
            gate, up = (x @ first.T.contiguous() if turned else nn.functional.linear(x, first)).chunk(2, dim=-1)
            inner = nn.functional.silu(gate) * up
            halves = dict(zip((".gate_proj", ".up_proj"), first.chunk(2), strict=True))
            expected = halves | {".down_proj": solved(bank.down_proj[e].T if turned else bank.down_proj[e], inner)}
        for name, weight in expected.items():
            prefix = f"{BANKS[family].format(0)}.{e}{name if name[0] == '.' else '.' + name}"
            assert torch.equal(dequantized(out, prefix, dtype), weight), prefix


@pytest.mark.parametrize(("family", "dtype"), families_and_dtypes(FAMILIES))
def test_a_quantized_model(family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sound, made again with holes it has the same bytes, and read whole it computes what it computes streamed."""
    model, out = saved(family, tmp_path, dtype), tmp_path / "out"
    small_groups(monkeypatch, 3, family)
    report = bigq.quantize(str(model), out, job(tmp_path))
    assert {record["name"] for record in report.linears if "experts" in record["name"]} == linears(family)
    assert bigq.verify(out) == []
    made, all_shards = hashes(out), shards(out)
    assert len(all_shards) == 1 + BLOCKS * (1 + 2), "a block has two groups of experts"
    for lost in ([all_shards[-1]], all_shards[1::2], all_shards[2:5], all_shards[1:]):
        for name in lost:
            (out / name).unlink()
        bigq.quantize(str(model), out, job(tmp_path))
        assert hashes(out) == made, lost
    ids = random_tokens(8, 16)
    logits = streamed(out, ids)
    assert torch.equal(whole(load_model(out, device="cpu"), ids), logits)
    assert not torch.equal(logits, streamed(model, ids))


def test_transposed_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """aria stores [experts, inputs, outputs] with gate and up as halves, under names of its own."""
    monkeypatch.setitem(MOE_FAMILIES, "aria_text", {"moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1})  # type: ignore[arg-type]
    model, out = saved("aria_text", tmp_path, torch.bfloat16), tmp_path / "out"
    assert "model.layers.0.mlp.experts.fc1.weight" in Checkpoint.open(model)
    bigq.quantize(str(model), out, job(tmp_path))
    assert bigq.verify(out) == []
    made, all_shards = hashes(out), shards(out)
    for name in all_shards[1::2]:
        (out / name).unlink()
    bigq.quantize(str(model), out, job(tmp_path))
    assert hashes(out) == made
    ids = random_tokens(4, 16)
    loaded = load_model(out, device="cpu")
    assert torch.equal(whole(loaded, ids), streamed(out, ids))
    halves = [dequantized(out, f"model.layers.1.mlp.experts.2.{name}", torch.bfloat16) for name in ("gate_proj", "up_proj")]
    assert torch.equal(loaded.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[2], torch.cat(halves).T)
    source = load_file(model / "model.safetensors")["model.layers.1.mlp.experts.fc1.weight"][2].float()
    assert (source - torch.cat(halves).T.float()).norm() < 0.2 * source.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_folder_holds(family: str, tmp_path: Path) -> None:
    """Packed matrices of single experts in place of the tensors for all of them. Biases stay as they are."""
    model, out = saved(family, tmp_path, torch.bfloat16), tmp_path / "out"
    bigq.quantize(str(model), out, job(tmp_path))
    before, after = Checkpoint.open(model), Checkpoint.open(out)
    assert not [name for name in after if name.endswith(WHOLE[family])]
    between = "_" if family == "gpt_oss" else "."
    assert {f"{name}{between}weight_packed" for name in linears(family)} <= set(after.tensors)
    assert {f"{name}{between}weight_scale" for name in linears(family)} <= set(after.tensors)
    assert not [name for name in after if "w13_weight_shape" in name], "vLLM fails on this name"
    biases = [name for name in before if name.endswith(BIASES)]
    assert len(biases) == (2 * BLOCKS if family == "gpt_oss" else 0)
    assert all(torch.equal(read_tensor(before[name]), read_tensor(after[name])) for name in biases)


@pytest.mark.parametrize(("family", "dtype"), families_and_dtypes(FAMILIES))
def test_experts_left_out(family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors that hold all experts are copied, each once and whole; the rest is quantized with their outputs in it."""
    model, out = saved(family, tmp_path, dtype), tmp_path / "out"
    small_groups(monkeypatch, 1, family)
    rules = skip(r".*experts\..*")
    report = bigq.quantize(str(model), out, job(tmp_path, rules=rules))
    assert not [record["name"] for record in report.linears if ".experts." in record["name"]]
    assert {f"model.layers.{i}.{name}" for i in range(BLOCKS) for name in ATTENTION} <= {record["name"] for record in report.linears}
    found: list[str] = [name for file in shards(out) for name in load_file(out / file)]
    assert len(found) == len(set(found))
    source, after = load_file(model / "model.safetensors"), Checkpoint.open(out)
    copied = [name for name in source if name.endswith((*WHOLE[family], *BIASES))]
    assert len(copied) == BLOCKS * (4 if family == "gpt_oss" else 2)
    assert all(torch.equal(source[name].view(torch.uint8), read_tensor(after[name]).view(torch.uint8)) for name in copied)
    assert set(source) - {f"{record['name']}.weight" for record in report.linears} == {n for n in found if "weight_" not in n}
    assert bigq.verify(out) == []
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert [f"re:^{BANKS[family].format(i)}(.|$)" for i in range(BLOCKS)] == [
        name.replace("\\", "") for name in ignored if "experts" in name
    ]
    made, all_shards = hashes(out), shards(out)
    for name in all_shards[1::2]:
        (out / name).unlink()
    bigq.quantize(str(model), out, job(tmp_path, rules=rules))
    assert hashes(out) == made
    ids = random_tokens(4, 16)
    assert torch.equal(whole(load_model(out, device="cpu"), ids), streamed(out, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_know_the_names_of_the_output(family: str, tmp_path: Path) -> None:
    """Of two kinds of Linears, experts are one pattern in the config. The plan counts them."""
    model, out = saved(family, tmp_path), tmp_path / "out"
    last = "|".join(MATRICES[family])
    rules = (Rule(pattern=rf".*\.experts\.\d+\.({last})$", overrides={"bits": 8}),)
    plan = bigq.plan(str(model), out, job(tmp_path, rules=rules))
    assert [count.linears for count in plan.rules] == [len(linears(family))]
    report = bigq.quantize(str(model), out, job(tmp_path, rules=rules))
    bits = {record["name"]: record["bits"] for record in report.linears}
    assert {name for name in bits if bits[name] == 8} == linears(family)
    assert bigq.verify(out) == []
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    (targets,) = [group["targets"] for group in groups.values() if group["weights"]["num_bits"] == 8]
    assert len(targets) == (BLOCKS if family == "gpt_oss" else 1) and all("experts" in target for target in targets)
    ids = random_tokens(4, 16)
    assert torch.equal(whole(load_model(out, device="cpu"), ids), streamed(out, ids))
    with pytest.raises(UsageError, match="of all experts of a layer together, which needs one scheme"):
        bigq.quantize(str(model), tmp_path / "other", job(tmp_path, rules=skip(rf".*experts\.\d+\.{MATRICES[family][-1]}$")))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_experts(family: str, tmp_path: Path) -> None:
    """The bytes of the output, with and without them; and the same Linears from a config alone."""
    model = saved(family, tmp_path)
    for rules, out in (((), tmp_path / "all"), (skip(r".*experts\..*"), tmp_path / "few")):
        plan = bigq.plan(str(model), out, job(tmp_path, rules=rules))
        assert any("in one tensor for all: it leaves them random" in note for note in plan.notes) == (not rules)
        bigq.quantize(str(model), out, job(tmp_path, rules=rules))
        tensors = sum(info.nbytes for info in Checkpoint.open(out).tensors.values())
        assert plan.cost.output == pytest.approx(tensors, rel=0.06)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((model / "config.json").read_bytes())
    rules = (Rule(pattern=rf".*\.experts\.\d+\.({'|'.join(MATRICES[family])})$", overrides={"bits": 8}),)
    described = bigq.plan(str(tmp_path / "config"), tmp_path / "none", job(tmp_path, rules=rules))
    assert [count.linears for count in described.rules] == [len(linears(family))]
    shapes = [{(linear.m, linear.n) for bank in block.banks for linear in bank.linears} for block in described.shape.blocks]
    assert shapes == [SHAPES[family]] * BLOCKS


def test_formats_without_names_for_them(tmp_path: Path) -> None:
    """gptq has no names for an expert's gate and up as one Linear. The advice works."""
    model = saved("gpt_oss", tmp_path, num_hidden_layers=1)
    for method in ("gptq", "rtn"):
        with pytest.raises(UsageError) as caught:
            bigq.quantize(str(model), tmp_path / "out", job(tmp_path, format="gptq", method=method))
        assert "are part of experts whose gate and up are one Linear, for which gptq has no names" in str(caught.value)
        assert str(caught.value).endswith("; use --format compressed-tensors")
    bigq.quantize(str(model), tmp_path / "out", job(tmp_path, method="rtn"))
    assert bigq.verify(tmp_path / "out") == []


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_halves_in_any_format(format: Any, tmp_path: Path) -> None:
    model, out = saved("granitemoe", tmp_path), tmp_path / "out"
    bigq.quantize(str(model), out, job(tmp_path, format=format))
    assert bigq.verify(out) == []
    ids = random_tokens(4, 16)
    assert torch.equal(whole(load_model(out, device="cpu"), ids), streamed(out, ids))


@pytest.mark.parametrize(("family", "suffix"), [("gpt_oss", "w13_weight_scale"), ("granitemoe", "up_proj.weight_scale")])
def test_verify_sees_values_that_no_reader_can_use(family: str, suffix: str, tmp_path: Path) -> None:
    model, out = saved(family, tmp_path), tmp_path / "out"
    bigq.quantize(str(model), out, job(tmp_path, method="rtn"))
    info = Checkpoint.open(out)[f"{BANKS[family].format(1)}.2.{suffix}"]
    with open(info.file, "r+b") as file:
        file.seek(info.start)
        file.write(b"\x00\x00\xc0\xff")
    assert any(f"tensor {info.name} holds NaN or Inf" in problem for problem in bigq.verify(out))
