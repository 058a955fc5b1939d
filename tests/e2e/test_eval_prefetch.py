"""Evaluation reads the next block while it computes one, where it has memory for that, and gives the same figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bigq
from bigq.infer import evaluate as evaluate_module
from bigq.io.prefetch.to_device import least_budget
from bigq.model.pager import Pager


def test_reading_ahead_changes_no_figure(checkpoint: Callable[[str], Path], ids_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bigq.EvalConfig(data=str(ids_file), seqlen=40, batch=8, device="cpu", quiet=True)
    expected = bigq.evaluate(str(checkpoint("llama")), config)
    announced: list[int] = []
    announce = Pager.announce_block

    def seen(self: Pager, i: int) -> None:
        announced.append(i)
        announce(self, i)
        assert i >= len(self.blocks) or self._ahead is not None

    monkeypatch.setattr(Pager, "announce_block", seen)
    monkeypatch.setattr(evaluate_module, "_read_ahead", lambda pager, processes: 2**24)
    assert bigq.evaluate(str(checkpoint("llama")), config) == expected
    assert announced == [1, 2, 3]


def test_a_gpu_gets_a_ring_of_one_block_and_a_cpu_none(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pager: Any = Pager(checkpoint("llama"), device=torch.device("cpu"))
    assert evaluate_module._read_ahead(pager, 1) == 0
    pager.device = torch.device("cuda")
    assert evaluate_module._read_ahead(pager, 1) == least_budget()  # blocks of a tiny model are smaller
    monkeypatch.setattr(evaluate_module, "least_budget", lambda: 1)
    assert evaluate_module._read_ahead(pager, 1) == sum(info.nbytes for info in pager.block_tensors(0))
    monkeypatch.setattr(evaluate_module, "host_budget", lambda resident: 100)
    assert [evaluate_module._read_ahead(pager, processes) for processes in (1, 2)] == [50, 25]
