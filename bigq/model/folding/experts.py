"""Finding where the inputs of an expert's last matrix can be scaled, by running one expert of few units with random weights.

Scales of these inputs are divided out of the outputs of the matrix before, where these enter linearly: behind a gate, what the gate
multiplies. Which outputs those are is tried out. An output that enters through a clamp looks linear as long as it is small, so all is
tried with large outputs too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedModelError
from bigq.model.experts.bank import Bank, Expert, Product, reading_products
from bigq.model.experts.call import BankCall
from bigq.model.experts.proof import prove_bank
from bigq.model.experts.spare import spare_experts
from bigq.model.folding.apply import fold_expert_
from bigq.model.folding.find import candidate_rows
from bigq.model.folding.fold import ExpertFold
from bigq.model.rotation.banks import few_sizes, few_units, units_of
from bigq.model.rotation.standins import Bare, generator_of

#: Factors of the outputs that are divided, with which a fold must hold: clamps of published models are at 7 and 10.
SIZES = (1.0, 2.0**12)
#: Random tokens that an expert runs on.
TOKENS = 64
#: Weights of an expert in an experiment, at most: six of them are in memory. Only where its shape does not tell units from the width of the
#: hidden states does it have so many.
MOST_WEIGHTS = 2**25


def bank_fold(bare: Bare, name: str) -> ExpertFold | str | None:
    """The fold inside each expert of a bank, which has run on stand-ins. Without one, the name of the parameter whose inputs it would
    scale; None if experts have one matrix only."""
    module, call, path = bare.banks[name], bare.calls.get(name), f"{bare.name}.{name}"
    last = [key for key, param in module.named_parameters(recurse=False) if param.ndim == 3][-1]
    if len([param for param in module.parameters(recurse=False) if param.ndim == 3]) == 1:
        return None
    if call is None or sum(map(math.prod, few_sizes(module, bare.width).values())) > MOST_WEIGHTS:
        return last
    slots = min(call.slots(), 1 + (spare_experts(module) > 0))  # of a token: so that few experts do
    call = call.chosen_anew(torch.zeros(call.count, slots, dtype=torch.long, device=call.tokens.device), 1)
    for small in (module, _of_few_units(module, bare.width)):
        try:
            bank = prove_bank(path, small, call, lambda e: few_units(module, bare.width, f"{path}.{e}"))
            break
        except UnsupportedModelError:
            continue
    else:
        return last
    parameters = few_units(module, bare.width, f"{path}.0")
    found = find_expert_fold(small, bank, call, parameters)
    if found is None:
        return bank.products[-1].parameter
    rows = _of_all_units(module, found, parameters)
    return found.reader.parameter if rows is None else dataclasses.replace(found, bank=name, rows=rows)


def find_expert_fold(module: nn.Module, bank: Bank, call: BankCall, parameters: Mapping[str, Tensor]) -> ExpertFold | None:
    """The fold inside an expert with these parameters, fp32; None without one."""
    reader = bank.products[-1]
    tokens = _tokens(bank, call, parameters)
    for producer in reading_products(bank):
        m, n = _matrix(parameters, producer).shape[0], _matrix(parameters, reader).shape[1]
        for rows in _candidates(m, n):
            fold = ExpertFold(bank=bank.name, producer=producer, reader=reader, rows=rows)
            if all(_holds(module, bank, call, _enlarged(parameters, fold, size), fold, tokens) for size in SIZES):
                return fold
    return None


def _holds(module: nn.Module, bank: Bank, call: BankCall, parameters: Mapping[str, Tensor], fold: ExpertFold, tokens: Tensor) -> bool:
    """Whether twice the outputs are twice the inputs of the reader, all of which are there for some token, and the fold is proven."""
    x = _expert(module, bank, call, parameters).input_of(fold.reader, tokens)
    twice = _expert(module, bank, call, _enlarged(parameters, fold, 2.0)).input_of(fold.reader, tokens)
    there = bool(x.isfinite().all()) and bool((x != 0).any(0).all())
    return there and torch.equal(twice, 2 * x) and is_proven(module, bank, call, parameters, fold, tokens)


def is_proven(
    module: nn.Module, bank: Bank, call: BankCall, parameters: Mapping[str, Tensor], fold: ExpertFold, tokens: Tensor | None = None
) -> bool:
    """Whether an expert into which random powers of two are folded returns the same bits, in fp32.

    parameters: of the expert. tokens: [t, d]; None for those of the call.
    """
    given = call.routing(call.slots()).inputs[:TOKENS] if tokens is None else tokens
    given, ones = given.float(), torch.ones(min(len(given), TOKENS), device=given.device)
    exact = {key: value.float() for key, value in parameters.items()}
    expected = Expert(module, bank, call, exact).run(given, ones)
    for seed in ("one", "another"):
        scales = 2.0 ** torch.randint(-3, 4, (len(fold.rows),), generator=generator_of(f"{fold} {seed}"))
        expert = _expert(module, bank, call, exact)
        fold_expert_(expert, fold, scales.to(given.device))
        if not torch.equal(expert.run(given, ones), expected):
            return False
    return True


def require_expert_fold(
    name: str, module: nn.Module, bank: Bank, call: BankCall, fold: ExpertFold, parameters: Mapping[str, Tensor]
) -> None:
    """Raise UnsupportedModelError unless a fold leaves a real expert's bits as they are. call: of a probe. parameters: of the expert."""
    if not is_proven(module, bank, call, parameters, fold):
        raise UnsupportedModelError(
            f"{name}: an expert does not compute the same once scales are folded into it, although one of few units does; use --fold none"
        )


