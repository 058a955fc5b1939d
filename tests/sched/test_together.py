"""What ranks agree on before a job begins, which jobs they share, and the folders of their hidden states.

Whole jobs: tests/e2e/test_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import random_ids
from rank_threads import ThreadRanks, together

from bigq.config import JobConfig
from bigq.errors import ResourceError, UsageError
from bigq.job.request import make_request
from bigq.job.settle import require_shareable
from bigq.machine.ranks import OneProcess
from bigq.methods import method_of
from bigq.sched.plan.work import Choice
from bigq.sched.together import (
    agreed_plan,
    make_rank_folder,
    remove_other_counts,
    remove_rank_folder,
    require_same_request,
)

ROOT = Path(__file__).resolve().parents[2]


def request_of(**changes: Any) -> dict[str, Any]:
    model = ROOT / "bigq/assets/tiny-llama"
    return make_request(JobConfig(seqlen=64, batch=2, **changes), model, "0" * 64, random_ids(), torch.device("cpu"))


def test_ranks_with_other_options_are_refused_by_all() -> None:
    same = [request_of()] * 3
    assert together(3, lambda ranks: require_same_request(same[ranks.index], ranks)) == [None] * 3
    other = [*same[:2], {**request_of(method="gptaq"), "machine": {}, "calibration_tokens": "1"}]
    errors = together(3, lambda ranks: require_same_request(other[ranks.index], ranks))
    assert {type(error) for error in errors} == {UsageError} and len(set(map(str, errors))) == 1
    assert "rank 2 of 3: its calibration_tokens and settings.method differ from those of rank 0" in str(errors[0])


def test_ranks_with_something_that_the_first_has_not_are_refused() -> None:
    """As an evaluation with --baseline is, beside one without."""
    errors = together(2, lambda ranks: require_same_request({"settings": {}, **({"--baseline": 1} if ranks.index else {})}, ranks))
    assert [type(error) for error in errors] == [UsageError] * 2
    assert "rank 1 of 2: its --baseline differ from those of rank 0" in str(errors[0])


def test_the_smallest_batch_counts_and_what_is_short_anywhere(monkeypatch: Any) -> None:
    from bigq.sched.plan import planner

    def plan_of(ranks: ThreadRanks) -> Any:
        blank = dict.fromkeys(planner.Plan.__dataclass_fields__)
        choice = Choice(**dict.fromkeys(Choice.__dataclass_fields__) | {"batch": 4 - ranks.index, "experts_at_once": 2 + ranks.index})  # type: ignore[arg-type]
        short = ("rank 1 is short of memory",) if ranks.index == 1 else ()
        return agreed_plan(planner.Plan(**blank | {"choice": choice, "shortages": short}), ranks)  # type: ignore[arg-type]

    for plan in together(2, plan_of):
        assert isinstance(plan, planner.Plan)
        assert plan.choice.batch == 3 and plan.choice.experts_at_once == 2 and plan.shortages == ("rank 1 is short of memory",)


def test_folders_of_hidden_states(tmp_path: Path) -> None:
    two = SimpleNamespace(index=1, count=2)
    missing = together(1, lambda ranks: make_rank_folder(tmp_path, two))[0]  # type: ignore[arg-type]
    assert isinstance(missing, ResourceError) and "OUT must be on a file system that all hosts share" in str(missing)
    (tmp_path / ".bigq").mkdir()
    folder = make_rank_folder(tmp_path, two)  # type: ignore[arg-type]
    (folder / "activations-00001.safetensors").touch()
    remove_rank_folder(tmp_path, two)  # type: ignore[arg-type]
    assert folder.is_dir(), "only an empty one"
    remove_other_counts(tmp_path, two)  # type: ignore[arg-type]
    assert folder.is_dir()
    remove_other_counts(tmp_path, OneProcess())
    assert not folder.exists()


def require(remote: object = None, rows: int = 8, **config: Any) -> None:
    """remote: the server that the model stays on."""
    made = JobConfig(**config)
    require_shareable(made, method_of(made), remote=remote is not None, rows=rows, ranks=2)


def test_calibrated_methods_and_folds_are_shared() -> None:
    for method in ("gptq", "gptaq", "awq"):
        require(method=method)
    for fold in ("awq", "smoothquant"):
        require(fold=fold)


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("--method rtn", {"method": "rtn"}),
        ("--tune-steps", {"tune_steps": 4}),
        ("--bits-per-weight", {"bits_per_weight": 4.5}),
        ("a model that stays on a server", {"remote": object()}),
    ],
)
def test_what_is_not_shared_is_refused_by_name(what: str, parts: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{what}: 2 processes cannot share such a job; start it in one process$"):
        require(**parts)


def test_each_rank_needs_a_row() -> None:
    with pytest.raises(UsageError, match="--samples 1: 2 processes share the calibration rows"):
        require(rows=1)
