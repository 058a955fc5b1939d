"""Linears that do not fit: all are named at once, and with the options that are advised the job is taken."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence

import pytest

from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.job.fit import Candidate, misfits, require_fit
from bigq.job.rules import require_sound_rules
from bigq.scheme import QuantScheme, Rule, scheme_for

#: (outputs, inputs) of a block's Linears.
SHAPES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (192, 128),
    "mlp.up_proj": (192, 128),
    "mlp.down_proj": (128, 192),
}


def model(changes: Mapping[str, tuple[int, int]] = {}, blocks: int = 3, transposed: bool = False) -> list[Candidate]:
    """changes: other shapes, by the end of a Linear's name."""
    found = []
    for i in range(blocks):
        for part, shape in SHAPES.items():
            name = f"model.layers.{i}.{part}"
            m, n = next((other for end, other in changes.items() if name.endswith(end)), shape)
            found.append(Candidate(name=name, m=m, n=n, transposed=transposed))
    return found


def refusal(linears: Sequence[Candidate], config: JobConfig) -> str | None:
    names = [each.name for each in linears if each.name.startswith("model.")]
    head = next((each.name for each in linears if each.name == "lm_head"), None)
    try:
        require_sound_rules(names, head, config)
        require_fit(linears, names, head, config)
    except UsageError as error:
        return str(error)
    return None


def followed(said: str, config: JobConfig) -> JobConfig:
    """The job with the options that a refusal advises."""
    advice = said.rpartition("; use ")[2]
    scheme = {"bits": config.scheme.bits, "group_size": config.scheme.group_size, "symmetric": config.scheme.symmetric}
    skips, rules, format = [], list(config.rules), config.format
    for change in re.split(r", (?=--|\w+=)| and (?=--|\w+=)", advice):
        words = shlex.split(change)
        if words[0] == "--skip":
            skips.append(Rule(words[1], None))
        elif words[0] == "--rule":
            rules.append(Rule.parse(words[1]))
        elif words[0] == "--format":
            format = words[1]
        elif words[0].startswith("--"):
            scheme[words[0][2:].replace("-", "_")] = int(words[1])
        else:
            key, _, value = words[0].partition("=")
            assert words[1:3] == ["in", "--rule"]
            old = Rule.parse(words[3])
            rules[rules.index(old)] = Rule(old.pattern, {**(old.overrides or {}), key: int(value)})
    return dataclasses.replace(config, scheme=QuantScheme(**scheme), rules=(*skips, *rules), format=format)


