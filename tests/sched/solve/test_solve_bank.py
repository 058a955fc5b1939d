"""Experts solved one by one, against GPTQ on matrices that were taken apart by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from moe_families import call_of, moe_model, random_tokens
from torch import Tensor, nn

from bigq.methods.gptq import Gptq
from bigq.model.experts.bank import Bank, bank_modules, find_bank, run_bank
from bigq.model.experts.call import RoutedCall
from bigq.progress.clock import Clock
from bigq.sched.rows.routed import RoutedRows
from bigq.sched.rows.tiers import Tier
from bigq.sched.solve import bank as solve
from bigq.sched.solve.bank import BankJob, SolvedExpert, solve_bank
from bigq.scheme import QuantScheme
from bigq.solver.gptq import quantize_linear
from bigq.solver.hessian import HessianSum
from bigq.solver.rtn import round_to_nearest

SCHEME = QuantScheme(bits=4, group_size=16, act_order=True)


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


def solved(module: nn.Module, bank: Bank, call: RoutedCall) -> tuple[list[SolvedExpert], Tensor]:
    job = BankJob(
        prefix=bank.name,
        module=module,
        bank=bank,
        schemes=dict.fromkeys(bank.parameters, SCHEME),
        names=lambda parameter, e: [f"{bank.name}.{e}.{parameter}"],
        load=lambda e: {name: getattr(module, name)[e].clone() for name in bank.parameters},
        clock=Clock(torch.device("cpu")),
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
    """The same codes but for the rounding of sums, and the same output but for that of products."""
    module, bank, call = called("mixtral")
    whole, output = solved(module, bank, call)
    monkeypatch.setattr(solve, "CHUNK_TOKENS", 50)
    parts, again = solved(module, bank, call)
    assert max(expert.tokens for expert in parts) > 100
    same = [
        (a.weight.codes == b.weight.codes).float().mean()
        for x, y in zip(whole, parts, strict=True)
        for a, b in zip(x.matrices, y.matrices, strict=True)
    ]
    assert min(same) > 0.998
    assert torch.allclose(output, again, atol=2e-2)
