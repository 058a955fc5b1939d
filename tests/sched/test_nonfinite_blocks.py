"""Activations that are not finite, and Linears that cannot be solved, one block at a time.

Blocks are those of the tiny checkpoints; what goes wrong in them is put there by hooks and by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, random_ids
from torch import Tensor, nn

from bigq.errors import NumericsError
from bigq.job.batches import Batches
from bigq.kernels.syrk import CHUNK_TOKENS
from bigq.machine.ranks import OneProcess
from bigq.methods import gptq as gptq_module
from bigq.methods.gptq import Gptq
from bigq.methods.rtn import Rtn
from bigq.model.blocks import block_linears
from bigq.model.pager import Pager
from bigq.model.skeleton import linear_weight
from bigq.model.structure import plan_block
from bigq.progress.clock import Clock
from bigq.progress.trace import Trace
from bigq.sched.plan.cost import job_cost
from bigq.sched.plan.shape import BlockShape, GroupShape, LinearShape, ModelShape, Reach, Rows
from bigq.sched.plan.work import Choice, Work
from bigq.sched.rows.probe import activations_for, probe_model
from bigq.sched.rows.shortcut_cache import ShortcutCache
from bigq.sched.rows.store import ActivationStore
from bigq.sched.rows.tiers import Tier
from bigq.sched.solve.block import BlockJob, BlockRows, quantize_weights, solve_block
from bigq.sched.solve.propagate import propagate
from bigq.sched.solve.results import Skipped, Solved
from bigq.scheme import QuantScheme
from bigq.solver import gptq, hessian

CPU = torch.device("cpu")
ROWS, SEQLEN = 7, 20
NAN = float("nan")


@dataclass
class Bench:
    """The first block of a model, and its inputs for calibration rows."""

    block: nn.Module
    store: ActivationStore
    job: BlockJob
    cache: ShortcutCache
    hessians: dict[str, Tensor] = field(default_factory=dict)

    def poison(self, row: int, token: int, value: float = NAN) -> None:
        """Set one value of one token in the block's inputs."""
        hidden = self.store.rows(row, row + 1).clone()
        hidden[0, token, 5] = value
        self.store.put(row, hidden)

    def solve(self) -> tuple[list[Solved], list[Skipped]]:
        results = list(solve_block(self.job, BlockRows(store=self.store, cache=self.cache), Gptq(), true_sequential=True))
        return [r for r in results if isinstance(r, Solved)], [r for r in results if isinstance(r, Skipped)]

    def propagate(self, on_nonfinite: str = "skip", cache: ShortcutCache | None = None) -> int:
        return propagate(0, self.block, self.store, "model.layers.0", cache, on_nonfinite)

    def outputs(self) -> Tensor:
        return self.store.rows(0, ROWS).clone()


