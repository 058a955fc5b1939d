"""How many experts are solved side by side, and the memory that they take."""

from __future__ import annotations

import dataclasses

import pytest

from bigq.config import JobConfig
from bigq.methods.gptq import Gptq
from bigq.methods.rtn import Rtn
from bigq.sched.plan.budgets import Budgets
from bigq.sched.plan.cost import job_cost
from bigq.sched.plan.costs.bank import AT_ONCE, AT_ONCE_BYTES, numbers_at_once
from bigq.sched.plan.planner import Machine, Plan, make_plan
from bigq.sched.plan.shape import BankShape, BlockShape, GroupShape, LinearShape, ModelShape, Reach, Rows
from bigq.sched.plan.work import Choice, Work
from bigq.scheme import QuantScheme

GIB = 2**30
SEQLEN, ROWS, WIDTH = 2048, 128, 7168
PLENTY = Budgets(device=1000 * GIB, host=1000 * GIB, disk=10000 * GIB)
SCHEME = QuantScheme(bits=4, group_size=128)


def linear(name: str, m: int, n: int) -> LinearShape:
    return LinearShape(name, m, n, 2 * m * n)


def bank(width: int = WIDTH, inner: int = 2048, experts: int = 256) -> BankShape:
    names = [f"mlp.experts.0.{name}" for name in ("gate", "up", "down")]
    products = ((linear(names[0], inner, width), linear(names[1], inner, width)), (linear(names[2], width, inner),))
    return BankShape(name="mlp.experts", experts=experts, chosen=8, level=1, products=products)


def model(*banks: BankShape) -> ModelShape:
    """A block of a small attention and banks."""
    groups = (GroupShape((linear("attn.q", 256, WIDTH),), 0),)
    forward = Rows(0, 4 * SEQLEN * WIDTH)
    block = BlockShape(
        groups=groups,
        reach=(Reach(forward, Rows(0, SEQLEN * WIDTH)),) * 2,
        forward=forward,
        calls=Rows(0, 0),
        memos=(),
        weights=2 * 256 * WIDTH,
        stored=2 * 256 * WIDTH,
        largest_stored=2 * 256 * WIDTH,
        attention=0,
        banks=banks,
    )
    return ModelShape(
        path="layers",
        blocks=(block,) * 2,
        seqlen=SEQLEN,
        width=WIDTH,
        itemsize=2,
        vocabulary=1000,
        embedding_row=2 * WIDTH,
        rest_stored=0,
        rest_loaded=0,
    )


WORK = Work(rows=ROWS, tokens=1000, scheme=lambda _: SCHEME, method=Gptq(), true_sequential=True)


def plan(shape: ModelShape, device: int = 1000 * GIB, *, on_gpu: bool = True, work: Work = WORK, **settings: object) -> Plan:
    budgets = dataclasses.replace(PLENTY, device=device)
    machine = Machine(on_gpu=on_gpu, base=GIB, budgets=budgets, ceilings=None)
    return make_plan(shape, work, JobConfig(**settings), machine)  # type: ignore[arg-type]


def test_a_gpu_takes_as_many_as_fill_it() -> None:
    assert numbers_at_once(model(bank()), None, on_gpu=True) == [8, 4, 2, 1]
    assert plan(model(bank())).choice.experts_at_once == AT_ONCE == 8


def test_no_more_than_there_are_or_than_the_largest_of_them_allow() -> None:
    """Mixtral-8x22B: Hessians of 16384 inputs take a GiB each."""
    assert numbers_at_once(model(bank(experts=3)), None, on_gpu=True) == [3, 1]
    assert numbers_at_once(model(bank(experts=40)), None, 4, on_gpu=True) == [32, 16, 8, 4, 2, 1], "eight for each process"
    wide = bank(width=6144, inner=16384, experts=8)
    most = numbers_at_once(model(bank(), wide), None, on_gpu=True)[0]
    assert most == 1 and AT_ONCE_BYTES > 2 * 4 * 16384**2
    assert numbers_at_once(model(bank(width=6144, inner=8192, experts=8)), None, on_gpu=True) == [4, 2, 1]


