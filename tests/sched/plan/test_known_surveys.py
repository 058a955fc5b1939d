"""Tests remember surveys: only of what is the same in all that a survey sees."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from known_surveys import remembered_rates, remembered_survey
from models import make_checkpoint
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from bigq.machine.ceilings import KNOWN
from bigq.model.pager import Pager
from bigq.sched.plan import inputs
from bigq.sched.plan.survey import Outline, survey

Make = Callable[..., Outline]


@pytest.fixture
def outline(checkpoint: Callable[[str], Path]) -> Make:
    """Outlines of equal models, but for changes."""

    def make(folder: Path | None = None, **changes: Any) -> Outline:
        pager = Pager(folder or checkpoint("llama"), device=torch.device("cpu"))
        model = copy.deepcopy(pager.model)
        return Outline(**{"model": model, "blocks_path": pager.blocks_path, "dtype": pager.dtype, "sources": pager.sources, **changes})

    return make


class Counted:
    """Counts what is surveyed anew."""

    def __init__(self) -> None:
        self.times = 0
        self.remembered = remembered_survey(self.survey)

    def survey(self, outline: Outline, seqlen: int) -> Any:
        self.times += 1
        return seqlen

    def is_new(self, outline: Outline, seqlen: int = 16) -> bool:
        before = self.times
        self.remembered(outline, seqlen)
        return self.times > before


@pytest.fixture
def known(outline: Make) -> Counted:
    counted = Counted()
    assert counted.is_new(outline()) and not counted.is_new(outline())
    return counted


def test_the_result_is_the_surveys_own(outline: Make) -> None:
    remembered = remembered_survey(survey)
    first = remembered(outline(), 16)
    assert remembered(outline(), 16) is first
    assert first == survey(outline(), 16) != remembered(outline(), 24)


def test_plans_of_tests_are_made_of_them_unless_they_ask_for_their_own(request: pytest.FixtureRequest) -> None:
    assert inputs.survey is not survey
    request.getfixturevalue("plans_of_their_own")
    assert inputs.survey is survey


@pytest.mark.parametrize("changes", [{"dtype": torch.bfloat16}, {"stored": 5}, {"coded": 5}, {"fused": False}, {"sources": {}}], ids=str)
def test_another_outline_is_surveyed_anew(changes: dict[str, Any], outline: Make, known: Counted) -> None:
    assert known.is_new(outline(**changes)) and not known.is_new(outline(**changes)) and not known.is_new(outline())
    assert known.is_new(outline(), seqlen=17)


def test_a_copy_elsewhere_is_the_same_and_another_dtype_is_not(outline: Make, known: Counted, tmp_path: Path) -> None:
    assert not known.is_new(outline(make_checkpoint(tmp_path / "same", "llama", seed=1)))
    assert known.is_new(outline(make_checkpoint(tmp_path / "half", "llama", dtype=torch.float16)))


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_parameters", "num_key_value_heads"])
def test_another_config_is_surveyed_anew(name: str, outline: Make, known: Counted, tmp_path: Path) -> None:
    values = {"rms_norm_eps": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "num_key_value_heads": 4}
    assert known.is_new(outline(make_checkpoint(tmp_path / "other", "llama", **{name: values[name]})))


def test_other_code_is_surveyed_anew(outline: Make, known: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function in place of a class's, a class in place of another, a function or a setting of one module."""
    forward = LlamaAttention.forward
    with monkeypatch.context() as patch:
        patch.setattr(LlamaAttention, "forward", lambda *args, **kwargs: forward(*args, **kwargs))
        assert known.is_new(outline())
    assert not known.is_new(outline())

    class Other(LlamaMLP):
        pass

    for change in (
        lambda mlp: setattr(mlp, "__class__", Other),
        lambda mlp: setattr(mlp, "forward", lambda x: x),
        lambda mlp: setattr(mlp, "intermediate_size", 5),
        lambda mlp: setattr(mlp.up_proj, "weight", nn.Parameter(mlp.up_proj.weight.half())),
        lambda mlp: setattr(mlp.up_proj, "weight", mlp.gate_proj.weight),
        lambda mlp: mlp.register_buffer("more", torch.zeros(3)),
    ):
        changed = outline()
        change(changed.model.model.layers[1].mlp)
        assert known.is_new(changed)


def test_rates_are_measured_once_for_each_number_of_threads() -> None:
    measured: list[torch.dtype] = []

    def measure(device: torch.device, dtype: torch.dtype) -> Any:
        measured.append(dtype)
        return dataclasses.replace(KNOWN["h100"], products=len(measured))

    remembered, threads = remembered_rates(measure), torch.get_num_threads()
    cpu = torch.device("cpu")
    assert [remembered(cpu, dtype).products for dtype in (torch.float32, torch.half, torch.float32, torch.half)] == [1, 2, 1, 2]
    try:
        torch.set_num_threads(threads + 1)
        assert remembered(cpu, torch.float32).products == 3
    finally:
        torch.set_num_threads(threads)
