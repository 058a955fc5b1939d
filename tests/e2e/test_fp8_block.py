"""Whole jobs in fp8-block: solved, resumed, checked, read with inputs rounded in groups, decoded as a source, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_checkpoint, random_ids, reference_model, save_ids, stored_tensors, streamed_logits
from moe_families import moe_model
from tinyjob import hashes
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import bigq
from bigq.cli.main import main
from bigq.config import JobConfig
from bigq.errors import BigqError, UsageError
from bigq.infer.evaluate import EvalConfig
from bigq.infer.load import load_model
from bigq.inspect.history import read_history
from bigq.inspect.verify import verify
from bigq.job.journal import read_commits
from bigq.model.pager import Pager
from bigq.progress.progress import Progress
from bigq.reports.model_card import model_card
from bigq.scheme import QuantScheme

pytestmark = pytest.mark.usefixtures("one_thread")

#: All Linears have inputs in groups of 128, and what readers load as one has whole blocks.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("blocks") / "m", "llama", dtype=torch.bfloat16, shard="400KB", **SIZES)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ids(tmp_path_factory.mktemp("block-ids") / "ids.safetensors", random_ids(8, 16))


def job(ids: Path, **changes: Any) -> JobConfig:
    values: dict[str, Any] = {"format": "fp8-block", "calibration": str(ids), "samples": 8, "seqlen": 16, "device": "cpu", "quiet": True}
    return JobConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def done(model: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("blocks-out") / "out"
    bigq.quantize(str(model), out, job(ids))
    return out


def decoded(out: Path) -> dict[str, Tensor]:
    """The weights by hand, fp32: each number times the scale of its block."""
    stored = stored_tensors(out)
    found = {}
    for name, scale in stored.items():
        if name.endswith(".weight_scale"):
            weight = stored[name.removesuffix("_scale")].float()
            m, n = weight.shape
            blocks = scale.repeat_interleave(128, 0)[:m].repeat_interleave(128, 1)[:, :n]
            found[name.removesuffix("_scale")] = weight * blocks
    return found


def rounded_by_hand(x: Tensor) -> Tensor:
    """Inputs, each group of 128 as numbers of E4M3 of which the largest is 448."""
    groups = x.unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def computed_by_hand(source: Path, out: Path, rows: Tensor) -> Tensor:
    """The logits of a plain model with the weights by hand, whose inputs are rounded by hand."""
    model = reference_model(source)
    for name, weight in decoded(out).items():
        linear = model.get_submodule(name.removesuffix(".weight"))
        linear.weight.data.copy_(weight)
        linear.register_forward_pre_hook(lambda module, args: (rounded_by_hand(args[0]),))
    with torch.no_grad():
        logits: Tensor = model(input_ids=rows).logits
    return logits


def test_a_job_is_sound_and_computes_what_readers_do(model: Path, done: Path, ids: Path) -> None:
    assert verify(done) == [] and len(Pager(done, device=torch.device("cpu")).packed) == len(decoded(done)) == 14
    rows = random_ids(4, 16)
    by_hand = computed_by_hand(model, done, rows)
    streamed = streamed_logits(done, rows, 2, "float32")
    exact = reference_model(model)(rows).logits
    away = float((by_hand - exact).norm())
    assert float((streamed - by_hand).norm()) < 0.05 * away  # a number near the middle of two may become the other one
    assert away < 0.2 * float(exact.norm())
    loaded = load_model(done, device="cpu", dtype="float32", packed=None)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=rows).logits, streamed, atol=1e-5)
    result = bigq.evaluate(done, EvalConfig(data=str(ids), seqlen=16, device="cpu", quiet=True), baseline=model)
    assert result.kl is not None and 0 < result.kl < 0.1
    card = model_card(read_history(done), "")
    assert "pip install transformers compressed-tensors" in card and "for each token, 128 at a time" in card
    assert main(["status", str(done)]) == 0


def test_a_job_goes_on_to_the_same_bytes(model: Path, done: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise BigqError("stopped here")

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "block_done", fail)
        with pytest.raises(BigqError, match="stopped here"):
            bigq.quantize(str(model), tmp_path / "out", job(ids))
    assert 0 < len(read_commits(tmp_path / "out")[0]) < 4
    bigq.quantize(str(model), tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(done)


@pytest.mark.parametrize("method", ["rtn", "awq", "gptaq"])
def test_other_methods(method: str, model: Path, ids: Path, done: Path, tmp_path: Path) -> None:
    changes = {"scheme": QuantScheme(scales="minmax")} if method == "rtn" else {}
    bigq.quantize(str(model), tmp_path / "out", job(ids, method=method, **changes))
    assert verify(tmp_path / "out") == []
    exact = reference_model(model)(random_ids(4, 16)).logits
    logits = streamed_logits(tmp_path / "out", random_ids(4, 16), 2, "float32")
    assert float((logits - exact).norm() / exact.norm()) < 0.2
    if method == "rtn":
        name = "model.layers.1.mlp.down_proj.weight"
        weight, exact = decoded(tmp_path / "out")[name], stored_tensors(model)[name].float()
        for g in range(2):
            part = slice(128 * g, 128 * g + 128)
            scale = float((exact[:, part].abs().max() / 448).bfloat16())
            assert torch.equal((exact[:, part] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale, weight[:, part])


def test_it_is_a_source_with_the_same_weights(done: Path, tmp_path: Path) -> None:
    """A job on it reads the weights that are decoded by hand."""
    again = JobConfig(format="gptq", method="rtn", scheme=QuantScheme(bits=8, group_size=32), device="cpu", quiet=True)
    bigq.quantize(str(done), tmp_path / "again", again)
    pager = Pager(tmp_path / "again", device=torch.device("cpu"), dtype="float32")
    for name, weight in decoded(done).items():
        found = pager.dequantized(name)
        assert float((found - weight).norm() / weight.norm()) < 0.01
    blocks = JobConfig(format="fp8-block", method="rtn", scheme=QuantScheme(scales="minmax"), device="cpu", quiet=True)
    bigq.quantize(str(done), tmp_path / "blocks", blocks)
    assert decoded(tmp_path / "blocks").keys() == decoded(done).keys()


def test_blocks_at_the_edge_are_partial(ids: Path, tmp_path: Path) -> None:
    """192 outputs are a block and a half. Linears of 192 inputs stay unquantized."""
    source = make_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16, **{**SIZES, "hidden_size": 192, "num_hidden_layers": 1})
    bigq.quantize(str(source), tmp_path / "out", job(ids, allow_partial=True))
    assert verify(tmp_path / "out") == []
    weights = decoded(tmp_path / "out")
    assert sorted(weights) == [f"model.layers.0.{name}.weight" for name in ("mlp.down_proj", "self_attn.o_proj")]
    assert stored_tensors(tmp_path / "out")["model.layers.0.mlp.down_proj.weight_scale"].shape == (2, 2)
    rows = random_ids(4, 16)
    streamed, by_hand = streamed_logits(tmp_path / "out", rows, 2, "float32"), computed_by_hand(source, tmp_path / "out", rows)
    exact = reference_model(source)(rows).logits
    assert float((streamed - by_hand).norm()) < 0.05 * float((by_hand - exact).norm())


def test_parts_of_a_fused_linear_have_whole_blocks(ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Readers load q, k and v as one matrix; with 64 outputs of k, a block would lie in k and v."""
    source = make_checkpoint(tmp_path / "m", "llama", dtype=torch.bfloat16, **{**SIZES, "num_key_value_heads": 1, "num_hidden_layers": 1})
    asked = ["--format", "fp8-block", "--method", "rtn", "--device", "cpu"]
    assert main(["plan", str(source), *asked]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "k_proj has 64 outputs, but readers load q_proj, k_proj and v_proj as one Linear in blocks of 128 outputs" in said
    bigq.quantize(str(source), tmp_path / "out", job(ids))
    assert verify(tmp_path / "out") == []
    assert sorted(name.split(".")[-2] for name in decoded(tmp_path / "out")) == ["down_proj", "gate_proj", "o_proj", "up_proj"]


class RoundedExperts(TorchFunctionMode):
    """Rounds what experts multiply, by hand."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._experts = {p.untyped_storage().data_ptr() for p in model.parameters() if p.ndim == 3}
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and args[1].untyped_storage().data_ptr() in self._experts:
            self.seen += 1
            args = (rounded_by_hand(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts(family: str, ids: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 4}
    latent = {"q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    sizes |= latent if family == "deepseek_v3" else {"head_dim": 32}
    moe_model(family, **sizes).save_pretrained(tmp_path / "m")
    bigq.quantize(str(tmp_path / "m"), tmp_path / "out", job(ids))
    assert verify(tmp_path / "out") == []
    stored = stored_tensors(tmp_path / "out")
    assert sum(".experts." in name and name.endswith("weight_scale") for name in stored) > 8
    loaded, rows = load_model(tmp_path / "out", device="cpu", dtype="float32", packed=False), random_ids(4, 16)
    loaded.set_experts_implementation("eager")
    with torch.no_grad(), RoundedExperts(loaded) as mode:
        expected = loaded(input_ids=rows).logits
    with torch.no_grad():
        unrounded = loaded(input_ids=rows).logits
    logits = streamed_logits(tmp_path / "out", rows, 4, "float32")
    assert mode.seen > 4 and float((logits - expected).norm()) < 0.02 * float((unrounded - expected).norm())
    exact = reference_model(tmp_path / "m")(rows).logits
    assert float((logits - exact).norm() / exact.norm()) < 0.3  # some tokens go to other experts
    if family == "deepseek_v3":  # q_a and kv_a are one Linear of readers, of which the last may end in part of a block
        assert stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale"].shape == (2, 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--group-size", "64"], "--group-size 64: --format fp8-block holds only --group-size 128; leave it out"),
        (["--bits", "4"], "--bits 4: --format fp8-block holds only --bits 8; use --bits 8"),
        (["--asym"], "--asym: --format fp8-block holds only --sym; leave it out"),
        (["--scale-bits", "8"], "--scale-bits 8: --format fp8-block stores scales in a form of its own; leave it out"),
    ],
)
def test_what_the_format_does_not_hold_is_refused(flags: list[str], said: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(model), "--format", "fp8-block", "--method", "rtn", "--device", "cpu"]
    assert main([*command, *flags]) == 2
    assert said in capsys.readouterr().err
    assert main([*command, *(["--bits", "8"] if flags[0] == "--bits" else [])]) == 0


def test_tuning_is_refused(model: Path, ids: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tune-steps 8: --format fp8-block stores no integers; leave it out"):
        bigq.quantize(str(model), tmp_path / "out", job(ids, tune_steps=8))


@pytest.mark.parametrize("to", ["fp8", "gptq", "compressed-tensors", "fp8-block"])
def test_it_is_converted_to_no_other_format(to: str, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(done), str(tmp_path / "new"), "--to", to]) == 2
    said = "is in the fp8-block format already" if to == "fp8-block" else f"quantize the original model with --format {to}"
    assert said in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_the_config_is_what_readers_need(done: Path) -> None:
    (group,) = json.loads((done / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert group["weights"]["block_structure"] == [128, 128] and group["input_activations"]["group_size"] == 128
