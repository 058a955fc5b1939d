"""Jobs that write int8 weights for readers that quantize inputs too, and what such a model computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import linear_module, random_ids, reference_model, save_ids, stored_tensors, streamed_logits
from test_convert import hashes, refused
from torch import Tensor, nn

import bigq
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.infer.load import load_model
from bigq.inspect.verify import verify
from bigq.model.forward.quantized_inputs import QuantizedInputs
from bigq.scheme import QuantScheme, Rule

SCHEME = QuantScheme(bits=8, group_size=-1)
SKIP = Rule(r".*\.1\.self_attn", None)


def job(ids: Path, **changes: Any) -> JobConfig:
    given = {"scheme": SCHEME, "rules": (SKIP,), "format": "w8a8-int8", "samples": 8, "seqlen": 24, "device": "cpu", **changes}
    return JobConfig(calibration=str(ids), quiet=True, **given)


@pytest.fixture(scope="module")
def out(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("w8a8")
    bigq.quantize(str(checkpoint("llama")), folder / "out", job(save_ids(folder / "ids.safetensors", random_ids())))
    return folder / "out"


def rounded_inputs(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scale = given[0].abs().amax(-1, keepdim=True) / 127
    return (torch.round(given[0] / scale) * scale, *given[1:])


def by_definition(source: Path, out: Path, ids: Tensor, *, inputs: bool) -> Tensor:
    """Logits of the source with the stored numbers times scales for weights, and with rounded inputs or not."""
    model, tensors = reference_model(source), stored_tensors(out)
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]:
        module = linear_module(model, name.removesuffix(".weight"))
        module.weight.data = tensors[name].float() * tensors[f"{name}_scale"].float()
        if inputs:
            module.register_forward_pre_hook(rounded_inputs)
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def test_a_model_computes_with_rounded_inputs(out: Path, checkpoint: Callable[[str], Path]) -> None:
    """Streamed and resident, as if one wrote it down; without rounding, logits are others."""
    ids = random_ids()[:4]
    expected, plain = (by_definition(checkpoint("llama"), out, ids, inputs=inputs) for inputs in (True, False))
    assert verify(out) == []
    resident = load_model(out, device="cpu")
    with torch.no_grad():
        found = (streamed_logits(out, ids, 2), resident(ids).logits)
    for logits in found:
        assert float((logits - expected).norm()) < 1e-4 * float((plain - expected).norm())
    kinds = {type(module).__name__ for name, module in resident.named_modules() if name.endswith("_proj") and ".1.self_attn" not in name}
    assert {module.input_type for module in resident.modules() if isinstance(module, QuantizedInputs)} == {"int8"}
    assert kinds == {"QuantizedInputs"} and type(resident.model.layers[1].self_attn.q_proj) is nn.Linear


def test_it_is_what_the_same_job_in_gptq_holds(out: Path, checkpoint: Callable[[str], Path], ids_file: Path, tmp_path: Path) -> None:
    bigq.quantize(str(checkpoint("llama")), tmp_path / "gptq", job(out.parent / "ids.safetensors", format="gptq"))
    tensors, other = stored_tensors(out), stored_tensors(tmp_path / "gptq")
    name = "model.layers.2.mlp.down_proj"
    codes = torch.stack([(other[f"{name}.qweight"] >> shift) & 255 for shift in (0, 8, 16, 24)], 1).flatten(0, 1).T
    assert torch.equal(tensors[f"{name}.weight"].int() + 128, codes)
    assert torch.equal(tensors[f"{name}.weight_scale"].T.half(), other[f"{name}.scales"])
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["ignore"] == ["lm_head", *(f"model.layers.1.self_attn.{part}_proj" for part in "koqv")]


def test_a_lost_shard_is_made_again(out: Path, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "out"))
    sorted(copy.glob("*.safetensors"))[2].unlink()
    bigq.quantize(str(checkpoint("llama")), copy)
    assert hashes(copy) == hashes(out) and verify(copy) == []


def test_it_may_be_quantized_again(out: Path, ids_file: Path, tmp_path: Path) -> None:
    """Its weights are decoded; nothing is said of inputs then."""
    bigq.quantize(str(out), tmp_path / "out", JobConfig(scheme=QuantScheme(group_size=32), method="rtn", device="cpu", quiet=True))
    assert verify(tmp_path / "out") == []


def test_other_formats_are_other_models(out: Path, tmp_path: Path) -> None:
    said = "readers of w8a8-int8 quantize the inputs of Linears too, so another format is another model; quantize the original model"
    for to in ("gptq", "compressed-tensors"):
        refused(out, tmp_path / "out", to, f"{said} with --format {to}$")
    refused(out, tmp_path / "out", "w8a8-int8", "is in the w8a8-int8 format already")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scheme": QuantScheme(bits=3)}, "--bits 3: --format w8a8-int8 holds only --bits 8; use --bits 8$"),
        ({"scheme": QuantScheme(group_size=32)}, "--group-size 32: --format w8a8-int8 holds only --group-size -1; use --group-size -1$"),
        (
            {"scheme": QuantScheme(bits=8, group_size=-1, symmetric=False)},
            "--asym: --format w8a8-int8 holds only --sym; leave it out$",
        ),
        (
            {"rules": (Rule.parse(".*o_proj:sym=false"),)},
            "--rule '.*o_proj:sym=false': --format w8a8-int8 holds only --sym; leave this out of the rule$",
        ),
    ],
    ids=["bits", "groups", "asym", "rule"],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], said: str, checkpoint: Callable[[str], Path], ids_file: Path) -> None:
    with pytest.raises(UsageError, match=said):
        bigq.plan(str(checkpoint("llama")), config=job(ids_file, **changes))