@pytest.fixture
def bench(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    """(family, on_nonfinite, batch, tier, dtype) → a bench; Hessians are recorded by the label of their factorization."""
    recorded: dict[str, Tensor] = {}
    factorize = gptq_module.factorize

    def recording(h: Tensor, *, name: str, **options: Any) -> Any:
        recorded[name] = h.clone()
        return factorize(h, name=name, **options)

    monkeypatch.setattr(gptq_module, "factorize", recording)
    with contextlib.ExitStack() as stack, torch.no_grad():

        def make(
            family: str = "llama",
            on_nonfinite: str = "skip",
            batch: int = 3,
            tier: str = "gpu",
            dtype: str = "auto",
            scheme: QuantScheme | None = None,
        ) -> Bench:
            pager = Pager(checkpoint(family), device=CPU, dtype=dtype)
            probe = probe_model(pager)
            clock = Clock(CPU, Trace(keep=False))
            store = activations_for(pager, random_ids(ROWS, SEQLEN), Batches(batch), probe, Tier(tier, CPU, tmp_path, clock))
            stack.callback(store.close)
            block = pager.load_block(0)
            plan = plan_block(block, probe.hidden, probe.calls[0])
            schemes = {name: scheme or QuantScheme(group_size=32) for group in plan.groups for name in group.names}
            cache = ShortcutCache()
            stack.callback(cache.close)
            job = BlockJob(
                index=0,
                prefix="model.layers.0",
                block=block,
                plan=plan,
                schemes=schemes,
                device=CPU,
                clock=clock,
                on_nonfinite=on_nonfinite,
            )
            recorded.clear()
            return Bench(block, store, job, cache, recorded)

        yield make


class Spoilt(nn.Module):
    """Returns nothing but NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, NAN)


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, linear: str, module: Any, name: str, broken: Any) -> Iterator[None]:
    """``module.name`` is ``broken`` while the Hessian of a Linear is factored, or the Linear solved."""
    inside = {"factorize": gptq_module.factorize, "solve": gptq_module.solve}
    sound = getattr(module, name)

    def wrap(function: Any, label_of: Callable[..., str]) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, name, broken if linear in label_of(*args, **kwargs) else sound)
                return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(gptq_module, "factorize", wrap(inside["factorize"], lambda *args, name, **kwargs: name))
        patch.setattr(gptq_module, "solve", wrap(inside["solve"], lambda weights, factor, scheme, label, correction: label))
        yield


# Tokens.


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_hessians_are_made_of_the_finite_tokens(family: str, bench: Callable[..., Bench]) -> None:
    """Compares the Hessians of the first level, whose inputs no solve has changed, with the inputs."""
    b = bench(family)
    b.poison(3, 11)
    b.poison(5, 0, float("inf"))
    first = b.job.plan.groups[0].names
    seen: list[Tensor] = []
    hook = block_linears(b.block)[first[0]].register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    for hidden, call in b.store.batches(0):
        call.run(b.block, hidden)
    hook.remove()
    x = torch.cat(seen).double()
    x = x[torch.isfinite(x).all(-1)]
    assert len(x) == ROWS * SEQLEN - 2
    solved, skipped = b.solve()
    assert not skipped and {s.name.removeprefix("model.layers.0.") for s in solved} == set(b.job.schemes)
    assert all(s.left_out == 2 for s in solved if s.name.removeprefix("model.layers.0.") in first)
    assert all(torch.isfinite(linear_weight(module)).all() for module in block_linears(b.block).values())
    got = b.hessians[", ".join(f"model.layers.0.{n}" for n in first)]
    assert torch.allclose(got.double(), 2 / len(x) * x.T @ x, rtol=0, atol=1e-5 * float(got.diagonal().max()))


@pytest.mark.parametrize("tier", ["gpu", "disk"])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_same_tokens_are_left_out_whatever_the_batch_and_the_tier(batch: int, tier: str, bench: Callable[..., Bench]) -> None:
    counts, lost = [], []
    for how in ({"batch": 2, "tier": "gpu"}, {"batch": batch, "tier": tier}):
        b = bench(**how)
        b.poison(3, 11)
        b.poison(6, 19)
        solved, skipped = b.solve()
        assert not skipped
        counts.append({s.name: s.left_out for s in solved})
        lost.append(b.propagate(cache=b.cache))
    assert counts[0] == counts[1] and lost[0] == lost[1]
    assert min(counts[0].values()) == 2 and lost[0] >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_other_rows_are_not_reached(family: str, bench: Callable[..., Bench]) -> None:
    """Other rows keep their bits. In the row itself attention spreads NaN to later tokens, and all of these are counted."""
    clean = bench(family)
    assert clean.propagate() == 0
    b = bench(family)
    b.poison(4, 8)
    lost = b.propagate()
    expected, got = clean.outputs(), b.outputs()
    others = [r for r in range(ROWS) if r != 4]
    assert torch.equal(got[others], expected[others])
    bad = ~torch.isfinite(got[4]).all(-1)
    assert bad[8] and lost == int(bad.sum())


@pytest.mark.long
@pytest.mark.usefixtures("triton_path")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_the_triton_path(dtype: str, bench: Callable[..., Bench]) -> None:
    # Without searches and sweeps, which take minutes in the interpreter.
    b = bench(dtype=dtype, scheme=QuantScheme(group_size=32, order="activation", scales="minmax", sweeps=0))
    b.poison(3, 11)
    solved, skipped = b.solve()
    assert not skipped and len(solved) == 7 and min(s.left_out for s in solved) == 1
    assert all(torch.isfinite(linear_weight(module)).all() for module in block_linears(b.block).values())
    assert 0 < b.propagate(cache=b.cache) <= SEQLEN


def test_tokens_are_counted_once_when_memory_runs_out(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch that failed is repeated with fewer rows."""
    b = bench(batch=4)
    b.poison(5, SEQLEN - 1)
    expected = bench(batch=4)
    expected.poison(5, SEQLEN - 1)
    put, calls = b.store.put, []

    def failing_put(lo: int, hidden: Tensor) -> None:
        calls.append(lo)
        if calls == [0, 4]:
            raise torch.OutOfMemoryError("for a test")
        put(lo, hidden)

    monkeypatch.setattr(b.store, "put", failing_put)
    assert b.propagate() == expected.propagate() > 0
    assert calls == [0, 4, 4, 6]


# Linears.


def test_a_linear_without_a_finite_token_stays_unquantized(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.block.mlp.act_fn = Spoilt()  # type: ignore[union-attr]
    before = linear_weight(block_linears(b.block)["mlp.down_proj"]).clone()
    solved, skipped = b.solve()
    assert [(s.name, s.reason) for s in skipped] == [
        ("model.layers.0.mlp.down_proj", "the calibration inputs of all tokens contain NaN or Inf")
    ]
    assert len(solved) == 6 and torch.equal(linear_weight(block_linears(b.block)["mlp.down_proj"]), before)


def test_a_group_whose_hessian_overflows_stays_unquantized(bench: Callable[..., Bench]) -> None:
    """Every token is finite; its square is not."""
    b = bench()
    b.block.input_layernorm.weight.mul_(1e25)  # type: ignore[union-attr, operator]
    skipped = b.solve()[1]
    assert [s.name.rpartition(".")[2] for s in skipped[:3]] == ["q_proj", "k_proj", "v_proj"]
    assert all("their squares overflow" in s.reason and ";" not in s.reason for s in skipped[:3])


def indefinite(_: Tensor) -> bool:
    return False


def broken_inverses(r: Tensor, blocks: list[tuple[int, int]]) -> Tensor:
    k = max(b - a for a, b in blocks)
    return torch.full((len(blocks), k, k), NAN)


FAILURES = [
    pytest.param(hessian, "upper_cholesky_", indefinite, "its Hessian is not positive definite even with damping 1", id="indefinite"),
    pytest.param(gptq, "diagonal_inverses", broken_inverses, "the solve produced NaN or Inf", id="NaN from the solve"),
]


@pytest.mark.parametrize(
    "scheme", [QuantScheme(group_size=32), QuantScheme(group_size=-1, order="activation")], ids=["groups", "act-order"]
)
@pytest.mark.parametrize(("module", "name", "broken", "reason"), FAILURES)
@pytest.mark.parametrize(
    ("family", "linear", "group"),
    [
        ("llama", "self_attn.o_proj", ["self_attn.o_proj"]),
        ("llama", "self_attn.k_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("bloom", "self_attention.dense", ["self_attention.dense"]),
    ],
)
def test_linears_that_cannot_be_solved_stay_unquantized(
    family: str,
    linear: str,
    group: list[str],
    module: Any,
    name: str,
    broken: Any,
    reason: str,
    scheme: QuantScheme,
    bench: Callable[..., Bench],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all Linears solved together with it. Its shortcut returns the unquantized Linear's output, like a replay without shortcuts."""
    b = bench(family, scheme=scheme)
    before = {n: linear_weight(m).clone() for n, m in block_linears(b.block).items()}
    assert b.job.plan.shortcuts
    with failing(monkeypatch, linear, module, name, broken):
        solved, skipped = b.solve()
    assert [(s.name, s.reason) for s in skipped] == [(f"model.layers.0.{n}", reason) for n in group]
    assert {s.name.removeprefix("model.layers.0.") for s in solved} == set(before) - set(group)
    for n, m in block_linears(b.block).items():
        assert torch.equal(linear_weight(m), before[n]) == (n in group)
    inputs = b.outputs()
    assert b.propagate(cache=b.cache) == 0
    with_memo = b.outputs()
    b.store.put(0, inputs)
    b.propagate()
    assert torch.equal(b.outputs(), with_memo)


@pytest.mark.parametrize(("module", "name", "broken", "reason"), FAILURES)
def test_a_job_that_stops_names_the_linear(
    module: Any, name: str, broken: Any, reason: str, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(on_nonfinite="stop")
    with failing(monkeypatch, "o_proj", module, name, broken), pytest.raises(NumericsError) as caught:
        b.solve()
    said = str(caught.value)
    assert said.startswith(f"model.layers.0.self_attn.o_proj: {reason}; ")
    assert "--on-nonfinite skip" in said and "\n" not in said


def test_a_job_that_stops_at_a_hessian_names_the_linears(bench: Callable[..., Bench]) -> None:
    b = bench(on_nonfinite="stop")
    b.poison(3, 11)
    with pytest.raises(NumericsError, match=r"^model\.layers\.0\.self_attn\.q_proj, .*v_proj: the calibration inputs contain NaN or Inf"):
        b.solve()


def test_rules_that_split_a_group_skip_only_what_fails(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """q has its own damping and so its own factorization, which comes first and fails."""
    b = bench()
    schemes = dict(b.job.schemes)
    schemes["self_attn.q_proj"] = QuantScheme(group_size=32, damping=0.001)
    b.job = BlockJob(**{f: getattr(b.job, f) for f in BlockJob.__slots__} | {"schemes": schemes})  # type: ignore[attr-defined]
    upper_cholesky_ = hessian.upper_cholesky_
    calls: list[int] = []

    def first_ladder_fails(h: Tensor) -> bool:
        calls.append(1)
        return len(calls) > 4 and upper_cholesky_(h)  # 0.001, 0.01, 0.1, 1

    monkeypatch.setattr(hessian, "upper_cholesky_", first_ladder_fails)
    solved, skipped = b.solve()
    assert [s.name for s in skipped] == ["model.layers.0.self_attn.q_proj"]
    assert len(solved) == 6


def test_rounding_skips_a_scale_that_cannot_be_stored(bench: Callable[..., Bench]) -> None:
    b = bench()
    linear_weight(block_linears(b.block)["mlp.up_proj"])[3, 5] = 1e7
    results = list(quantize_weights(b.job, Rtn()))
    assert [r.name for r in results if isinstance(r, Skipped)] == ["model.layers.0.mlp.up_proj"]
    assert len(results) == 7
    stopping = BlockJob(**{f: getattr(b.job, f) for f in BlockJob.__slots__} | {"on_nonfinite": "stop"})  # type: ignore[attr-defined]
    with pytest.raises(NumericsError, match="above 65504, the maximum of fp16"):
        list(quantize_weights(stopping, Rtn()))


# Outputs.


def spoil(b: Bench, module: str, rows: tuple[int, ...], *, before: bool = False) -> None:
    """From now on a module of the block returns (or receives) an Inf in these rows."""

    def spoilt(x: Tensor) -> Tensor:
        lo, hi = b.store.at
        x = x.clone()
        for row in rows:
            if lo <= row < hi:
                x[row - lo, 4, 2] = float("inf")
        return x

    def after(_m: nn.Module, _args: Any, output: Any) -> Any:
        return (spoilt(output[0]), *output[1:]) if isinstance(output, tuple) else spoilt(output)

    found = b.block.get_submodule(module)
    if before:
        found.register_forward_pre_hook(lambda _, args: (spoilt(args[0]), *args[1:]))
    else:
        found.register_forward_hook(after)


@pytest.mark.parametrize("cache", [False, True], ids=["plain", "cache"])
@pytest.mark.parametrize(
    ("module", "before", "culprit"),
    [
        ("mlp.down_proj", False, "the output of mlp.down_proj"),
        ("mlp.act_fn", False, "the output of mlp.act_fn"),
        ("mlp.down_proj", True, "the input of mlp.down_proj"),
        ("post_attention_layernorm", True, "the input of post_attention_layernorm"),
        ("", False, "the block's output"),
    ],
)
def test_outputs_name_the_module_and_the_rows(module: str, before: bool, culprit: str, cache: bool, bench: Callable[..., Bench]) -> None:
    """The rows of the first batch with non-finite outputs."""
    b = bench()
    if cache:
        b.solve()
    spoil(b, module, (3, 5, 6), before=before)
    with pytest.raises(NumericsError) as caught:
        b.propagate("stop", b.cache if cache else None)
    said = str(caught.value)
    assert said.startswith(f"model.layers.0: its outputs are not finite (NaN or Inf) for calibration rows 3, 5, beginning with {culprit}; ")
    assert "--dtype" in said and "--on-nonfinite skip" in said and "\n" not in said
    assert not any(m._forward_hooks or m._forward_pre_hooks for n, m in b.block.named_modules() if n != module), "checks are taken off"


def test_nonfinite_inputs_are_reported_as_such(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.poison(6, 0)
    with pytest.raises(NumericsError, match=r"for calibration row 6, beginning with the block's input;"):
        b.propagate("stop")


def test_many_rows_are_reported_as_a_count(bench: Callable[..., Bench]) -> None:
    b = bench(batch=7)
    spoil(b, "mlp", tuple(range(7)))
    with pytest.raises(NumericsError, match=r"calibration rows 0, 1, 2, 3, 4, 5 … 6 \(7 rows\), beginning with the output of mlp;"):
        b.propagate("stop")


def test_without_a_finite_token_the_job_stops(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.block.mlp.act_fn = Spoilt()  # type: ignore[union-attr]
    with pytest.raises(NumericsError, match=r"^model\.layers\.0: its outputs contain NaN or Inf for every calibration token; .*--dtype"):
        b.propagate()
    one = bench()
    for row in range(ROWS - 1):
        one.poison(row, 0)
    assert 0 < one.propagate() < ROWS * SEQLEN


def test_finite_tokens_of_another_rank_are_enough(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.block.mlp.act_fn = Spoilt()  # type: ignore[union-attr]

    class Second(OneProcess):
        """Of the first rank's tokens, 5 of 20 are lost."""

        def __init__(self) -> None:
            self.of_first = iter((5, 20))

        def number(self, share: int) -> int:
            return share + next(self.of_first)

    assert propagate(0, b.block, b.store, "model.layers.0", None, "skip", ranks=Second()) == ROWS * SEQLEN + 5


# The plan.


def test_a_plan_counts_the_copy_without_nonfinite_tokens() -> None:
    """At most one chunk of tokens of the level's widest input, in addition to the memory of the forward."""
    n, rows, seqlen = 512, 4, 3000
    reach = Reach(peak=Rows(0, 100), held=Rows(0, 100))
    block = BlockShape(
        groups=(GroupShape((LinearShape("up", n, n, 2 * n * n),), 0),),
        reach=(reach,),
        forward=Rows(0, 100),
        calls=Rows(0, 0),
        memos=(),
        weights=2 * n * n,
        stored=2 * n * n,
        largest_stored=2 * n * n,
        attention=0.0,
    )
    shape = ModelShape(
        path="layers", blocks=(block,), seqlen=seqlen, width=n, itemsize=2, vocabulary=10, embedding_row=n, rest_stored=0, rest_loaded=0
    )
    replay = {}
    for batch in (1, 4):
        for how in ("stop", "skip"):
            work = Work(rows=rows, tokens=10, scheme=lambda _: QuantScheme(), method=Gptq(), true_sequential=True, on_nonfinite=how)
            choice = Choice(on_gpu=True, tier="gpu", batch=batch, memo=False, ahead=0, beside=False)
            cost = job_cost(shape, work, choice, base=0)
            replay[batch, how] = next(p.device for p in cost.phases if p.name == "replay")
    assert replay[1, "skip"] - replay[1, "stop"] == 2 * seqlen * n
    assert replay[4, "skip"] - replay[4, "stop"] == 2 * CHUNK_TOKENS * n
