"""Rules, schemes, and from codes back to weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bigq.errors import UsageError
from bigq.kernels.dequantize import dequantize
from bigq.quantized_weight import QuantizedWeight
from bigq.scheme import QuantScheme, Rule, scheme_for


@pytest.mark.parametrize(
    ("text", "pattern", "overrides"),
    [
        (".*down:bits=8", ".*down", {"bits": 8}),
        ("q:bits=8,group_size=32", "q", {"bits": 8, "group_size": 32}),
        ("q:group_size=-1", "q", {"group_size": -1}),
        ("q: bits = 3 , sym = False", "q", {"bits": 3, "sym": False}),
        ("q:sym=TRUE,order=natural,scales=search", "q", {"sym": True, "order": "natural", "scales": "search"}),
        ("q:damping=1e-2", "q", {"damping": 0.01}),
        ("(?:q|k)_proj$:bits=2", "(?:q|k)_proj$", {"bits": 2}),
        (r"layers\.\d{1,2}\.:bits=2", r"layers\.\d{1,2}\.", {"bits": 2}),
    ],
)
def test_good_rules(text: str, pattern: str, overrides: dict[str, int | float | bool]) -> None:
    rule = Rule.parse(text)
    assert rule == Rule(pattern, overrides)
    assert rule.overrides is not None and {k: type(v) for k, v in rule.overrides.items()} == {k: type(v) for k, v in overrides.items()}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected REGEX:key=value"),
        ("bits=8", "expected REGEX:key=value"),
        (":bits=8", "expected REGEX:key=value"),
        ("q:", "expected REGEX:key=value"),
        ("q:bits", "'bits' is not key=value"),
        (".*down_proj=bits:8", r"'8' is not key=value with a key of bits, .*; expected REGEX:key=value\[,key=value…\]$"),
        ("q:bits=8,", "'' is not key=value"),
        ("q:colour=blue", "'colour=blue' is not key=value with a key of bits, group_size"),
        ("q:symmetric=true", "'symmetric=true' is not key=value"),
        ("q:min_zero=1", "'min_zero=1' is not key=value"),
        ("q:bits=four", "bits must be a number, not 'four'"),
        ("q:bits=4.5", "bits must be a number, not '4.5'"),
        ("q:bits=", "bits must be a number, not ''"),
        ("q:sym=1", "sym must be true or false, not '1'"),
        ("q:damping=much", "damping must be a number, not 'much'"),
        ("(q:bits=8", r"'\(q' is not a regular expression"),
    ],
)
def test_bad_rules_are_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Rule.parse(text)


def test_a_bad_pattern_of_a_skip_rule_is_refused_too() -> None:
    with pytest.raises(UsageError, match=r"'\*' is not a regular expression"):
        Rule("*", None)


def test_the_first_matching_rule_decides() -> None:
    base = QuantScheme(bits=4, group_size=128, damping=0.05)
    rules = (Rule(r".*\.k", None), Rule(r"layers\.0\.", {"bits": 8, "sym": False}), Rule(r".*", {"group_size": 64}))
    expected = {
        "layers.0.k": None,
        "layers.0.q": dataclasses.replace(base, bits=8, symmetric=False),
        "layers.1.q": dataclasses.replace(base, group_size=64),
        "model.layers.0.q": dataclasses.replace(base, group_size=64),
        "layers.00.q": dataclasses.replace(base, group_size=64),
    }
    assert {name: scheme_for(name, base, rules) for name in expected} == expected
    assert scheme_for("anything", base, ()) is base
    assert scheme_for("anything", base, rules[:2]) is base
    assert scheme_for("layers.0.k", base, rules[::-1]) == dataclasses.replace(base, group_size=64), "order counts"


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("bits", 2, "bits"),
        ("group_size", 8, "group_size"),
        ("sym", False, "symmetric"),
        ("order", "group", "order"),
        ("damping", 0.5, "damping"),
        ("scales", "search", "scales"),
    ],
)
def test_every_override_reaches_its_field(key: str, value: float | str, field: str) -> None:
    scheme = scheme_for("q", QuantScheme(min_zero=1), (Rule("q", {key: value}),))
    assert scheme == dataclasses.replace(QuantScheme(min_zero=1), **{field: value})  # type: ignore[arg-type]


def test_an_override_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match="bits=5"):
        scheme_for("q", QuantScheme(), (Rule("q", {"bits": 5}),))


@pytest.mark.parametrize("bits", [-4, 0, 1, 5, 6, 7, 16])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(UsageError, match=f"bits={bits}: must be one of 2, 3, 4, 8"):
        QuantScheme(bits=bits)


@pytest.mark.parametrize("group_size", [-2, 0, 4, 7, 12, 100])
def test_other_group_sizes_are_refused(group_size: int) -> None:
    with pytest.raises(UsageError, match=f"group_size={group_size}: must be -1 or a positive multiple of 8"):
        QuantScheme(group_size=group_size)


@pytest.mark.parametrize("damping", [0, -0.1, 1, 7.5, float("nan"), float("inf")])
def test_other_dampings_are_refused(damping: float) -> None:
    with pytest.raises(UsageError, match=f"damping={damping}: must lie between 0 and 1"):
        QuantScheme(damping=damping)


def test_group_width_and_max_code() -> None:
    assert [QuantScheme(bits=b).grid.max_code for b in (2, 3, 4, 8)] == [3, 7, 15, 255]
    assert QuantScheme(group_size=-1).group_width(100) == 100
    assert QuantScheme(group_size=64).group_width(192) == 64
    with pytest.raises(UsageError, match="group size 64 does not divide 100"):
        QuantScheme(group_size=64).group_width(100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n", "groups"), [(5, 24, 1), (7, 96, 3), (1, 64, 8), (300, 4096, 32)])
def test_dequantize_is_the_exact_value_rounded_once(m: int, n: int, groups: int, dtype: torch.dtype) -> None:
    """The last shape is worked through in more than one slice."""
    gen = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 256, (m, n), generator=gen).to(torch.uint8)
    zeros = torch.randint(0, 256, (m, groups), generator=gen).to(torch.uint8)
    scales = (torch.rand(m, groups, generator=gen) * torch.logspace(-7, 1, groups)).half()
    exact = (codes.long() - zeros.long().repeat_interleave(n // groups, 1)).double() * scales.double().repeat_interleave(n // groups, 1)
    result = dequantize(codes, scales, zeros, dtype)
    assert result.dtype == dtype and result.is_contiguous()
    assert torch.equal(result, exact.to(dtype))
    scheme = QuantScheme(bits=8, group_size=-1 if groups == 1 else n // groups)
    weight = QuantizedWeight(codes=codes, scales=scales, zeros=zeros, scheme=scheme, loss=2.0, energy=8.0, damping=0.01)
    assert torch.equal(weight.dequantize(dtype), result)
    assert weight.relative_error == 0.25
