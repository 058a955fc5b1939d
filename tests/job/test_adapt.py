"""Linears of odd widths: which group sizes they get, which are left out, and which jobs are refused as they were asked for."""

from __future__ import annotations

import dataclasses

import pytest

from bigq.config import JobConfig
from bigq.io.formats.base import bank_of
from bigq.job.adapt import Adapted, adapted
from bigq.job.fit import Candidate, misfits
from bigq.scheme import QuantScheme, Rule, scheme_for

WIDTHS = {"q_proj": 576, "k_proj": 576, "v_proj": 576, "o_proj": 1024, "gate_proj": 576, "up_proj": 576, "down_proj": 1536}
BLOCK = {f"{'mlp' if part in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{part}": (256, n) for part, n in WIDTHS.items()}
SMALL = {name for name, (_, n) in BLOCK.items() if n == 576}


def linears(shapes: dict[str, tuple[int, int]] = BLOCK, **more: tuple[int, int]) -> list[Candidate]:
    return [
        Candidate(name=f"model.layers.{i}.{name}", m=m, n=n)
        for i in range(2)
        for name, (m, n) in {**shapes, **{key.replace("__", "."): shape for key, shape in more.items()}}.items()
    ]


def job(format: str = "compressed-tensors", group_size: int = 128, **more: object) -> JobConfig:
    return JobConfig(format=format, scheme=QuantScheme(group_size=group_size), **more)  # type: ignore[arg-type]


def fitted(candidates: list[Candidate], config: JobConfig, head: str | None = None) -> Adapted:
    found = adapted(candidates, [each.name for each in candidates if each.name != "lm_head"], head, config)
    assert found.said or found == Adapted(config=config), "what is changed is said"
    return found


def sizes(candidates: list[Candidate], config: JobConfig) -> dict[str, int | None]:
    """By the name in the block, the same in both blocks: the group size; None for a Linear that is left out."""
    result: dict[str, int | None] = {}
    for each in candidates:
        scheme = scheme_for(each.name, config.base_scheme, config.rules)
        size = None if scheme is None else scheme.group_size
        assert result.setdefault(each.name.split(".", 3)[-1], size) == size
    return result


def test_a_job_that_fits_is_not_changed() -> None:
    config = job(rules=(Rule(".*o_proj", None),))
    assert fitted(linears({"self_attn.o_proj": (256, 1024)}), config) == Adapted(config=config)


def test_the_largest_group_that_fits() -> None:
    found = fitted(linears(), job())
    assert sizes(linears(), found.config) == {name: 64 if name in SMALL else 128 for name in BLOCK}
    assert found.config.scheme.group_size == 128 and not misfits(linears(), found.config)
    assert found.said == (
        "model.layers.0.self_attn.q_proj and 9 more have 576 inputs, which group size 128 does not divide: "
        "10 Linears are quantized in groups of 64",
    )


def test_one_size_for_all_where_a_reader_takes_no_other() -> None:
    found = fitted(linears(), job("gptq"))
    assert found.config == job("gptq", group_size=64) and not found.rules
    assert "all Linears are quantized in groups of 64" in found.said[0]


def test_rules_where_one_size_would_be_too_small_for_all() -> None:
    """72 inputs fit groups of 8 only."""
    candidates = linears(mlp__gate=(64, 96 * 3), mlp__odd=(64, 32 * 9 + 8))
    found = fitted(candidates, job("compressed-tensors", group_size=64))
    assert sizes(candidates, found.config)["mlp.gate"] == 32 and sizes(candidates, found.config)["mlp.odd"] is None
    assert [rule.overrides for rule in found.rules] == [{"group_size": 32}, None]
    assert "1 Linear" not in found.said[1] and found.said[1].endswith("2 Linears are left unquantized")


