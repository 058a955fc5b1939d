"""Why Linears of a block stay unquantized: routers by what they reach, whatever their size; small ones; others."""

from __future__ import annotations

import pytest
from test_banks_in_blocks import structure

SMALL, OTHER = "has fewer than 32 inputs or outputs", "is called several times, or computes something else"


@pytest.mark.parametrize("experts", [4, 48, 64])
@pytest.mark.parametrize("on_meta", [False, True], ids=["real", "meta"])
def test_a_router_is_known_by_what_it_reaches(experts: int, on_meta: bool) -> None:
    """48 fit no format but compressed-tensors."""
    found = structure("hunyuan_v1_moe", on_meta=on_meta, num_experts=experts)
    assert found.routers == {"mlp.gate.wg"} and found.left_out == ("mlp.gate.wg",)
    assert found.why_left("mlp.gate.wg", (experts, 64)) == "chooses experts"


def test_what_is_small_and_what_is_no_product() -> None:
    gate = structure("qwen2_moe")
    assert gate.left_out == ("mlp.shared_expert_gate",) and not gate.routers
    assert gate.why_left("mlp.shared_expert_gate", (1, 64)) == SMALL
    router = structure("phimoe", num_local_experts=64)
    assert router.left_out == ("mlp.router",)
    assert router.why_left("mlp.router", (64, 64)) == OTHER
