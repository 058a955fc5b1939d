"""A finished folder as a GGUF file: every weight is the one that bigq solved, and what could not be exact is refused beforehand."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import Child
from models import make_checkpoint, rewrite, shard_of, stored_tensors, word_tokenizer
from safetensors.torch import save_file
from torch import Tensor

import bigq
from bigq import faults
from bigq.cli.main import main
from bigq.conversion.gguf import check_gguf, check_gguf_job, write_gguf
from bigq.errors import BigqError, CheckpointError, ResourceError, Stopped, UnsupportedModelError, UsageError
from bigq.inspect.status import status
from bigq.inspect.verify import verify
from bigq.io import gguf_file
from bigq.job.stop import Stop
from bigq.model.pager import Pager
from bigq.reports.write import write_model_card
from bigq.sched import run

CPU = torch.device("cpu")
ASYMMETRIC = {"symmetric": False, "scale_bits": 7}


def quantized(source: Path, out: Path, *, rules: Sequence[bigq.Rule] = (), format: str = "gptq", **scheme: Any) -> Path:
    """Rounded to nearest: what the solver makes of it is of no matter here."""
    values = bigq.QuantScheme(**{"group_size": 32, **scheme})
    bigq.quantize(str(source), str(out), bigq.JobConfig(scheme=values, rules=tuple(rules), method="rtn", format=format))
    return out


@pytest.fixture(scope="module")
def packed(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama, 4 bits, symmetric, groups of 32. To be read only."""
    return quantized(checkpoint("llama"), tmp_path_factory.mktemp("packed") / "out")


def tensors_of(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Name → (type, values in fp32) as the gguf package reads them."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).view(*map(int, reversed(tensor.shape))),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def test_a_head_of_its_own_is_written_though_the_config_ties_it(tmp_path: Path) -> None:
    """Without output.weight, llama.cpp would use the embedding. transformers, and so bigq, use the head that is stored."""
    source = make_checkpoint(tmp_path / "m", "llama", tie_word_embeddings=True)
    stored = stored_tensors(source)
    embedding = stored["model.embed_tokens.weight"]
    for path in source.glob("*.safetensors*"):
        path.unlink()
    for head, written in ((embedding.clone(), False), (embedding.index_fill(0, torch.tensor(99), 0.5), True)):
        save_file({**stored, "lm_head.weight": head}, source / "model.safetensors", metadata={"format": "pt"})
        file = tmp_path / f"{written}.gguf"
        write_gguf(quantized(source, tmp_path / f"out {written}"), file)
        found = tensors_of(file)
        assert torch.equal(found["token_embd.weight"][1], embedding)
        assert ("output.weight" in found) == written
        assert not written or torch.equal(found["output.weight"][1], head)


def field(path: Path, key: str) -> Any:
    found = gguf.GGUFReader(path).get_field(key)
    return None if found is None else found.contents()


#: Name in a block of the model → in GGUF, written out once more.
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def in_transformers_order(family: str, name: str, tensor: Tensor) -> Tensor:
    """Undo what llama.cpp's rope wants of llama's q and k: neighbours become the two halves of a head of 16."""
    if family in ("llama", "mistral") and ("attn_q." in name or "attn_k." in name):
        return tensor.unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2)
    return tensor


def expected_of(folder: Path, family: str) -> dict[str, Tensor]:
    """What a GGUF file of a folder should hold: dequantized weights and others, in fp32, by GGUF's names."""
    pager = Pager(folder, device=CPU, dtype="float32")
    stored = stored_tensors(folder)
    expected = {}
    for parameter in pager.model.state_dict():
        module, _, leaf = parameter.rpartition(".")
        if module.startswith("model.layers."):
            _, _, block, inner = module.split(".", 3)
            name = f"blk.{block}.{BLOCK_NAMES[inner]}.{leaf}"
        else:
            name = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[module] + ".weight"
        if parameter in pager.packed:
            expected[name] = pager.dequantized(parameter)
        elif parameter in stored:
            expected[name] = stored[parameter].float()
    return expected


