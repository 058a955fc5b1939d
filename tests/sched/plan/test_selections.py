"""On meta, masks select everything; elsewhere nothing changes."""

from __future__ import annotations

import torch

from bigq.sched.plan.selections import AllSelected


def test_a_mask_on_meta_selects_everything() -> None:
    x, mask = torch.zeros(2, 5, 8, device="meta"), torch.zeros(2, 5, dtype=torch.bool, device="meta")
    with AllSelected():
        assert x[mask].shape == (10, 8)
        assert x[mask[:, 0]].shape == (2, 5, 8)
        assert x[torch.zeros(2, 5, 8, dtype=torch.bool, device="meta")].shape == (80,)


def test_what_is_put_back_depends_on_the_values() -> None:
    values = torch.zeros(10, 8, device="meta", requires_grad=True)
    mask = torch.zeros(2, 5, dtype=torch.bool, device="meta")
    with AllSelected():
        one, other = torch.zeros(2, 5, 8, device="meta"), torch.zeros(2, 5, 8, device="meta")
        one[mask] = values
        other[mask] = 1.0
        broadcast = torch.zeros(2, 5, 8, device="meta")
        broadcast[mask] = values[0]
    assert one.requires_grad and broadcast.requires_grad and not other.requires_grad
    assert one.shape == other.shape == (2, 5, 8)


def test_other_selections_are_left_alone() -> None:
    x = torch.arange(6.0).view(2, 3)
    with AllSelected():
        assert x[x > 2].tolist() == [3, 4, 5]
        x[x > 2] = 0
        assert torch.zeros(4, 3, device="meta")[torch.zeros(2, dtype=torch.long, device="meta")].shape == (2, 3)
    assert x.tolist() == [[0, 1, 2], [0, 0, 0]]
