"""Files beside the weights: which are copied, from subfolders too, and that every command knows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bigq
from bigq.errors import CheckpointError
from bigq.io import side_files
from bigq.io.atomic import TEMP_SUFFIX
from bigq.sched.plan.inputs import plan
from tests.e2e.test_extras import job
from tests.models import make_checkpoint

KEPT = {
    "tokenizer.json": "{}",
    "LICENSE": "terms",
    "modules.json": "[]",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "1_Pooling/config.json": '{"pooling_mode_lasttoken": true}',
    "code/inner/layers.py": "pass",
    "figures/speed.png": "png",
    "mel_filters.npz": "filters",
}
LEFT = (
    *("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"),
    *("latest", "zero_to_fp32.py", "events.out.tfevents.17.host", "all_results.json", "train_results.json", "train.log"),
    *(
        "last.ckpt",
        "backup.zip",
        "weights.tar.gz",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.00.pth",
        "x.onnx_data",
    ),
    *("checkpoint-500/trainer_state.json", "checkpoint-500/config.json", "global_step10/latest", "runs/Nov/events.out.tfevents.1"),
    *("original/params.json", "original/consolidated.00.pth", "onnx/config.json", "onnx/model.onnx", "2_Dense/model.safetensors"),
    *("1_Pooling/trainer_state.json", "code/__pycache__/layers.cpython-311.pyc", ".git/config", ".cache/x", "figures/.DS_Store"),
)


def fill(folder: Path) -> Path:
    for name, text in {**dict.fromkeys(LEFT, "{}"), **KEPT}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fill(make_checkpoint(tmp_path / "m", "llama"))


def held(folder: Path) -> set[str]:
    """The files of a folder that are not weights, records or written by bigq itself."""
    own = ("config.json", "quantize_config.json", "model.safetensors.index.json", "generation_config.json")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if name not in own and not name.startswith((".bigq/", "model-000"))}


def test_what_is_copied(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert plan(str(model), out, job()).warnings == ()
    bigq.quantize(model, out, job())
    assert held(out) == set(KEPT)
    assert all((out / name).read_text() == text for name, text in KEPT.items())
    manifest = json.loads((out / ".bigq" / "manifest.json").read_text())["files"]
    assert set(KEPT) <= set(manifest) and bigq.verify(out) == []


def test_conversions_copy_them_too(model: Path, tmp_path: Path) -> None:
    bigq.quantize(model, tmp_path / "out", job())
    bigq.convert(tmp_path / "out", tmp_path / "other", "compressed-tensors")
    assert held(tmp_path / "other") == set(KEPT) and bigq.verify(tmp_path / "other") == []
    (tmp_path / "other" / "1_Pooling" / "config.json").write_text("{}")
    assert any(problem.startswith("1_Pooling/config.json: ") for problem in bigq.verify(tmp_path / "other"))


def test_verify_sees_changes_in_subfolders(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bigq.quantize(model, out, job())
    template = out / "additional_chat_templates" / "tool_use.jinja"
    template.write_text("{{ other }}")
    (problem,) = bigq.verify(out)
    assert problem.startswith("additional_chat_templates/tool_use.jinja: ")
    template.unlink()
    (problem,) = bigq.verify(out)
    assert "additional_chat_templates/tool_use.jinja: is missing" in problem
    bigq.quantize(model, out, job())
    assert template.read_text() == KEPT["additional_chat_templates/tool_use.jinja"] and bigq.verify(out) == []
    (out / "figures" / "foreign.txt").write_text("x")
    (problem,) = bigq.verify(out)
    assert problem.startswith("figures/foreign.txt: no record lists it")


def test_what_a_killed_run_left_in_a_subfolder_is_removed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bigq.quantize(model, out, job())
    left = out / "1_Pooling" / f"config.json.1234{TEMP_SUFFIX}"
    left.write_text("half")
    assert any(problem.startswith("1_Pooling/config.json.1234") for problem in bigq.verify(out))
    bigq.quantize(model, out, job())
    assert not left.exists() and bigq.verify(out) == []


@pytest.mark.parametrize(("limit", "value"), [("MAX_BYTES", 100), ("MAX_TOTAL", 100), ("MAX_FILES", 4)])
def test_limits_in_subfolders(limit: str, value: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exceeds them is not copied, and told; files at the top have no limit."""
    monkeypatch.setattr(side_files, limit, value)
    (model / "figures" / "zoo.png").write_text("x" * 101)
    (model / "tokenizer.model").write_text("x" * 1000)
    (warning,) = plan(str(model), tmp_path / "out", job()).warnings
    assert "figures/zoo.png is above the limits" in warning
    bigq.quantize(model, tmp_path / "out", job())
    assert held(tmp_path / "out") == {*KEPT, "tokenizer.model"} and bigq.verify(tmp_path / "out") == []


def test_links(model: Path, tmp_path: Path) -> None:
    """A link inside the folder is copied as the file; one that leaves it is refused, by conversions too."""
    (model / "1_Pooling" / "link.json").symlink_to("../tokenizer.json")
    bigq.quantize(model, tmp_path / "out", job())
    copy = tmp_path / "out" / "1_Pooling" / "link.json"
    assert copy.read_text() == "{}" and not copy.is_symlink()
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "out" / "figures" / "secret.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match="a link out of the model folder"):
        bigq.convert(tmp_path / "out", tmp_path / "other", "compressed-tensors")
    assert "figures/secret.txt" not in side_files.side_files(tmp_path / "out").files
