"""Buffers for the inputs of last Linears: reused by the next block, and never of more than one block's widths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bigq.sched.rows.shortcut_cache import LastInputs
from bigq.sched.rows.tiers import RowBuffer, Tier

BF16 = torch.bfloat16


@pytest.fixture
def last(tmp_path: Path) -> LastInputs:
    return LastInputs(4, Tier("host", torch.device("cpu"), tmp_path))


def closed(buffer: RowBuffer, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows when the buffer is closed."""
    seen: list[bool] = []
    monkeypatch.setattr(buffer, "close", lambda: seen.append(True))
    return seen


def test_a_buffer_of_the_same_size_is_used_again(last: LastInputs) -> None:
    first = last.take(96, BF16)
    last.give(first, 96, BF16)
    assert last.take(96, BF16) is first
    assert last.take(96, BF16) is not first, "it is in use"


def test_buffers_of_other_sizes_are_freed(last: LastInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a model whose blocks differ in width would hold a buffer for each width."""
    narrow = last.take(96, BF16)
    ended = closed(narrow, monkeypatch)
    last.give(narrow, 96, BF16)
    assert not ended
    last.take(128, BF16)
    assert ended == [True]
    assert last.take(96, BF16) is not narrow


def test_a_block_with_two_widths_uses_both_again(last: LastInputs) -> None:
    both = {size: last.take(size, BF16) for size in (96, 128)}
    for size, buffer in both.items():
        last.give(buffer, size, BF16)
    assert all(last.take(size, BF16) is buffer for size, buffer in both.items())


def test_at_the_end_all_are_freed(last: LastInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = last.take(96, BF16)
    ended = closed(buffer, monkeypatch)
    last.give(buffer, 96, BF16)
    last.close()
    assert ended == [True] and last.rows == 0
