"""Which of bigq's outputs vLLM loads, by its lookup rules: vLLM 0.32 was run by hand (docs/formats.md), not where these tests run.

The rules below are facts about vLLM, written down anew:

- Needed in ``quantization_config``: bits, group_size, desc_act, sym; read if there: lm_head, dynamic, modules_in_block_to_quantize.
  A ``quant_method`` of "gptq" selects its GPTQ reader.
- Since its GPTQ readers became one (pull request 38288, spring 2026) it takes 4 and 8 bits, symmetric, in groups of 32, 64 or 128
  or one per row; before, 2 and 3 bits and asymmetric too, by a slower kernel, of either ``checkpoint_format``.
- q/k/v are one Linear there, qkv_proj, and gate/up another, gate_up_proj (phi3 has them so in its checkpoint).
  All parts of one must be packed, or none; which are, it sees from the types of the tensors.
- ``dynamic`` is looked up by the name of its own, fused Linear, with ``re.match`` and in order, the first match counting: "-:" leaves
  unquantized, "+:" or no prefix replaces bits, group_size, desc_act and sym. Names of the parts are not looked up.
- Symmetric zero points are not read but taken to be 2^(bits − 1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from models import linear_names

from bigq.io.formats import FORMATS, Quantization
from bigq.job.rules import splits
from bigq.scheme import QuantScheme, Rule, scheme_for
from bigq.vocabulary import OrderName

NEEDED = {"bits": int, "group_size": int, "desc_act": bool, "sym": bool}
GROUP_SIZES = (-1, 32, 64, 128)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
PREFIXES = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "phi3": "model.layers",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
}
BLOCKS = 12


def quantization_config(
    scheme: QuantScheme, rules: tuple[Rule, ...], version: int, left_out: tuple[str, ...], meta: Mapping[str, Any]
) -> dict[str, Any]:
    job = Quantization(scheme=scheme, rules=rules, packed={}, left_out=left_out, others=("lm_head",), head=None, meta=meta)
    return FORMATS["gptq" if version == 1 else "gptq_v2"].config(job)


@dataclass(frozen=True)
class Settings:
    """How a Linear is packed."""

    bits: int
    group_size: int
    sym: bool

    @property
    def taken(self) -> bool:
        return self.bits in (4, 8) and self.sym and self.group_size in GROUP_SIZES

    @property
    def taken_before(self) -> bool:
        return self.bits in (2, 3, 4, 8)


def written(scheme: QuantScheme, rules: tuple[Rule, ...], names: list[str]) -> dict[str, Settings | None]:
    """The settings with which bigq packs each Linear; None if it stays unquantized."""
    schemes = {name: scheme_for(name, scheme, rules) for name in names}
    return {name: s and Settings(s.bits, s.group_size, s.symmetric) for name, s in schemes.items()}


def looked_up(config: Mapping[str, Any], name: str) -> Settings | None:
    """The settings that vLLM assumes for one of its Linears; None if unquantized."""
    base = Settings(config["bits"], config["group_size"], config["sym"])
    for pattern, said in config["dynamic"].items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            return None if pattern.startswith("-:") else replace(base, **said)
    return base


def parts_by_linear(names: list[str]) -> dict[str, list[str]]:
    """vLLM's Linears, each with its parts in the checkpoint."""
    found: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        fused = next((f"{parent}.{whole}" for whole, parts in FUSED.items() if last in parts), name)
        found.setdefault(fused, []).append(name)
    return found


def complaints(config: Mapping[str, Any], packed: Mapping[str, Settings | None]) -> set[str]:
    """Why vLLM does not load the output, or loads it wrong."""
    if any(type(config.get(key)) is not kind for key, kind in NEEDED.items()) or config["quant_method"] != "gptq":
        return {"keys"}
    base = Settings(config["bits"], config["group_size"], config["sym"])
    said = set() if base.taken else {"settings"}
    for linear, parts in parts_by_linear(list(packed)).items():
        stored = {packed[part] for part in parts}
        if len(stored) > 1:
            said.add("parts differ")
        seen = None if None in stored else looked_up(config, linear)  # a Linear without packed tensors is unquantized in vLLM too
        if len(stored) == 1 and seen not in stored:
            said.add("rule not seen")
        if seen is not None and not seen.taken:
            said.add("settings")
    return said


def names_of(family: str) -> list[str]:
    return [f"{PREFIXES[family]}.{i}.{linear}" for i in range(BLOCKS) for linear in linear_names(family)]


