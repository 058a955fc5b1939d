"""What a job with experts writes for other readers: its format, its config, what convert makes of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import save_ids, stored_tensors
from moe_families import moe_model, random_tokens

import bigq
from bigq.config import JobConfig
from bigq.errors import UnsupportedModelError, UsageError
from bigq.scheme import QuantScheme, Rule

Make = Callable[..., tuple[Path, Path]]
EIGHT = {"bits": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    save_ids(folder / "ids.safetensors", random_tokens(16, 32))

    def get(family: str) -> Path:
        path = folder / family
        if not path.exists():
            moe_model(family, torch.bfloat16).save_pretrained(path)
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps({**config, "only_the_source_has": ["this"]}))
        return path

    return get


def job(model: Path, **settings: object) -> JobConfig:
    values = {"scheme": QuantScheme(group_size=16), "calibration": str(model.parent / "ids.safetensors"), "samples": 16, "seqlen": 32}
    return JobConfig(**{**values, "device": "cpu", "quiet": True, **settings})  # type: ignore[arg-type]


def said(out: Path) -> dict[str, object]:
    config = json.loads((out / "config.json").read_text())
    quantization: dict[str, object] = config["quantization_config"]
    return quantization


def test_the_format_follows_the_model_unless_it_is_given(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = models("qwen3_moe")
    bigq.quantize(str(model), tmp_path / "unset", job(model))
    bigq.quantize(str(model), tmp_path / "given", job(model, format="gptq", scheme=QuantScheme(group_size=32)))
    assert said(tmp_path / "unset")["quant_method"] == "compressed-tensors"
    assert said(tmp_path / "given")["quant_method"] == "gptq"
    assert json.loads((tmp_path / "unset/.bigq/job.json").read_text())["settings"]["format"] == "compressed-tensors"


def test_a_resumed_job_keeps_its_format(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Also if it is not the one that the model would get today."""
    model, out = models("qwen3_moe"), tmp_path / "out"
    scheme = QuantScheme(group_size=32)
    bigq.quantize(str(model), out, job(model, format="gptq", scheme=scheme))
    before = (out / "config.json").read_bytes()
    next(out.glob("model-*")).unlink()
    bigq.quantize(str(model), out, job(model, scheme=scheme))
    assert (out / "config.json").read_bytes() == before
    (out / "config.json").unlink()
    with pytest.raises(UsageError, match=r"--format compressed-tensors: the job in .* was begun with --format gptq"):
        bigq.quantize(str(model), out, job(model, scheme=scheme, format="compressed-tensors"))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_the_config_is_the_source_s_own_and_names_routers(family: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = models(family), tmp_path / "out"
    bigq.quantize(str(model), out, job(model))
    source, written = (json.loads((folder / "config.json").read_text()) for folder in (model, out))
    quantization = written.pop("quantization_config")
    assert written == source and "only_the_source_has" in written
    routers = [name for name in quantization["ignore"] if name.endswith(".mlp.gate")]
    assert len(routers) == (1 if family == "deepseek_v3" else 2)
    assert [group["targets"] for group in quantization["config_groups"].values()] == [["Linear"]]


def test_experts_of_another_scheme_are_one_pattern(models: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers looks for the experts' group by a pattern; and a list of all of them would be long."""
    model, out = models("mixtral"), tmp_path / "out"
    bigq.quantize(str(model), out, job(model, rules=(Rule(r".*\.experts", EIGHT),)))
    groups = said(out)["config_groups"]
    assert isinstance(groups, dict)
    targets = {group["weights"]["num_bits"]: group["targets"] for group in groups.values()}
    assert targets[8] == [r"re:.*\.experts\.\d+\."] and len(targets[4]) == 8
    ids = random_tokens(2, 16)
    assert torch.isfinite(bigq.load_model(out, device="cpu")(input_ids=ids).logits).all()
    bigq.quantize(str(model), tmp_path / "two", job(model, rules=(Rule(r".*\.0\..*\.experts", EIGHT),)))
    groups = said(tmp_path / "two")["config_groups"]
    assert isinstance(groups, dict)
    assert {len(group["targets"]) for group in groups.values()} == {12, 20}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_convert_re_packs_experts(family: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    """From gptq to compressed-tensors and back: every tensor, and what a job in that format would write."""
    model = models(family)
    changes = {"scheme": QuantScheme(group_size=32), "rules": (Rule(r".*\.experts", EIGHT),)}
    bigq.quantize(str(model), tmp_path / "gptq", job(model, format="gptq", **changes))
    bigq.quantize(str(model), tmp_path / "ct", job(model, **changes))
    done = bigq.convert(tmp_path / "gptq", tmp_path / "to-ct", "compressed-tensors")
    bigq.convert(tmp_path / "to-ct", tmp_path / "back", "gptq")
    direct, converted, first, back = (stored_tensors(tmp_path / name) for name in ("ct", "to-ct", "gptq", "back"))
    for one, other in ((direct, converted), (first, back)):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    records = (tmp_path / "gptq/.bigq/linears.jsonl").read_text().splitlines()
    assert done.linears == len(records) > 24
    packed = {key: said(tmp_path / "ct")[key] for key in ("ignore", "config_groups")}
    assert packed["ignore"] == said(tmp_path / "to-ct")["ignore"]
    dynamic = said(tmp_path / "back")["dynamic"]
    assert isinstance(dynamic, dict)
    assert any(
        "experts" in pattern and settings == {"bits": 8, "group_size": 32, "sym": True} for pattern, settings in dynamic.items()
    ) or (said(tmp_path / "back")["bits"] == 8)
    assert len(dynamic) < 20
    for name in ("to-ct", "back"):
        assert bigq.verify(tmp_path / name) == []


def test_convert_names_banks_that_stay_unquantized(models: Callable[[str], Path], tmp_path: Path) -> None:
    model = models("mixtral")
    bigq.quantize(str(model), tmp_path / "ct", job(model, rules=(Rule(r".*\.experts", None),), scheme=QuantScheme(group_size=32)))
    bigq.convert(tmp_path / "ct", tmp_path / "gptq", "gptq")
    assert r"-:^model\.layers\.0\.block_sparse_moe\.experts(\.|$)" in said(tmp_path / "gptq")["dynamic"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"format": "gguf", "scheme": QuantScheme(group_size=32)}, UnsupportedModelError, "writes no GGUF files of model type 'qwen3_moe'"),
        ({"rules": (Rule(r".*down_proj", EIGHT),)}, UsageError, "of all experts of a layer together, which needs one scheme; use"),
        ({"rules": (Rule(r".*experts\.3\.", None),)}, UsageError, r"use '\.\*\\\.experts'"),
    ],
    ids=["gguf", "one matrix", "one expert"],
)
def test_what_cannot_be_written_is_refused_first(
    settings: dict[str, object], error: type[Exception], message: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = models("qwen3_moe")
    for run in (bigq.plan, bigq.quantize):
        with pytest.raises(error, match=message) as caught:
            run(str(model), tmp_path / "out", job(model, **settings))  # type: ignore[operator]
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "loads", "notes"),
    [
        ({}, ["transformers", "compressed-tensors"], ["vLLM does not load compressed-tensors in groups of 16"]),
        ({"scheme": QuantScheme(group_size=32)}, ["transformers", "compressed-tensors", "vLLM"], []),
        (
            {"scheme": QuantScheme(group_size=32), "format": "gptq"},
            ["GPTQModel", "vLLM"],
            ["transformers does not load experts in gptq: it leaves them random; use --format compressed-tensors"],
        ),
        (
            {"scheme": QuantScheme(group_size=32, symmetric=False)},
            ["compressed-tensors", "vLLM"],
            ["transformers does not load asymmetric experts of 4 bits in compressed-tensors; use --sym"],
        ),
    ],
    ids=["default", "groups of 32", "gptq", "asymmetric"],
)
def test_the_plan_says_who_reads_experts(
    settings: dict[str, object], loads: list[str], notes: list[str], models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = models("qwen3_moe")
    plan = bigq.plan(str(model), tmp_path, job(model, **settings))
    assert [verdict.reader for verdict in plan.readers if verdict.loads] == loads
    assert len(plan.notes) == len(notes) and all(note.startswith(start) for note, start in zip(plan.notes, notes, strict=True))
    for note in notes:
        assert note.partition(":")[0][:30] in " ".join(plan.brief().split())
