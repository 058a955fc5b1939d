"""Scales inside experts, chosen as each is solved, against AWQ on matrices that were taken apart by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rank_threads import ThreadRanks, together
from test_solve_bank import SCHEME, called, rows_of
from torch import Tensor, nn

from bigq.methods.awq import Awq
from bigq.methods.base import CalibratedMethod
from bigq.methods.gptaq import Gptaq
from bigq.methods.gptq import Gptq
from bigq.methods.scaling import AwqScaling, SmoothQuantScaling
from bigq.model.experts.bank import Bank
from bigq.model.experts.call import RoutedCall
from bigq.model.folding.fold import ExpertFold
from bigq.progress.clock import Clock
from bigq.sched.solve import expert_scales
from bigq.sched.solve.bank import BankJob, solve_bank
from bigq.sched.solve.results import SolvedExpert
from bigq.solver.input_products import InputProducts
from bigq.solver.rtn import round_to_nearest
from bigq.solver.scaling import InputStatistics, Reader, awq_scales, smoothquant_scales

UNITS = 32


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def fold_of(bank: Bank) -> ExpertFold:
    return ExpertFold(bank=bank.name, producer=bank.products[0], reader=bank.products[1], rows=UNITS + torch.arange(UNITS))


def solved(
    module: nn.Module, bank: Bank, call: RoutedCall, method: CalibratedMethod, *, reference: bool = False, **more: Any
) -> tuple[list[SolvedExpert], Tensor, Tensor | None]:
    """The experts, what the bank returns, and what it returns in the unquantized model."""
    job = BankJob(
        prefix=bank.name,
        module=module,
        bank=bank,
        schemes=dict.fromkeys(bank.parameters, SCHEME),
        names=lambda parameter, e: [f"{bank.name}.{e}.{parameter}"],
        clock=Clock(torch.device("cpu")),
        load=lambda e: {name: getattr(module, name)[e].clone() for name in bank.parameters},
        **{"fold": fold_of(bank), **more},
    )
    rows, before = rows_of(call, bank), rows_of(call, bank) if reference else None
    return list(solve_bank(job, method, rows, before)), rows.output(0, 1), None if before is None else before.output(0, 1)


@pytest.mark.parametrize("choose", [AwqScaling(), SmoothQuantScaling()], ids=["awq", "smoothquant"])
def test_codes_are_those_of_a_folded_expert(choose: Any) -> None:
    module, bank, call = called("qwen3_moe")
    experts, _, _ = solved(module, bank, call, Awq(choose))
    for e in (0, 5):
        x = call.tokens[(call.experts == e).any(1)]
        gate, up = module.gate_up_proj[e].chunk(2)
        inner = nn.functional.silu(x @ gate.T) * (x @ up.T)
        seen = InputStatistics(UNITS, x.device, len(x))
        seen.add(inner)
        rule = awq_scales if isinstance(choose, AwqScaling) else smoothquant_scales
        scales = rule(seen, [Reader(module.down_proj[e], SCHEME)], torch.arange(UNITS))
        assert scales.max() > 1.1 * scales.min()
        folded = torch.cat([gate, up / scales[:, None]])
        first, last = (matrix.weight for matrix in experts[e].matrices)
        assert torch.equal(first.codes, nearest(folded, x).codes)
        gate, up = first.dequantize().chunk(2)
        inner = nn.functional.silu(x @ gate.T) * (x @ up.T)
        codes = nearest(module.down_proj[e] * scales, inner).codes
        assert (last.codes != codes).float().mean() < 0.01  # sums in another order


def nearest(weight: Tensor, x: Tensor) -> Any:
    products = InputProducts(x.shape[1], x.device, finite_only=False)
    products.add(x)
    return round_to_nearest(weight, SCHEME, "", products.finish(""))


def test_an_expert_with_few_tokens_is_not_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is solved as without a fold; the others are not. Their outputs, which scales leave alone, are all near the original's."""
    module, bank, call = called("qwen3_moe")
    plain, without, _ = solved(module, bank, call, Gptq(AwqScaling()), fold=None)
    counts = [each.tokens for each in plain]
    least = sorted(n for n in counts if n is not None)[4]
    monkeypatch.setattr(expert_scales, "LEAST_TOKENS", least)
    scaled, found, _ = solved(module, bank, call, Gptq(AwqScaling()))
    same = [torch.equal(a.matrices[1].weight.codes, b.matrices[1].weight.codes) for a, b in zip(plain, scaled, strict=True)]
    assert same == [n is not None and n < least for n in counts] and 0 < sum(same) < len(same)
    exact = call.run(module.forward)
    assert float((found - exact).norm()) < 1.1 * float((without - exact).norm())
    assert [torch.equal(a.matrices[0].weight.codes, b.matrices[0].weight.codes) for a, b in zip(plain, scaled, strict=True)] == same


