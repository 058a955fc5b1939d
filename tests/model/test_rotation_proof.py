"""Roles are found by experiment and proven; a wrong guess does not pass, and models that cannot be rotated are refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bigq.errors import UnsupportedModelError
from bigq.model import skeleton
from bigq.model.description import ModelDescription
from bigq.model.rotation import around, banks
from bigq.model.rotation.around import ModelRoles, model_roles
from bigq.model.rotation.checkpoint import untie
from bigq.model.rotation.matrices import Rotation
from bigq.model.rotation.roles import HeadPair, Roles

NORMS = {"input_layernorm": 0.0, "post_attention_layernorm": 0.0}


@pytest.fixture
def roles(checkpoint: Callable[[str], Path]) -> Callable[[str], ModelRoles]:
    def find(family: str) -> ModelRoles:
        folder = checkpoint(family)
        config = skeleton.load_config(folder)
        untie(config)
        return model_roles(ModelDescription(folder, config, skeleton.build(config, torch.bfloat16), {}))

    return find


def test_llama(roles: Callable[[str], ModelRoles]) -> None:
    found = roles("llama")
    assert len(found.blocks) == 3 and found.difference < 1e-5
    block = found.blocks[0]
    assert dict(block.norms) == NORMS
    attention, mlp = NORMS
    assert dict(block.readers) == {
        **{f"self_attn.{name}_proj": attention for name in "qkv"},
        "mlp.gate_proj": mlp,
        "mlp.up_proj": mlp,
    }
    assert block.writers == ("self_attn.o_proj", "mlp.down_proj")
    assert block.heads == (HeadPair("self_attn.v_proj", "self_attn.o_proj", 16, 2, 4),)
    assert dict(found.around.readers) == {"lm_head": "model.norm"}


def test_values_within_one_matrix(roles: Callable[[str], ModelRoles]) -> None:
    """phi3 has queries, keys and values in one Linear: 64 + 32 + 32 outputs."""
    (pair,) = roles("phi3").blocks[0].heads
    assert pair == HeadPair("self_attn.qkv_proj", "self_attn.o_proj", 16, 2, 4, 96)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families(family: str, roles: Callable[[str], ModelRoles]) -> None:
    found = roles(family)
    assert found.difference < 1e-5 and all(len(block.heads) == 1 for block in found.blocks)


def test_experts(roles: Callable[[str], ModelRoles]) -> None:
    """A bank counts as one Linear; its router reads behind the same norm."""
    block = roles("mixtral").blocks[0]
    norm = "post_attention_layernorm"
    assert dict(block.tables) == {"mlp.gate": norm} and block.readers["mlp.experts"] == norm and "mlp.experts" in block.writers
    assert {name: role.norm for name, role in block.banks.items()} == {"mlp.experts.gate_up_proj": norm, "mlp.experts.down_proj": None}


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("bloom", "what enters the first block is not what the embedding returns"),
        ("opt", "numbers a token, and the embedding has 32|what enters the first block"),
        ("gpt_neox", r"gpt_neox\.layers\.0\.attention\.query_key_value reads the residual stream behind no norm"),
        ("gemma2", r"model\.layers\.0\.post_attention_layernorm weighs features of what is added"),
    ],
)
def test_refused_by_name(family: str, says: str, roles: Callable[[str], ModelRoles]) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^--rotate: .*({says}).*; leave out --rotate$"):
        roles(family)


def test_a_model_that_needs_its_weights(roles: Callable[[str], ModelRoles], monkeypatch: pytest.MonkeyPatch) -> None:
    def on_meta(*_: Any, **__: Any) -> None:
        raise RuntimeError("Tensor on device meta is not on the expected device cpu!")

    monkeypatch.setattr(around, "find_roles", on_meta)
    with pytest.raises(UnsupportedModelError, match=r"^--rotate: the model does not run on stand-ins .*; leave out --rotate$"):
        roles("llama")


def without_norm(roles: Roles) -> Roles:
    """The MLP's norm is not folded, though its readers are turned."""
    return dataclasses.replace(roles, norms={**roles.norms, "post_attention_layernorm": 0.5})


def without_writer(roles: Roles) -> Roles:
    return dataclasses.replace(roles, writers=roles.writers[:1])


def without_reader(roles: Roles) -> Roles:
    return dataclasses.replace(roles, readers={k: v for k, v in roles.readers.items() if k != "self_attn.k_proj"})


def swapped_norms(roles: Roles) -> Roles:
    one, other = roles.norms
    return dataclasses.replace(roles, readers={k: other if v == one else one for k, v in roles.readers.items()})


def fewer_heads(roles: Roles) -> Roles:
    return dataclasses.replace(roles, heads=(dataclasses.replace(roles.heads[0], reads=2),))


def other_heads(roles: Roles) -> Roles:
    """Keys are turned instead of values."""
    return dataclasses.replace(roles, heads=(dataclasses.replace(roles.heads[0], value="self_attn.k_proj"),))


def unread_router(roles: Roles) -> Roles:
    return dataclasses.replace(roles, tables={})


def sizes_of_heads(roles: Roles) -> Roles:
    return dataclasses.replace(roles, heads=(dataclasses.replace(roles.heads[0], size=32, values=1, reads=2),))


@pytest.mark.parametrize(
    "wrong",
    [without_norm, without_writer, without_reader, swapped_norms, fewer_heads, other_heads, sizes_of_heads],
    ids=lambda f: f.__name__,
)
def test_a_wrong_fold_does_not_pass(
    wrong: Callable[[Roles], Roles], roles: Callable[[str], ModelRoles], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = around.find_roles

    def planted(bare: Any, *args: Any, **kwargs: Any) -> Roles:
        right = found(bare, *args, **kwargs)
        return wrong(right) if right.writers else right

    monkeypatch.setattr(around, "find_roles", planted)
    with pytest.raises(UnsupportedModelError, match=r"^--rotate: model\.layers\.0.* does not compute the same once the model is rotated"):
        roles("llama")


def test_a_router_that_is_not_folded_does_not_pass(roles: Callable[[str], ModelRoles], monkeypatch: pytest.MonkeyPatch) -> None:
    found = around.find_roles
    monkeypatch.setattr(around, "find_roles", lambda *args, **kwargs: unread_router(found(*args, **kwargs)))
    with pytest.raises(UnsupportedModelError, match=r"mlp\.experts choice does not compute the same once the model is rotated"):
        roles("mixtral")


def test_an_expert_with_other_roles_does_not_pass(roles: Callable[[str], ModelRoles], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the matrices that read the stream are left as they are."""
    turn = Rotation.turn
    monkeypatch.setattr(banks.Rotation, "turn", lambda self, x, dim=-1: x if dim == -1 and x.shape == (16, 64) else turn(self, x, dim))
    with pytest.raises(UnsupportedModelError, match=r"an expert of model\.layers\.0\.mlp\.experts does not compute the same"):
        roles("mixtral")


def test_a_head_that_is_not_folded_does_not_pass(roles: Callable[[str], ModelRoles], monkeypatch: pytest.MonkeyPatch) -> None:
    found = around.find_roles

    def planted(bare: Any, *args: Any, **kwargs: Any) -> Roles:
        right = found(bare, *args, **kwargs)
        return right if right.writers else dataclasses.replace(right, norms={"model.norm": 0.5})

    monkeypatch.setattr(around, "find_roles", planted)
    with pytest.raises(UnsupportedModelError, match="does not compute the same once the model is rotated"):
        roles("llama")
