"""Models whose class names no modules that must not be split: their blocks are found by the lists that hold Linears."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import logits_of, random_ids, randomize, reference_model, save_ids, streamed_logits
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import bigq
from bigq.errors import UnsupportedModelError
from bigq.model.blocks import find_blocks

_SIZES: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
}
#: Model type → its config, and the path of its blocks. OpenAI GPT's blocks return lists; that RoBERTa names classes that are in no list.
FAMILIES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "biogpt": (_SIZES, "biogpt.layers"),
    "openai-gpt": ({"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}, "transformer.h"),
    "roberta-prelayernorm": ({**_SIZES, "is_decoder": True}, "roberta_prelayernorm.encoder.layer"),
}


def saved(family: str, folder: Path) -> Path:
    values, _ = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values))
    randomize(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "m")
    ids = random_ids(3)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        expected = logits_of(reference_model(folder, dtype), ids, 2)
        assert torch.isfinite(expected).all() and torch.equal(streamed_logits(folder, ids, 2, name), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_their_blocks_are_quantized(family: str, tmp_path: Path) -> None:
    ids = save_ids(tmp_path / "ids.safetensors", random_ids(4))
    config = bigq.JobConfig(
        scheme=bigq.QuantScheme(group_size=32),
        calibration=str(ids),
        samples=4,
        seqlen=16,
        device="cpu",
        quiet=True,
    )
    report = bigq.quantize(str(saved(family, tmp_path / "m")), tmp_path / "out", config)
    _, path = FAMILIES[family]
    # GPT's matrices are stored transposed (Conv1D), 4 in a block; the others have 6 Linears.
    assert report.blocks == 3 and len(report.linears) == 3 * (4 if family == "openai-gpt" else 6)
    assert all(record["name"].startswith(f"{path}.") for record in report.linears)


def test_lists_without_linears_are_no_blocks() -> None:
    model = nn.Module()
    model.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
    model.deep = nn.ModuleList([nn.ModuleDict({"parts": nn.ModuleList([nn.Linear(8, 8)])}) for _ in range(2)])
    path, blocks = find_blocks(model)
    assert path == "deep" and len(blocks) == 2
    del model.deep
    with pytest.raises(UnsupportedModelError, match="no list of decoder blocks found"):
        find_blocks(model)
