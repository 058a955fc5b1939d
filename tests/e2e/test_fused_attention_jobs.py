"""Jobs of ``--attention fused``: nearly the codes of the model's own attention, the same bytes after a stop, less memory in the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, make_checkpoint, random_ids, save_ids, stored_tensors
from tinyjob import hashes
from torch import Tensor
from transformers import CONFIG_MAPPING

import bigq
from bigq import faults
from bigq.config import JobConfig
from bigq.errors import UsageError
from bigq.job.journal import read_job
from bigq.model.forward import fused_attention
from bigq.scheme import QuantScheme
from bigq.vocabulary import AttentionName


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused")
    make_checkpoint(folder / "bloom", "bloom")
    save_ids(folder / "ids.safetensors", random_ids(24, 32))
    return folder


def job(place: Path, **changes: Any) -> JobConfig:
    given: dict[str, Any] = {
        "scheme": QuantScheme(group_size=32),
        "calibration": str(place / "ids.safetensors"),
        "samples": 24,
        "seqlen": 32,
        "batch": 4,
        "device": "cpu",
        "attention": "fused",
    }
    return JobConfig(**(given | changes))


def test_codes_are_nearly_those_of_the_models_own_attention(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, fused, rows = place / "own", place / "out", []
    attend = fused_attention.scaled_dot_product_attention

    def counted(query: Tensor, *others: Tensor, **more: Any) -> Tensor:
        rows.append(len(query))
        return attend(query, *others, **more)

    monkeypatch.setattr(fused_attention, "scaled_dot_product_attention", counted)
    before = bigq.quantize(str(place / "bloom"), own, job(place, attention="model"))
    assert not rows
    after = bigq.quantize(str(place / "bloom"), fused, job(place))
    assert len(rows) > 3 * 24 and set(rows) == {1}
    for one, other in zip(before.linears, after.linears, strict=True):
        assert other["relative_error"] == pytest.approx(one["relative_error"], rel=0.02)
    a, b, different, codes = stored_tensors(own), stored_tensors(fused), 0, 0
    for name in (name for name in a if name.endswith("qweight")):
        xor = a[name] ^ b[name]
        nibbles = torch.stack([(xor >> shift) & 15 for shift in range(0, 32, 4)])
        different, codes = different + int(nibbles.ne(0).sum()), codes + nibbles.numel()
    # A scale that is chosen from nearly equal ones takes its group with it.
    assert different < codes / 20
    assert read_job(fused)["settings"]["attention"] == "fused"


def planned(model: str, attention: AttentionName) -> int:
    return bigq.plan(model, config=JobConfig(attention=attention, batch=4, seqlen=2048, vram="60GiB"), on="h100").cost.device


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_a_stopped_job_ends_in_the_same_bytes(place: Path, tmp_path: Path, method: str) -> None:
    config = job(place, method=method, checkpoint_every=0.0)
    bigq.quantize(str(place / "bloom"), tmp_path / "whole", config)
    faults.arm("block.replayed:2:EIO")
    try:
        with pytest.raises(OSError, match="Input/output"):
            bigq.quantize(str(place / "bloom"), tmp_path / "out", config)
    finally:
        faults.disarm()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) < 4
    bigq.quantize(str(place / "bloom"), tmp_path / "out", config)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_the_plan_needs_less_memory(tmp_path: Path) -> None:
    """A config alone: attention that writes its scores is most of the peak with long rows."""
    kind, values = FAMILIES["bloom"]
    CONFIG_MAPPING[kind](**values | {"hidden_size": 1024, "n_head": 16}).save_pretrained(tmp_path)
    scores = 4 * 16 * 2048**2 * 4
    assert planned(str(tmp_path), "model") - planned(str(tmp_path), "fused") > scores


def test_other_models_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "llama", "llama")
    with pytest.raises(UsageError, match=r"^--attention fused: no effect on LlamaForCausalLM"):
        bigq.quantize(str(tmp_path / "llama"), tmp_path / "out", job(tmp_path, calibration="builtin"))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))