GROUPS = QuantScheme(group_size=128)
CASES: Mapping[str, tuple[list[Candidate], JobConfig, str]] = {
    "one size for all": (model(), JobConfig(scheme=GROUPS), "use --group-size 64"),
    "inputs of several sizes": (model({"mlp.down_proj": (128, 160)}), JobConfig(scheme=GROUPS), "use --group-size 32"),
    "a rule has the size": (
        model(),
        JobConfig(scheme=QuantScheme(group_size=64), rules=(".*mlp:group_size=48",)),
        "use group_size=32 in --rule '.*mlp:group_size=48'",
    ),
    "a rule and the rest": (
        model(),
        JobConfig(scheme=GROUPS, rules=(".*o_proj:group_size=80",)),
        "use --group-size 64 and group_size=64 in --rule '.*o_proj:group_size=80'",
    ),
    "a rule's size that the rest would have to follow": (
        model(),
        JobConfig(scheme=GROUPS, rules=(".*q_proj:group_size=128",), format="compressed-tensors"),
        "use --rule '.*down_proj$:group_size=64'",
    ),
    "a shape in every block": (
        model({"mlp.down_proj": (130, 192)}),
        JobConfig(scheme=QuantScheme(group_size=64)),
        "use --skip '.*down_proj$'",
    ),
    "a shape in one block": (
        model({"1.mlp.down_proj": (128, 200)}),
        JobConfig(scheme=QuantScheme(group_size=64), format="gguf"),
        r"use --skip 'model\.layers\.1\.mlp\.down_proj$'",
    ),
    "a shape in two blocks": (
        model({"1.self_attn.o_proj": (128, 200), "2.self_attn.o_proj": (128, 200)}),
        JobConfig(scheme=QuantScheme(group_size=64), format="gguf"),
        r"use --skip 'model\.layers\.(1|2)\.self_attn\.o_proj$'",
    ),
    "a part of a fused Linear": (
        model({"q_proj": (200, 128)}),
        JobConfig(scheme=GROUPS, format="gptq", rules=(".*down_proj:group_size=64",)),
        "use --skip '.*(q|k|v)_proj$'",
    ),
    "a shape and the group size": (
        model({"mlp.up_proj": (100, 128), "mlp.down_proj": (128, 64)}),
        JobConfig(scheme=GROUPS, format="gptq"),
        "use --skip '.*(up|gate)_proj$' and --group-size 64",
    ),
    "the head": (
        [*model(), Candidate(name="lm_head", m=1001, n=128)],
        JobConfig(scheme=QuantScheme(group_size=64), lm_head=True),
        "use --skip 'lm_head$'",
    ),
    "transposed": (model(transposed=True), JobConfig(scheme=QuantScheme(group_size=64), format="compressed-tensors"), "use --format gptq"),
    "transposed, and the group size": (
        model(transposed=True),
        JobConfig(scheme=GROUPS, format="compressed-tensors"),
        "use --format gptq and --group-size 64",
    ),
    "GGUF: bits": (model(), JobConfig(scheme=QuantScheme(bits=3, group_size=64), format="gguf"), "use --bits 4"),
    "GGUF: bits of a rule": (
        model(),
        JobConfig(scheme=QuantScheme(group_size=64), format="gguf", rules=(".*down_proj:bits=2",)),
        "use bits=4 in --rule '.*down_proj:bits=2'",
    ),
    "GGUF: bits and groups": (
        model(),
        JobConfig(scheme=QuantScheme(bits=8, symmetric=False, group_size=16), format="gguf"),
        "use --bits 4 and --group-size 32",
    ),
    "GGUF: groups that divide, of no whole blocks": (
        model({"": (96, 96)}),
        JobConfig(scheme=QuantScheme(group_size=48), format="gguf"),
        "use --group-size 32",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_advised_works(case: str) -> None:
    linears, config, advice = CASES[case]
    said = refusal(linears, config)
    assert said is not None and said.endswith(advice), said
    changed = followed(said, config)
    assert refusal(linears, changed) is None, said
    kept = [each.name for each in linears if scheme_for(each.name, changed.scheme, changed.rules) is not None]
    unfit = {name for name, found in misfits(linears, config).items() if found.kind in ("shape", "transposed")}
    assert kept and (unfit or len(kept) == len(linears)), "Linears are skipped that a scheme would fit"


def test_all_that_do_not_fit_are_named_once() -> None:
    said = refusal(model(), JobConfig(scheme=GROUPS))
    assert said == "model.layers.0.mlp.down_proj and 2 more have 192 inputs, which group size 128 does not divide; use --group-size 64"
    linears = [Candidate(name=f"model.layers.{i}.proj", m=64, n=8 * (i + 1)) for i in range(5)]
    said = refusal(linears, JobConfig(scheme=QuantScheme(group_size=-1))) or ""
    assert said.count("model.layers") >= 3 and "and 1 other does not fit either; use --skip " in said


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj", "q_proj")])
def test_parts_of_a_fused_linear_end_with_whole_blocks(names: tuple[str, ...]) -> None:
    """All but the last part in the readers' order, whatever that of the model."""
    config = JobConfig(format="fp8-block", scheme=QuantScheme(bits=8))
    outputs = {"q_proj": 192, "k_proj": 64, "v_proj": 64}
    linears = [Candidate(name=f"model.layers.0.self_attn.{name}", m=outputs[name], n=128) for name in names]
    found = {name.rpartition(".")[2]: misfit.said for name, misfit in misfits(linears, config).items()}
    said = "readers load q_proj, k_proj and v_proj as one Linear in blocks of 128 outputs"
    assert found.keys() == {"q_proj", "k_proj"} and found["q_proj"].startswith("has 192 outputs, but readers load")
    assert names[0] != "q_proj" or found["q_proj"] == f"has 192 outputs, but {said}"
    assert not misfits(linears[:1] if names[0] == "q_proj" else linears[2:], config)
    skipped = dataclasses.replace(config, rules=(Rule(r".*(q|k|v)_proj", None),))
    assert not misfits(linears, skipped)