def _of_few_units(module: nn.Module, width: int) -> nn.Module:
    """A bank whose attributes say that its experts have few units."""
    inner, units = units_of(module, width)
    made: nn.Module = object.__new__(type(module))
    numbers = {key: units for key, value in vars(module).items() if type(value) is int and value == inner}
    made.__dict__.update({**module.__dict__, **numbers})
    return made


def _expert(module: nn.Module, bank: Bank, call: BankCall, parameters: Mapping[str, Tensor]) -> Expert:
    """An expert whose parameters may be changed."""
    return Expert(module, bank, call, {key: value.clone() for key, value in parameters.items()})


def _enlarged(parameters: Mapping[str, Tensor], fold: ExpertFold, factor: float) -> dict[str, Tensor]:
    """Parameters where the outputs that a fold divides are multiplied by a factor."""
    value = _matrix(parameters, fold.producer).clone()
    value[fold.rows] *= factor
    return {**parameters, fold.producer.parameter: value.T.contiguous() if fold.producer.transposed else value}


def _candidates(m: int, n: int) -> Iterator[Tensor]:
    """Which of m outputs may be those that n inputs belong to, one each."""
    return (rows for rows in candidate_rows(m, n, ()) if len(rows) == n)


def _tokens(bank: Bank, call: BankCall, parameters: Mapping[str, Tensor]) -> Tensor:
    width = _matrix(parameters, bank.products[0]).shape[1]
    return torch.randn(TOKENS, width, generator=generator_of(f"{bank.name} tokens")).to(call.tokens.device)


def _matrix(parameters: Mapping[str, Tensor], product: Product) -> Tensor:
    """An expert's matrix, [outputs, inputs]."""
    value = parameters[product.parameter]
    return value.T if product.transposed else value


def _of_all_units(module: nn.Module, fold: ExpertFold, parameters: Mapping[str, Tensor]) -> Tensor | None:
    """The rows of a fold where an expert has all its units. fold: of one with these parameters."""
    few = _candidates(_matrix(parameters, fold.producer).shape[0], len(fold.rows))
    every = _candidates(_sides(module, fold.producer)[0], _sides(module, fold.reader)[1])
    return next((rows for alike, rows in zip(few, every, strict=False) if torch.equal(alike, fold.rows)), None)


def _sides(module: nn.Module, product: Product) -> Sequence[int]:
    """Outputs and inputs of a product."""
    shape = module.get_parameter(product.parameter).shape[1:]
    return shape[::-1] if product.transposed else shape
