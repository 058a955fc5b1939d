"""The comparison of a job's output with its source notices every tensor that is wrong, missing or too many."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from models import random_ids, rewrite, save_ids, shard_of, stored_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

import bigq

sys.path.append(str(ROOT / "scripts"))

from family_output import compare_output

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def quantized(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("outputs")

    def get(family: str, method: str = "rtn", **scheme: Any) -> Path:
        out = folder / "-".join([family, method, *map(str, scheme.values())])
        if not out.exists():
            ids = save_ids(folder / "ids.safetensors", random_ids(4, 24))
            given = {"calibration": str(ids), "samples": 4, "seqlen": 24} if method == "gptq" else {}
            config = bigq.JobConfig(
                scheme=bigq.QuantScheme(group_size=16, scales="minmax", **scheme),
                method=method,
                device="cpu",
                quiet=True,
                **given,  # type: ignore[arg-type]
            )
            bigq.quantize(checkpoint(family), out, config)
        return out

    return get


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_outputs_are_right(family: str, method: str, quantized: Callable[..., Path], checkpoint: Callable[[str], Path]) -> None:
    found = compare_output(checkpoint(family), quantized(family, method), rounded=method == "rtn")
    assert found["result"] == "right"
    assert found["linears"] == {"llama": 21, "gpt2": 12, "mixtral": 12 + 36}[family]
    if method == "rtn":
        assert 0.4 < found["largest_steps"] <= 0.51


def test_8_bits_and_zero_points(quantized: Callable[..., Path], checkpoint: Callable[[str], Path]) -> None:
    for scheme in ({"bits": 8}, {"symmetric": False}):
        found = compare_output(checkpoint("llama"), quantized("llama", **scheme), rounded=True)
        assert found["result"] == "right" and found["largest_steps"] < 0.6


def test_gptq_does_not_round_to_nearest(quantized: Callable[..., Path], checkpoint: Callable[[str], Path]) -> None:
    assert compare_output(checkpoint("llama"), quantized("llama", "gptq"), rounded=True)["result"] == "different"


def _added(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] += 1
    return changed


def _doubled(tensor: Tensor) -> Tensor:
    return tensor * 2


@pytest.mark.parametrize(
    ("end", "change", "says"),
    [
        ("layers.0.mlp.up_proj.scales", _doubled, "layers.0.mlp.up_proj is not what its source holds"),
        ("layers.1.mlp.down_proj.qweight", _added, "layers.1.mlp.down_proj is not what its source holds"),
        ("layers.2.input_layernorm.weight", _added, "layers.2.input_layernorm.weight is not what its source holds"),
        ("model.norm.weight", None, "model.norm.weight is not in the output"),
    ],
)
def test_a_wrong_tensor_is_noticed(
    end: str, change: Any, says: str, quantized: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(quantized("llama"), out)
    name = next(name for name in stored_tensors(out) if name.endswith(end))
    rewrite(out, name, None if change is None else change(stored_tensors(out)[name]))
    found = compare_output(checkpoint("llama"), out, rounded=True)
    assert found["result"] == "different" and says in found["reason"]


def test_one_tensor_too_many_is_noticed(quantized: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(quantized("llama"), out)
    shard = shard_of(out, "model.norm.weight")
    tensors = load_file(shard)
    save_file(tensors | {"model.extra.weight": tensors["model.norm.weight"].clone()}, shard)
    assert "model.extra.weight is not what" in compare_output(checkpoint("llama"), out, rounded=True)["reason"]


def test_an_expert_in_the_place_of_another_is_noticed(
    quantized: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(quantized("mixtral"), out)
    tensors = stored_tensors(out)
    names = [name for name in tensors if "layers.0" in name and ".experts.1." in name]
    assert names
    for name in names:
        rewrite(out, name, tensors[name.replace(".experts.1.", ".experts.0.")])
    assert "experts.1." in compare_output(checkpoint("mixtral"), out, rounded=True)["reason"]