def test_a_method_without_scales_folds_nothing() -> None:
    module, bank, call = called("qwen3_moe")
    with_fold, without = (solved(module, bank, call, Gptq(), fold=fold)[1] for fold in (fold_of(bank), None))
    assert torch.equal(with_fold, without)


def test_the_unquantized_model_runs_without_scales() -> None:
    """With gptaq both copies of an expert are scaled, behind the run of the unquantized one: its output has the bits that it has in a
    job that goes on, where the expert is loaded as it is."""
    module, bank, call = called("qwen3_moe")
    method = Gptaq(0.25, AwqScaling())
    experts, found, before = solved(module, bank, call, method, reference=True)
    assert before is not None
    finished, _, again = solved(module, bank, call, method, reference=True, finished=lambda e: True)
    assert not finished and torch.equal(before, again)
    plain, _, _ = solved(module, bank, call, method, reference=True, fold=None)
    exact = call.run(module.forward)
    assert float((found - exact).norm()) < 0.3 * float(exact.norm())
    assert not torch.equal(experts[0].matrices[1].weight.codes, plain[0].matrices[1].weight.codes)


@pytest.mark.parametrize("chunk", [64, 8192])
def test_scales_are_chosen_on_all_tokens_of_an_expert(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it takes them in parts."""
    from bigq.sched.solve import bank as solve

    monkeypatch.setattr(solve, "CHUNK_TOKENS", chunk)
    seen: list[tuple[int, int]] = []

    class Counting(AwqScaling):
        def choose(self, inputs: InputStatistics, readers: Any, channels: Tensor) -> Tensor:
            seen.append((inputs.tokens, len(inputs.sample)))
            return super().choose(inputs, readers, channels)

    module, bank, call = called("qwen3_moe")
    experts, _, _ = solved(module, bank, call, Gptq(Counting()))
    assert [tokens for tokens, _ in seen] == [each.tokens for each in experts if (each.tokens or 0) >= expert_scales.LEAST_TOKENS]
    assert all(sampled <= 256 for _, sampled in seen) and len(seen) > 4


@pytest.mark.parametrize("method", [Gptq(AwqScaling()), Gptaq(0.25, AwqScaling())], ids=["gptq", "gptaq"])
def test_ranks_that_have_no_token_of_an_expert(method: CalibratedMethod) -> None:
    """Experts 3 and 4, which ranks solve side by side with others, have their tokens at one rank each; they are solved like the others."""
    module, bank, call = called("qwen3_moe")
    half = len(call.experts) // 2
    call.experts[:half][call.experts[:half] == 3] = 1
    call.experts[half:][call.experts[half:] == 4] = 6

    def run(ranks: ThreadRanks) -> list[SolvedExpert]:
        mine = slice(half * ranks.index, half * (ranks.index + 1))
        part = dataclasses.replace(call, tokens=call.tokens[mine], experts=call.experts[mine], weights=call.weights[mine])
        with torch.no_grad():
            return solved(module, bank, part, method, reference=method.passes > 1, ranks=ranks, at_once=3)[0]

    alone, _, _ = solved(module, bank, call, method, reference=method.passes > 1)
    for found in together(2, run):
        assert not isinstance(found, Exception), found
        for one, whole in zip(found, alone, strict=True):
            assert one.tokens == whole.tokens
            for a, b in zip(one.matrices, whole.matrices, strict=True):
                assert a.rounded is b.rounded is None
                assert (a.weight.codes == b.weight.codes).float().mean() > 0.9
