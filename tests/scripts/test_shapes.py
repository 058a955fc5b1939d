"""The shapes that benchmarks run on, and the random checkpoints made of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Child

from bigq.io.index import INDEX_NAME, Checkpoint
from bigq.io.reader import read_tensor

sys.path.append(str(ROOT / "scripts"))

import shapes
from flops import Group, block_flops, groups_of
from shapes import POOL, SHAPES, layout_of, pool, random_tensor, write_checkpoint, write_config, zipf_ids


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_parameters_as_the_model_is_published_with(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    write_config(shape, tmp_path)
    layout = layout_of(tmp_path)
    count = {part: sum(torch.Size(s).numel() for s in getattr(layout, part).values()) for part in ("block", "rest")}
    assert shape.blocks * count["block"] + count["rest"] == shape.parameters
    assert sum(len(group.outputs) for group in groups_of(layout.block, shape.groups)) == shape.linears_per_block


def test_a_checkpoint_holds_all_that_its_model_needs(tmp_path: Path) -> None:
    said: list[str] = []
    write_checkpoint(SHAPES["tiny"], tmp_path, blocks=2, say=said.append)
    checkpoint = Checkpoint.open(tmp_path)
    layout = layout_of(tmp_path)
    assert set(checkpoint) == {*layout.rest, *layout.of_block(0), *layout.of_block(1)}
    files = [{checkpoint[name].file for name in layout.of_block(i)} for i in range(2)]
    assert [len(f) for f in files] == [1, 1] and files[0] != files[1]
    weights = [read_tensor(checkpoint[f"model.layers.{i}.mlp.up_proj.weight"]).float() for i in range(2)]
    assert weights[0].std() == pytest.approx(0.02, rel=0.02) and not torch.equal(*weights)
    assert bool((read_tensor(checkpoint["model.norm.weight"]) == 1).all())
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 2
    assert said[-1].startswith("model-00003-of-00003.safetensors: 3 of 3")


def test_a_checkpoint_that_was_cut_off_is_finished_with_the_same_bytes(child: Child, tmp_path: Path) -> None:
    done = child(ROOT / "scripts/shapes.py", "tiny", tmp_path / "a", "--blocks", "2")
    assert done.returncode == 0, done.stderr
    whole = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    (tmp_path / "a" / INDEX_NAME).unlink()
    (tmp_path / "a/model-00002-of-00003.safetensors").unlink()
    write_checkpoint(SHAPES["tiny"], tmp_path / "a", blocks=2, say=str)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == whole


def test_tensors_are_told_apart_by_name() -> None:
    some = {name: b"".join(map(bytes, random_tensor(name, (8, 8), 0).chunks())) for name in ("a.weight", "b.weight")}
    assert some["a.weight"] != some["b.weight"]


def test_a_large_weight_repeats_a_pool_and_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of 4093 numbers and a weight of 64,000: rows overlap, and none is another one."""
    monkeypatch.setattr(shapes, "PIECE", 1000)
    monkeypatch.setattr(shapes, "POOL", 4093)
    monkeypatch.setattr(shapes, "POOL_PIECE", 512)
    pool.cache_clear()
    made = [b"".join(map(bytes, random_tensor(name, (1000, 64), 0).chunks())) for name in ("a.weight", "b.weight", "a.weight")]
    pool.cache_clear()
    assert made[0] == made[2] != made[1]
    weight = torch.frombuffer(bytearray(made[0]), dtype=torch.bfloat16).reshape(1000, 64).float()
    assert len(weight.unique(dim=0)) == 1000 and torch.linalg.matrix_rank(weight) == 64
    assert weight.std() == pytest.approx(0.02, rel=0.05) and abs(float(weight.mean())) < 1e-3
    correlation = torch.corrcoef(weight.T) - torch.eye(64)
    assert float(correlation.abs().max()) < 0.25


def test_rows_of_every_published_shape_begin_at_different_places_of_the_pool() -> None:
    assert all(POOL % k for k in range(2, int(POOL**0.5) + 1)), "not a prime"
    assert max(max(shape.vocabulary, shape.hidden) for shape in SHAPES.values()) < POOL


def test_token_ids_are_in_the_vocabulary_and_uneven() -> None:
    ids = zipf_ids(4, 500, 100)
    assert ids.shape == (4, 500) and ids.dtype == torch.int64 and int(ids.min()) == 4 and int(ids.max()) < 100
    counts = ids.flatten().bincount(minlength=100).tolist()
    assert counts[4] > 5 * counts[20] > 0


def test_flops_are_those_of_products_written_out() -> None:
    """Two Linears 3 × 5 and 2 × 5 on one input, one 5 × 3 on another; 7 rows of 11 tokens; hidden 5."""
    flops = block_flops([Group(inputs=5, outputs=(3, 2)), Group(inputs=3, outputs=(5,))], hidden=5, rows=7, seqlen=11)
    tokens = 7 * 11
    causal = sum(2 * 2 * 5 * (position + 0.5) for position in range(11)) * 7
    assert flops["replay"] == pytest.approx(2 * tokens * (3 * 5 + 2 * 5 + 5 * 3) + causal)
    assert flops["hessian"] == tokens * (25 + 9)
    assert flops["factor"] == pytest.approx((125 + 27) / 3)
    assert flops["solve"] == 3 * 25 + 2 * 25 + 5 * 9


def test_groups_name_every_linear_of_the_block() -> None:
    with pytest.raises(ValueError, match="down_proj"):
        groups_of({"mlp.down_proj.weight": (4, 8), "norm.weight": (4,)}, [["up_proj"]])
