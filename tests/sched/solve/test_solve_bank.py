"""Experts solved one by one, against GPTQ on matrices that were taken apart by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import call_of, moe_model, random_tokens
from torch import Tensor, nn

from bigq.methods import gptq
from bigq.methods.gptq import Gptq
from bigq.model.experts.bank import Bank, bank_modules, find_bank, run_bank
from bigq.model.experts.call import RoutedCall
from bigq.progress.clock import Clock
from bigq.sched.rows.routed import RoutedRows
from bigq.sched.rows.tiers import Tier
from bigq.sched.solve import bank as solve
from bigq.sched.solve.bank import BankJob, run_bank_rows, solve_bank
from bigq.sched.solve.results import SolvedExpert
from bigq.scheme import QuantScheme
from bigq.solver.gptq import quantize_linear
from bigq.solver.hessian import HessianSum
from bigq.solver.rtn import round_to_nearest

SCHEME = QuantScheme(bits=4, group_size=16, order="activation", scales="minmax")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def called(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Bank, RoutedCall]:
    """The first bank of a model, with 16 rows of 32 tokens at it."""
    model, seen = moe_model(family, dtype), []
    name, module = next(iter(bank_modules(model).items()))
    module.register_forward_hook(lambda m, args, kwargs, out: seen.append((args, kwargs, out.clone())), with_kwargs=True)
    model(input_ids=random_tokens(16, 32), use_cache=False)
    args, kwargs, output = seen[0]
    call = call_of(module, args, kwargs)
    assert isinstance(call, RoutedCall)
    return module, find_bank(name, module, call, output), call


def rows_of(call: RoutedCall, bank: Bank) -> RoutedRows:
    """The rows of a call, with a sum that is begun."""
    tier = Tier("host", torch.device("cpu"), Path("."))
    inputs = tier.buffer(len(call.tokens), call.tokens.shape[1], call.tokens.dtype)
    total = tier.buffer(len(call.tokens), call.tokens.shape[1], bank.total)
    inputs.put(0, call.tokens)
    total.put(0, torch.zeros(call.tokens.shape, dtype=bank.total))
    return RoutedRows(call=call, inputs=inputs, experts=call.experts, weights=call.weights, per_row=len(call.tokens), total=total)


def solved(module: nn.Module, bank: Bank, call: RoutedCall, **more: Any) -> tuple[list[SolvedExpert], Tensor]:
    job = BankJob(
        prefix=bank.name,
        module=module,
        bank=bank,
        schemes=dict.fromkeys(bank.parameters, SCHEME),
        names=lambda parameter, e: [f"{bank.name}.{e}.{parameter}"],
        clock=Clock(torch.device("cpu")),
        **{"load": lambda e: {name: getattr(module, name)[e].clone() for name in bank.parameters}, **more},
    )
    rows = rows_of(call, bank)
    return list(solve_bank(job, Gptq(), rows)), rows.output(0, 1)


def by_hand(module: nn.Module, call: RoutedCall, e: int) -> tuple[Tensor, Tensor]:
    """Codes of gate and up, and of down, of a qwen3_moe expert in fp32, by plain matrices."""

    def codes(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        hessian = HessianSum(x.shape[1], x.device)
        hessian.add(x)
        result = quantize_linear(weight, hessian.finish(), SCHEME)
        return result.codes, result.dequantize()

    x = call.tokens[torch.where(e == call.experts.T)[1]]
    first, weight = codes(module.gate_up_proj[e], x)
    gate, up = (x @ weight.T).chunk(2, dim=-1)
    second, _ = codes(module.down_proj[e], nn.functional.silu(gate) * up)
    return first, second


def test_codes_are_those_of_gptq_on_single_matrices() -> None:
    module, bank, call = called("qwen3_moe")
    experts, _ = solved(module, bank, call)
    assert [expert.number for expert in experts] == list(range(8))
    for expert in experts:
        assert expert.tokens == int((call.experts == expert.number).sum()) > 0
        assert [matrix.rounded for matrix in expert.matrices] == [None, None]
        for matrix, codes in zip(expert.matrices, by_hand(module, call, expert.number), strict=True):
            assert torch.equal(matrix.weight.codes, codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_the_output_is_that_of_the_bank_with_quantized_weights(family: str, dtype: torch.dtype) -> None:
    module, bank, call = called(family, dtype)
    before = run_bank(module, bank, call)
    experts, output = solved(module, bank, call)
    for expert in experts:
        for matrix in expert.matrices:
            weight, parameter = matrix.weight.dequantize(dtype), matrix.name.rpartition(".")[2]
            transposed = next(product.transposed for product in bank.products if product.parameter == parameter)
            getattr(module, parameter)[expert.number] = weight.T if transposed else weight
    assert torch.equal(run_bank(module, bank, call), output)
    assert not torch.equal(output, before)


def test_an_expert_without_tokens_is_rounded_to_nearest() -> None:
    module, bank, call = called("qwen3_moe")
    call.experts[call.experts == 3] = 4
    experts, _ = solved(module, bank, call)
    assert experts[3].tokens == 0
    for matrix in experts[3].matrices:
        assert matrix.rounded == "no calibration token is routed to it"
        original = getattr(module, matrix.name.rpartition(".")[2])[3]
        assert torch.equal(matrix.weight.codes, round_to_nearest(original, SCHEME).codes)
    assert all(matrix.rounded is None for expert in experts if expert.number != 3 for matrix in expert.matrices)


def test_an_expert_that_cannot_be_solved_is_rounded_to_nearest() -> None:
    module, bank, call = called("qwen3_moe")
    call.tokens[(call.experts == 5).any(1)] = float("inf")
    experts, _ = solved(module, bank, call)
    first = experts[5].matrices[0]
    assert first.rounded is not None and "NaN or Inf" in first.rounded
    assert torch.equal(first.weight.codes, round_to_nearest(module.gate_up_proj[5], SCHEME).codes)


def test_tokens_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same codes but for the rounding of sums, and the output of these codes but for that of products."""
    module, bank, call = called("mixtral")
    whole, _ = solved(module, bank, call)
    with monkeypatch.context() as patch:
        patch.setattr(solve, "CHUNK_TOKENS", 50)
        parts, output = solved(module, bank, call)
    assert max(expert.tokens for expert in parts) > 100
    same = [
        (a.weight.codes == b.weight.codes).float().mean()
        for x, y in zip(whole, parts, strict=True)
        for a, b in zip(x.matrices, y.matrices, strict=True)
    ]
    assert min(same) > 0.998
    values = [{name: m.weight.dequantize(torch.float32) for name, m in zip(bank.parameters, e.matrices, strict=True)} for e in parts]
    assert torch.allclose(output, run_whole(module, bank, call, values), atol=1e-5)


