"""The codes of experts of every family, against GPTQ of single matrices in memory, with inputs that the family's own bank computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import DISTINCT, MOE_FAMILIES, moe_model, random_tokens
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

import bigq
from bigq.config import JobConfig
from bigq.infer.load import load_model
from bigq.model.experts.bank import bank_modules
from bigq.scheme import QuantScheme
from bigq.solver.gptq import quantize_linear
from bigq.solver.hessian import HessianSum

CPU = torch.device("cpu")
SCHEME = QuantScheme(bits=4, group_size=16, order="activation")
#: Families whose experts are stored as one tensor for all are in test_wide_banks.py.
FAMILIES = [family for family in MOE_FAMILIES if family not in ("gpt_oss", "granitemoe", "llama4_text")]
BATCH = 4


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class InputsOf(TorchFunctionMode):
    """The inputs of products with the experts' parts of a parameter, by the expert's number."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self._first, self._bytes, self._count = parameter.data_ptr(), parameter[0].nbytes, len(parameter)
        self.inputs: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            number, rest = divmod(args[1].data_ptr() - self._first, self._bytes)
            if not rest and 0 <= number < self._count:
                self.inputs[number] = args[0]
        return func(*args, **kwargs or {})


def at_bank(model: nn.Module, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a bank for all rows, as batches of the job's size have them."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    for part in random_tokens(16, 32).split(BATCH):
        model(input_ids=part, use_cache=False)
    handle.remove()
    first, named = calls[0]
    return (
        tuple(torch.cat([args[i] for args, _ in calls]) for i in range(len(first))),
        {key: torch.cat([kwargs[key] for _, kwargs in calls]) for key in named},
    )


def quantized(weight: Tensor, x: Tensor) -> Tensor:
    hessian = HessianSum(x.shape[1], CPU)
    hessian.add(x)
    return quantize_linear(weight, hessian.finish(), SCHEME).dequantize()


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in DISTINCT else pytest.mark.long) for f in FAMILIES])
def test_codes_are_those_of_gptq_in_memory(family: str, tmp_path: Path) -> None:
    """Of the first bank. A model read whole holds what bigq solved: its attention gives the bank's inputs, and its first matrices those
    of the last one. Every matrix is solved again by itself, from the source's weights: the first ones have equal codes.

    The inputs of the last ones come from products of another number of tokens, which may round otherwise and move a code here and there.
    A changed weight of the source is noticed.
    """
    model, out = tmp_path / "model", tmp_path / "out"
    moe_model(family).save_pretrained(model)  # type: ignore[operator]
    save_file({"input_ids": random_tokens(16, 32)}, tmp_path / "ids.safetensors")
    config = {"samples": 16, "seqlen": 32, "batch": BATCH, "device": "cpu", "format": "compressed-tensors", "scheme": SCHEME}
    bigq.quantize(str(model), out, JobConfig(calibration=str(tmp_path / "ids.safetensors"), quiet=True, **config))  # type: ignore[arg-type]
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager").eval()
    solved = load_model(out, device="cpu")
    name = next(iter(bank_modules(solved)))
    before, after = source.get_submodule(name), solved.get_submodule(name)
    args, kwargs = at_bank(solved, name)
    keys = [key for key, parameter in after.named_parameters(recurse=False) if parameter.ndim == 3]
    assert keys[-1] == "down_proj" and len(keys) == 2
    checked = 0
    for key in keys:
        with InputsOf(after.get_parameter(key)) as seen:
            after(*args, **kwargs)
        for e, x in seen.inputs.items():
            weights, found = before.get_parameter(key)[e], after.get_parameter(key)[e]
            same = (quantized(weights, x) == found).float().mean()
            assert same > 0.995 and (key == "down_proj" or same == 1), (key, e)
            checked += 1
        weights[1] += 0.3
        assert not torch.equal(quantized(weights, x), found)
    assert checked >= len(after.get_parameter(keys[0])), "hardly any expert has tokens"
