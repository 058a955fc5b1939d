"""Experts whose gate and up are one Linear: their names in compressed-tensors, which join the Linear and the tensor by an underscore."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from bigq.io.formats import FORMATS, PackedLinear, PackedWeight, Quantization
from bigq.io.formats.base import module_of
from bigq.io.index import TensorInfo
from bigq.scheme import QuantScheme
from bigq.solver.rtn import round_to_nearest

PACKED = FORMATS["compressed-tensors"]
PREFIX = "model.layers.0.mlp.experts.3.w13_"


def stored(scheme: QuantScheme, prefix: str = PREFIX) -> tuple[PackedWeight, dict[str, torch.Tensor]]:
    weight = PackedWeight.of(round_to_nearest(torch.randn(24, 64, generator=torch.Generator().manual_seed(1)), scheme, "w13"))
    return weight, PACKED.store(prefix, weight, scheme, torch.float32)


@pytest.mark.parametrize("symmetric", [True, False])
def test_names(symmetric: bool) -> None:
    """All that vLLM reads has an underscore; weight_shape, which it does not know, has none."""
    scheme = QuantScheme(bits=4, group_size=32, symmetric=symmetric)
    weight, tensors = stored(scheme)
    expected = [f"{PREFIX}weight_packed", f"{PREFIX}weight_scale", "model.layers.0.mlp.experts.3.w13.weight_shape"]
    assert list(tensors) == expected + [f"{PREFIX}weight_zero_point"] * (not symmetric)
    linear = PackedLinear(bits=4, outputs=24, inputs=64, groups=2)
    layout = PACKED.layout(PREFIX, linear, symmetric, torch.float32)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == layout
    found = PACKED.read(PREFIX, lambda name: tensors[name], scheme)
    assert all(torch.equal(a, b) for a, b in zip(found, weight, strict=True))
    assert module_of(PREFIX) == "model.layers.0.mlp.experts.3.w13"


def test_they_are_found_beside_others() -> None:
    """Also w2 of families that have it as a Linear of its own, and names that only look like them."""
    names = [
        f"{PREFIX}weight_packed",
        f"{PREFIX}weight_scale",
        "model.layers.0.mlp.experts.3.w13.weight_shape",
        "model.layers.0.block_sparse_moe.experts.1.w2.weight_packed",
        "model.layers.0.self_attn.q_proj.weight_packed",
        "model.layers.0.mlp.my_weight_packed",
    ]
    assert PACKED.prefixes(names) == [PREFIX, "model.layers.0.block_sparse_moe.experts.1.w2", "model.layers.0.self_attn.q_proj"]
    assert [PACKED.split(name) for name in names[:2]] == [(PREFIX, "weight_packed"), (PREFIX, "weight_scale")]
    assert PACKED.split(names[3]) == (names[3].removesuffix(".weight_packed"), "weight_packed")
    assert FORMATS["gptq"].prefixes(["a.experts.3.w2_qweight", "a.q_proj.qweight"]) == ["a.q_proj"]


def test_geometry(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    from bigq.io.index import read_header

    _, tensors = stored(QuantScheme(bits=4, group_size=32))
    save_file(tensors, tmp_path / "a.safetensors")
    infos: dict[str, TensorInfo] = read_header(tmp_path / "a.safetensors")[0]
    assert PACKED.geometry(PREFIX, infos) == PackedLinear(bits=4, outputs=24, inputs=64, groups=2)


def config(packed: dict[str, QuantScheme]) -> list[list[str]]:
    job = Quantization(scheme=QuantScheme(bits=4, group_size=32), rules=(), packed=packed, left_out=(), others=(), head=None, meta={})
    return [group["targets"] for group in PACKED.config(job)["config_groups"].values()]


def test_a_bank_is_one_target_where_kinds_differ() -> None:
    """vLLM asks for gate_proj, up_proj and down_proj of the first expert, whatever the Linears are called."""
    four, eight = QuantScheme(bits=4, group_size=32), QuantScheme(bits=8, group_size=32)
    banks = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    experts = {f"{bank}.{e}.{name}": four for bank in banks for e in range(3) for name in ("w13", "w2")}
    attention = {"model.layers.0.self_attn.q_proj": eight}
    (first, second) = config({**attention, **experts})
    assert first == list(attention) and len(second) == 2
    for pattern, bank in zip(second, banks, strict=True):
        expression = pattern.removeprefix("re:")
        assert re.match(expression, f"{bank}.0.gate_proj") and re.match(expression, f"{bank}.2.w2")
        assert not re.match(expression, f"{bank}_other.0.w2")
    assert config(experts) == [["Linear"]]
    # Matrices that are stored one by one have one pattern for all banks.
    mixtral = {f"model.layers.0.moe.experts.0.{name}": four for name in ("w1", "w2", "w3")}
    assert config({**attention, **mixtral})[1] == [r"re:.*\.experts\.\d+\."]


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_other_formats_have_no_names_for_them(name: str) -> None:
    scheme = QuantScheme(bits=4, group_size=32)
    misfit = FORMATS[name].misfit(192, 64, scheme, joined=True)
    assert misfit is not None and misfit.kind == "joined" and FORMATS[name].misfit(192, 64, scheme) is None
    assert PACKED.misfit(192, 64, scheme, joined=True) is None
