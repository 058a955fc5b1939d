"""Choosing how to run a job, on made-up shapes: every term is there, and what gives way gives way in order."""

from __future__ import annotations

import dataclasses
import re

import pytest

from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.io.remote.parts import LARGEST_PART
from bigq.machine.ceilings import KNOWN, Ceilings
from bigq.methods.gptq import Gptq
from bigq.methods.rtn import Rtn
from bigq.progress.sizes import parse_size
from bigq.sched.plan.budgets import Budgets, Download, Fetch, Streamed, usual_cache
from bigq.sched.plan.cost import Cost, Phase, job_cost
from bigq.sched.plan.planner import Machine, Plan, make_plan, phase_seconds
from bigq.sched.plan.shape import BlockShape, GroupShape, LinearShape, MemoShape, ModelShape, Reach, Rows, packed_bytes
from bigq.sched.plan.work import Choice, Work
from bigq.scheme import QuantScheme, Rule, scheme_for

GIB = 2**30
WIDTH, INNER, SEQLEN, ROWS, BLOCKS = 4096, 16384, 2048, 128, 10
PLENTY = Budgets(device=1000 * GIB, host=1000 * GIB, disk=1000 * GIB)


def linear(name: str, m: int, n: int) -> LinearShape:
    return LinearShape(name, m, n, 2 * m * n)


def block() -> BlockShape:
    groups = (
        GroupShape((linear("attn.q", WIDTH, WIDTH), linear("attn.k", WIDTH, WIDTH)), 0),
        GroupShape((linear("attn.o", WIDTH, WIDTH),), 1),
        GroupShape((linear("up", INNER, WIDTH),), 2),
        GroupShape((linear("down", WIDTH, INNER),), 3),
    )
    weights = sum(x.stored for g in groups for x in g.linears) + 4 * WIDTH
    forward = Rows(0, 10 * SEQLEN * WIDTH)
    return BlockShape(
        groups=groups,
        reach=(Reach(forward, Rows(0, SEQLEN * WIDTH)),) * 4,
        forward=forward,
        calls=Rows(1000, 10),
        memos=(MemoShape("attn.o", WIDTH, WIDTH, ("attn.q", "attn.k", "attn.o")),),
        weights=weights,
        stored=weights,
        largest_stored=2 * INNER * WIDTH,
        attention=4.0 * SEQLEN * SEQLEN * WIDTH,
    )


SHAPE = ModelShape(
    path="layers",
    blocks=(block(),) * BLOCKS,
    seqlen=SEQLEN,
    width=WIDTH,
    itemsize=2,
    vocabulary=32000,
    embedding_row=2 * WIDTH,
    rest_stored=4 * 32000 * WIDTH,
    rest_loaded=2 * WIDTH,
)
SCHEME = QuantScheme(bits=4, group_size=128)
WORK = Work(rows=ROWS, tokens=10000, scheme=lambda _: SCHEME, method=Gptq(), true_sequential=True)
HIDDEN = ROWS * SEQLEN * WIDTH * 2
BEST = Choice(on_gpu=True, tier="gpu", batch=8, memo=True, ahead=block().stored, beside=True, checkpoints=True)


def machine(budgets: Budgets, *, on_gpu: bool = True, ceilings: Ceilings | None = None) -> Machine:
    return Machine(on_gpu=on_gpu, base=GIB, budgets=budgets, ceilings=ceilings)


def plan(budgets: Budgets = PLENTY, *, on_gpu: bool = True, work: Work = WORK, **settings: object) -> Plan:
    config = JobConfig(**settings)  # type: ignore[arg-type]
    return make_plan(SHAPE, work, config, machine(budgets, on_gpu=on_gpu, ceilings=KNOWN["h100"] if on_gpu else None))


def phase(cost: Cost, name: str) -> Phase:
    return next(p for p in cost.phases if p.name == name)


def test_with_plenty_of_room_a_gpu_keeps_everything() -> None:
    found = plan()
    assert found.choice == BEST
    assert not found.shortages