def test_what_cannot_be_held_is_left_out() -> None:
    """A gate of a linear attention with 48 outputs, in gptq. compressed-tensors holds it."""
    candidates = linears(linear_attn__in_proj_ba=(48, 1024))
    found = fitted(candidates, job("gptq", group_size=64))
    assert sizes(candidates, found.config) == {**dict.fromkeys(BLOCK, 64), "linear_attn.in_proj_ba": None}
    assert found.said[0].startswith("model.layers.0.linear_attn.in_proj_ba and 1 more are 48 × 1024, but packed dimensions must be mult")
    assert found.instead == "compressed-tensors" and found.leaves_out("model.layers.1.linear_attn.in_proj_ba")
    assert not found.skipped_by_user("model.layers.1.linear_attn.in_proj_ba")


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_what_readers_load_as_one_is_left_out_as_one(format: str) -> None:
    """Of q, k and v, only k has too few outputs."""
    shapes = {**BLOCK, "self_attn.k_proj": (40, 1024), "self_attn.q_proj": (256, 1024), "self_attn.v_proj": (256, 1024)}
    found = fitted(linears(shapes), job(format, group_size=64))
    left = {name for name, size in sizes(linears(shapes), found.config).items() if size is None}
    assert left == ({f"self_attn.{part}_proj" for part in "qkv"} if format == "gptq" else set())


def test_all_matrices_of_a_bank_have_one_size() -> None:
    experts = {f"mlp.experts.{i}.{part}": (256, n) for i in range(3) for part, n in (("gate_proj", 1024), ("down_proj", 576))}
    candidates = linears({"self_attn.o_proj": (256, 1024), **experts})
    found = fitted(candidates, job())
    for name, size in sizes(candidates, found.config).items():
        assert size == (64 if bank_of(f"model.layers.0.{name}") else 128)


@pytest.mark.parametrize(
    "config",
    [
        job(rules=(Rule(".*mlp", {"group_size": 128}),)),
        job(rules=(Rule(".*(gate|up)_proj", {"bits": 8}),)),
        job(group_size=1000),
        job("gguf", group_size=128),
    ],
    ids=["a rule with the size", "a rule that decides it", "a size that fits none", "the blocks of GGUF"],
)
def test_what_was_asked_for_is_refused_as_before(config: JobConfig) -> None:
    assert fitted(linears(), config) == Adapted(config=config)


def test_experts_and_a_shared_expert_of_one_width() -> None:
    """No simple pattern matches both and not the other down_proj."""
    experts = {f"mlp.experts.{i}.{part}": (256, 576) for i in range(300) for part in ("gate_proj", "down_proj")}
    candidates = linears({"mlp.down_proj": (256, 1024), "mlp.shared_experts.down_proj": (256, 576), **experts})
    found = fitted(candidates, job())
    assert found.rules == (Rule(r".*\.mlp\.shared_experts\.down_proj$", {"group_size": 64}), Rule(r".*\.experts", {"group_size": 64}))
    assert sizes(candidates, found.config) == {"mlp.down_proj": 128, "mlp.shared_experts.down_proj": 64, **dict.fromkeys(experts, 64)}


def test_the_head_gets_smaller_groups_but_is_not_left_out() -> None:
    fine = [*linears({"self_attn.o_proj": (256, 1024)}), Candidate(name="lm_head", m=320, n=576)]
    config = job(lm_head=True)
    found = fitted(fine, config, "lm_head")
    assert found.rules == (Rule("lm_head$", {"group_size": 64}),)
    odd = [*fine[:-1], Candidate(name="lm_head", m=130, n=1024)]
    refused = job("gptq", lm_head=True)
    assert fitted(odd, refused, "lm_head") == Adapted(config=refused)


def test_a_resumed_job_ends_with_the_same_rules_whatever_is_given_again() -> None:
    """The rules of a kind that is not given come from the job, those that skip before the others."""
    candidates = linears(linear_attn__gate=(48, 72), mlp__wide=(64, 1024))
    skip, rule = Rule(".*o_proj", None), Rule(".*down_proj", {"bits": 8})
    first = fitted(candidates, job(rules=(skip, rule)))
    assert len(first.rules) == 2
    kept = first.config.rules
    for given in (
        kept,
        (skip, *(each for each in kept if each.overrides is not None)),
        (*(each for each in kept if each.overrides is None), rule),
        (skip, rule),
    ):
        assert fitted(candidates, dataclasses.replace(job(), rules=given)).config.rules == kept