CASES: Mapping[str, tuple[str, dict[str, Any], dict[str, Any], set[str]]] = {
    "llama": ("llama", {}, {}, {"F32", "Q4_0"}),
    "one group": ("llama", {}, {"group_size": -1}, {"F32", "Q4_0"}),
    "8 bits": ("llama", {}, {"bits": 8}, {"F32", "Q8_0"}),
    "asymmetric": ("llama", {}, ASYMMETRIC, {"F32", "Q4_1"}),
    "gptq_v2, asymmetric": ("llama", {}, {**ASYMMETRIC, "format": "gptq_v2"}, {"F32", "Q4_1"}),
    "compressed-tensors": ("llama", {"dtype": torch.bfloat16}, {"format": "compressed-tensors"}, {"F32", "BF16", "Q4_0"}),
    "compressed-tensors, asymmetric": ("llama", {}, {**ASYMMETRIC, "format": "compressed-tensors"}, {"F32", "Q4_1"}),
    "mixed": (
        "llama",
        {"dtype": torch.float16, "attention_bias": True, "mlp_bias": True},
        {
            "rules": (
                bigq.Rule(r".*v_proj$", {"bits": 8}),
                bigq.Rule(r".*\.1\..*q_proj$", None),
                bigq.Rule(r".*up_proj$", {"group_size": 64}),
            ),
            "format": "gguf",  # readers of the others fuse q, k and v
        },
        {"F32", "F16", "Q4_0", "Q8_0"},
    ),
    "tied": ("llama", {"tie_word_embeddings": True}, {}, {"F32", "Q4_0"}),
    "mistral": ("mistral", {}, {}, {"F32", "Q4_0"}),
    "qwen2": ("qwen2", {"use_sliding_window": False}, {}, {"F32", "Q4_0"}),
    "qwen3": ("qwen3", {}, {"bits": 8}, {"F32", "Q8_0"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_what_the_folder_holds(case: str, tmp_path: Path) -> None:
    family, model, scheme, types = CASES[case]
    folder = quantized(make_checkpoint(tmp_path / "source", family, **model), tmp_path / "out", **scheme)
    write_gguf(folder, tmp_path / "x.gguf")
    expected, got = expected_of(folder, family), tensors_of(tmp_path / "x.gguf")
    assert got.keys() == expected.keys()
    assert {type for type, _ in got.values()} == types
    for name, (_, values) in got.items():
        assert torch.equal(in_transformers_order(family, name, values), expected[name]), name
    assert ("output.weight" in got) == (case != "tied")
    assert all(type == "F32" for name, (type, values) in got.items() if values.ndim == 1)
    assert all(type in ("F32", "F16", "BF16") for name, (type, _) in got.items() if not name.startswith("blk."))


def test_rows_of_q_and_k_move_and_others_do_not(packed: Path, tmp_path: Path) -> None:
    """The comparison above would notice rows left as they are."""
    write_gguf(packed, tmp_path / "x.gguf")
    expected, got = expected_of(packed, "llama"), tensors_of(tmp_path / "x.gguf")
    moved = {name.split(".")[2] for name, (_, values) in got.items() if not torch.equal(values, expected[name])}
    assert moved == {"attn_q", "attn_k"}


def test_metadata(tmp_path: Path) -> None:
    source = make_checkpoint(
        tmp_path / "source", "llama", head_dim=32, rms_norm_eps=1e-4, rope_parameters={"rope_theta": 7e4, "rope_type": "default"}
    )
    path = tmp_path / "x.gguf"
    write_gguf(quantized(source, tmp_path / "a name", bits=8), path)
    said = {
        "general.architecture": "llama",
        "general.name": "llama 146K",
        "general.size_label": "146K",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "general.quantization_version": 2,
        "llama.vocab_size": 128,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 3,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-4),
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 7e4,
        "tokenizer.ggml.model": "none",
    }
    assert {key: field(path, key) for key in said} == said


def test_context_ends_with_the_sliding_window(tmp_path: Path) -> None:
    folder = quantized(make_checkpoint(tmp_path / "source", "mistral"), tmp_path / "out")
    told: list[str] = []
    blocks: list[tuple[int, int]] = []
    write_gguf(folder, tmp_path / "x.gguf", say=told.append, written=lambda *at: blocks.append(at))
    assert field(tmp_path / "x.gguf", "llama.context_length") == 16
    assert "no tokenizer" in told[0] and "a context length of 16, the sliding window" in told[1]
    assert blocks == [(1, 3), (2, 3), (3, 3)]


def test_factors_of_llama_3_are_those_of_transformers(tmp_path: Path) -> None:
    rope = {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    source = make_checkpoint(tmp_path / "source", "llama", head_dim=64, rope_parameters={**rope, "original_max_position_embeddings": 32})
    folder = quantized(source, tmp_path / "out")
    write_gguf(folder, tmp_path / "x.gguf")
    type, factors = tensors_of(tmp_path / "x.gguf")["rope_freqs.weight"]
    plain = 1e4 ** -(torch.arange(0, 64, 2) / 64)
    scaled = Pager(folder, device=CPU).model.get_buffer("model.rotary_emb.inv_freq")
    assert type == "F32" and torch.allclose(plain / factors, scaled, rtol=1e-6)
    assert {1.0, 8.0} < set(factors.tolist()), "some stay, some are stretched, some are between"


def test_a_folder_that_is_not_packed_is_written_as_it_is(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("llama")
    write_gguf(source, tmp_path / "x.gguf")
    got, expected = tensors_of(tmp_path / "x.gguf"), expected_of(source, "llama")
    assert got.keys() == expected.keys() and {type for type, _ in got.values()} == {"F32"}
    assert all(torch.equal(in_transformers_order("llama", name, values), expected[name]) for name, (_, values) in got.items())


def test_a_matrix_is_never_whole_in_blocks(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are put into blocks some at a time, and the file is the same."""
    write_gguf(packed, tmp_path / "at-once.gguf")
    monkeypatch.setattr(gguf_file, "CODES_AT_ONCE", 500)
    write_gguf(packed, tmp_path / "in-parts.gguf")
    assert (tmp_path / "at-once.gguf").read_bytes() == (tmp_path / "in-parts.gguf").read_bytes()


# What is refused: when a job is asked for, and again when a folder is written.


SCHEMES: Mapping[str, tuple[dict[str, Any], str]] = {
    "2 bits": ({"bits": 2}, r"model\.layers\.0\.self_attn\.q_proj and 20 more: GGUF has no blocks for 2 bits symmetric.*--bits 4"),
    "3 bits, asymmetric": ({"bits": 3, "symmetric": False}, "no blocks for 3 bits asymmetric"),
    "8 bits, asymmetric": ({"bits": 8, "symmetric": False}, "no blocks for 8 bits asymmetric.*--bits 8 --sym"),
    "groups of 16": ({"group_size": 16}, "q_proj and 20 more have groups of 16.*--group-size 32"),
    "asymmetric": (
        {"symmetric": False},
        "q_proj: the products of its zero points and scales are not fp16 numbers.*"
        "(use --scale-bits 7|quantize the model with --format gguf)",
    ),
    "one of them": (
        {"rules": (bigq.Rule(r".*\.2\.mlp\.down_proj$", {"bits": 3}),)},
        r"model\.layers\.2\.mlp\.down_proj: GGUF has no blocks for 3 bits",
    ),
}


@pytest.mark.parametrize("case", SCHEMES)
def test_linears_that_would_be_rounded_again_are_refused(case: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    settings, told = SCHEMES[case]
    source = checkpoint("llama")
    scheme = {"group_size": 32, **{name: value for name, value in settings.items() if name != "rules"}}
    config = bigq.JobConfig(scheme=bigq.QuantScheme(**scheme), rules=settings.get("rules", ()))
    with pytest.raises(UsageError, match=told):
        check_gguf_job(Pager(source, device=CPU), config)
    folder = quantized(source, tmp_path / "out", **settings)
    with pytest.raises(UsageError, match=told):
        write_gguf(folder, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "m", "llama", intermediate_size=80)
    pager = Pager(source, device=CPU)
    config = bigq.JobConfig(scheme=bigq.QuantScheme(group_size=-1))
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.down_proj and 2 more have 80 inputs, but blocks of GGUF hold 32.*--skip"):
        check_gguf_job(pager, config)
    check_gguf_job(pager, bigq.JobConfig(scheme=bigq.QuantScheme(group_size=-1), rules=(bigq.Rule(r".*down_proj$", None),)))


@pytest.mark.parametrize("settings", [{}, {"bits": 8}, ASYMMETRIC, {"group_size": 96}, {"group_size": -1}])
def test_what_will_be_exact_is_let_through(settings: dict[str, Any], checkpoint: Callable[[str], Path]) -> None:
    config = bigq.JobConfig(scheme=bigq.QuantScheme(**{"group_size": 32, **settings}))
    check_gguf_job(Pager(checkpoint("llama"), device=CPU), config)


MODELS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "family": ("bloom", {}, "no GGUF files of model type 'bloom', only of llama, mistral, qwen2, qwen3"),
    "activation": ("llama", {"hidden_act": "gelu"}, r"config\.json: hidden_act is 'gelu', which llama\.cpp computes differently"),
    "rope": ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    "llama3 elsewhere": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        "rope_type is 'llama3'",
    ),
    "yarn of another kind": (
        "llama",
        {
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 0.5,
            }
        },
        r"rope_parameters\.attention_factor is 0\.5",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_llama_cpp_computes_otherwise_are_refused(case: str, tmp_path: Path) -> None:
    family, values, told = MODELS[case]
    source = make_checkpoint(tmp_path / "m", family, **values)
    with pytest.raises(UnsupportedModelError, match=told):
        check_gguf_job(Pager(source, device=CPU), bigq.JobConfig(scheme=bigq.QuantScheme(group_size=32)))
    with pytest.raises(UnsupportedModelError, match=told):
        write_gguf(source, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(packed, folder)
    word_tokenizer().save_pretrained(folder)
    pager, config = Pager(folder, device=CPU), bigq.JobConfig(scheme=bigq.QuantScheme(group_size=32))
    for check in (lambda: check_gguf(pager), lambda: check_gguf_job(pager, config)):
        with pytest.raises(UnsupportedModelError, match=r"does not support this tokenizer \(its type is 'WordLevel'"):
            check()


def test_scales_and_zero_points_of_others_are_looked_at(packed: Path, tmp_path: Path) -> None:
    """A folder that says symmetric and is not, down to one group."""
    folder = tmp_path / "out"
    shutil.copytree(packed, folder)
    name = "model.layers.2.mlp.up_proj.qzeros"
    zeros = stored_tensors(folder)[name]
    zeros[1, 3] += 1 << 8
    rewrite(folder, name, zeros)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj is symmetric, but"):
        write_gguf(folder, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_places_that_no_file_can_have_are_refused(packed: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "x.gguf"):
        with pytest.raises(UsageError, match="name a file in an existing folder"):
            write_gguf(packed, path)


# What goes wrong on the way.


@pytest.mark.parametrize("point", ["file.opened:1", "gguf.piece:1", "gguf.piece:20", "file.written:1", "file.synced:1"])
def test_a_disk_that_fills_up_leaves_nothing_behind(point: str, packed: Path, tmp_path: Path) -> None:
    faults.arm(f"{point}:ENOSPC")
    try:
        with pytest.raises(ResourceError, match=r"x\.gguf: cannot be written: No space left on device; free some space"):
            write_gguf(packed, tmp_path / "x.gguf")
    finally:
        faults.disarm()
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_damaged_on_the_way_leaves_nothing_behind(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(packed, folder)
    norm = stored_tensors(folder)["model.norm.weight"]
    norm[3] = float("nan")
    rewrite(folder, "model.norm.weight", norm)
    with pytest.raises(BigqError, match=r"model\.norm\.weight contains NaN"):
        write_gguf(folder, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert shard_of(folder, "model.norm.weight").exists()


def test_a_kill_leaves_nothing_under_the_name(packed: Path, tmp_path: Path, child: Child) -> None:
    code = (
        "import sys; from pathlib import Path; from bigq import faults; from bigq.conversion.gguf import write_gguf; "
        "faults.arm('gguf.piece:20'); write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    done = child("-c", code, packed, tmp_path / "x.gguf")
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "x.gguf").exists() and len(list(tmp_path.iterdir())) == 1
    write_gguf(packed, tmp_path / "x.gguf")
    assert json.loads((packed / "config.json").read_text())["num_hidden_layers"] == field(tmp_path / "x.gguf", "llama.block_count")


# Jobs and conversions.


def gguf_job(ids: Path, **changes: object) -> bigq.JobConfig:
    values: dict[str, object] = {"scheme": bigq.QuantScheme(group_size=32), "calibration": str(ids), "samples": 8, "seqlen": 24}
    return bigq.JobConfig(**{**values, "format": "gguf", "quiet": True, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_a_job_makes_shards_and_a_file_of_them(
    symmetric: bool, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = tmp_path / "out", str(checkpoint("llama"))
    config = gguf_job(ids_file, scheme=bigq.QuantScheme(group_size=32, symmetric=symmetric), lm_head=True)
    report = bigq.quantize(source, out, config)
    assert verify(out) == []
    assert json.loads((out / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert json.loads((out / ".bigq/job.json").read_text())["settings"]["scheme"]["scale_bits"] == (11 if symmetric else 7)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["output.weight"] == ("Q4_0" if symmetric else "Q4_1")
    write_gguf(Path(shutil.copytree(out, tmp_path / "elsewhere")), tmp_path / "again.gguf")
    whole = (out / "model.gguf").read_bytes()
    assert whole == (tmp_path / "again.gguf").read_bytes()
    planned = bigq.plan(source, tmp_path, config).cost.output
    assert planned == pytest.approx(report.output_bytes + len(whole), rel=0.2), "headers and metadata weigh much in a tiny model"

    (out / "model.gguf").unlink()
    assert any(line.startswith("model.gguf: ") for line in verify(out))
    shards = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    bigq.quantize(source, out)
    assert (out / "model.gguf").read_bytes() == whole and verify(out) == []
    assert shards == {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}, "nothing else was made again"

    next(iter(shards)).unlink()
    monkeypatch.setattr(run, "write_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bigq.quantize(source, out)
    assert not (out / "model.gguf").exists(), "the file of other shards is gone"
    assert verify(out), "and its job is not done"
    monkeypatch.undo()
    bigq.quantize(source, out)
    assert (out / "model.gguf").read_bytes() == whole and verify(out) == []


def interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_a_file_that_was_damaged_is_made_again(checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    """Of the size that it had; one that was copied, and has another time, is read and stays."""
    out, source = tmp_path / "out", str(checkpoint("llama"))
    bigq.quantize(source, out, gguf_job(ids_file, method="rtn"))
    path = out / "model.gguf"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + b"\0\1")
    assert any(line.startswith("model.gguf: was changed") for line in verify(out))
    bigq.quantize(source, out)
    assert path.read_bytes() == whole and verify(out) == []
    os.utime(path, ns=(1, 1))
    bigq.quantize(source, out)
    assert path.stat().st_mtime_ns == 1 and verify(out) == []


@pytest.mark.parametrize("way", ["killed", "failed", "stopped"])
def test_a_job_is_not_finished_before_its_file_is(
    way: str, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = tmp_path / "out", str(checkpoint("llama"))
    config = gguf_job(ids_file, method="rtn")
    if way == "killed":
        flags = f"--format gguf --group-size 32 --method rtn --calibration {ids_file} --samples 8 --seqlen 24".split()
        done = child("-m", "bigq", "quantize", source, out, *flags, env={"BIGQ_FAULT": "finish.config"})
        assert done.returncode == -9, done.stderr
    elif way == "failed":
        faults.arm("gguf.piece:5:ENOSPC")
        try:
            with pytest.raises(ResourceError, match=r"model\.gguf"):
                bigq.quantize(source, out, config)
        finally:
            faults.disarm()
    else:
        stop = Stop()

        def asked(*args: Any, **kwargs: Any) -> None:
            stop.request("SIGTERM")
            write_gguf(*args, **kwargs)

        monkeypatch.setattr(run, "write_gguf", asked)
        with pytest.raises(Stopped, match=r"stopped while model\.gguf was written"):
            bigq.quantize(source, out, config, stop)
        monkeypatch.undo()
    assert (out / "config.json").exists() and not (out / "model.gguf").exists()
    now = status(out)
    assert (now.state, now.resumable) == (way, True)
    with pytest.raises(UsageError, match=r"not finished \(" + way):
        write_model_card(out)
    bigq.quantize(source, out)
    assert status(out).state == "finished" and verify(out) == []


@pytest.mark.parametrize(
    ("family", "scheme", "says"),
    [
        ("llama", {"bits": 3}, "GGUF has no blocks for 3 bits"),
        ("llama", {"bits": 8, "symmetric": False}, "GGUF has no blocks for 8 bits"),
        ("llama", {"group_size": 16}, "groups of 16"),
        ("bloom", {}, "bloom"),
    ],
)
def test_a_job_that_could_not_end_in_a_file_does_not_begin(
    family: str, scheme: dict[str, Any], says: str, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path
) -> None:
    config = gguf_job(ids_file, scheme=bigq.QuantScheme(**{"group_size": 32, **scheme}))
    with pytest.raises((UsageError, UnsupportedModelError), match=says):
        bigq.quantize(str(checkpoint(family)), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_convert_makes_the_same_file(
    checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bigq.quantize(str(checkpoint("qwen2")), tmp_path / "out", gguf_job(ids_file, format="gptq"))
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "x.gguf"), "--to", "gguf"]) == 0
    told = capsys.readouterr()
    assert "gptq → gguf" in told.out and "block 3 of 3" in told.err
    write_gguf(tmp_path / "out", tmp_path / "y.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "x.gguf"), "--to", "gguf"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(checkpoint("qwen2")), str(tmp_path / "z.gguf"), "--to", "gguf"]) == 2
    assert "is not quantized" in capsys.readouterr().err and not (tmp_path / "z.gguf").exists()
