"""The structure of blocks with experts: the bank has a level, the router is no Linear to be quantized, shared experts are."""

from __future__ import annotations

import pytest
import torch
from moe_families import MOE_FAMILIES, moe_model, random_tokens

from bigq.model.forward.block_call import BlockCall
from bigq.model.structure import BankPlace, BlockPlan, plan_block
from bigq.model.tracers import GradientTracer


def structure(family: str, on_meta: bool = False, **changes: int) -> BlockPlan:
    """Of the last block, which has experts in every family."""
    model = moe_model(family, **changes)
    layers = model.model.layers
    block = layers[-1]
    seen: list[tuple[tuple[object, ...], dict[str, object]]] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=random_tokens(2, 12), use_cache=False)
    handle.remove()
    (hidden, *args), kwargs = seen[0]
    assert isinstance(hidden, torch.Tensor)
    if on_meta:
        block.to("meta").requires_grad_(False)

        def moved(x: object) -> object:
            return x.to("meta") if isinstance(x, torch.Tensor) else tuple(map(moved, x)) if isinstance(x, tuple) else x

        call = BlockCall(tuple(map(moved, args)), {key: moved(value) for key, value in kwargs.items()})
        return plan_block(block, hidden.to("meta"), call, GradientTracer())
    with torch.no_grad():
        return plan_block(block, hidden, BlockCall(tuple(args), kwargs))


@pytest.mark.parametrize("family", [name for name in MOE_FAMILIES if name != "nemotron_h"])
def test_levels_of_a_block_with_experts(family: str) -> None:
    found = structure(family)
    assert len(found.banks) == 1
    bank = found.banks[0]
    level = {name: group.level for group in found.groups for name in group.names}
    shared = {name: depth for name, depth in level.items() if "shared" in name}
    assert bank.level == max(depth for name, depth in level.items() if name not in shared) + 1, "it comes after attention"
    for name, depth in shared.items():
        assert depth == bank.level + ("down" in name or "output" in name)


def test_the_bank_is_named_by_its_module() -> None:
    assert structure("qwen3_moe").banks == (BankPlace("mlp.experts", 2),)
    assert structure("nemotron_h").banks == (BankPlace("mixer.experts", 0),)


@pytest.mark.parametrize(
    ("family", "changes", "router"),
    [("hunyuan_v1_moe", {"num_experts": 64}, "mlp.gate.wg"), ("llama4_text", {"num_local_experts": 64}, "feed_forward.router")],
)
def test_a_router_that_is_a_linear_stays_unquantized(family: str, changes: dict[str, int], router: str) -> None:
    """Also where it is as large as Linears that are quantized: here it has 64 outputs and as many inputs."""
    found = structure(family, **changes)
    assert moe_model(family, **changes).model.layers[-1].get_submodule(router).weight.shape == (64, 64)
    assert router in found.left_out
    assert router not in [name for group in found.groups for name in group.names]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "hunyuan_v1_moe", "llama4_text"])
def test_the_same_structure_without_weights(family: str) -> None:
    """Banks do not run, so blocks on meta can be traced too."""
    found, real = structure(family, on_meta=True), structure(family)
    assert (found.groups, found.left_out, found.banks) == (real.groups, real.left_out, real.banks)