def judge(family: str, scheme: QuantScheme, rules: tuple[Rule, ...] = (), version: int = 1) -> set[str]:
    return complaints(quantization_config(scheme, rules, version, (), {}), written(scheme, rules, names_of(family)))


@pytest.mark.parametrize("family", PREFIXES)
@pytest.mark.parametrize("order", ["natural", "activation", "group"])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_4_and_8_bits_load(bits: int, group_size: int, order: OrderName, family: str) -> None:
    assert judge(family, QuantScheme(bits=bits, group_size=group_size, order=order)) == set()


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(bits=2),
        QuantScheme(bits=3),
        QuantScheme(bits=4, symmetric=False),
        QuantScheme(bits=8, symmetric=False),
        QuantScheme(bits=4, group_size=16),
        QuantScheme(bits=4, group_size=256),
    ],
    ids=str,
)
def test_other_settings_are_refused(scheme: QuantScheme) -> None:
    assert judge("llama", scheme) == {"settings"}
    assert Settings(scheme.bits, scheme.group_size, scheme.symmetric).taken_before


def test_readers_need_no_g_idx_for_act_order() -> None:
    """With static groups ``desc_act`` stays false, so weights need not be gathered, nor scales repeated on every GPU."""
    config = quantization_config(QuantScheme(order="activation"), (), 1, (), {})
    assert config["desc_act"] is False and config["static_groups"] is True and config["lm_head"] is False


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (r".*\.down_proj$:bits=8", set()),
        (r".*mlp\.:bits=8,group_size=64", set()),
        (r"model\.layers\.1\.:group_size=32", set()),
        (r".*self_attn\.(q|k|v|qkv)_proj$:bits=8", set()),
        (r".*self_attn\.[qkv]+_proj$:bits=8", set()),
        (r".*mlp\.(gate|up|gate_up)_proj$:bits=8", set()),
        (r".*\.q_proj$:bits=8", {"parts differ"}),
        (r".*\.gate_proj$:group_size=32", {"parts differ"}),
        (r".*self_attn\.(q|k|v)_proj$:bits=8", {"rule not seen"}),
        (r".*mlp\.(gate|up)_proj$:bits=8", {"rule not seen"}),
        (r".*\.down_proj$:bits=3", {"settings"}),
        (r".*\.down_proj$:sym=false", {"settings"}),
        (r".*\.down_proj$:group_size=16", {"settings"}),
    ],
)
def test_a_rule_must_treat_fused_linears_alike_and_match_their_name(rule: str, expected: set[str]) -> None:
    assert judge("llama", QuantScheme(), (Rule.parse(rule),)) == expected
    assert judge("qwen2", QuantScheme(), (Rule.parse(rule),)) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r".*\.o_proj$", set()),
        (r"model\.layers\.1\.", set()),
        (r".*mlp\.", set()),
        (r".*self_attn\.(q|k|v)_proj$", set()),
        (r".*\.v_proj$", {"parts differ"}),
        (r".*\.up_proj$", {"parts differ"}),
    ],
)
def test_a_skipped_linear_must_not_be_part_of_a_fused_one(pattern: str, expected: set[str]) -> None:
    assert judge("llama", QuantScheme(), (Rule(pattern, None),)) == expected


def test_an_unanchored_skip_of_a_part_matches_the_fused_linear() -> None:
    """``.*v_proj`` matches qkv_proj too. So with a rule for v alone, vLLM treats q and k as unquantized, although they are packed."""
    config = quantization_config(QuantScheme(), (Rule(r".*v_proj", None),), 1, (), {})
    assert looked_up(config, "model.layers.0.self_attn.qkv_proj") is None
    assert looked_up(config, "model.layers.0.self_attn.o_proj") == Settings(4, 128, True)


def test_the_first_rule_that_matches_counts_on_both_sides() -> None:
    rules = (Rule.parse(r"model\.layers\.1\.:bits=8"), Rule.parse(r".*mlp\.:group_size=64"))
    config = quantization_config(QuantScheme(), rules, 1, (), {})
    names = [name for name in names_of("llama") if name.endswith("down_proj")]
    assert {name: looked_up(config, name) for name in names} == written(QuantScheme(), rules, names)
    assert looked_up(config, "model.layers.1.mlp.down_proj") == Settings(8, 128, True)
    assert looked_up(config, "model.layers.11.mlp.down_proj") == Settings(4, 64, True)


