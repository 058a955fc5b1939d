"""Rules against names: which are refused with which advice, and how the others are counted."""

from __future__ import annotations

import re

import pytest

from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.io.formats.readers_table import BY_FUSED_NAME
from bigq.job.rules import count_words, require_sound_rules, rule_counts, splits
from bigq.scheme import QuantScheme, Rule

PARTS = tuple(f"self_attn.{p}_proj" for p in "qkvo") + tuple(f"mlp.{p}_proj" for p in ("gate", "up", "down"))
NAMES = [f"model.layers.{i}.{part}" for i in range(3) for part in PARTS]
MLA = [f"model.layers.{i}.self_attn.{part}" for i in range(2) for part in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")]


EXPERTS = [f"model.layers.{i}.mlp.experts.{e}.{part}_proj" for i in range(2) for e in range(3) for part in ("gate", "up", "down")]
WITH_EXPERTS = [*NAMES, *EXPERTS]


def rule(text: str) -> Rule:
    """ "-PATTERN" skips; else as --rule takes it."""
    return Rule(text[1:], None) if text.startswith("-") else Rule.parse(text)


def refusal(*rules: str, format: str = "gptq", names: list[str] = NAMES, lm_head: bool = False, head: str | None = "lm_head") -> str | None:
    config = JobConfig(rules=tuple(map(rule, rules)), format=format, lm_head=lm_head)
    try:
        require_sound_rules(names, head, config)
    except UsageError as error:
        return str(error)
    return None


def advised(said: str) -> str:
    """The pattern that a refusal advises, or guesses."""
    found = re.search(r"use '([^']*)'$|did you mean '([^']*)'\?", said)
    assert found is not None, said
    return found[1] or found[2]


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("-o_proj", ".*o_proj"),
        ("down_proj:bits=8", ".*down_proj"),
        ("-re:.*o_proj", ".*o_proj"),
        ("-^o_proj$", ".*o_proj$"),
        ("-:.*o_proj", None),
        (r"-.*\.oproj", ".*o_proj"),
        ("mlp.down:bits=8", ".*mlp.down"),
        ("-self_attn", ".*self_attn"),
        ("-q_proj", ".*(q|k|v|qkv)_proj"),
        ("up_proj:bits=8", ".*(gate|up|gate_up)_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_one_that_does(text: str, advice: str | None) -> None:
    said = refusal(text)
    assert said is not None and "matches no Linear" in said and "model.layers.0.self_attn.q_proj" in said
    assert said.startswith("--skip '" if text.startswith("-") else "--rule '")
    if advice is not None:
        assert advised(said) == advice
        assert refusal(f"-{advice}" if text.startswith("-") else f"{advice}:{text.rpartition(':')[2]}") is None


def test_the_advice_of_the_simplest_mistake_names_both_patterns() -> None:
    assert refusal("-q_proj", format="gguf") == (
        "--skip 'q_proj': matches no Linear (patterns match from the start of a name such as model.layers.0.self_attn.q_proj); "
        "use '.*q_proj'"
    )
    said = refusal("-q_proj")
    assert said is not None and "'.*q_proj' would match, but readers load q_proj, k_proj and v_proj as one Linear" in said


def test_a_guess_is_a_question() -> None:
    assert (refusal("-.*oproj") or "").endswith("; did you mean '.*o_proj'?")
    assert (refusal("-.*qproj", format="gguf") or "").endswith("; did you mean '.*q_proj'?")
    said = refusal("-.*qproj") or ""
    assert said.endswith("; did you mean '.*(q|k|v|qkv)_proj'? Readers load q_proj, k_proj and v_proj as one Linear")


def test_without_anything_close_the_linears_are_listed() -> None:
    said = refusal("-.*router")
    assert said is not None and said.endswith("Linears are called q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj")


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (
            (".*:bits=8", ".*down_proj:bits=3"),
            r"--rule '\.\*down_proj:bits=3': has no effect.*'\.\*:bits=8' decides.*give it first, or leave",
        ),
        (("-.*mlp", ".*mlp.*:bits=3"), r"--rule '\.\*mlp\.\*:bits=3': has no effect, since --skip '\.\*mlp' decides all .*; leave it out$"),
        (("-.*mlp", "-.*down_proj"), r"--skip '\.\*down_proj': has no effect.*; leave it out$"),
        ((".*down_proj:bits=8", ".*down_proj:bits=8"), r"has no effect.*; leave it out$"),
        (("-.*down", "-.*gate|.*up", ".*mlp:bits=3"), r"'\.\*mlp:bits=3': has no effect, since --skip '\.\*down' and --skip .* decide all"),
    ],
)
def test_a_hidden_rule_is_refused(rules: tuple[str, ...], says: str) -> None:
    said = refusal(*rules)
    assert said is not None and re.search(says, said), said


def test_what_is_left_to_a_rule_counts_as_its_effect() -> None:
    assert refusal("-.*down_proj", ".*mlp:bits=8") is None


def test_rules_for_the_head() -> None:
    assert "add --lm-head or leave out" in (refusal("lm_head:bits=8") or "")
    assert "leave out this --skip" in (refusal("-lm_head") or "")
    assert refusal("lm_head:bits=8", lm_head=True) is None and refusal("-lm_head$", lm_head=True) is None
    assert "matches no Linear" in (refusal("lm_head:bits=8", head=None) or "")