@pytest.mark.parametrize(
    ("shape", "given", "on_gpu", "expected"),
    [
        (model(bank()), None, False, None),
        (model(bank()), 3, False, 3),
        (model(bank()), 3, True, 3),
        (model(), None, True, None),
        (model(), 3, True, None),
        (None, 3, True, None),
    ],
)
def test_where_nothing_is_chosen(shape: ModelShape | None, given: int | None, on_gpu: bool, expected: int | None) -> None:
    """On a CPU one after the other takes as long. Without experts, or without calibration, the option has no effect."""
    assert numbers_at_once(shape, given, on_gpu=on_gpu) == [expected]
    if shape is not None:
        assert plan(shape, on_gpu=on_gpu, experts_at_once=given).choice.experts_at_once == expected


def test_without_calibration_nothing_is_solved() -> None:
    rounded = dataclasses.replace(WORK, method=Rtn(), rows=0)
    assert plan(model(bank()), work=rounded, method="rtn").choice.experts_at_once is None


def test_fewer_where_memory_is_short_before_anything_else_gives_way() -> None:
    """Down from plenty: the number halves first, and each plan keeps to its budget. It is said in the plan."""
    shape = model(bank())
    most = plan(shape)
    assert "8 experts at once" in most.brief() and most.to_json()["experts_at_once"] == 8
    seen: list[Choice] = []
    for step in range(100, 0, -1):
        found = plan(shape, int(most.cost.device / 0.9 * step / 100) + 1)
        if found.shortages:
            break
        assert found.cost.device <= found.budgets.device
        if not seen or found.choice != seen[-1]:
            seen.append(found.choice)
    numbers = [choice.experts_at_once or 1 for choice in seen]
    assert numbers[0] == 8 and min(numbers) < 8
    assert [(choice.tier, choice.batch) for choice in seen[:2]] == [(most.choice.tier, most.choice.batch)] * 2
    assert "at once" not in plan(shape, experts_at_once=1).brief()


def test_each_takes_its_weights_its_hessian_and_its_buffers() -> None:
    """Per expert of DeepSeek-V3: a Hessian of 206 MB, gate and up in fp32, 117 MB, all weights in bf16, 88 MB, inputs of 117 MB."""
    shape = model(bank())

    def peaks(experts: int | None) -> dict[str, int]:
        choice = Choice(on_gpu=True, tier="host", batch=1, memo=False, ahead=0, beside=False, experts_at_once=experts)
        return {phase.name: phase.device for phase in job_cost(shape, WORK, choice, GIB).phases}

    one, two, eight = peaks(None), peaks(2), peaks(8)
    assert peaks(1) == one
    hessian, weights, single = 4 * WIDTH**2, 2 * 3 * 2048 * WIDTH, 4 * 2 * 2048 * WIDTH
    inputs = 2 * 8192 * WIDTH
    assert eight["hessian"] - two["hessian"] == 6 * (hessian + weights + inputs)
    more = (eight["solve"] - two["solve"]) / 6
    assert hessian + weights + inputs + single < more < 1.2 * (hessian + weights + inputs + single)
    assert two["load"] - one["load"] == weights and eight["replay"] >= one["replay"]


def test_unquantized_experts_are_loaded_one_by_one() -> None:
    skipping = dataclasses.replace(WORK, scheme=lambda name: None if "experts" in name else SCHEME)
    costs = []
    for experts in (None, 8):
        choice = Choice(on_gpu=True, tier="host", batch=1, memo=False, ahead=0, beside=False, experts_at_once=experts)
        costs.append(job_cost(model(bank()), skipping, choice, GIB).device)
    assert costs[0] == costs[1]
