"""Plans of one of several processes, on made-up shapes: what they share, what each does alone, what they exchange, and what bounds them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from test_bank_cost import EXPERTS, bank
from test_planner import BEST, BLOCKS, INNER, PLENTY, ROWS, SCHEME, SHAPE, WIDTH, WORK, advised, block, linear, machine, phase

import bigq
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.job.settle import for_ranks
from bigq.kernels.cholesky import GPU_PANEL, SHARED_FROM
from bigq.machine.ceilings import KNOWN, Links
from bigq.machine.ranks import PIECE, bands, share
from bigq.methods.awq import Awq
from bigq.sched.plan.budgets import Budgets
from bigq.sched.plan.cost import job_cost
from bigq.sched.plan.costs.bank import group_of
from bigq.sched.plan.costs.ranks import batches, dealt, gathering_bytes, own_rows, result_bytes, summing_bytes
from bigq.sched.plan.costs.traffic import job_traffic
from bigq.sched.plan.planner import Plan, make_plan
from bigq.sched.plan.scaling import BUS, DISK, Times
from bigq.sched.plan.several import with_scaling
from bigq.sched.plan.shape import ModelShape
from bigq.sched.plan.sharing import Assumed, Sharing, Traffic, dealt_triangles, factored, joined, summed, summed_triangle
from bigq.sched.plan.work import Work

EIGHT, TWO_HOSTS = Sharing(ranks=8, local=8), Sharing(ranks=8, local=4)
GIB = 2**30


def work_of(sharing: Sharing, **changes: Any) -> Work:
    return dataclasses.replace(WORK, rows=sharing.part(ROWS), sharing=sharing, **changes)


def plan(sharing: Sharing = EIGHT, budgets: Budgets = PLENTY, shape: ModelShape = SHAPE, disk: float = 1e15, **settings: Any) -> Plan:
    work, config = work_of(sharing), JobConfig(**settings)
    given = dataclasses.replace(machine(budgets, ceilings=KNOWN["h100"]), disk_rate=disk)
    return with_scaling(make_plan(shape, work, config, given), ROWS, config, given)


def test_rows_and_solved_rows_are_shared_and_loading_and_packing_are_not() -> None:
    alone, shared = job_cost(SHAPE, WORK, BEST, 0), job_cost(SHAPE, work_of(EIGHT), BEST, 0)
    for name in ("replay", "hessian", "solve"):
        for kind, count in phase(alone, name).flops.items():
            assert phase(shared, name).flops[kind] == pytest.approx(count / 8), (name, kind)
    assert phase(shared, "solve").moved == phase(alone, "solve").moved / 8
    for name in ("load", "pack"):
        assert phase(shared, name).moved == phase(alone, name).moved and phase(shared, name).flops == phase(alone, name).flops
    assert shared.read == alone.read and shared.output == alone.output and shared.scratch == alone.scratch, "the disk is for all"
    assert shared.device < alone.device / 2


def test_factors_are_shared_from_a_size_on_but_for_their_corners() -> None:
    alone, shared = (phase(job_cost(SHAPE, work, BEST, 0), "factor").flops["single"] for work in (WORK, work_of(EIGHT)))
    corners = BLOCKS * (3 * WIDTH + INNER) * GPU_PANEL**2 / 3
    assert WIDTH >= SHARED_FROM and shared == pytest.approx(alone / 8 + corners)
    small = dataclasses.replace(SHAPE, blocks=(dataclasses.replace(block(), groups=(narrow(SHARED_FROM - SCHEME.group_size),), memos=()),))
    alone, shared = (phase(job_cost(small, work, BEST, 0), "factor").flops["single"] for work in (WORK, work_of(EIGHT)))
    assert shared == alone and "factor" not in job_traffic(small, work_of(EIGHT), BEST)


def test_panels_of_a_factor_are_joined_above_their_corners() -> None:
    three = Sharing(ranks=3, local=3)
    assert factored(10, 4, three) == joined(6, 16, 1, three) + joined(2, 16, 1, three) == Traffic(2 * (2 + 1) * 16, 2)
    assert factored(4, 4, three) == Traffic()
    half = 4 * INNER**2 / 2 * 7 / 8
    assert factored(INNER, GPU_PANEL, EIGHT).received == pytest.approx(half * (1 - GPU_PANEL / INNER))


def narrow(n: int) -> Any:
    return dataclasses.replace(block().groups[0], linears=(dataclasses.replace(linear("attn.q", WIDTH, n), stored=2 * WIDTH * n),))


def test_what_few_rows_or_common_scales_keep_with_each_process() -> None:
    """All solve all of it, and have nothing to join."""
    few, many = linear("few", 7, WIDTH), linear("many", WIDTH, WIDTH)
    schemes = {"few": SCHEME, "many": SCHEME}
    assert [each.m for each in own_rows([many], schemes, EIGHT)] == [WIDTH // 8]
    assert [each.m for each in own_rows([few, many], schemes, EIGHT)] == [7, WIDTH], "those of one scheme are solved together"
    others = schemes | {"few": dataclasses.replace(SCHEME, bits=8)}
    assert [each.m for each in own_rows([few, many], others, EIGHT)] == [7, WIDTH // 8]
    settling = dataclasses.replace(SCHEME, scale_form="block", group_size=128)
    assert [each.m for each in own_rows([many], {"many": settling}, EIGHT)] == [WIDTH]
    assert dealt(8, EIGHT, [SCHEME]) == 1 and dealt(8, EIGHT, [settling]) == 8
    work = work_of(EIGHT, scheme=lambda _: settling)
    assert "solve" not in job_traffic(SHAPE, work, BEST) and "hessian" in job_traffic(SHAPE, work, BEST)
    alone = job_cost(SHAPE, dataclasses.replace(work, sharing=Sharing()), BEST, 0)
    assert phase(job_cost(SHAPE, work, BEST, 0), "solve").flops == phase(alone, "solve").flops


def test_hessians_are_added_up_in_pieces() -> None:
    """Each process receives its part from each other one, and then the sums of these, padded to equal parts."""
    three = Sharing(ranks=3, local=3)
    assert summed(10, three, 100) == Traffic(2 * 2 * 4 * 4, 2)
    assert summed(25, three, 10) == Traffic(2 * 2 * 4 * (4 + 4 + 2), 6)
    found = job_traffic(SHAPE, work_of(EIGHT), BEST)["hessian"]
    assert found == (summed_triangle(WIDTH, EIGHT).times(3) + summed_triangle(INNER, EIGHT)).times(BLOCKS)
    whole = BLOCKS * 4 * 2 * 7 / 8 * (3 * WIDTH**2 + INNER**2)
    assert whole / 2 < found.received < 0.57 * whole
    widest = max((hi - lo) * (INNER - lo) for lo, hi in bands(INNER))
    assert 0.9 * PIECE < widest <= PIECE
    assert summing_bytes(INNER, EIGHT) == 4 * EIGHT.part(widest) * 25 and summing_bytes(INNER, Sharing()) == 0
    assert summing_bytes(INNER, EIGHT, square=True) == 4 * PIECE // 8 * 25


@pytest.mark.parametrize("n", [1, 100, 511, 513, 4100, 8192, 57344])
def test_bands_hold_each_row_once_and_little_below_the_diagonal(n: int) -> None:
    found = list(bands(n))
    assert [row for lo, hi in found for row in range(lo, hi)] == list(range(n))
    assert all((hi - lo) * (n - lo) <= PIECE for lo, hi in found)
    assert n < 4096 or sum((hi - lo) * (n - lo) for lo, hi in found) < 0.57 * n * n
    assert next(bands(2**25)) == (0, 1), "a row that is longer than a piece is a band"


def test_without_hessians_products_of_neighbours_are_added_up() -> None:
    """And nothing is factored."""
    work = work_of(EIGHT, method=Awq(None))
    traffic = job_traffic(SHAPE, work, BEST)
    assert traffic["hessian"] == (summed(WIDTH * 128, EIGHT).times(3) + summed(INNER * 128, EIGHT)).times(BLOCKS)
    assert "factor" not in traffic and traffic["solve"].received
    assert sum(phase(job_cost(SHAPE, work, BEST, 0), "factor").flops.values()) == 0


def test_joined_rows_are_padded_to_the_largest_share() -> None:
    three = Sharing(ranks=3, local=3)
    assert max(len(share(10, i, 3)) for i in range(3)) == three.part(10) == 4
    assert joined(10, 5, 3, three) == Traffic(2 * 4 * 5, 3)


def test_experts_are_dealt_out_batch_by_batch() -> None:
    assert batches(10, 4, 3) == [3, 1, 3, 1, 2] and sum(batches(EXPERTS, 7, 3)) == EXPERTS
    shape = dataclasses.replace(SHAPE, blocks=(dataclasses.replace(block(), groups=(), memos=(), banks=(bank(0),)),))
    sizes = [group_of(bank(0)), EXPERTS - group_of(bank(0))]
    assert len(sizes) == 2 and sizes[0] % 8 and sizes[0] > sizes[1] > 16, "the last batch of a shard is smaller"
    for at_once, most in ((8, 1), (4, 1), (1, 1), (16, 2)):
        own = sum(size // at_once * most + -(-(size % at_once) // 8) for size in sizes)
        choice = dataclasses.replace(BEST, experts_at_once=at_once)
        alone, shared = (phase(job_cost(shape, work, choice, 0), "solve").flops["solve"] for work in (WORK, work_of(EIGHT)))
        assert shared == pytest.approx(alone * own / EXPERTS), "with fewer at once than processes, some have nothing to solve"
    few, all_busy = (job_traffic(shape, work_of(EIGHT), dataclasses.replace(BEST, experts_at_once=n)) for n in (4, 8))
    for name in ("hessian", "solve"):
        assert few[name].received > 1.9 * all_busy[name].received
    one = summed_triangle(WIDTH, EIGHT).received
    assert dealt_triangles(8, WIDTH, EIGHT).received == pytest.approx(8 * one / 2, rel=0.01), "nobody needs the sums of the others"


def test_results_of_experts_that_are_solved_one_by_one_are_gathered_too() -> None:
    """From all processes, though one has solved as many as there are at once."""
    one, settling = linear("down", WIDTH, INNER), dataclasses.replace(SCHEME, scale_form="block", group_size=128)
    result = WIDTH * result_bytes(one, SCHEME)
    assert gathering_bytes([one], {"down": SCHEME}, 1, 1, EIGHT) > 8 * result
    assert gathering_bytes([one], {"down": SCHEME}, 8, 1, EIGHT) == gathering_bytes([one], {"down": SCHEME}, 1, 1, EIGHT) + 7 * result
    for sharing, scheme in ((Sharing(), SCHEME), (EIGHT, settling)):
        assert gathering_bytes([one], {"down": scheme}, 8, 8, sharing) == 0


def test_seconds_of_traffic_are_those_of_the_slowest_link() -> None:
    links = Links(bus=1.0, peers=100.0, hosts=10.0, peers_wait=1.0, hosts_wait=2.0)
    assert Traffic(700, 3).seconds(EIGHT, links) == 7 + 3
    assert Traffic(700, 3).seconds(TWO_HOSTS, links) == pytest.approx(400 / 10 + 3 * 2)
    assert Traffic().seconds(Sharing(), links) == 0


def test_a_plan_says_how_much_several_processes_gain() -> None:
    found = plan()
    value = found.to_json()
    ranks = value["ranks"]
    assert (ranks["count"], ranks["hosts"], ranks["rows"], value["rows"]) == (8, 1, ROWS // 8, ROWS)
    alone = make_plan(SHAPE, WORK, JobConfig(), machine(PLENTY, ceilings=KNOWN["h100"]))
    assert alone.to_json()["ranks"] is None and alone.scaling is None
    computing = sum(alone.seconds.values()) / (8 * sum(found.seconds.values()))
    assert ranks["scaling_computing"] == pytest.approx(computing) and 0.3 < computing < 1
    assert ranks["bound_by"] == "hessian" and ranks["excess_seconds"] > 0
    by_phase = {each["phase"]: each["seconds"] for each in value["phases"]}
    without = alone.seconds["hessian"] / 8
    assert by_phase["hessian"] == pytest.approx(without + ranks["traffic"]["hessian"]["seconds"])
    table = found.table()
    assert max(map(len, table.splitlines())) <= 60 and "  ranks:   8 on 1 host, 16 rows each;" in table
    assert f"  scaling: {ranks['scaling']:.0%}".replace("%", " %") + " of 8 × one process" in table and "(assumed)" in table
    two = plan(TWO_HOSTS)
    assert "8 on 2 hosts" in two.brief() and two.total_seconds > found.total_seconds


def test_a_slow_disk_bounds_every_number_of_processes() -> None:
    slow = plan(disk=1e8)
    assert slow.scaling is not None and slow.scaling.efficiency() == pytest.approx(1 / 8, rel=0.05)
    assert slow.to_json()["ranks"]["bound_by"] == DISK
    times = Times(phases={"solve": 1.0}, disk=1.0, bus=5.0, beside=True)
    assert times.total == 5 and times.excess(Times(phases={"solve": 8.0}, disk=1.0, bus=5.0, beside=True), 8) == (BUS, 5 - 5 / 8)
    after = dataclasses.replace(times, beside=False)
    assert after.total == 6


def test_a_host_reads_once_if_its_files_fit_beside_the_processes() -> None:
    plenty = plan()
    assert plenty.scaling is not None and plenty.scaling.reads == 1
    tight = dataclasses.replace(PLENTY, host=plenty.cost.host * 11 // 10)
    fits = plan(budgets=tight, read_ahead=1)
    assert fits.scaling is not None and fits.scaling.reads == (1 if 8 * (tight.host - fits.cost.host) >= 2 * block().stored else 8)
    short = plan(budgets=dataclasses.replace(PLENTY, host=plenty.cost.host), read_ahead=1, activations="gpu", batch=8, disk=3e9)
    assert (
        short.scaling is not None
        and short.scaling.reads == 8
        and "each host reads MODEL 8 times" in short.table().replace("\n           ", " ")
    )
    assert short.times.disk > plan(disk=3e9).times.disk


def test_host_memory_is_for_all_processes_of_a_host() -> None:
    """The budget that a shortage advises is that of the host, of which each has its part."""
    given = 16 * GIB
    found = plan(budgets=dataclasses.replace(PLENTY, host=given // 8), ram=given, activations="host")
    assert found.shortages and "by each of 8 processes" in found.shortages[0]
    enough = advised(found.shortages[0], "--ram")
    assert enough > 8 * found.cost.host
    assert plan(budgets=dataclasses.replace(PLENTY, host=enough // 8), ram=enough, activations="host").fits


def test_experts_at_once_follow_the_processes_of_a_cpu() -> None:
    assert for_ranks(JobConfig(), 4, "cpu").experts_at_once == 4
    assert for_ranks(JobConfig(), 4, "cuda").experts_at_once is for_ranks(JobConfig(), 1, "cpu").experts_at_once is None
    assert for_ranks(JobConfig(experts_at_once=2), 4, "cpu").experts_at_once == 2


def test_hosts_have_equally_many_processes() -> None:
    with pytest.raises(UsageError, match="--hosts 3: must divide --ranks 8"):
        Assumed(ranks=8, hosts=3)
    with pytest.raises(UsageError, match="--ranks 0: must be at least 1"):
        Assumed(ranks=0)
    assert Assumed(disk_rate="40GB").disk_rate == 40 * 10**9


def test_what_processes_do_not_share_the_plan_refuses(checkpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """As the job does."""
    command = ["plan", str(checkpoint("llama")), "--device", "cpu", "--group-size", "32", "--ranks", "2"]
    assert main([*command, "--method", "rtn"]) == 2
    assert "--method rtn: 2 processes cannot share such a job; start it in one process" in capsys.readouterr().err
    assert main([*command, "--samples", "1"]) == 2
    assert "--samples 1: 2 processes share the calibration rows" in capsys.readouterr().err


def test_python_plans_several_processes_too(checkpoint: Any) -> None:
    config = JobConfig(scheme=dataclasses.replace(SCHEME, group_size=32), samples=4, seqlen=32, device="cpu", calibration="builtin")
    found = bigq.plan(checkpoint("llama"), config=config, ranks=4, hosts=2, disk_rate="2GB")
    assert found.scaling is not None and found.scaling.sharing == Sharing(ranks=4, local=2) and found.disk_rate == 2 * 10**9
    with pytest.raises(UsageError, match="--hosts 3"):
        bigq.plan(checkpoint("llama"), config=config, ranks=4, hosts=3)
