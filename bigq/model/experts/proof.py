"""Finding out how a bank computes without loading all of it: a bank of its first few experts stands for the whole.

The small bank is the family's own module with fewer experts. That single experts add up to its bits is proven as for a whole bank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedModelError
from bigq.model.experts.bank import Bank, Expert, count_attributes, find_bank, total_attributes
from bigq.model.experts.call import BankCall
from bigq.model.experts.naming import Naming
from bigq.model.experts.spare import spare_experts

#: Experts of a token in the proof, at most, and experts beyond those: sums of few outputs would hide their order.
_SLOTS, _MORE = 4, 2


def prove_bank(name: str, module: nn.Module, call: BankCall, load: Callable[[int], Mapping[str, Tensor]]) -> Bank:
    """How the bank ``name`` computes. call: of a probe. load: the parameters of one expert on the device.

    Loads six experts at most. Raises UnsupportedModelError, with the reason.
    """
    experts = next(iter(module.parameters(recurse=False))).shape[0]
    slots = min(call.slots(), _SLOTS)
    count = min(experts, slots + _MORE)
    parts = [load(e) for e in range(count)]
    held = {key: nn.Parameter(torch.stack([part[key] for part in parts]), requires_grad=False) for key in parts[0]}
    del parts
    tokens = torch.arange(call.count, device=call.tokens.device)
    spare, totals = spare_experts(module), total_attributes(module, experts)
    numbers = count + min(spare, 1)
    chosen = (tokens[:, None] * 3 + torch.arange(slots, device=tokens.device) * (1 + tokens[:, None] % 2 * (numbers - 2))) % numbers
    small = call.chosen_anew(chosen, numbers)
    failed: UnsupportedModelError | None = None
    for counts in count_attributes(module, experts):
        part = object.__new__(type(module))
        part.__dict__.update(module.__dict__)
        part.__dict__["_parameters"] = held
        part.__dict__.update({**dict.fromkeys(totals, count + spare), **dict.fromkeys(counts, count)})
        try:
            output = small.run(part.forward)
            return dataclasses.replace(find_bank(name, part, small, output), experts=experts)
        except UnsupportedModelError as error:
            failed = failed or error
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            failed = failed or UnsupportedModelError(
                f"{name}: a bank of {experts} experts that does not run with fewer: {type(error).__name__}: {error}"
            )
    assert failed is not None
    raise failed


def require_layout(name: str, module: nn.Module, bank: Bank, call: BankCall, parameters: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedModelError unless a bank computes with its matrices in the layout by which the output names them.

    parameters: of one expert, which are changed. If two rows are left of a product that returns gate and up, the next product must have
    one input that is not 0.
    """
    naming = Naming.of(module)
    said = "its matrices are stored in another layout than its class in transformers says; this architecture is not supported yet"
    if any(product.transposed != (product.parameter in naming.transposed) for product in bank.products):
        raise UnsupportedModelError(f"{name}: {said}")
    expert = Expert(module, bank, call, parameters)
    for product, following in itertools.pairwise(bank.products):
        if len(naming.parts[product.parameter]) == 1:
            continue
        weight = expert.weight(product)
        half = weight.shape[0] // 2
        kept = weight[[1, 1 + half]].clone()
        weight.zero_()
        weight[[1, 1 + half]] = kept
        found = expert.input_of(following, call.routing(call.slots()).inputs).ne(0).any(0).nonzero().flatten().tolist()
        if found != [1]:
            raise UnsupportedModelError(f"{name}: {said}")
