"""Quantizing whole models: what is written is what was solved, solved on the right Hessians, and reads back as such.

Expected values come from plain transformers models and from the decoder in ``models``, which shares no code with bigq.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from damping_by_hand import usual_by_hand
from models import (
    FAMILIES,
    LEVELS,
    SEQLEN,
    Decoded,
    block_prefixes,
    decode,
    linear_module,
    linear_names,
    logits_of,
    make_checkpoint,
    matrix,
    packed_prefixes,
    put_matrix,
    random_ids,
    reference_model,
    stored_tensors,
    streamed_logits,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bigq
from bigq.config import JobConfig
from bigq.io.formats import Format
from bigq.methods import gptq as gptq_module
from bigq.model.pager import Pager
from bigq.model.structure import plan_block
from bigq.progress.records import Report
from bigq.quantized_weight import QuantizedWeight
from bigq.sched.rows.probe import probe_model
from bigq.scheme import QuantScheme, Rule
from bigq.solver.energy import ENERGY_ROWS

GROUP = 32
BATCH = 8


@dataclass(frozen=True)
class Run:
    """A finished job: where it read and wrote, what the solver handed to the packer, and the Hessians it factored."""

    source: Path
    out: Path
    report: Report
    solved: Mapping[str, QuantizedWeight]
    hessians: Mapping[str, Tensor]

    def config(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.out / "config.json").read_text())["quantization_config"]
        return value

    def decoded(self, version: int = 1) -> dict[str, Decoded]:
        tensors = stored_tensors(self.out)
        return {p: decode(tensors, p, self.solved[p].scheme.bits, version) for p in packed_prefixes(tensors)}

    def hessian(self, linear: str) -> Tensor:
        """The Hessian that a Linear was solved with."""
        return next(h for label, h in self.hessians.items() if linear in label.split(", "))


def job(ids: Path, **changes: Any) -> JobConfig:
    """4 bits, groups of 32, all calibration ids; ``changes`` to fields of the scheme or of the job."""
    scheme_fields = {f.name for f in dataclasses.fields(QuantScheme)}
    scheme = QuantScheme(**{"group_size": GROUP, **{k: v for k, v in changes.items() if k in scheme_fields}})
    rest = {k: v for k, v in changes.items() if k not in scheme_fields}
    return JobConfig(**{"scheme": scheme, "calibration": str(ids), "samples": 16, "seqlen": SEQLEN, "batch": BATCH, "quiet": True, **rest})


def run_job(source: Path, out: Path, config: JobConfig) -> Run:
    solved: dict[str, QuantizedWeight] = {}
    hessians: dict[str, Tensor] = {}
    pack, factorize = Format.pack, gptq_module.factorize

    def recording_pack(self: Format, prefix: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        assert prefix not in solved
        solved[prefix] = dataclasses.replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone(), zeros=weight.zeros.clone())
        return pack(self, prefix, weight, dtype)

    def recording_factorize(h: Tensor, *, name: str, **options: Any) -> Any:
        hessians[name] = h.clone()
        return factorize(h, name=name, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Format, "pack", recording_pack)
        patch.setattr(gptq_module, "factorize", recording_factorize)
        report = bigq.quantize(str(source), out, config)
    return Run(source, out, report, solved, hessians)


@pytest.fixture(scope="module")
def family_run(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Family → its checkpoint quantized with the settings of ``job``; each is quantized once."""
    folder = tmp_path_factory.mktemp("quantized")
    runs: dict[str, Run] = {}

    def get(family: str) -> Run:
        if family not in runs:
            runs[family] = run_job(checkpoint(family), folder / family, job(ids_file))
        return runs[family]

    return get