def test_what_gives_way_first_is_the_batch_then_the_memo_then_reading_ahead_and_last_the_tier() -> None:
    """Down from plenty: each plan keeps to its budget, and each change is the next in that order."""
    seen: list[Choice] = []
    for tenth in range(300, 0, -1):
        found = plan(dataclasses.replace(PLENTY, device=tenth * GIB // 10))
        if found.shortages:
            break
        assert found.cost.device <= found.budgets.device
        if not seen or found.choice != seen[-1]:
            seen.append(found.choice)
    assert seen[:2] == [BEST, dataclasses.replace(BEST, batch=4)]
    order = [(("gpu", "host", "disk").index(c.tier), c.ahead == 0, not c.memo, -c.batch) for c in seen]
    assert order == sorted(order)
    assert {(c.tier, c.memo, c.ahead > 0) for c in seen} >= {("gpu", True, True), ("gpu", False, True), ("host", True, True)}


def test_little_host_memory_sends_the_activations_to_the_disk() -> None:
    host = plan(on_gpu=False)
    assert host.choice.tier == "host"
    less = plan(dataclasses.replace(PLENTY, host=host.cost.host - HIDDEN), on_gpu=False)
    assert less.choice.tier == "disk"
    assert not less.shortages
    assert less.cost.scratch >= HIDDEN
    assert less.cost.host < host.cost.host - HIDDEN


def test_where_nothing_fits_each_budget_is_named_with_what_it_lacks() -> None:
    found = plan(Budgets(device=GIB, host=2 * GIB, disk=GIB))
    assert [s.split(":")[0] for s in found.shortages] == ["device memory", "host memory", "disk"]
    assert all(flag in text for flag, text in zip(("--vram", "--ram", "--disk"), found.shortages, strict=True))
    assert found.cost.device > GIB
    assert "short" in found.brief()


def advised(shortage: str, flag: str) -> int:
    """The budget that a shortage advises, as the option reads it."""
    found = re.search(rf"give {flag} (\S+) or more$", shortage)
    assert found is not None, shortage
    return parse_size(found[1], flag)


@pytest.mark.parametrize("rows", [1, ROWS])
def test_budgets_that_a_shortage_advises_are_enough(rows: int) -> None:
    work = dataclasses.replace(WORK, rows=rows)
    for scale in (1, 2, 30):
        tight = Budgets(device=scale * GIB // 4, host=scale * GIB // 4, disk=GIB // 4)
        found = plan(tight, work=work, vram=tight.device, ram=tight.host, disk=tight.disk)
        assert found.shortages
        given = {"vram": tight.device, "ram": tight.host, "disk": tight.disk}
        for shortage in found.shortages:
            flag = next(name for name in given if f"--{name} " in shortage)
            needed = advised(shortage, f"--{flag}")
            assert given[flag] < needed
            assert "free as much" not in shortage
            given[flag] = needed
        assert plan(Budgets(device=given["vram"], host=given["ram"], disk=given["disk"]), work=work).fits


def test_what_is_asked_for_stays_as_it_is() -> None:
    tight = Budgets(device=4 * GIB, host=1000 * GIB, disk=1000 * GIB)
    found = plan(tight, batch=8, activations="gpu", read_ahead=1)
    assert (found.choice.batch, found.choice.tier, found.choice.ahead) == (8, "gpu", block().stored)
    assert found.shortages
    with pytest.raises(UsageError, match="--activations gpu"):
        plan(on_gpu=False, activations="gpu")


def test_nothing_is_kept_where_no_level_follows_another() -> None:
    at_once = plan(work=dataclasses.replace(WORK, true_sequential=False), true_sequential=False)
    assert not at_once.choice.memo
    assert "not kept" in at_once.brief()


def test_activations_and_memo_are_counted_once_each() -> None:
    with_memo = job_cost(SHAPE, WORK, BEST, 0)
    without = job_cost(SHAPE, WORK, dataclasses.replace(BEST, memo=False), 0)
    assert with_memo.device - without.device == HIDDEN
    host = job_cost(SHAPE, WORK, dataclasses.replace(BEST, tier="host"), 0)
    assert host.host - with_memo.host == 2 * HIDDEN
    assert host.device < with_memo.device


def test_the_largest_hessian_is_there_while_it_is_solved() -> None:
    cost = job_cost(SHAPE, WORK, BEST, 0)
    square = 4 * INNER * INNER
    kept = 2 * HIDDEN + block().weights
    for name in ("hessian", "factor", "solve"):
        assert phase(cost, name).device >= kept + square
    assert phase(cost, "solve").device >= kept + square + 4 * INNER * WIDTH


def test_a_memo_spares_what_lies_inside_its_module() -> None:
    """Passes over the calibration set: to o (q, k), to up (all of attention), to down (with up), and the whole block."""
    tokens = ROWS * SEQLEN
    q, up = 2.0 * tokens * WIDTH * WIDTH, 2.0 * tokens * WIDTH * INNER
    attention = ROWS * block().attention
    with_memo = phase(job_cost(SHAPE, WORK, BEST, 0), "replay").flops["products"]
    without = phase(job_cost(SHAPE, WORK, dataclasses.replace(BEST, memo=False), 0), "replay").flops["products"]
    assert with_memo == pytest.approx(BLOCKS * (2 * q + attention + up + 2 * up))
    assert without == pytest.approx(BLOCKS * (2 * q + 3 * q + 3 * q + 3 * q + 4 * attention + up + 2 * up))


def test_arithmetic_of_hessians_factors_and_solves() -> None:
    cost = job_cost(SHAPE, WORK, BEST, 0)
    tokens = ROWS * SEQLEN
    assert phase(cost, "hessian").flops == {"hessian": BLOCKS * float(tokens) * (3 * WIDTH**2 + INNER**2)}
    assert phase(cost, "factor").flops["single"] == pytest.approx(BLOCKS * (3 * WIDTH**3 + INNER**3) / 3)
    solved = BLOCKS * float(3 * WIDTH**3 + INNER * WIDTH**2 + WIDTH * INNER**2)
    assert phase(cost, "solve").flops["solve"] == solved * (1 + 2 * SCHEME.sweeps)


def test_searches_and_sweeps_take_their_time() -> None:
    """A grid is a pass over the columns of a group; a sweep is a product with the whole Hessian, where GPTQ needs half of it."""

    def solving(**changes: object) -> Phase:
        scheme = dataclasses.replace(SCHEME, **changes)  # type: ignore[arg-type]
        work = dataclasses.replace(WORK, scheme=lambda _: scheme)
        return phase(job_cost(SHAPE, work, BEST, 0), "solve")

    plain, searched, swept = solving(scales="minmax", sweeps=0), solving(sweeps=0), solving(sweeps=3)
    weights = sum(linear.m * linear.n for block in SHAPE.blocks for linear in block.linears)
    assert plain.flops["single"] == 0 and searched.flops["single"] == 2 * 16 * SCHEME.group_size * weights
    assert solving(bits=2, sweeps=0).flops["single"] == 2 * 28 * SCHEME.group_size * weights
    assert searched.moved == plain.moved and searched.flops["solve"] == plain.flops["solve"]
    assert swept.flops["solve"] == 7 * plain.flops["solve"] and swept.moved > searched.moved
    assert solving(order="activation", sweeps=0).flops == plain.flops


def test_time_is_arithmetic_and_moving_at_the_best_rates() -> None:
    rates = Ceilings("x", products=10.0, correcting=5.0, single=2.0, hessian=10.0, copy=100.0, memory=1, source="made up")
    assert phase_seconds(Phase("a", 0, 0, {"products": 30.0, "hessian": 10.0, "solve": 10.0, "single": 4.0}, 50.0), rates) == 8.5
    on_cpu = dataclasses.replace(rates, hessian=2.0, memory=0)
    assert phase_seconds(Phase("a", 0, 0, {"hessian": 10.0}, 0.0), on_cpu) == 5.0


def test_output_is_packed_linears_and_everything_else() -> None:
    packed = packed_bytes(linear("x", WIDTH, INNER), SCHEME)
    groups = INNER // 128
    assert packed == WIDTH * INNER // 2 + groups * WIDTH // 2 + 2 * groups * WIDTH + 4 * INNER
    skipping = dataclasses.replace(WORK, scheme=lambda name: None if name.endswith(".down") else SCHEME)
    all_of_it, some = job_cost(SHAPE, WORK, BEST, 0).output, job_cost(SHAPE, skipping, BEST, 0).output
    assert some - all_of_it == BLOCKS * (2 * WIDTH * INNER - packed)
    assert job_cost(SHAPE, WORK, BEST, 0).read >= SHAPE.stored


def test_rounding_to_nearest_needs_no_activations() -> None:
    rtn = plan(work=dataclasses.replace(WORK, rows=0, tokens=0, method=Rtn()), method="rtn")
    assert rtn.cost.device < job_cost(SHAPE, WORK, BEST, 0).device - HIDDEN
    assert "no calibration" in rtn.brief() and "round-to-nearest" in rtn.brief() and "tokens" not in rtn.brief()
    assert "replay" not in {p.name for p in rtn.cost.phases}


def test_the_table_and_the_json_tell_the_same() -> None:
    found = plan()
    value = found.to_json()
    assert value["device_bytes"] == found.cost.device
    assert value["shortages"] == []
    assert [p["phase"] for p in value["phases"]] == [p.name for p in found.cost.phases]
    table = found.table()
    assert all(p.name in table for p in found.cost.phases)
    assert "H100" in table
    assert "at least" in table


def test_activations_are_saved_where_the_disk_has_room_for_them_twice() -> None:
    """Without that room the job runs all the same; asked not to, or with nothing to save, it does not save either."""
    found = plan()
    assert found.choice.checkpoints and found.cost.scratch == 2 * HIDDEN
    short = plan(dataclasses.replace(PLENTY, disk=found.cost.output + 2 * HIDDEN - 1))
    assert not short.choice.checkpoints and short.cost.scratch == 0 and not short.shortages
    assert not plan(checkpoint_every=None).choice.checkpoints
    assert not plan(work=dataclasses.replace(WORK, method=Rtn())).choice.checkpoints


def test_a_download_to_the_same_file_system_takes_from_the_disk_budget() -> None:
    needed = plan().cost.output
    found = planned(Download(size=5 * GIB, folder="/cache"), disk=needed + 5 * GIB)
    assert found.fits and not found.choice.checkpoints and found.disk == needed + 5 * GIB
    assert "  fetches: 5.00 GiB to /cache, in 42.9 s at 125 MB/s" in found.brief()
    assert found.to_json()["fetch"] == {"way": "download", "bytes": 5 * GIB, "cache_bytes": None, "bytes_per_second": 125 * 10**6}
    short = planned(Download(size=5 * GIB, folder="/cache"), disk=needed + 2 * GIB)
    assert not short.fits and short.shortages[0].startswith("disk: 3.00 GiB more needed on OUT's file system, for ")
    assert "and 5.00 GiB of MODEL downloaded to /cache; free as much, or give --disk " in short.shortages[0]
    enough = advised(short.shortages[0], "--disk")
    assert planned(Download(size=5 * GIB, folder="/cache"), disk=enough).fits


def test_a_download_to_another_file_system_has_a_budget_of_its_own() -> None:
    needed = plan().cost.output
    found = planned(Download(size=5 * GIB, folder="/cache", free=5 * GIB), disk=needed)
    assert found.fits and found.disk == needed
    short = planned(Download(size=5 * GIB, folder="/cache", free=4 * GIB), disk=needed)
    assert short.shortages == (
        "disk: 1.00 GiB more needed in /cache, for 5.00 GiB of MODEL (set HF_HOME to use another cache, or give --fetch stream)",
    )


def test_the_cache_of_a_streamed_model_takes_what_the_disk_has_left() -> None:
    """A cache that the user gave is needed as it is."""
    needed = plan().cost.output
    streamed = Streamed(size=50 * GIB, cache=5 * GIB)
    found = planned(streamed, disk=needed + 6 * GIB)
    scratch = found.cost.scratch
    assert found.fits and scratch and found.fetch is not None and found.fetch.on_disk == min(5 * GIB, 6 * GIB - scratch)
    assert found.disk == needed + scratch + found.fetch.on_disk
    tight = planned(streamed, disk=needed + 2 * GIB)
    assert tight.fits and tight.disk <= needed + 2 * GIB and tight.fetch is not None and tight.fetch.on_disk > GIB
    short = planned(streamed, disk=needed + 2**20)
    assert short.shortages[0].startswith("disk: 31.0 MiB more needed") and "and 32.0 MiB of --fetch-cache; " in short.shortages[0]
    assert planned(streamed, disk=advised(short.shortages[0], "--disk")).fits
    given = planned(dataclasses.replace(streamed, given=True), disk=needed + 2 * GIB)
    assert not given.fits and "and 5.00 GiB of --fetch-cache; " in given.shortages[0]


def test_a_streamed_job_takes_at_least_as_long_as_its_network() -> None:
    slow = planned(Streamed(size=50 * GIB, cache=GIB, rate=10**6), disk=1000 * GIB)
    assert slow.total_seconds == 50 * GIB / 10**6
    assert "  fetches: 50.00 GiB through a cache of 1.00 GiB, in 14.9 h\n           at 1 MB/s" in slow.brief()
    quick = planned(Streamed(size=50 * GIB, cache=GIB, rate=10**15), disk=1000 * GIB)
    before = planned(Download(size=50 * GIB, folder="/c"), disk=1000 * GIB)  # which is over when the job begins
    assert quick.total_seconds == before.total_seconds < slow.total_seconds


def test_the_usual_cache_holds_two_blocks_or_a_small_model() -> None:
    largest = max(block.stored + block.expert_bytes for block in SHAPE.blocks)
    assert 2 * largest < usual_cache(SHAPE, 10**13) < 2 * largest + 2 * GIB
    assert usual_cache(SHAPE, 10) == 32 * 2**20
    assert 10**8 < usual_cache(SHAPE, 10**8) < 10**8 + 2 * LARGEST_PART


def planned(fetch: Fetch, disk: int) -> Plan:
    budgets = dataclasses.replace(PLENTY, disk=disk)
    return make_plan(SHAPE, WORK, JobConfig(), machine(budgets), fetch=fetch)


def test_rules_and_readers_are_told() -> None:
    rules = (Rule(r".*\.o$", None), Rule.parse(r".*\.(up|down)$:bits=8"))
    work = dataclasses.replace(WORK, scheme=lambda name: scheme_for(name, SCHEME, rules))
    found = plan(work=work, rules=rules, format="compressed-tensors")
    text = found.brief()
    assert "  rules:   20 Linears at 8 bits, 10 left out\n" in text and "rules" not in plan().brief()
    assert "  read by: transformers (with compressed-tensors),\n           compressed-tensors, vLLM (CUDA: Marlin)" in text
    value = found.to_json()
    assert [rule["linears"] for rule in value["rules"]] == [10, 20] and value["rules"][1]["overrides"] == {"bits": 8}
    assert {reader["reader"]: reader["loads"] for reader in value["readers"]} == {
        "transformers": True,
        "compressed-tensors": True,
        "vLLM": True,
    }
    asymmetric = QuantScheme(symmetric=False)
    found = plan(work=dataclasses.replace(WORK, scheme=lambda _: asymmetric), scheme=asymmetric)
    assert "vLLM does not load asymmetric gptq; use --format compressed-tensors" in found.notes
    assert found.read_by == ("transformers (with optimum, gptqmodel)",)


def test_no_line_of_a_plan_wraps_at_60_columns() -> None:
    """With long names, large numbers and everything that a plan may say."""
    asymmetric = QuantScheme(symmetric=False, bits=3)
    rules = (Rule(".*down", None), *(Rule(f".*{name}$", {"bits": 8, "group_size": 32, "damping": 0.25}) for name in ("q", "k", "o", "up")))
    work = dataclasses.replace(WORK, rows=123456, scheme=lambda name: scheme_for(name, asymmetric, rules))
    rates = Ceilings(
        "NVIDIA A GPU With A Long Name SXM5 141GB", 1e12, 1e12, 1e12, 1e12, 1e12, 2**40, "a data sheet of the vendor, and a measurement"
    )
    found = make_plan(
        dataclasses.replace(SHAPE, family="some_model_type_with_a_long_name", seqlen=1048576),
        work,
        JobConfig(scheme=asymmetric, rules=rules),
        machine(Budgets(device=GIB, host=2 * GIB, disk=GIB), ceilings=rates),
        fetch=Download(size=2000 * GIB, folder="/a/folder/" * 12, free=GIB),
    )
    lines = found.table().splitlines()
    assert max(map(len, lines)) <= 60
    assert len(found.shortages) == 4 and sum(line.startswith("  short:") for line in lines) == 4
    assert any("not run" in line or "readers were run with" in line for line in lines)
    cells = [line.split() for line in lines if line.startswith("  solve ")]
    assert len(cells) == 1 and "EFLOP" in " ".join(line for line in lines if line.startswith("  replay"))


def with_last(shape: ModelShape = SHAPE) -> ModelShape:
    """Blocks whose MLP has a shortcut too."""
    mlp = MemoShape("down", WIDTH, INNER, ("up", "down"), last=True)
    return dataclasses.replace(shape, blocks=(dataclasses.replace(block(), memos=(*block().memos, mlp)),) * BLOCKS)


def last_plan(budgets: Budgets = PLENTY, *, on_gpu: bool = True, work: Work = WORK, **settings: object) -> Plan:
    config = JobConfig(**settings)  # type: ignore[arg-type]
    return make_plan(with_last(), work, config, machine(budgets, on_gpu=on_gpu))


INPUTS = ROWS * SEQLEN * INNER * 2


def test_last_inputs_take_the_memory_that_is_left() -> None:
    """All rows on the device, or else in host memory, or else as many batches as fit somewhere. Nothing else gives way to them."""
    found = last_plan()
    assert found.choice == dataclasses.replace(BEST, kept_rows=ROWS, kept_tier="gpu") and "last inputs kept" in found.brief()
    before = plan()
    tight = dataclasses.replace(PLENTY, device=int(1.02 * before.cost.device / 0.9) + INPUTS // 2)
    found = last_plan(tight)
    assert found.choice == dataclasses.replace(BEST, kept_rows=ROWS, kept_tier="host")
    assert found.cost.host >= before.cost.host + INPUTS and "kept in host memory" in found.brief().replace("\n           ", " ")
    found = last_plan(dataclasses.replace(tight, host=before.cost.host * 10 // 9 + 1))
    assert found.choice == dataclasses.replace(BEST, kept_rows=found.choice.kept_rows, kept_tier="gpu")
    assert 0 < found.choice.kept_rows < ROWS and found.choice.kept_rows % BEST.batch == 0
    assert f"of {found.choice.kept_rows} rows kept" in found.brief().replace("\n           ", " ")
    assert found.cost.device <= 0.9 * tight.device
    more = dataclasses.replace(found.choice, kept_rows=found.choice.kept_rows + BEST.batch)
    assert job_cost(with_last(), WORK, more, GIB).device > 0.9 * tight.device


def test_last_inputs_are_not_kept_on_disk_nor_where_nothing_is_replayed() -> None:
    assert last_plan(activations="disk").choice.kept_rows == 0
    at_once = last_plan(work=dataclasses.replace(WORK, true_sequential=False), true_sequential=False)
    assert at_once.choice.kept_rows == 0 and "last inputs not kept" in at_once.brief().replace("\n           ", " ")
    assert last_plan(on_gpu=False).choice.kept_rows == ROWS
    one = dataclasses.replace(with_last(), blocks=with_last().blocks[:1])
    for lm_head, kept in ((False, 0), (True, ROWS)):
        work = dataclasses.replace(WORK, lm_head=lm_head)
        assert make_plan(one, work, JobConfig(), machine(PLENTY)).choice.kept_rows == kept


def test_kept_inputs_spare_their_share_of_the_replay() -> None:
    tokens = ROWS * SEQLEN
    up = 2.0 * tokens * WIDTH * INNER
    for rows in (0, ROWS // 2, ROWS):
        flops = phase(job_cost(with_last(), WORK, dataclasses.replace(BEST, kept_rows=rows), 0), "replay").flops["products"]
        without = phase(job_cost(SHAPE, WORK, BEST, 0), "replay").flops["products"]
        assert flops == pytest.approx(without - BLOCKS * up * rows / ROWS)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["CPU", "GPU"])
def test_inputs_in_host_memory_are_there_throughout(on_gpu: bool) -> None:
    """Their buffers stay for the next block. Where blocks differ, those of the widest count."""
    blocks = with_last().blocks
    narrow = dataclasses.replace(blocks[0], memos=tuple(dataclasses.replace(m, n=WIDTH) if m.last else m for m in blocks[0].memos))
    shape = dataclasses.replace(with_last(), blocks=(blocks[0], *(narrow,) * (BLOCKS - 1)))
    choice = dataclasses.replace(BEST, on_gpu=on_gpu, tier="host", ahead=0, beside=False, kept_tier="host")
    without, kept = (job_cost(shape, WORK, dataclasses.replace(choice, kept_rows=rows), 0) for rows in (0, ROWS))
    more = {p.name: p.host - phase(without, p.name).host for p in kept.phases}
    early = {"copy", "probe"}
    assert more == {name: 0 if name in early else INPUTS for name in more} and early < set(more)
