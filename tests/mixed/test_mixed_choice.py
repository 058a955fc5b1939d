"""What a budget counts, which rules say what was chosen, and how a survey becomes a choice."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch

from bigq.errors import UsageError
from bigq.io.formats import FORMATS
from bigq.mixed.groups import Group, Part, capacity, groups_of, require_budget, stored_bits
from bigq.mixed.loss import RUNS, Place, choose_bits, rates, run_name, run_of
from bigq.mixed.rules import rules_of
from bigq.scheme import MAX_PATTERN, QuantScheme, Rule, scheme_for

PATH = "model.layers"
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def part(name: str, scheme: QuantScheme | None = None, *, chosen: bool = True, bits: tuple[int, ...] = (2, 3, 4, 8)) -> Part:
    scheme = scheme or QuantScheme(group_size=64)
    return Part(name=name, m=128, n=256, dtype=torch.bfloat16, scheme=scheme, chosen=chosen, bits=bits)


def model(blocks: int, format: str = "compressed-tensors") -> tuple[Group, ...]:
    return groups_of([part(f"{PATH}.{i}.{name}") for i in range(blocks) for name in NAMES], FORMATS[format])


def changes(groups: Sequence[Group], blocks: int, **without: float) -> dict[str, float]:
    """A survey in which all kinds and runs matter alike, but for some."""
    names = {name for g in groups if (place := Place.of(g, PATH, blocks)) is not None for name in place.exceptions}
    return {"": 1.0, **dict.fromkeys(sorted(names), 0.9), **without}


@pytest.mark.parametrize(
    ("format", "symmetric", "expected"),
    [("compressed-tensors", True, 3.25), ("compressed-tensors", False, 3 + (16 + 3) / 64), ("gptq_v2", True, 3 + (16 + 3) / 64)],
)
def test_codes_scales_and_zero_points_count(format: str, symmetric: bool, expected: float) -> None:
    each = part("x", QuantScheme(group_size=64, symmetric=symmetric))
    assert stored_bits(FORMATS[format], each, 3) / (each.m * each.n) == expected


def test_scales_of_a_model_in_fp32_take_twice_as_much() -> None:
    each = Part(name="x", m=8, n=64, dtype=torch.float32, scheme=QuantScheme(group_size=64), chosen=True)
    assert stored_bits(FORMATS["compressed-tensors"], each, 4) / (8 * 64) == 4.5


def test_what_readers_fuse_is_one_group() -> None:
    names = [group.name.removeprefix(f"{PATH}.0.") for group in model(1)]
    assert names == ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    experts = [part(f"{PATH}.0.mlp.experts.{e}.{name}") for e in range(3) for name in ("gate_proj", "down_proj")]
    (bank,) = groups_of(experts, FORMATS["gptq"])
    assert bank.experts and bank.name == f"{PATH}.0.mlp.experts" and bank.weights == 6 * 128 * 256


def test_a_group_has_the_bits_that_fit_all_of_its_parts() -> None:
    both = [part("a.gate_proj", bits=(2, 4, 8)), part("a.up_proj", bits=(3, 4))]
    assert list(groups_of(both, FORMATS["gptq"])[0].sizes) == [4]
    with pytest.raises(UsageError, match=r"no number of bits fits a\.gate_up_proj"):
        groups_of([part("a.gate_proj", bits=(2,)), part("a.up_proj", bits=(3,))], FORMATS["gptq"])


def test_a_part_that_a_rule_decides_fixes_its_group() -> None:
    both = [part("a.gate_proj", QuantScheme(bits=8, group_size=64), chosen=False), part("a.up_proj", QuantScheme(bits=8, group_size=64))]
    assert list(groups_of(both, FORMATS["gptq"])[0].sizes) == [8]


def test_a_budget_is_a_decimal_number() -> None:
    """3.3 is not a binary fraction: the bound of 10 × 32768 weights is exact."""
    assert capacity(model(1)[:1], 3.3) == 3 * 32768 * 33 // 10
    groups = model(1)
    require_budget(groups, 2.25)
    with pytest.raises(UsageError, match=r"are 2\.25 bits per weight; use --bits-per-weight 2\.25 or more"):
        require_budget(groups, 2.249)


@pytest.mark.parametrize("blocks", [1, 3, 100])
def test_rules_say_what_was_chosen_and_no_more(blocks: int) -> None:
    groups = model(blocks)
    chosen = {group.name: (2, 3, 4, 8)[hash_of(group.name) % 4] for group in groups}
    rules = rules_of(groups, chosen, PATH)
    base = QuantScheme(bits=4, group_size=64)
    for group in groups:
        for name in (*group.parts, group.name):
            scheme = scheme_for(name, base, rules)
            assert scheme is not None and scheme.bits == chosen[group.name], name
    assert all(len(rule.pattern) <= MAX_PATTERN for rule in rules)
    outside = f"{PATH}.{blocks}.mlp.down_proj"
    assert not any(re.match(rule.pattern, outside) or re.match(rule.pattern, f"{group.parts[-1]}_x") for rule in rules for group in groups)


def hash_of(name: str) -> int:
    return sum(map(ord, name)) // 3


def test_long_lists_of_blocks_become_several_rules() -> None:
    groups = model(400)
    rules = rules_of(groups, {group.name: 3 for group in groups}, PATH)
    assert len(rules) > 4
    assert all(len(rule.pattern) <= MAX_PATTERN for rule in rules)


def test_rules_of_experts_match_all_of_a_layer() -> None:
    groups = groups_of([part(f"{PATH}.{i}.mlp.experts.{e}.up_proj") for i in (0, 1) for e in range(11)], FORMATS["gptq"])
    assert rules_of(groups, {groups[1].name: 2}, PATH) == (Rule(r"model\.layers\.1\.mlp\.experts(\.|$)", {"bits": 2}),)


def test_runs_of_blocks_are_even() -> None:
    runs = [run_of(block, 30) for block in range(30)]
    assert sorted(runs) == runs and set(runs) == set(range(RUNS))
    assert [run_of(block, 3) for block in range(3)] == [0, 1, 2]


def test_rates_are_relative_to_the_mean_and_never_vanish() -> None:
    assert rates(1.0, {"a": 0.4, "b": 0.8}, {"a": 10, "b": 10}) == pytest.approx({"a": 1.5, "b": 0.5})
    assert rates(1.0, {"a": 0.5, "b": 1.2}, {"a": 10, "b": 10})["b"] > 0
    assert rates(1.0, {"a": 1.0, "b": 1.0}, {"a": 10, "b": 10}) == {"a": 1.0, "b": 1.0}


def test_a_budget_of_uniform_bits_stays_uniform_without_a_reason() -> None:
    groups = model(8)
    alike = {"": 1.0} | {name: 1.0 for name in changes(groups, 8) if name}
    assert set(choose_bits(groups, PATH, 8, 3.25, alike).weights) == {3}


def test_the_kind_and_the_run_that_matter_get_more_bits() -> None:
    groups = model(8)
    found = choose_bits(groups, PATH, 8, 3.5, changes(groups, 8, **{"mlp.down_proj": 0.1, run_name(2): 0.1}))
    bits = {group.name: scheme for group in groups if (scheme := scheme_for(group.parts[0], QuantScheme(bits=4), found.rules)) is not None}
    assert found.reached <= 3.5
    assert bits[f"{PATH}.4.mlp.down_proj"].bits >= 4 > bits[f"{PATH}.0.self_attn.o_proj"].bits
