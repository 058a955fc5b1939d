"""The comparison of families tells equal from different, and refused from not built."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "scripts"))

import families


@pytest.mark.long
@pytest.mark.parametrize("kind", ["afmoe", "cohere2", "falcon_h1", "gpt_neo", "granite", "mamba", "olmo2", "qwen3_5_text", "stablelm"])
def test_families_beside_those_of_the_other_tests(kind: str) -> None:
    """Experts, mixed attention, convolutions and states in one model, and other kinds of norms and scales."""
    found = families.family(kind)
    assert found["result"] == "equal", found
    assert found["plan"] == "fits"


def test_refused_and_not_built() -> None:
    found = families.family("jetmoe")
    assert found["result"] == "refused"
    assert "weights of several experts in another form" in found["reason"]
    assert families.family("xlnet")["result"] == "not built"


def test_a_difference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = families.Stream.logits

    def wrong(self: Any, lo: int, hi: int) -> torch.Tensor:
        logits: torch.Tensor = run(self, lo, hi)
        logits[0, 0, 0] = torch.nextafter(logits[0, 0, 0], torch.tensor(9.0))
        return logits

    monkeypatch.setattr(families.Stream, "logits", wrong)
    assert families.family("llama")["result"] == "different"


def test_arguments_made_of_embeddings_are_seen_by_the_plan() -> None:
    found = families.family("zamba")
    assert found["result"] == "refused"
    assert "depend on the tokens" in found["reason"] and "depend on the tokens" in found["plan"]