def test_linears_skipped_by_name_do_not_affect_others() -> None:
    config = quantization_config(QuantScheme(), (), 1, ("model.layers.1.mlp.down_proj",), {})
    left_out = {name for name in names_of("llama") if looked_up(config, name) is None}
    assert left_out == {"model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize("missing", NEEDED)
def test_the_keys_that_vllm_needs_are_there(missing: str) -> None:
    config = quantization_config(QuantScheme(), (), 1, (), {})
    packed = written(QuantScheme(), (), names_of("llama"))
    assert complaints(config, packed) == set()
    assert complaints({k: v for k, v in config.items() if k != missing}, packed) == {"keys"}


# compressed-tensors has other rules:
#
# - A Linear is ignored if a name or a pattern of ``ignore`` matches; of a fused Linear, all parts or none.
# - The group of a Linear is the first with its own name; else, of a fused Linear, the first with its first part's name, whose scheme then
#   holds for all parts (version 0.32); else one with its class (every class name contains "Linear").
# - Symmetric Linears may have 2 to 8 bits, asymmetric ones 4 or 8 (newer versions: 2 to 8), by group or by channel.


def ct_config(scheme: QuantScheme, rules: tuple[Rule, ...], names: list[str]) -> dict[str, Any]:
    packed = {name: found for name in names if (found := scheme_for(name, scheme, rules)) is not None}
    others = ("lm_head", *(name for name in names if name not in packed))
    job = Quantization(scheme=scheme, rules=rules, packed=packed, left_out=(), others=others, head=None, meta={})
    return FORMATS["compressed-tensors"].config(job)


def ct_looked_up(config: Mapping[str, Any], name: str, parts: list[str]) -> Settings | None:
    """The settings that vLLM assumes for one of its Linears. Raises ValueError where vLLM does."""
    ignored = {part in config["ignore"] for part in parts}
    if len(ignored) > 1:
        raise ValueError(f"{name}: some parts are ignored")
    if ignored == {True}:
        return None
    groups = list(config["config_groups"].values())
    found = [g for g in groups if name in g["targets"]] or [g for g in groups if parts[0] in g["targets"]]
    found = found or [g for g in groups if "Linear" in g["targets"]]
    if not found:
        raise ValueError(f"{name}: no group")
    weights = found[0]["weights"]
    assert weights["strategy"] == ("channel" if weights["group_size"] is None else "group") and weights["dynamic"] is False
    assert weights["num_bits"] in (2, 3, 4, 8)
    return Settings(weights["num_bits"], -1 if weights["group_size"] is None else weights["group_size"], weights["symmetric"])


CT_RULES: list[tuple[Rule, ...]] = [
    (),
    (Rule(r".*self_attn\.(q|k|v)_proj", {"bits": 8}),),
    (Rule(r".*down_proj", {"bits": 8, "group_size": -1}), Rule(r"model\.layers\.3\.", None)),
    (Rule(r".*mlp\.", {"sym": False}), Rule(r".*o_proj", None)),
]


@pytest.mark.parametrize("rules", CT_RULES)
def test_compressed_tensors_settings_are_right_for_every_linear(rules: tuple[Rule, ...]) -> None:
    names, scheme = names_of("llama"), QuantScheme()
    config, packed = ct_config(scheme, rules, names), written(scheme, rules, names)
    for fused, parts in parts_by_linear(names).items():
        assert {packed[part] for part in parts} == {ct_looked_up(config, fused, parts)}


def test_of_compressed_tensors_a_rule_for_a_part_is_taken_for_all_parts_or_refused() -> None:
    """Taken for all, the other parts load with wrong weights and no error: bigq refuses such rules itself (tests/job/test_rules.py)."""
    names = names_of("llama")
    parts = parts_by_linear(names)["model.layers.0.self_attn.qkv_proj"]
    rule = Rule(r".*q_proj", {"sym": False})
    config, packed = ct_config(QuantScheme(), (rule,), names), written(QuantScheme(), (rule,), names)
    taken = ct_looked_up(config, "model.layers.0.self_attn.qkv_proj", parts)
    assert taken == packed[parts[0]] != packed[parts[1]]
    assert splits(names, QuantScheme(), (rule,))
    skipped = ct_config(QuantScheme(), (Rule(r".*v_proj", None),), names)
    with pytest.raises(ValueError, match="qkv_proj"):
        ct_looked_up(skipped, "model.layers.0.self_attn.qkv_proj", parts)


@pytest.mark.parametrize("rules", CT_RULES)
def test_rules_that_vllm_takes_split_nothing(rules: tuple[Rule, ...]) -> None:
    assert not splits(names_of("llama"), QuantScheme(), rules)
