"""The shape of a model as found on meta, against what the real one shows."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, LEVELS, make_checkpoint
from moe_families import moe_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigq.errors import CheckpointError, UnsupportedModelError
from bigq.model.forward.capture import forward_errors
from bigq.model.pager import Pager
from bigq.model.structure import plan_block
from bigq.sched.plan.shape import ModelShape
from bigq.sched.plan.survey import Outline, survey
from bigq.sched.rows.probe import probe_model

CPU = torch.device("cpu")

#: What only feeds the attention and the MLP, where it is not a norm before and one after attention.
IDLE = {
    "falcon": (("ln_attn",), ("ln_mlp",)),
    "gemma2": (("input_layernorm",), ("pre_feedforward_layernorm",)),
    "gemma3": (("input_layernorm",), ("pre_feedforward_layernorm",)),
    "gpt2": (("ln_1",), ("ln_2",)),
    "opt": (("self_attn_layer_norm",), ("fc1", "activation_fn", "final_layer_norm")),
}

SEQLEN = 48


def shape_of(pager: Pager, seqlen: int = SEQLEN, *, fused: bool = True) -> ModelShape:
    stored = sum(info.nbytes for info in pager.checkpoint.tensors.values())
    outline = Outline(
        model=copy.deepcopy(pager.model),
        blocks_path=pager.blocks_path,
        dtype=pager.dtype,
        sources=pager.sources,
        stored=stored,
        fused=fused,
    )
    return survey(outline, seqlen)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pager(family: str, tmp_path_factory: pytest.TempPathFactory) -> Pager:
    return Pager(make_checkpoint(tmp_path_factory.mktemp("survey") / family, family), device=CPU)


@pytest.fixture(scope="module")
def shape(pager: Pager) -> ModelShape:
    return shape_of(pager)


def test_levels_groups_and_shortcuts_are_those_of_the_real_block(pager: Pager, family: str, shape: ModelShape) -> None:
    found = shape.blocks[0].groups
    levels = tuple(
        tuple(tuple(linear.name for linear in g.linears) for g in found if g.level == level)
        for level in range(1 + max(g.level for g in found))
    )
    assert levels == LEVELS[family]
    with torch.no_grad():
        probe = probe_model(pager)
        for i, block in enumerate(shape.blocks):
            real = plan_block(pager.load_block(i), probe.hidden, probe.calls[i])
            pager.evict_block(i)
            assert [(tuple(linear.name for linear in g.linears), g.level) for g in block.groups] == [
                (g.names, g.level) for g in real.groups
            ]
            assert [(memo.linear, memo.last) for memo in block.memos] == [(s.linear, s.last) for s in real.shortcuts]
            # Attention's output projection, and the last Linear of the MLP; in parallel blocks both are at the deepest level.
            attention, mlp = real.shortcuts
            assert (attention.last, mlp.last) == (len(LEVELS[family]) == 2, True)
            # The norm before each; in OPT also what its block has in place of an MLP module.
            assert (attention.idle, mlp.idle) == IDLE.get(family, (("input_layernorm",), ("post_attention_layernorm",)))


def test_bytes_are_those_of_the_checkpoint(pager: Pager, shape: ModelShape) -> None:
    for i, block in enumerate(shape.blocks):
        assert block.stored == sum(info.nbytes for info in pager.block_tensors(i))
        assert block.weights == sum(p.numel() * p.element_size() for p in pager.blocks[i].parameters())
    assert shape.stored == sum(info.nbytes for info in pager.checkpoint.tensors.values())


class Held(TorchDispatchMode):
    """Bytes that tensors made inside hold at most: the real ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._alive:
                    size, key = storage.nbytes(), storage._cdata
                    self.now += size
                    self.peak = max(self.peak, self.now)

                    def gone(_: Any, key: int = key, size: int = size) -> None:
                        del self._alive[key]
                        self.now -= size

                    self._alive[key] = weakref.ref(storage, gone)
        return output


def held_by_a_forward(pager: Pager) -> int:
    """The peak of a real forward of three rows through block 0. Views of weights count in it, so those are taken off."""
    from bigq.model.forward.capture import first_input, record_calls

    with torch.no_grad():
        probe = probe_model(pager)
        ids = torch.zeros(3, SEQLEN, dtype=torch.long)
        with pager.rest_loaded(), pager.embedding_rows(ids):
            hidden, _ = first_input(pager.model, pager.blocks, ids)
            calls = record_calls(pager.model, pager.blocks, ids, probe.form)
        block = pager.load_block(0)
        known = {t.untyped_storage()._cdata for t in (*block.parameters(), *block.buffers(), hidden)}
        known |= {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((calls[0].args, dict(calls[0].kwargs))) if isinstance(leaf, torch.Tensor)
        }
        held = Held()
        held._alive.update(dict.fromkeys(known))
        with held:
            calls[0].run(block, hidden)
        pager.evict_block(0)
    return held.peak


def test_memory_of_a_forward_is_that_of_the_real_forward(pager: Pager, shape: ModelShape) -> None:
    """For three rows, where it was counted for one and two."""
    # Fused attention on a CPU makes a row of sums for each head beside its output, which the survey leaves out.
    assert held_by_a_forward(pager) == pytest.approx(shape.blocks[0].forward.at(3), rel=0.1)


def test_scores_of_heads_whose_queries_and_values_differ_in_width_count_on_a_cpu(tmp_path: Path) -> None:
    """DeepSeek's attention, in a dense block."""
    moe_model("deepseek_v3").save_pretrained(tmp_path / "m")
    pager = Pager(tmp_path / "m", device=CPU)
    held = held_by_a_forward(pager)
    assert held == pytest.approx(shape_of(pager, fused=False).blocks[0].forward.at(3), rel=0.1)
    assert held > 1.5 * shape_of(pager).blocks[0].forward.at(3), "scores are not much here, so this shows nothing"


def test_blocks_that_attend_differently_are_looked_at_apart(tmp_path: Path) -> None:
    shape = shape_of(Pager(make_checkpoint(tmp_path / "m", "gemma3"), device=CPU))
    assert shape.blocks[0] is shape.blocks[1]
    assert shape.blocks[0] is not shape.blocks[2]


def test_a_forward_that_fails_is_told() -> None:
    """Whatever it raises; our own errors and memory that ended stay what they are."""
    with pytest.raises(UnsupportedModelError, match=r"own forward fails .* ValueError: no such head"), forward_errors():
        raise ValueError("no such\nhead")
    with pytest.raises(RuntimeError, match="CUDA error: out of memory"), forward_errors():
        raise RuntimeError("CUDA error: out of memory")
    with pytest.raises(CheckpointError, match="damaged"), forward_errors():
        raise CheckpointError("damaged")