@pytest.mark.parametrize("format", BY_FUSED_NAME)
@pytest.mark.parametrize(
    "text",
    [
        ".*q_proj:bits=8",
        r".*\.q_proj$:sym=false",
        "-.*v_proj",
        r"model\.layers\.1\..*k_proj:group_size=32",
        ".*(q|k)_proj:bits=8",
        r"-model\.layers\.0\..*[qk]_proj",
        r".*\.(down|q)_proj:bits=8",
        ".*gate_proj:bits=8",
        "-.*up_proj$",
    ],
)
def test_a_rule_for_part_of_a_fused_linear_is_refused_with_one_for_all(format: str, text: str) -> None:
    """The advice works, and decides all that the rule was for."""
    said = refusal(text, format=format)
    assert said is not None and "as one Linear" in said and ("q_proj, k_proj and v_proj" in said or "gate_proj and up_proj" in said), said
    pattern = advised(said)
    assert refusal(f"-{pattern}" if text.startswith("-") else f"{pattern}:{text.rpartition(':')[2]}", format=format) is None
    before = rule(text).pattern
    assert {n for n in NAMES if re.match(before, n)} < {n for n in NAMES if re.match(pattern, n)}
    assert refusal(text, format="gguf") is None


def test_q_a_and_kv_a_are_one_linear() -> None:
    said = refusal("-.*q_a_proj", names=MLA, format="compressed-tensors")
    assert said is not None and advised(said) == ".*(q_a_proj|kv_a_proj_with_mqa)"


@pytest.mark.parametrize("text", [r".*self_attn\.(q|k|v)_proj$:bits=8", r".*mlp\.(gate|up)_proj$:bits=8"])
def test_gptq_rules_must_match_the_fused_name_too(text: str) -> None:
    said = refusal(text)
    assert said is not None and "under the name" in said
    assert refusal(f"{advised(said)}:bits=8") is None
    assert refusal(text, format="compressed-tensors") is None


def test_a_rule_that_matches_the_fused_name_but_no_part_is_refused() -> None:
    """The pattern is for o_proj, and vLLM would use it for the fused q, k and v too."""
    said = refusal(r".*(o|qkv)_proj:bits=8")
    assert said is not None and "under the name qkv_proj" in said


@pytest.mark.parametrize(
    "rules",
    [
        (".*mlp.*:bits=8",),
        (".*self_attn:bits=8,sym=false", "-.*down_proj"),
        (r"-model\.layers\.1\.",),
        (".*(q|k|v|qkv)_proj:bits=8",),
        (r"-.*\.(q|k|v)_proj",),
        (".*q_proj:order=activation", ".*k_proj:damping=0.3"),
        (".*q_proj:bits=8", ".*k_proj:bits=8", ".*v_proj:bits=8"),
    ],
)
def test_rules_that_treat_a_fused_linear_as_one_are_taken(rules: tuple[str, ...]) -> None:
    assert refusal(*rules) is None
    assert not splits(NAMES, QuantScheme(), tuple(map(rule, rules)))


def test_splits() -> None:
    assert splits(NAMES, QuantScheme(), (Rule.parse(".*q_proj:bits=8"),)) and not splits(NAMES, QuantScheme(), ())


def test_counts_and_their_words() -> None:
    rules = tuple(map(rule, ("-.*o_proj", r".*\.0\.mlp:bits=8", ".*mlp:bits=8", ".*v_proj:sym=false,group_size=-1")))
    counts = rule_counts(NAMES, rules)
    assert [count.linears for count in counts] == [3, 3, 6, 3]
    assert count_words(counts) == ["9 Linears at 8 bits", "3 asymmetric in whole rows", "3 left out"]
    assert count_words(rule_counts(NAMES, ())) == []
    assert count_words(rule_counts(NAMES[:1], (Rule.parse(".*:scales=search,damping=0.5"),))) == [
        "1 Linear with scales search with damping 0.5"
    ]


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize(
    "text", [r"-.*experts\.2\.", r".*experts\.\d+\.down_proj:bits=8", ".*down_proj:bits=8", "-model.layers.1.mlp.experts.0.gate_proj"]
)
def test_rules_treat_all_experts_of_a_layer_alike(text: str, format: str) -> None:
    said = refusal(text, format=format, names=WITH_EXPERTS)
    assert said is not None and "readers such as vLLM load gate_proj, up_proj and down_proj of all experts of a layer together" in said
    pattern = advised(said)
    again = f"-{pattern}" if text.startswith("-") else f"{pattern}:bits=8"
    assert refusal(again, format=format, names=WITH_EXPERTS) is None
    decided = {name for name in WITH_EXPERTS if re.match(pattern, name)}
    assert decided >= {name for name in WITH_EXPERTS if re.match(rule(text).pattern, name)} and decided >= set(EXPERTS)


@pytest.mark.parametrize("text", [r"-.*\.experts\..*", r".*mlp\.experts\.\d:bits=8"])
def test_gptq_rules_match_the_name_of_a_bank_too(text: str) -> None:
    """vLLM looks experts up under the name of all of them, skipped ones too."""
    assert refusal(text, format="compressed-tensors", names=WITH_EXPERTS) is None
    said = refusal(text, names=WITH_EXPERTS)
    assert said is not None and "vLLM looks for gate_proj, up_proj and down_proj of all experts of a layer under the name experts" in said
    assert advised(said) == r".*\.experts"


@pytest.mark.parametrize("text", [r"-.*\.experts", r".*\.experts:bits=8", r".*\.1\.mlp\.experts:bits=8", "-.*self_attn"])
def test_rules_for_whole_banks_are_sound(text: str) -> None:
    for format in ("gptq", "compressed-tensors"):
        assert refusal(text, format=format, names=WITH_EXPERTS) is None
