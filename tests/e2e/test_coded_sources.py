"""Checkpoints that are quantized already, in fp8, int8 or fp4: a job on one ends in the bytes of the job on its decoded copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from coded_checkpoints import STORAGES, coded_and_decoded
from composite_families import make_composite
from models import make_checkpoint, random_ids, save_ids, stored_tensors, streamed_logits
from moe_families import moe_model
from safetensors import safe_open
from safetensors.torch import save_file

import bigq
from bigq.errors import BigqError, CheckpointError, NumericsError, UnsupportedModelError
from bigq.sched.plan.inputs import plan

Make = Callable[[str, str], tuple[Path, Path]]
#: How Linears are stored. The others differ from these in one part of a decoder, which has tests of its own.
FIRST = ("fp8 blocks", "fp8 rows", "nvfp4", "mxfp4", "gptq, groups in any order", "awq")
DENSE = [pytest.param(name, marks=[] if name in FIRST else pytest.mark.long) for name in STORAGES if not name.endswith("experts")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """(family, storage) → a coded checkpoint and its decoded copy."""
    known: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(family: str, storage: str) -> tuple[Path, Path]:
        if (family, storage) not in known:
            folder = tmp_path_factory.mktemp("coded")
            plain = folder / "plain"
            if family == "llama":
                make_checkpoint(plain, family, dtype=torch.bfloat16)
            else:
                moe_model(family).to(torch.bfloat16).save_pretrained(plain, max_shard_size="300KB")
            known[family, storage] = coded_and_decoded(plain, folder, storage)
        return known[family, storage]

    return make


def config(folder: Path, **more: object) -> bigq.JobConfig:
    ids = save_ids(folder / "ids.safetensors", random_ids(4))
    scheme = bigq.QuantScheme(group_size=32)
    return bigq.JobConfig(scheme=scheme, calibration=str(ids), samples=4, seqlen=16, device="cpu", quiet=True, **more)  # type: ignore[arg-type]


def weights_of(out: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """All tensors of an output. Their order in a shard follows the source's files, where scales stand between them."""
    return {name: (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in stored_tensors(out).items()}


def dtypes_of(out: Path) -> set[str]:
    found = set()
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def require_same_job(source: tuple[Path, Path], folder: Path) -> None:
    coded, decoded = source
    for name, model in (("a", coded), ("b", decoded)):
        bigq.quantize(str(model), folder / name, config(folder))
    a, b = folder / "a", folder / "b"
    assert weights_of(a) == weights_of(b) and len(weights_of(a)) > 2
    assert not any(dtype.startswith("F8") or dtype == "U8" for dtype in dtypes_of(a))
    assert json.loads((a / "config.json").read_text()) == json.loads((b / "config.json").read_text())


@pytest.mark.parametrize("storage", DENSE)
def test_a_job_ends_in_the_bytes_of_the_job_on_the_decoded_copy(storage: str, made: Make, tmp_path: Path) -> None:
    require_same_job(made("llama", storage), tmp_path)


@pytest.mark.parametrize(
    ("family", "storage"),
    [
        ("deepseek_v3", "fp8 blocks"),
        ("gpt_oss", "mxfp4 experts"),
        pytest.param("gpt_oss", "fp8 experts", marks=pytest.mark.long),
        pytest.param("deepseek_v3", "int4 experts", marks=pytest.mark.long),
        pytest.param("qwen3_moe", "fp8 blocks", marks=pytest.mark.long),
        pytest.param("deepseek_v3", "nvfp4 of ModelOpt", marks=pytest.mark.long),
    ],
)
def test_experts_end_in_the_bytes_of_the_job_on_the_decoded_copy(family: str, storage: str, made: Make, tmp_path: Path) -> None:
    require_same_job(made(family, storage), tmp_path)


@pytest.mark.parametrize("storage", ["fp8 blocks", "nvfp4"])
def test_logits_are_those_of_the_decoded_copy(storage: str, made: Make) -> None:
    coded, decoded = made("llama", storage)
    ids = random_ids(2)
    got = streamed_logits(coded, ids, 2)
    assert got.dtype == torch.bfloat16 and torch.isfinite(got).all()
    assert torch.equal(got, streamed_logits(decoded, ids, 2))


def test_skipped_weights_are_written_decoded(made: Make, tmp_path: Path) -> None:
    """The output's config no longer says that they are fp8, so no reader would decode them."""
    coded, decoded = made("llama", "fp8 blocks")
    for name, model in (("a", coded), ("b", decoded)):
        rules = (bigq.Rule(".*(q|k|v|qkv)_proj", None), bigq.Rule(r".*\.1\.", None))
        bigq.quantize(str(model), tmp_path / name, config(tmp_path, rules=rules))
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


def test_skipped_experts_are_written_decoded(made: Make, tmp_path: Path) -> None:
    coded, decoded = made("gpt_oss", "mxfp4 experts")
    for name, model in (("a", coded), ("b", decoded)):
        bigq.quantize(str(model), tmp_path / name, config(tmp_path, rules=(bigq.Rule(".*experts", None),)))
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


def test_the_plan_knows_both_sizes(made: Make, tmp_path: Path) -> None:
    """Disk reads count stored bytes; memory and output count decoded ones."""
    coded, decoded = made("llama", "fp8 blocks")
    plans = [plan(str(model), tmp_path / "out", config(tmp_path)) for model in (coded, decoded)]
    assert plans[0].cost.host == pytest.approx(plans[1].cost.host, rel=0.02)
    assert plans[0].disk == plans[1].disk
    assert plans[0].cost.read < 0.85 * plans[1].cost.read
    assert any("fp8" in warning for warning in plans[0].warnings) and not any("fp8" in warning for warning in plans[1].warnings)


def test_a_description_beside_the_config(made: Make, tmp_path: Path) -> None:
    """ModelOpt's own file; the output is not what it describes, so it is not copied."""
    coded, decoded = made("llama", "nvfp4 of ModelOpt")
    model = tmp_path / "model"
    shutil.copytree(coded, model)
    described = json.loads((model / "config.json").read_text())
    del described["quantization_config"]
    (model / "config.json").write_text(json.dumps(described))
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    require_same_job((model, decoded), tmp_path)
    assert not (tmp_path / "a" / "hf_quant_config.json").exists()


def damaged(coded: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A coded checkpoint in one file after a change."""
    tensors = stored_tensors(coded)
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((coded / "config.json").read_text())
    return folder


WEIGHT = "model.layers.1.mlp.up_proj.weight"


def refusal(model: Path, folder: Path) -> BigqError:
    with pytest.raises(BigqError) as caught:
        bigq.quantize(str(model), folder / "out", config(folder))
    return caught.value


def lose_scales(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{WEIGHT}_scale_inv"]


def cut_blocks(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{WEIGHT}_scale_inv"] = tensors[f"{WEIGHT}_scale_inv"][:, :-1].contiguous()


def cut_groups(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{WEIGHT}_scale"] = tensors[f"{WEIGHT}_scale"][:, :-1].contiguous()


def two_global_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{WEIGHT}_global_scale"] = torch.ones(2)


def scaled_inputs(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT.replace("weight", "pre_quant_scale")] = torch.ones(64)


def zero_points(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{WEIGHT}_zero_point"] = torch.zeros(tensors[WEIGHT].shape[0], 1, dtype=torch.int8)


def lose_zeros(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[WEIGHT.replace("weight", "qzeros")]


def cut_zeros(tensors: dict[str, torch.Tensor]) -> None:
    name = WEIGHT.replace("weight", "qzeros")
    tensors[name] = tensors[name][:, :-1].contiguous()


def nan_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT].view(torch.uint8)[3, 5] = 0xFF


@pytest.mark.parametrize(
    ("storage", "damage", "said"),
    [
        ("fp8 blocks", lose_scales, f"tensor {WEIGHT} lacks its scales, {WEIGHT}_scale; fetch it again"),
        ("fp8 blocks", cut_blocks, "blocks of 24 × 40 by config.json; the two belong to different models"),
        ("fp8 blocks", nan_number, f"tensor {WEIGHT} contains NaN or Inf"),
        ("nvfp4", cut_groups, f"tensor {WEIGHT}_scale has shape"),
        ("nvfp4 of ModelOpt", scaled_inputs, "up_proj.pre_quant_scale scales the inputs of a Linear, which is not supported"),
        ("int8 rows", zero_points, f"tensor {WEIGHT} has zero points, which are not supported"),
        ("awq", lose_zeros, "up_proj.qzeros is missing, but its Linear is packed"),
        ("awq", cut_zeros, "its shape or dtype does not match those of qzeros and scales"),
        ("gptq", lose_zeros, "up_proj.qzeros is missing, but its Linear is packed"),
        ("nvfp4", two_global_scales, "has shape [2], not one number; fetch it again"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_original_is_not(
    storage: str, damage: Callable[[dict[str, torch.Tensor]], None], said: str, made: Make, tmp_path: Path
) -> None:
    coded, _ = made("llama", storage)
    error = refusal(damaged(coded, tmp_path / "m", damage), tmp_path)
    assert isinstance(error, (CheckpointError, NumericsError, UnsupportedModelError)) and said in str(error)
    bigq.quantize(str(coded), tmp_path / "fetched", config(tmp_path))


@pytest.mark.parametrize("change", [{"version": "gemv"}, {"bits": 3}], ids=str)
def test_another_version_of_awq_is_refused(change: dict[str, object], made: Make, tmp_path: Path) -> None:
    """One of version gemm is not, nor is the original model."""
    coded, decoded = made("llama", "awq")
    model = damaged(coded, tmp_path / "m", lambda tensors: None)
    path = model / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"quantization_config": said["quantization_config"] | change}))
    assert "of awq, bigq reads version gemm at 4 bits: give such a one, or the original model" in str(refusal(model, tmp_path))
    for name, other in (("gemm", coded), ("original", decoded)):
        bigq.quantize(str(other), tmp_path / name, config(tmp_path))


def test_transformed_weights_are_refused(made: Make, tmp_path: Path) -> None:
    """They would have to be rotated back; numbers times scales are not the model's weights."""
    model = damaged(made("llama", "nvfp4")[0], tmp_path / "m", lambda tensors: None)
    path = model / "config.json"
    said = json.loads(path.read_text())
    said["quantization_config"]["transform_config"] = {"config_groups": {"R1": {"type": "hadamard"}}}
    path.write_text(json.dumps(said))
    assert "transform_config is set; bigq does not read transformed weights" in str(refusal(model, tmp_path))


def test_a_wrong_block_size_is_refused(made: Make, tmp_path: Path) -> None:
    model = damaged(made("llama", "fp8 blocks")[0], tmp_path / "m", lambda tensors: None)
    path = model / "config.json"
    said = json.loads(path.read_text())
    said["quantization_config"]["weight_block_size"] = [128]
    path.write_text(json.dumps(said))
    assert "weight_block_size is [128], not two sizes" in str(refusal(model, tmp_path))


@pytest.mark.parametrize(("storage", "part"), [("fp8 blocks", "text_config"), ("gptq, groups in any order", "text_config")])
def test_the_language_part_of_a_config_describes_the_weights(storage: str, part: str, tmp_path: Path) -> None:
    """As in Kimi K2.5. The output's config describes only what the output is."""
    plain = make_composite(tmp_path / "plain", "llava", dtype=torch.bfloat16)
    coded, decoded = coded_and_decoded(plain, tmp_path, storage)
    value = json.loads((coded / "config.json").read_text())
    value[part]["quantization_config"] = value.pop("quantization_config")
    (coded / "config.json").write_text(json.dumps(value))
    require_same_job((coded, decoded), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())[part]


def test_the_older_name_of_a_description(made: Make, tmp_path: Path) -> None:
    """compressed-tensors wrote compression_config once."""
    coded, decoded = made("llama", "fp8 rows")
    model = tmp_path / "model"
    shutil.copytree(coded, model)
    value = json.loads((model / "config.json").read_text())
    value["compression_config"] = value.pop("quantization_config")
    (model / "config.json").write_text(json.dumps(value))
    require_same_job((model, decoded), tmp_path)
    assert "compression_config" not in json.loads((tmp_path / "a" / "config.json").read_text())
