"""Parameters that a checkpoint stores in pieces: one convolution of OLMo hybrid for queries, keys and values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import logits_of, random_ids, randomize, reference_model, rewrite, save_ids, stored_tensors, streamed_logits
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import bigq
from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.io.index import Checkpoint
from bigq.io.reader import read_tensor
from bigq.io.sources.joined import JoinedSource
from bigq.model.experts.stored import expert_parts, joined_parameters, merged_parts
from bigq.model.skeleton import Merge, build, place

PIECES = [f"model.layers.0.linear_attn.{part}_conv1d.weight" for part in "qkv"]
WHOLE = "model.layers.0.linear_attn.conv1d.weight"
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joined") / "m"
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["olmo_hybrid"](**SIZES))
    randomize(model)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert set(PIECES) < set(stored_tensors(folder)) and WHOLE in model.state_dict()
    return folder


def job(tmp_path: Path) -> bigq.JobConfig:
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(4, 24))
    scheme = bigq.QuantScheme(group_size=32)
    return bigq.JobConfig(scheme=scheme, calibration=str(ids), samples=4, seqlen=24, device="cpu", quiet=True, allow_partial=True)


def test_streamed_logits_are_those_of_the_whole_model(source: Path) -> None:
    ids = random_ids(3)
    assert torch.equal(streamed_logits(source, ids, 2, "float32"), logits_of(reference_model(source), ids, 2))


def test_every_piece_counts(source: Path, tmp_path: Path) -> None:
    before = streamed_logits(source, random_ids(2), 2)
    for name in PIECES:
        folder = tmp_path / name
        shutil.copytree(source, folder)
        rewrite(folder, name, stored_tensors(source)[name] + 1.0)
        assert not torch.equal(streamed_logits(folder, random_ids(2), 2), before)


def test_a_job_copies_the_pieces(source: Path, tmp_path: Path) -> None:
    """And its plan fits, its output is sound and runs."""
    assert bigq.plan(source, tmp_path / "out", job(tmp_path)).shortages == ()
    bigq.quantize(source, tmp_path / "out", job(tmp_path))
    before, after = stored_tensors(source), stored_tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in PIECES)
    assert WHOLE not in after and any(name.startswith("model.layers.0.") for name in set(before) - set(after))
    assert bigq.verify(tmp_path / "out") == []
    got = streamed_logits(tmp_path / "out", random_ids(2), 2)
    assert torch.isfinite(got).all() and not torch.equal(got, streamed_logits(source, random_ids(2), 2))


def test_a_value_has_its_pieces_in_the_order_of_the_rule(source: Path) -> None:
    checkpoint = Checkpoint.open(source)
    model = build(CONFIG_MAPPING["olmo_hybrid"](**SIZES), torch.float32)
    names = joined_parameters(model, place(model, list(reversed(PIECES))).merged)
    assert names == {WHOLE: tuple(PIECES)}
    joined = JoinedSource([checkpoint[name] for name in PIECES])
    value = joined.value(read_tensor, torch.device("cpu"), torch.bfloat16)
    expected = torch.cat([stored_tensors(source)[name] for name in PIECES]).bfloat16()
    assert torch.equal(value, expected) and joined.shape == tuple(expected.shape) and joined.is_plain


def test_a_missing_piece_is_named(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(source, folder)
    rewrite(folder, PIECES[1], None)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][PIECES[1]]
    index.write_text(json.dumps(content))
    for command in (lambda: bigq.plan(folder, tmp_path / "out", job(tmp_path)), lambda: streamed_logits(folder, random_ids(2), 2)):
        with pytest.raises(CheckpointError, match=r"0\.linear_attn\.conv1d\.weight: the checkpoint holds 2 of the 3 tensors .*fetch it"):
            command()
    shutil.rmtree(folder)
    shutil.copytree(source, folder)
    assert bigq.plan(folder, tmp_path / "out", job(tmp_path)).shortages == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t[:, :, :2].contiguous(), r"k_conv1d\.weight is torch.float32 .*cannot be joined to .*q_conv1d\.weight"),
        (lambda t: t.bfloat16(), r"k_conv1d\.weight is torch.bfloat16 .*cannot be joined to .*fetch the checkpoint again"),
        (lambda t: t[:8].contiguous(), r"those that are joined to it have shape .*but config\.json says"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(change: Any, says: str, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(source, folder)
    value: Tensor = change(stored_tensors(source)[PIECES[1]])
    rewrite(folder, PIECES[1], value)
    with pytest.raises(CheckpointError, match=says):
        streamed_logits(folder, random_ids(2), 2)


@pytest.mark.parametrize(
    ("kind", "stored", "made"),
    [
        ("hrm_text", "model.H_module.layers.0.mlp.gate_up_proj.weight", "makes it and others of one tensor by Chunk"),
        ("inkling2_text", "model.llm.layers.2.mlp.experts.w13_weight", "changes what is stored for it by Interleave"),
    ],
)
def test_other_ways_to_make_a_parameter_are_refused(kind: str, stored: str, made: str) -> None:
    sizes = {name: SIZES[name] for name in list(SIZES)[:5]}
    config = CONFIG_MAPPING[kind](**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with pytest.raises(UnsupportedModelError, match=f"transformers {made}.*, which is not supported$"):
        expert_parts(build(config, torch.float32), [stored])


@pytest.mark.parametrize("target", ["model.layers.0.mlp.gate_proj.weight", "model.embed_tokens.weight"])
def test_linears_and_embeddings_are_not_joined(target: str) -> None:
    """The output names a Linear as the checkpoint does, and an embedding is read by rows."""
    model = build(CONFIG_MAPPING["olmo_hybrid"](**SIZES), torch.float32)
    merged = {name: Merge(target, i, 2, (("Concatenate", 0),), (target,)) for i, name in enumerate("ab")}
    assert joined_parameters(model, merged) == {}
    assert joined_parameters(model, {n: m.at(WHOLE) for n, m in merged.items()}) == {WHOLE: ("a", "b")}
    with pytest.raises(UnsupportedModelError, match=r"makes it of several tensors by Concatenate, which is not supported$"):
        merged_parts(merged)
