"""Streaming block by block computes, bit for bit, what transformers computes with the whole model in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import FAMILIES, logits_of, make_checkpoint, random_ids, reference_model, rewrite, stored_tensors, streamed_logits
from safetensors.torch import save_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_equal_transformers(family: str, dtype: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(family)
    assert len(list(folder.glob("*.safetensors"))) > 2
    ids = random_ids(2)
    expected = logits_of(reference_model(folder, DTYPES[dtype]), ids, 2)
    got = streamed_logits(folder, ids, 2, dtype)
    assert expected.dtype == DTYPES[dtype]
    assert torch.isfinite(expected).all()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_changed_weight_changes_streamed_logits(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The comparison above would notice: one element of one matrix of the last block makes the difference."""
    source = checkpoint(family)
    folder = tmp_path / "changed"
    shutil.copytree(source, folder)
    tensors = stored_tensors(folder)
    name = [n for n in tensors if ".2." in n and tensors[n].ndim == 2][-1]
    changed = tensors[name].clone()
    changed[1, 2] += 3
    rewrite(folder, name, changed)
    ids = random_ids(2)
    expected = logits_of(reference_model(source), ids, 2)
    got = streamed_logits(folder, ids, 2, "float32")
    assert not torch.equal(got, expected)
    assert torch.equal(got, logits_of(reference_model(folder), ids, 2))


def test_single_file_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama", shard="1GB")
    assert [p.name for p in folder.glob("*.safetensors*")] == ["model.safetensors"]
    ids = random_ids(2)
    assert torch.equal(streamed_logits(folder, ids, 2, "float32"), logits_of(reference_model(folder), ids, 2))


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_sixteen_bit_source_computes_in_its_own_dtype(stored: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama", dtype=DTYPES[stored])
    assert {t.dtype for t in stored_tensors(folder).values()} == {DTYPES[stored]}
    ids = random_ids(2)
    got = streamed_logits(folder, ids, 2, "auto")
    assert got.dtype == DTYPES[stored]
    assert torch.equal(got, logits_of(reference_model(folder, DTYPES[stored]), ids, 2))


def test_sixteen_bit_source_in_fp32(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "qwen3", dtype=torch.bfloat16)
    ids = random_ids(2)
    assert torch.equal(streamed_logits(folder, ids, 2, "float32"), logits_of(reference_model(folder, torch.float32), ids, 2))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_tied_embeddings(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", family, tie_word_embeddings=True)
    assert "lm_head.weight" not in stored_tensors(folder)
    ids = random_ids(2)
    for dtype in ("float32", "bfloat16"):
        assert torch.equal(streamed_logits(folder, ids, 2, dtype), logits_of(reference_model(folder, DTYPES[dtype]), ids, 2))


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3", "falcon_alibi"])
def test_odd_tail_batch(family: str, checkpoint: Callable[[str], Path]) -> None:
    """7 rows in batches of 3 leave one row: masks and ALiBi of both batch sizes are the right ones."""
    folder, ids = checkpoint(family), random_ids(7)
    assert torch.equal(streamed_logits(folder, ids, 3, "float32"), logits_of(reference_model(folder), ids, 3))


def test_bloom_without_base_prefix(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """BLOOM's own checkpoints name tensors without the leading 'transformer.'."""
    source = checkpoint("bloom")
    tensors = {name.removeprefix("transformer."): t.clone() for name, t in stored_tensors(source).items()}
    assert "h.0.mlp.dense_h_to_4h.weight" in tensors and "word_embeddings.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", tmp_path)
    ids = random_ids(2)
    got = streamed_logits(tmp_path, ids, 2, "float32")
    assert torch.equal(got, logits_of(reference_model(source), ids, 2))
    assert torch.equal(got, logits_of(reference_model(tmp_path), ids, 2))


def test_rows_not_in_batch_do_not_matter(checkpoint: Callable[[str], Path]) -> None:
    """Rows are independent: the logits of a row are those of the same batch whatever comes behind it."""
    folder, ids = checkpoint("mistral"), random_ids(4)
    other = ids.clone()
    other[2:] = random_ids(2, seed=9)
    one, two = streamed_logits(folder, ids, 2, "float32"), streamed_logits(folder, other, 2, "float32")
    assert torch.equal(one[:2], two[:2])
    assert not torch.equal(one[2:], two[2:])


def test_config_without_dtype_follows_the_stored_one(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    ids = random_ids(2)
    assert torch.equal(streamed_logits(folder, ids, 2, "auto"), logits_of(reference_model(folder, torch.bfloat16), ids, 2))
