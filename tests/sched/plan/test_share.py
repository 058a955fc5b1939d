"""What share of the weights in blocks stays unquantized, what is said of it, and when a job is refused for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from moe_families import moe_model

from bigq.api import plan
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.job.adapt import Adapted
from bigq.sched.plan.shape import BankShape, BlockShape, GroupShape, LeftShape, LinearShape, ModelShape, Rows
from bigq.sched.plan.share import Kept, kept_weights, percent, require_share
from bigq.scheme import QuantScheme, Rule


def shape(left: tuple[LeftShape, ...], banks: tuple[BankShape, ...] = ()) -> ModelShape:
    """Two equal blocks with Linears "a" and "b" of 1000 weights each."""
    block = BlockShape(
        groups=(GroupShape((LinearShape("a", 10, 100, 4000), LinearShape("b", 10, 100, 4000)), 0),),
        reach=(),
        forward=Rows(0, 0),
        calls=Rows(0, 0),
        memos=(),
        weights=0,
        stored=0,
        largest_stored=0,
        attention=0.0,
        banks=banks,
        left=left,
    )
    fields = {"seqlen": 8, "width": 100, "itemsize": 4, "vocabulary": 10, "embedding_row": 4, "rest_stored": 0, "rest_loaded": 0}
    return ModelShape(path="layers", blocks=(block, block), **fields)  # type: ignore[arg-type]


def job(*rules: Rule, added: tuple[Rule, ...] = (), allow: bool = False) -> Adapted:
    return Adapted(config=JobConfig(rules=(*rules, *added), allow_partial=allow), rules=added)


GATE, CONV = LeftShape("gate", 500, "chooses experts", True), LeftShape("conv.weight", 1500, "is not the weight of a Linear", False)


def test_nothing_is_said_where_nothing_is_left() -> None:
    found = require_share(shape(()), job())
    assert (found.share, found.text(), found.to_json()) == (0, "", {"share": 0, "weights": []})


def test_the_share_of_each_reason() -> None:
    found = require_share(shape((GATE, CONV)), job())
    assert found == Kept(total=8000, left=(dataclasses.replace(GATE, size=1000), dataclasses.replace(CONV, size=3000)))
    assert found.text() == (
        "50 % of the weights in blocks unquantized; gate: chooses experts (12 %); conv.weight: is not the weight of a Linear (38 %)"
    )


def test_experts_count_as_often_as_they_are_there() -> None:
    """Eight of 1000 weights in each block."""
    banks = (BankShape("experts", 8, 2, 1, ((LinearShape("experts.0.w", 10, 100, 4000),),)),)
    assert kept_weights(shape((GATE,), banks), job()).share == 500 / 10500
    left_out = Rule(r".*\.experts", None)
    assert kept_weights(shape((GATE,), banks), job(added=(left_out,))).share == 8500 / 10500
    assert kept_weights(shape((GATE,), banks), job(left_out)).share == 500 / 10500


def test_what_rules_of_the_user_skip_does_not_count() -> None:
    everything = Rule(r"layers\.", None)
    assert require_share(shape((GATE,)), job(everything)).left == ()
    assert kept_weights(shape((CONV,)), job(everything)).share == 1500 / 3500, "no rule decides it"
    assert kept_weights(shape(()), job(added=(Rule(r".*\.a$", None),))).share == 0.5
    first = job(Rule(r".*\.a$", None), added=(Rule(r".*\.b$", None),))
    assert [each.name for each in kept_weights(shape(()), first).left] == ["b"]


def test_more_than_half_needs_a_flag() -> None:
    most = shape((GATE, dataclasses.replace(CONV, size=1501)))
    with pytest.raises(UsageError, match=r"^this job would leave 50 % of .*; use --allow-partial to go on with the rest$"):
        require_share(most, job())
    assert require_share(most, job(allow=True)).share > 0.5
    other = dataclasses.replace(job(), instead="compressed-tensors")
    with pytest.raises(UsageError, match="use --format compressed-tensors, which holds all Linears, or --allow-partial"):
        require_share(most, other)


@pytest.mark.parametrize(("share", "said"), [(0.5, "50 %"), (0.1, "10 %"), (0.024, "2.4 %"), (0.001, "0.1 %"), (0.0009, "less than 0.1 %")])
def test_a_share_as_text(share: float, said: str) -> None:
    assert percent(share) == said


@pytest.mark.parametrize("family", ["hunyuan_v1_moe", "qwen3_next", "nemotron_h", "gpt_oss"])
def test_every_weight_of_a_block_is_quantized_or_said(family: str, tmp_path: Path) -> None:
    """All that is no vector or bias, counted in the model itself."""
    model = moe_model(family)
    model.config.save_pretrained(tmp_path)
    config = JobConfig(method="rtn", format="compressed-tensors", scheme=QuantScheme(group_size=16), device="cpu")
    found = plan(str(tmp_path), tmp_path, config).kept
    blocks = model.model.layers
    assert found.total == sum(p.numel() for name, p in blocks.named_parameters() if p.ndim > 1 and not name.endswith("bias"))
    whys = {each.name: each.why for each in found.left}
    if family == "hunyuan_v1_moe":
        assert whys == {"mlp.gate.wg": "chooses experts"}
    elif family == "qwen3_next":
        assert whys.pop("mlp.shared_expert_gate") == "has fewer than 32 inputs or outputs"
        assert whys.pop("linear_attn.in_proj_ba") == "has fewer than 32 inputs or outputs"
        assert whys == dict.fromkeys(["linear_attn.conv1d.weight", "mlp.gate.weight"], "is not the weight of a Linear")
    assert 0 < found.share < 0.06
