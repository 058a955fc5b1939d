"""The comparison of families tells equal from different, and refused from not built."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "scripts"))

import families
import transformers
from models import logits_of, streamed_logits


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    ["afmoe", "cohere2", "falcon_h1", "gpt_neo", "granite", "granitemoe", "mamba", "mpt", "olmo2", "qwen3_5_text", "roformer", "stablelm"],
)
def test_families_beside_those_of_the_other_tests(kind: str) -> None:
    """Experts, mixed attention, convolutions and states in one model, and other kinds of norms and scales."""
    found = families.family(kind)
    assert found["result"] == "equal", found
    assert [found[method]["result"] for method in families.METHODS] == ["right", "right"], found


@pytest.mark.parametrize("kind", ["dbrx", "xmod"])
def test_families_whose_weights_have_a_form_of_their_own(kind: str) -> None:
    """Matrices of experts one behind the other, one of them transposed; adapters of which some get no tokens."""
    found = families.family(kind)
    assert found["result"] == "equal", found
    assert [found[method]["result"] for method in families.METHODS] == ["right", "right"], found


def test_refused_and_not_built() -> None:
    found = families.family("hrm_text")
    assert found["result"] == "refused"
    assert "transformers makes it and others of one tensor by Chunk" in found["reason"]
    assert families.family("musicgen")["result"] == "not built"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("prophetnet", r"hidden states \[1, 48, 64\] for 1 x 16 tokens, not vectors for each token"),
        ("xlnet", r"hidden states \[16, 1, 64\] for 1 x 16 tokens, not vectors for each token"),
        ("cpmant", r"embeds tokens that are not in its input, such as a prompt; this architecture"),
        ("xlm", r"the input of block 1 is not the output of block 0"),
    ],
)
def test_refusals_say_why(kind: str, reason: str) -> None:
    found = families.family(kind)
    assert found["result"] == "refused"
    assert re.search(reason, found["reason"]), found


def test_what_bigq_raises_by_mistake_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr(families, "Stream", broken)
    found = families.family("llama", methods=())
    assert found["result"] == "crashed" and found["reason"] == "RuntimeError: oh"
    assert families.faulty(found) and families.counted({"llama": found}) == {"types": 1, "crashed": 1}


def test_a_process_that_ends_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "family", lambda *_: os._exit(3))
    assert families.in_child("llama", "causal", ())["reason"] == "the process ended with 3"


def test_a_multimodal_type_whose_own_forward_needs_more_than_text_is_refused() -> None:
    found = families.family("kosmos-2", "multimodal")
    assert found["result"] == "refused" and "pixel_values" in found["own_forward"]


def test_a_difference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = families.Stream.logits

    def wrong(self: Any, lo: int, hi: int) -> torch.Tensor:
        logits: torch.Tensor = run(self, lo, hi)
        logits[0, 0, 0] = torch.nextafter(logits[0, 0, 0], torch.tensor(9.0))
        return logits

    monkeypatch.setattr(families.Stream, "logits", wrong)
    assert families.family("llama")["result"] == "different"


#: Types whose blocks take more for each row than one vector a token: arguments computed from tokens, extra outputs of the block before, or
#: several vectors.
BESIDE = [
    "glm_moe_dsa",
    *(pytest.param(kind, marks=pytest.mark.long) for kind in ("deepseek_v4", "gemma4_text", "hy_v4", "zamba", "zaya")),
]


@pytest.mark.parametrize("kind", BESIDE)
def test_what_blocks_take_for_each_row(kind: str) -> None:
    found = families.family(kind)
    assert found["result"] == "equal", found
    assert [found[method]["result"] for method in families.METHODS] == ["right", "right"], found


@pytest.mark.parametrize("kind", BESIDE)
def test_what_blocks_take_for_each_row_in_sixteen_bits(kind: str, tmp_path: Path) -> None:
    families.make(kind, "causal", tmp_path)
    whole: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    if whole._can_set_experts_implementation():
        whole.set_experts_implementation("eager")
    ids, batch = families.rows(), families.BATCH
    assert torch.equal(streamed_logits(tmp_path, ids, batch, "bfloat16"), logits_of(whole, ids, batch))