def with_weights(source: Path, weights: Mapping[str, Decoded], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The original model with its Linears' weights replaced by what the packed ones decode to."""
    model = reference_model(source, dtype)
    for prefix, linear in weights.items():
        put_matrix(linear_module(model, prefix), linear.weight(dtype))
    return model


def require_faithful(run: Run, version: int = 1) -> dict[str, Decoded]:
    """The packed values are the solver's, exactly; returns them."""
    decoded = run.decoded(version)
    assert decoded.keys() == run.solved.keys()
    for prefix, got in decoded.items():
        solved = run.solved[prefix]
        n, k = solved.codes.shape
        assert torch.equal(got.codes, solved.codes.long()), prefix
        assert torch.equal(got.zeros, solved.zeros.long()), prefix
        assert torch.equal(got.scales, solved.scales), prefix
        width = k if solved.scheme.group_size == -1 else solved.scheme.group_size
        assert torch.equal(got.group, torch.arange(k) // width), prefix
        assert got.scales.shape == (n, k // width)
        assert got.codes.unique().numel() > solved.scheme.bits  # codes that are all alike would prove nothing
    return decoded


def require_same_logits(run: Run, decoded: Mapping[str, Decoded], dtype: torch.dtype = torch.float32) -> None:
    """Streaming the packed folder computes what transformers computes with the decoded weights, and not what it
    computes with the original ones."""
    ids = random_ids(3, seed=5)
    got = streamed_logits(run.out, ids, 2)
    assert got.dtype == dtype
    assert torch.equal(got, logits_of(with_weights(run.source, decoded, dtype), ids, 2))
    assert not torch.equal(got, logits_of(reference_model(run.source, dtype), ids, 2))


# Every family, quantized in the plainest way.


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_values_are_the_solvers(family: str, family_run: Callable[[str], Run]) -> None:
    run = family_run(family)
    require_faithful(run)
    blocks = block_prefixes(stored_tensors(run.source), linear_names(family)[0])
    assert len(blocks) == 3
    assert set(run.solved) == {f"{block}.{name}" for block in blocks for name in linear_names(family)}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_model_computes_with_the_decoded_weights(family: str, family_run: Callable[[str], Run]) -> None:
    run = family_run(family)
    require_same_logits(run, run.decoded())


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_else_is_copied(family: str, family_run: Callable[[str], Run]) -> None:
    """Biases, norms, embeddings and head are as they were; of a quantized Linear only its weight is gone."""
    run = family_run(family)
    before, after = stored_tensors(run.source), stored_tensors(run.out)
    quantized = {f"{prefix}.weight" for prefix in run.solved}
    packed = {f"{p}.{suffix}" for p in run.solved for suffix in ("qweight", "qzeros", "scales", "g_idx")}
    assert quantized <= set(before)
    assert set(after) == (set(before) - quantized) | packed
    for name in set(before) - quantized:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_output_folder_is_complete(family: str, family_run: Callable[[str], Run]) -> None:
    run = family_run(family)
    config = json.loads((run.out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((run.source / "config.json").read_text())
    assert quantization == json.loads((run.out / "quantize_config.json").read_text())
    expected = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
    assert expected.items() <= quantization.items()
    index = json.loads((run.out / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {path.name: set(load_file(path)) for path in run.out.glob("*.safetensors")}
    assert index == {name: shard for shard, names in shards.items() for name in names}
    records = [json.loads(line) for line in (run.out / ".bigq" / "linears.jsonl").read_text().splitlines()]
    assert len(records) == len(run.solved)
    assert {record["name"] for record in records} == set(run.solved)
    for record in records:
        weight = run.solved[record["name"]]
        assert record["shape"] == list(weight.codes.shape)
        assert (record["bits"], record["group_size"]) == (4, GROUP)
        assert record["damping"] == 0.01
        assert record["loss"] == weight.loss > 0
        assert 0 < record["relative_error"] == weight.relative_error < 0.1
        assert record["seconds"].keys() == {"factor", "solve"} and all(s > 0 for s in record["seconds"].values())
    assert not list(run.out.glob("*tmp*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_of_a_block(family: str, checkpoint: Callable[[str], Path]) -> None:
    pager = Pager(checkpoint(family), device=torch.device("cpu"))
    with torch.no_grad():
        probe = probe_model(pager)
        plan = plan_block(pager.load_block(0), probe.hidden, probe.calls[0])
    assert plan.left_out == ()
    found = [[set(group.names) for group in level] for level in plan.levels(true_sequential=True)]
    assert found == [[set(names) for names in level] for level in LEVELS[family]]
    together = plan.levels(true_sequential=False)
    assert len(together) == 1
    assert {n for g in together[0] for n in g.names} == set(linear_names(family))


def test_levels_are_in_order_of_execution(checkpoint: Callable[[str], Path]) -> None:
    def levels(family: str) -> list[int]:
        pager = Pager(checkpoint(family), device=torch.device("cpu"))
        with torch.no_grad():
            probe = probe_model(pager)
            return [g.level for g in plan_block(pager.load_block(0), probe.hidden, probe.calls[0]).groups]

    assert levels("llama") == [0, 1, 2, 3]
    assert levels("gpt_neox") == [0, 1, 0, 1]


# Hessians.


def plain_hessians(model: nn.Module, linears: list[str], ids: Tensor) -> dict[str, Tensor]:
    """2/T · XᵀX of the inputs of some Linears, by forward hooks on the whole model, in fp64."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)) + x.T @ x

        return before

    handles = [linear_module(model, name).register_forward_pre_hook(hook(name)) for name in linears]
    logits_of(model, ids, BATCH)
    for handle in handles:
        handle.remove()
    return {name: total * (2 / ids.numel()) for name, total in sums.items()}


def distance(h: Tensor, expected: Tensor) -> float:
    return float((h.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_hessians_are_those_of_the_partly_quantized_model(family: str, family_run: Callable[[str], Run]) -> None:
    """Each level's Hessian comes from the inputs that it has with everything before it quantized, in this block and in
    those before."""
    run = family_run(family)
    model = reference_model(run.source)
    decoded = run.decoded()
    ids = random_ids()
    for block in block_prefixes(stored_tensors(run.source), linear_names(family)[0]):
        for level in LEVELS[family]:
            names = [f"{block}.{name}" for group in level for name in group]
            for name, expected in plain_hessians(model, names, ids).items():
                assert distance(run.hessian(name), expected) < 1e-5, name
            for name in names:
                put_matrix(linear_module(model, name), decoded[name].weight(torch.float32))


def test_hessians_of_later_levels_are_not_those_of_the_original_model(family_run: Callable[[str], Run]) -> None:
    """The comparison above can tell the difference."""
    run = family_run("llama")
    names = list(run.solved)
    for name, plain in plain_hessians(reference_model(run.source), names, random_ids()).items():
        first = name in {f"model.layers.0.self_attn.{p}_proj" for p in "qkv"}
        assert (distance(run.hessian(name), plain) < 1e-5) == first, name


def test_hessian_of_an_odd_tail_batch(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    """16 rows in batches of 7 leave 2: the same rows, the same Hessian."""
    source = checkpoint("llama")
    run = run_job(source, tmp_path / "out", job(ids_file, batch=7))
    name = "model.layers.0.self_attn.q_proj"
    expected = plain_hessians(reference_model(source), [name], random_ids())[name]
    assert distance(run.hessian(name), expected) < 1e-5
    require_same_logits(run, require_faithful(run))


def test_no_true_sequential_sees_the_original_block(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    """All Hessians of block 0 are the original model's; those of block 1 see block 0 quantized."""
    source = checkpoint("llama")
    run = run_job(source, tmp_path / "out", job(ids_file, true_sequential=False))
    for name, plain in plain_hessians(reference_model(source), list(run.solved), random_ids()).items():
        assert (distance(run.hessian(name), plain) < 1e-5) == name.startswith("model.layers.0."), name
    assert run.config()["meta"]["true_sequential"] is False
    require_same_logits(run, require_faithful(run))


def test_true_sequential_gives_other_codes(family_run: Callable[[str], Run], ids_file: Path, tmp_path: Path) -> None:
    one = family_run("llama")
    other = run_job(one.source, tmp_path / "out", job(ids_file, true_sequential=False))
    same = {name for name in one.solved if torch.equal(one.solved[name].codes, other.solved[name].codes)}
    assert same == {f"model.layers.0.self_attn.{p}_proj" for p in "qkv"}


def damped(h: Tensor, weight: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """What GPTQ makes of a Hessian and a weight before it begins: damped by a usual element of the diagonal (fp64)."""
    h, weight = h.double().clone(), weight.double().clone()
    h.diagonal().add_(damping * usual_by_hand(h.diagonal()))
    return h, weight


def form(rows: Tensor, h: Tensor) -> float:
    return float(((rows @ h) * rows).sum())


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """Symmetric rounding to nearest as the format defines it."""
    groups = weight.float().reshape(len(weight), -1, group)
    top = 2**bits - 1
    scale = (2 * groups.abs().amax(-1, keepdim=True) / top).half().float()
    half = 2 ** (bits - 1)
    steps = (groups / scale).round().clamp(-half, half - 1)
    return (steps * scale).reshape(weight.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_loss_is_told_right_and_below_rounding_to_nearest(family: str, family_run: Callable[[str], Run]) -> None:
    run = family_run(family)
    model = reference_model(run.source)
    for prefix, got in run.decoded().items():
        h, weight = damped(run.hessian(prefix), matrix(linear_module(model, prefix)), 0.01)
        loss = form(weight - got.weight(torch.float32).double(), h)
        assert run.solved[prefix].loss == pytest.approx(loss, rel=1e-3), prefix
        assert run.solved[prefix].relative_error == pytest.approx(
            loss / form(weight, h), rel=1e-3 if len(weight) <= ENERGY_ROWS else 0.2
        ), prefix
        assert loss < form(weight - rounded(weight, 4, GROUP).double(), h), prefix


# Settings.

VARIANTS: Mapping[str, dict[str, Any]] = {
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "8 bits": {"bits": 8},
    "gptq_v2": {"format": "gptq_v2"},
    "asym": {"symmetric": False},
    "asym, gptq_v2": {"symmetric": False, "format": "gptq_v2"},
    "asym, 3 bits, gptq_v2": {"symmetric": False, "bits": 3, "format": "gptq_v2"},
    "asym, 2 bits": {"symmetric": False, "bits": 2},
    "natural order": {"order": "natural"},
    "act order, asym, 3 bits": {"order": "activation", "symmetric": False, "bits": 3},
    "act order": {"order": "activation"},
    "asym, 3 bits": {"symmetric": False, "bits": 3},
    "ranges": {"scales": "minmax"},
    "ranges, act order, no sweeps": {"scales": "minmax", "order": "activation", "sweeps": 0},
    "natural order, one group per row": {"order": "natural", "group_size": -1},
    "ranges, asym, 2 bits": {"scales": "minmax", "symmetric": False, "bits": 2},
    "no sweeps": {"sweeps": 0},
    "four sweeps, asym": {"sweeps": 4, "symmetric": False},
    "one group per row": {"group_size": -1},
    "groups of 8": {"group_size": 8},
    "damping": {"damping": 0.2},
    "rtn": {"method": "rtn"},
    "rtn, asym, 8 bits": {"method": "rtn", "symmetric": False, "bits": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant: str, family_run: Callable[[str], Run], ids_file: Path, tmp_path: Path) -> None:
    """Packed values, logits and config of every setting; each setting makes a difference."""
    plain = family_run("llama")
    settings = VARIANTS[variant]
    run = run_job(plain.source, tmp_path / "out", job(ids_file, **settings))
    version = 2 if settings.get("format") == "gptq_v2" else 1
    decoded = require_faithful(run, version)
    require_same_logits(run, decoded)
    config = run.config()
    assert config["bits"] == settings.get("bits", 4)
    assert config["group_size"] == settings.get("group_size", GROUP)
    assert config["sym"] is settings.get("symmetric", True)
    assert config["checkpoint_format"] == settings.get("format", "gptq")
    assert config["desc_act"] is False and config["static_groups"] is (
        settings.get("order") == "activation" and settings.get("method") != "rtn"
    )
    assert config["damp_percent"] == settings.get("damping", 0.01)
    assert config["meta"]["method"] == settings.get("method", "gptq")
    for prefix, got in decoded.items():
        if settings.get("symmetric", True):
            assert bool((got.zeros == 2 ** (settings.get("bits", 4) - 1)).all())
        else:
            assert got.zeros.unique().numel() > 1, prefix
            assert int(got.zeros.min()) >= (1 if version == 1 else 0)
        if settings != {"format": "gptq_v2"}:
            before = plain.solved[prefix]
            assert not (
                torch.equal(got.codes, before.codes.long())
                and torch.equal(got.scales, before.scales)
                and torch.equal(got.zeros, before.zeros.long())
            ), prefix


def test_v2_differs_from_v1_in_stored_zeros_only(family_run: Callable[[str], Run], ids_file: Path, tmp_path: Path) -> None:
    one = family_run("llama")
    two = run_job(one.source, tmp_path / "out", job(ids_file, format="gptq_v2"))
    a, b = stored_tensors(one.out), stored_tensors(two.out)
    assert a.keys() == b.keys()
    assert {name for name in a if not torch.equal(a[name], b[name])} == {name for name in a if name.endswith(".qzeros")}


def test_more_bits_lose_less(family_run: Callable[[str], Run], ids_file: Path, tmp_path: Path) -> None:
    plain = family_run("llama")
    runs = {bits: run_job(plain.source, tmp_path / str(bits), job(ids_file, bits=bits)) for bits in (2, 3, 8)} | {4: plain}
    for name in plain.solved:
        errors = [runs[bits].solved[name].relative_error for bits in (2, 3, 4, 8)]
        assert errors == sorted(errors, reverse=True), name
        assert errors[-1] < errors[0] / 100


def test_mse_rounds_better(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    """By the measure that the grid search goes by, on plain rounding where nothing else plays in."""
    source = checkpoint("llama")
    model = reference_model(source)
    plain = run_job(source, tmp_path / "plain", job(ids_file, method="rtn", bits=3, scales="minmax")).decoded()
    searched = run_job(source, tmp_path / "mse", job(ids_file, method="rtn", bits=3, scales="search")).decoded()
    for name, linear in searched.items():
        weight = matrix(linear_module(model, name))
        errors = [(weight - d.weight(torch.float32)).abs().pow(2.4).sum() for d in (plain[name], linear)]
        assert errors[1] < errors[0], name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rtn_is_rounding_to_nearest(bits: int, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """And needs no calibration text at all."""
    source = checkpoint("gpt2")
    run = run_job(source, tmp_path / "out", job(tmp_path / "absent.txt", method="rtn", bits=bits, scales="minmax"))
    model = reference_model(source)
    assert len(run.solved) == 12 and not run.hessians
    for name, linear in require_faithful(run).items():
        assert torch.equal(linear.weight(torch.float32), rounded(matrix(linear_module(model, name)), bits, GROUP)), name


def test_gpt2_weights_are_packed_transposed(family_run: Callable[[str], Run]) -> None:
    """Conv1D stores [inputs, outputs]; the packed Linear is [outputs, inputs] as for everyone else."""
    run = family_run("gpt2")
    before, after = stored_tensors(run.source), stored_tensors(run.out)
    for name, inputs, outputs in (("attn.c_attn", 64, 192), ("mlp.c_fc", 64, 256), ("mlp.c_proj", 256, 64)):
        prefix = f"transformer.h.1.{name}"
        assert before[f"{prefix}.weight"].shape == (inputs, outputs)
        assert after[f"{prefix}.qweight"].shape == (inputs * 4 // 32, outputs)
        assert after[f"{prefix}.scales"].shape == (inputs // GROUP, outputs)
        assert after[f"{prefix}.qzeros"].shape == (inputs // GROUP, outputs * 4 // 32)
        weight = before[f"{prefix}.weight"].T
        error = decode(after, prefix, 4).weight(torch.float32) - weight
        assert error.norm() < 0.3 * weight.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_source(dtype: torch.dtype, ids_file: Path, tmp_path: Path) -> None:
    """The reader's weights are rounded once, from fp32 to the model's dtype."""
    source = make_checkpoint(tmp_path / "m", "llama", dtype=dtype)
    run = run_job(source, tmp_path / "out", job(ids_file))
    require_same_logits(run, require_faithful(run), dtype)


def test_bf16_hessians_come_from_bf16_activations(ids_file: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16)
    run = run_job(source, tmp_path / "out", job(ids_file))
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    for name, expected in plain_hessians(reference_model(source, torch.bfloat16), names, random_ids()).items():
        assert distance(run.hessian(name), expected) < 1e-5


def test_tied_embeddings(ids_file: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "m", "llama", tie_word_embeddings=True)
    run = run_job(source, tmp_path / "out", job(ids_file))
    assert "lm_head.weight" not in stored_tensors(run.out)
    require_same_logits(run, require_faithful(run))


def test_bloom_without_base_prefix(family_run: Callable[[str], Run], ids_file: Path, tmp_path: Path) -> None:
    """Names in the output are the source's; values are those of the same model under its full names."""
    full = family_run("bloom")
    source = tmp_path / "m"
    source.mkdir()
    tensors = {name.removeprefix("transformer."): t.clone() for name, t in stored_tensors(full.source).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(full.source / "config.json", source)
    run = run_job(source, tmp_path / "out", job(ids_file))
    after, expected = stored_tensors(run.out), stored_tensors(full.out)
    assert set(after) == {name.removeprefix("transformer.") for name in expected}
    assert all(torch.equal(expected[name], after[name.removeprefix("transformer.")]) for name in expected)
    require_same_logits(run, require_faithful(run))


# Rules.


def test_rules_mix_bits_and_groups(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    rules = (
        Rule.parse(r"model\.layers\.0\.mlp\..*:bits=8"),
        Rule.parse(r".*\.down_proj:bits=3,group_size=-1"),
        Rule.parse(r".*\.(q|k|v|qkv)_proj:sym=false,group_size=16"),
    )
    run = run_job(checkpoint("llama"), tmp_path / "out", job(ids_file, rules=rules))
    bits = dict.fromkeys(run.solved, 4)
    bits |= {f"model.layers.0.mlp.{p}_proj": 8 for p in ("gate", "up", "down")}
    bits |= {f"model.layers.{i}.mlp.down_proj": 3 for i in (1, 2)}
    tensors = stored_tensors(run.out)
    decoded = {name: decode(tensors, name, bits[name]) for name in run.solved}
    for name, linear in decoded.items():
        assert torch.equal(linear.codes, run.solved[name].codes.long()), name
        attention = name.endswith(("q_proj", "k_proj", "v_proj"))
        width = 96 if bits[name] == 3 else 16 if attention else GROUP
        assert linear.scales.shape[1] == linear.codes.shape[1] // width, name
        assert (linear.zeros.unique().numel() > 1) == attention, name
    assert run.config()["dynamic"] == {
        r"+:model\.layers\.0\.mlp\..*": {"bits": 8},
        r"+:.*\.down_proj": {"bits": 3, "group_size": -1},
        r"+:.*\.(q|k|v|qkv)_proj": {"sym": False, "group_size": 16},
    }
    assert run.config()["bits"] == 4
    records = {r["name"]: (r["bits"], r["group_size"]) for r in run.report.linears}
    assert records["model.layers.0.mlp.down_proj"] == (8, GROUP)
    assert records["model.layers.1.mlp.down_proj"] == (3, -1)
    require_same_logits(run, decoded)


def test_rules_for_act_order_and_damping_within_one_group(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    """q, k and v share a Hessian and still each get what was asked for: as in jobs where all Linears have it."""
    source = checkpoint("llama")
    rules = (Rule.parse(r".*\.q_proj:order=natural"), Rule.parse(r".*\.k_proj:damping=0.3"))
    mixed = run_job(source, tmp_path / "mixed", job(ids_file, rules=rules))
    natural = run_job(source, tmp_path / "natural", job(ids_file, order="natural"))
    damped_run = run_job(source, tmp_path / "damped", job(ids_file, damping=0.3))
    plain = run_job(source, tmp_path / "plain", job(ids_file))
    for part, run in (("q", natural), ("k", damped_run), ("v", plain)):
        name = f"model.layers.0.self_attn.{part}_proj"
        assert torch.equal(mixed.solved[name].codes, run.solved[name].codes), part
    q, k = (f"model.layers.0.self_attn.{p}_proj" for p in "qk")
    assert not torch.equal(mixed.solved[q].codes, plain.solved[q].codes)
    assert not torch.equal(mixed.solved[k].codes, plain.solved[k].codes)
    assert mixed.solved[k].damping == 0.3
    require_same_logits(mixed, require_faithful(mixed))


def test_skip_leaves_linears_as_they_are(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    source = checkpoint("llama")
    rules = (Rule(r".*\.o_proj", None), Rule(r"model\.layers\.2\.", None))
    run = run_job(source, tmp_path / "out", job(ids_file, rules=rules))
    names = {f"model.layers.{i}.{name}" for i in (0, 1) for name in linear_names("llama") if not name.endswith("o_proj")}
    assert set(run.solved) == names
    before, after = stored_tensors(source), stored_tensors(run.out)
    kept = [n for n in before if n.endswith("o_proj.weight") or n.startswith("model.layers.2.")]
    assert kept and all(torch.equal(before[n], after[n]) for n in kept)
    assert run.config()["dynamic"] == {r"-:.*\.o_proj": {}, r"-:model\.layers\.2\.": {}}
    require_same_logits(run, require_faithful(run))


def test_skipped_linears_compute_while_others_are_solved(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    """With gate and up skipped, down_proj still sees what the originals make of the inputs."""
    source = checkpoint("llama")
    run = run_job(source, tmp_path / "out", job(ids_file, rules=(Rule(r".*\.(gate|up)_proj", None),)))
    model = reference_model(source)
    for part in "qkvo":
        name = f"model.layers.0.self_attn.{part}_proj"
        put_matrix(linear_module(model, name), run.decoded()[name].weight(torch.float32))
    name = "model.layers.0.mlp.down_proj"
    assert distance(run.hessian(name), plain_hessians(model, [name], random_ids())[name]) < 1e-5


def test_tiny_linears_are_left_out_and_told(ids_file: Path, tmp_path: Path) -> None:
    """One key-value head of 16: k and v have fewer than 32 outputs and stay, which readers learn from ``dynamic``."""
    source = make_checkpoint(tmp_path / "m", "llama", num_key_value_heads=1)
    run = run_job(source, tmp_path / "out", job(ids_file))
    kept = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "kv"]
    assert set(run.report.left_out) == set(kept)
    assert not set(kept) & set(run.solved) and len(run.solved) == 15
    assert set(run.config()["dynamic"]) == {"-:^" + name.replace(".", r"\.") + "$" for name in kept}
    require_same_logits(run, require_faithful(run))


# Files beside the weights.


def test_side_files_are_copied(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "m"
    shutil.copytree(checkpoint("llama"), source)
    side = {
        "tokenizer.json": '{"version": "1.0"}',
        "tokenizer_config.json": "{}",
        "tokenizer.model": "pieces",
        "LICENSE": "terms",
        "README.md": "card",
        "chat_template.jinja": "{{ messages }}",
        "modeling_own.py": "pass",
    }
    left = {"pytorch_model.bin": "pickle", "model.gguf": "x", ".gitattributes": "x", "quantize_config.json": "{}"}
    for name, text in {**side, **left}.items():
        (source / name).write_text(text)
    run = run_job(source, tmp_path / "out", job(ids_file))
    assert {name: (run.out / name).read_text() for name in side} == side
    assert (run.out / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert not any((run.out / name).exists() for name in left if name != "quantize_config.json")
    assert json.loads((run.out / "quantize_config.json").read_text())["bits"] == 4


def test_report_counts_what_is_there(family_run: Callable[[str], Run]) -> None:
    run = family_run("llama")
    sizes = [path.stat().st_size for path in run.out.glob("*.safetensors")]
    assert run.report.output_bytes == sum(sizes)
    assert run.report.source_bytes == sum(t.numel() * t.element_size() for t in stored_tensors(run.source).values())
    assert run.report.output_bytes < run.report.source_bytes / 2
    assert run.report.blocks == 3 and run.report.resumed_blocks == 0
    assert {r["name"] for r in run.report.linears} == set(run.solved)
