"""The memory of a bank's phases, on a made-up shape: what is there at a time, and what is not."""

from __future__ import annotations

import dataclasses

import pytest
from test_planner import BEST, GIB, ROWS, SCHEME, SEQLEN, SHAPE, WIDTH, WORK, block, phase

from bigq.methods.base import Scaling
from bigq.methods.gptq import Gptq
from bigq.methods.scaling import AwqScaling
from bigq.model.experts import proof
from bigq.sched.plan.cost import BlockCost, Cost, job_cost
from bigq.sched.plan.costs import bank as bank_cost
from bigq.sched.plan.costs.bank import BankPhase, proof_bytes
from bigq.sched.plan.shape import BankShape, BlockShape, FoldShape, LinearShape, ModelShape
from bigq.sched.plan.sharing import ALONE
from bigq.sched.plan.work import Choice
from bigq.sched.solve import bank as solve_bank
from bigq.sched.units import experts as units
from bigq.scheme import QuantScheme
from bigq.solver.scaling import SAMPLED_TOKENS, TRIALS

EXPERTS, CHOSEN, INNER = 256, 8, 1024
#: Bytes of the inputs of a bank, and of the sums of its outputs.
BUFFER = 2 * ROWS * SEQLEN * WIDTH


def bank(level: int) -> BankShape:
    gate_up = tuple(LinearShape(f"experts.0.{name}", INNER, WIDTH, 2 * INNER * WIDTH) for name in ("gate", "up"))
    down = (LinearShape("experts.0.down", WIDTH, INNER, 2 * INNER * WIDTH),)
    return BankShape("experts", EXPERTS, CHOSEN, level, (gate_up, down))


def cost(level: int = 4, choice: Choice = BEST, scheme: QuantScheme | None = None) -> Cost:
    shape: ModelShape = dataclasses.replace(SHAPE, blocks=(dataclasses.replace(block(), banks=(bank(level),)),))
    return job_cost(shape, WORK if scheme is None else dataclasses.replace(WORK, scheme=lambda _: scheme), choice, 0)


def without(choice: Choice = BEST) -> Cost:
    return job_cost(dataclasses.replace(SHAPE, blocks=(block(),)), WORK, choice, 0)


def test_figures_are_those_of_the_job() -> None:
    assert bank_cost.EXPERT_TOKENS == solve_bank.CHUNK_TOKENS
    assert bank_cost.STEP_TOKENS == solve_bank.STEP_TOKENS
    assert bank_cost.GROUP_WEIGHTS == units.GROUP_WEIGHTS
    assert (bank_cost.PROVEN_SLOTS, bank_cost.PROVEN_MORE) == (proof._SLOTS, proof._MORE)


def peaks(*banks: BankShape) -> list[int]:
    """Of the phases of one block, in order."""
    made = dataclasses.replace(block(), banks=banks)
    names = [linear.name for linear in (*made.linears, *(linear for each in banks for linear in each.linears))]
    return [peak for _, peak, _, _ in BlockCost(SHAPE, WORK, BEST, made, dict.fromkeys(names, SCHEME)).phases()]


def test_buffers_count_while_they_are_there() -> None:
    """Before a bank there are none, in its own phases two, and behind it one with the sums of its outputs."""
    plain, behind, before = peaks(), peaks(bank(4)), peaks(bank(0))
    *levels, replay = plain
    assert behind[: len(levels)] == levels
    assert before[: len(levels)] == [peak + BUFFER for peak in levels]
    assert behind[-1] == before[-1] == replay + BUFFER
    assert all(2 * BUFFER < peak < 2 * BUFFER + 6 * GIB for peak in behind[len(levels) : -1])


def test_in_host_memory_buffers_count_there() -> None:
    choice = dataclasses.replace(BEST, tier="host")
    assert phase(cost(4, choice), "embed").host == phase(without(choice), "embed").host + 2 * BUFFER
    assert cost(4, choice).device < cost(4).device - 2 * BUFFER


def test_memory_does_not_follow_the_number_of_experts() -> None:
    shape = dataclasses.replace(SHAPE, blocks=(dataclasses.replace(block(), banks=(dataclasses.replace(bank(4), experts=4096),)),))
    assert job_cost(shape, WORK, BEST, 0).device == cost().device


def test_an_expert_takes_a_token_once() -> None:
    """With fewer tokens than an expert takes at a time, twice as many need twice the memory, however many experts each chooses."""
    running = [bank_cost._running(bank(4), terms(tokens)) for tokens in (SEQLEN, 2 * SEQLEN, 4 * SEQLEN, 8 * SEQLEN)]
    assert running[1] == 2 * running[0] and running[2] == running[3] == 4 * running[0]