def run_whole(module: nn.Module, bank: Bank, call: RoutedCall, values: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """What the bank returns with these parameters of its experts."""
    rows, clock = rows_of(call, bank), Clock(torch.device("cpu"))
    job = BankJob(
        prefix=bank.name, module=module, bank=bank, schemes={}, names=lambda parameter, e: [], clock=clock, load=values.__getitem__
    )
    run_bank_rows(job, rows)
    return rows.output(0, 1)


def same(one: tuple[list[SolvedExpert], Tensor], other: tuple[list[SolvedExpert], Tensor]) -> bool:
    """Whether two banks were solved to the same bits, and report the same. NaN equals NaN."""
    if [(e.number, e.tokens, e.left_out) for e in one[0]] != [(e.number, e.tokens, e.left_out) for e in other[0]]:
        return False
    pairs = [pair for a, b in zip(one[0], other[0], strict=True) for pair in zip(a.matrices, b.matrices, strict=True)]
    tensors = all(torch.equal(getattr(a.weight, key), getattr(b.weight, key)) for a, b in pairs for key in ("codes", "scales", "zeros"))
    outputs = (torch.equal(one[1].isnan(), other[1].isnan()), torch.equal(one[1].nan_to_num(), other[1].nan_to_num()))
    return tensors and all(repr(a.record(0)) == repr(b.record(0)) for a, b in pairs) and all(outputs)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of matrices that are solved side by side."""
    seen: list[int] = []
    solve_many = gptq.solve_many
    monkeypatch.setattr(gptq, "solve_many", lambda weights, *rest: seen.append(len(weights)) or solve_many(weights, *rest))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_experts_side_by_side_have_the_bits_of_single_ones(family: str, dtype: torch.dtype, batches: list[int]) -> None:
    """A bank of 8 or 4 in twos, in threes with a rest, and all at once; each with its own order of columns."""
    module, bank, call = called(family, dtype)
    alone = solved(module, bank, call)
    assert not batches
    for at_once in (2, 3, 8):
        assert same(solved(module, bank, call, at_once=at_once), alone), at_once
        assert max(batches) == min(at_once, bank.experts)
        batches.clear()


def test_experts_that_fail_leave_the_others_of_their_batch_alone(batches: list[int]) -> None:
    """No token, one token, a token that is not finite: the bits and the reasons are those of single experts."""
    module, bank, call = called("qwen3_moe")
    for number, left in ((1, 0), (6, 1)):
        for token, slot in torch.stack(torch.where(call.experts == number), 1)[left:].tolist():
            call.experts[token, slot] = min({0, 2, 7} - {int(call.experts[token, 1 - slot])})
    call.experts[9] = torch.tensor([3, 5])
    call.tokens[9] = float("inf")
    alone = solved(module, bank, call)
    assert alone[0][1].tokens == 0 and alone[0][6].tokens == 1
    assert [e.number for e in alone[0] if any(matrix.rounded for matrix in e.matrices)] == [1, 3, 5]
    for at_once in (2, 3, 4, 8):
        assert same(solved(module, bank, call, at_once=at_once), alone), at_once
    assert 0 < max(batches) < 8


@pytest.mark.parametrize("at_once", [2, 3, 4])
def test_batches_end_where_shards_do_and_go_around_finished_experts(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a job that goes on has the batches that it had before, whatever is finished, and adds outputs in the same order."""
    module, bank, call = called("qwen3_moe")
    begun: list[list[int]] = []
    solve_product = solve._solve

    def noted(job: BankJob, method: Any, members: list[Any], product: Any) -> None:
        begun.append([member.number for member in members])
        solve_product(job, method, members, product)

    monkeypatch.setattr(solve, "_solve", noted)
    how: dict[str, Any] = {"at_once": at_once, "ends": lambda e: e in (1, 5)}
    experts, output = solved(module, bank, call, **how)
    shards = [(0, 1), (2, 3, 4, 5), (6, 7)]
    expected = [list(shard[lo : lo + at_once]) for shard in shards for lo in range(0, len(shard), at_once)]
    assert begun[::2] == begun[1::2] == expected

    def load(e: int) -> dict[str, Tensor]:
        """As committed, or else as it was."""
        held = {name: getattr(module, name)[e].clone() for name in bank.parameters}
        for matrix in experts[e].matrices if e in shards[1] else ():
            held[matrix.name.rpartition(".")[2]] = matrix.weight.dequantize()
        return held

    begun.clear()
    rest = solved(module, bank, call, finished=lambda e: e in shards[1], load=load, **how)
    assert begun[::2] == [numbers for numbers in expected if numbers[0] not in shards[1]]
    assert same(rest, ([e for e in experts if e.number not in shards[1]], output))


@pytest.mark.parametrize("at_once", [1, 3])
def test_rows_of_an_expert_are_gathered_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more tokens than are computed at a time, for each use anew. The bits are the same."""
    module, bank, call = called("qwen3_moe")
    taken: list[int] = []
    take = solve._taken
    monkeypatch.setattr(solve, "_taken", lambda rows, part: taken.append(len(part)) or take(rows, part))
    once = solved(module, bank, call, at_once=at_once)
    assert sorted(taken) == sorted(expert.tokens for expert in once[0])
    taken.clear()
    monkeypatch.setattr(solve._Visited, "taken", lambda self, part: solve._taken(self.rows, part))
    assert same(solved(module, bank, call, at_once=at_once), once)
    assert len(taken) == 3 * bank.experts