def test_compiled_products_on_a_cpu() -> None:
    """As many as an expert can have numbers of tokens, and no more than there are experts."""
    for experts, sizes in ((4, 4), (256, 128)):
        one = dataclasses.replace(bank(4), experts=experts)
        loads = [bank_cost.bank_phases(one, 0, dataclasses.replace(terms(SEQLEN), on_gpu=on_gpu))[0] for on_gpu in (True, False)]
        assert loads[1][1] - loads[0][1] == 2 * sizes * bank_cost.COMPILED


def terms(tokens: int) -> bank_cost.BankTerms:
    return bank_cost.BankTerms(
        schemes={},
        tokens=tokens,
        streams=1,
        itemsize=2,
        inputs=0,
        reach=0,
        beside=False,
        at_once=1,
        on_gpu=True,
        hessians=True,
        collected=lambda n: float(n) * n,
        sums=lambda group: 4 * group.n * group.n,
        summing=lambda _: 0,
        sharing=ALONE,
        factor=lambda *_: 0,
        solve=lambda *_: 0,
        pack=lambda *_: 0,
        packed=lambda _: 0,
        moved=lambda _: 0,
        swept=lambda _: 0,
        searched=lambda _: 0,
    )


def test_the_unquantized_model_takes_rows_experts_and_sums_once_more() -> None:
    """Of a bank whose inputs are on the device: the inputs twice, the experts that are solved twice, two buffers for a Hessian's."""
    one, schemes = bank(4), {linear.name: SCHEME for linear in bank(4).linears}
    expert, n = 3 * INNER * WIDTH, one.products[0][0].n

    def phases(streams: int) -> dict[str, int]:
        sums = lambda group: streams * 4 * group.n**2  # noqa: E731
        given = dataclasses.replace(terms(SEQLEN), streams=streams, schemes=schemes, inputs=streams * 10**6, sums=sums)
        found: dict[str, int] = {}
        for name, peak, _, _ in bank_cost.bank_phases(one, 0, given):
            found.setdefault(name, peak)
        return found

    alone, both = phases(1), phases(2)
    assert both["load"] - alone["load"] == 2 * 10**6 + bank_cost.CHOICE * SEQLEN * one.chosen + 2 * expert
    assert both["factor"] - alone["factor"] == both["load"] - alone["load"] + 4 * n * n + SEQLEN * n * 2


def test_scales_inside_experts_take_a_pass_and_a_choice() -> None:
    """Each expert runs up to its last matrix once more; the choice holds a piece of that matrix and sampled inputs, for one expert."""
    one = bank(4)
    fold = FoldShape("experts.gate_up", ("experts.down",), INNER, INNER, "expert", one.name)
    made = dataclasses.replace(block(), banks=(one,), folds=(fold,))
    names = [linear.name for linear in (*made.linears, *one.linears)]

    def phases(scaling: Scaling | None, shape: BlockShape) -> dict[str, list[BankPhase]]:
        found: dict[str, list[BankPhase]] = {}
        work = dataclasses.replace(WORK, method=Gptq(scaling))
        for each in BlockCost(SHAPE, work, BEST, shape, dict.fromkeys(names, SCHEME)).phases():
            found.setdefault(each[0], []).append(each)
        return found

    plain, scaled = phases(None, made), phases(AwqScaling(), made)
    assert "scale" not in plain and "scale" not in phases(AwqScaling(), dataclasses.replace(made, folds=()))
    (choice,) = scaled["scale"]
    weights, routed = INNER * WIDTH, ROWS * SEQLEN * CHOSEN
    assert choice[2] == {"single": EXPERTS * TRIALS * 2 * SAMPLED_TOKENS * weights}
    more = [b[2]["products"] - a[2]["products"] for a, b in zip(plain["replay"], scaled["replay"], strict=True)]
    assert sorted(more)[-1] == 2.0 * routed * 2 * weights and sum(x > 0 for x in more) == 1
    assert choice[1] == phases(AwqScaling(), dataclasses.replace(made, banks=(dataclasses.replace(one, experts=4096),)))["scale"][0][1]


def test_packed_groups_grow_with_the_bits() -> None:
    four, eight = (phase(cost(4, scheme=QuantScheme(bits=bits)), "load").device for bits in (4, 8))
    weights = units.GROUP_WEIGHTS // (3 * INNER * WIDTH) * 3 * INNER * WIDTH
    others = sum(linear.m * linear.n for linear in block().linears)
    assert eight - four == pytest.approx(((1 + BEST.beside) * weights + others) / 2, rel=0.01)


def test_the_proof_holds_a_few_experts_twice() -> None:
    assert proof_bytes(bank(4), 2) == 2 * 6 * 3 * INNER * WIDTH * 2
    assert phase(cost(), "probe").device > phase(without(), "embed").device - BUFFER + proof_bytes(bank(4), 2)
