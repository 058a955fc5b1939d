"""What blocks take for every row besides hidden states: arguments computed from tokens, and extra outputs of the block before."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_ids, save_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_gptaq import interrupt
from test_out_of_memory import halvings_of, hashes, small_device
from test_own_code import _no_cache_of_modules as _no_cache_of_modules
from test_own_code import own_logits, streamed, write_toy
from torch import Tensor

import bigq
from bigq.config import JobConfig
from bigq.errors import UnsupportedModelError
from bigq.infer.options import EvalConfig
from bigq.machine.device import choose_device
from bigq.model import lookup
from bigq.model.pager import Pager
from bigq.sched.plan.inputs import plan
from bigq.sched.rows.row_values import TokenArguments
from bigq.sched.solve.nan_search import nonfinite_rows, sound_tokens
from bigq.scheme import QuantScheme

#: Twists of the toy model that stream: two compute arguments from tokens, two hand something on.
STREAMED = ("table", "first_embedding", "handed_on", "handed_on_ranks")
WIDTH, BLOCKS, VOCABULARY = 64, 4, 128

REFUSED = {
    "shifted_rows": "the arguments of block 0 depend on the tokens, and not row by row",
    "of_block": "the arguments of block 1 depend on what earlier blocks computed",
    "handed_on_late": "block 2 receives an extra output of an earlier block than the one before",
    "handed_on_scaled": "the model's own forward fails",
    "handed_on_rows": "layers.0: the output of a row depends on the other rows",
    "handed_on_flat": "layers.0: hands on something that has no part for every row",
    "handed_on_wider": "layers.2: hands on [24, 16] torch.float32 instead of [24, 8] torch.float32 besides hidden states",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("toys")

    def get(twist: str) -> Path:
        folder = root / twist
        if not folder.exists():
            write_toy(folder, twist)
            if twist == "table":
                file = folder / "model.safetensors"
                table = torch.randn(VOCABULARY, WIDTH * BLOCKS, generator=torch.Generator().manual_seed(1))
                save_file({**load_file(file), "table.weight": table}, file, metadata={"format": "pt"})
        return folder

    return get


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ids(tmp_path_factory.mktemp("ids") / "ids.safetensors", random_ids(16, 24))


def job(ids: Path, **changes: Any) -> JobConfig:
    values = {"scheme": QuantScheme(group_size=32), "calibration": str(ids), "samples": 16, "seqlen": 24, "batch": 8, "quiet": True}
    return JobConfig(**{"trust_remote_code": True, **values, **changes})


@pytest.fixture(scope="module")
def whole(toy: Callable[[str], Path], ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(twist, settings) → the output of an undisturbed job."""
    known: dict[str, Path] = {}

    def get(twist: str, **changes: Any) -> Path:
        key = f"{twist} {changes}"
        if key not in known:
            known[key] = tmp_path_factory.mktemp("whole") / "out"
            bigq.quantize(str(toy(twist)), known[key], job(ids, **changes))
        return known[key]

    return get


@pytest.mark.parametrize("twist", STREAMED)
def test_streaming_equals_the_model_s_own_forward(twist: str, toy: Callable[[str], Path]) -> None:
    rows = random_ids(3, 24)
    got = streamed(toy(twist), rows, 2)
    assert torch.equal(got, own_logits(toy(twist), rows, 2))
    assert not torch.allclose(got, own_logits(toy("none"), rows, 2))


@pytest.mark.parametrize("twist", REFUSED)
def test_what_has_no_place_among_the_rows_is_refused(twist: str, toy: Callable[[str], Path], ids: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        streamed(toy(twist), random_ids(3, 24), 2)
    assert REFUSED[twist] in str(refusal.value)
    with pytest.raises(UnsupportedModelError):
        bigq.quantize(str(toy(twist)), tmp_path / "out", job(ids))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("twist", STREAMED)
def test_the_quantized_model_is_the_one_that_was_measured(twist: str, toy: Callable[[str], Path], whole: Callable[..., Path]) -> None:
    """The output's own logits are near the source's; with the row values of another batch they would not be."""
    config = EvalConfig(data=str(save_ids(whole(twist).parent / "ids.safetensors", random_ids(4, 24, 3))), samples=4, seqlen=24)
    config = EvalConfig(data=config.data, samples=4, seqlen=24, trust_remote_code=True, quiet=True)
    found = bigq.evaluate(str(whole(twist)), config, baseline=str(toy(twist)))
    rounded = bigq.evaluate(str(whole(twist, method="rtn")), config, baseline=str(toy(twist)))
    assert found.kl is not None and rounded.kl is not None and found.kl < rounded.kl


@pytest.mark.parametrize("twist", STREAMED)
@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_every_tier_gives_the_same_bytes(
    twist: str, method: str, toy: Callable[[str], Path], whole: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    bigq.quantize(str(toy(twist)), tmp_path / "out", job(ids, method=method, activations="disk", disk=2**50))
    assert hashes(tmp_path / "out") == hashes(whole(twist, method=method))


@pytest.mark.parametrize("every", [None, 0.0], ids=["replayed", "checkpoint"])
@pytest.mark.parametrize("method", ["gptq", "gptaq"])
@pytest.mark.parametrize("twist", STREAMED)
def test_an_interrupted_job_ends_with_the_same_bytes(
    twist: str, method: str, every: float | None, toy: Callable[[str], Path], whole: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    out, config = tmp_path / "out", job(ids, method=method, checkpoint_every=every)
    interrupt(4, toy(twist), out, config)
    saved = sorted((out / ".bigq").glob("activations-*.safetensors"))
    assert bool(saved) == (every is not None)
    if saved:
        with safe_open(saved[-1], "pt") as file:
            names = {name for name in file.keys() if "handed_on" in name}  # noqa: SIM118
        expected = ["hidden_states"] if method == "gptq" else ["hidden_states", "original_hidden_states"]
        assert names == ({f"{name}.handed_on.0" for name in expected} if "handed_on" in twist else set())
    assert bigq.quantize(str(toy(twist)), out, config).resumed_blocks == 3
    assert hashes(out) == hashes(whole(twist, method=method))


@pytest.mark.parametrize("twist", ["first_embedding", "handed_on", "handed_on_ranks"])
def test_a_small_device_gives_what_its_batch_gives(
    twist: str, toy: Callable[[str], Path], whole: Callable[..., Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_device(monkeypatch, 3)
    report = bigq.quantize(str(toy(twist)), tmp_path / "out", job(ids))
    assert report.batches == (8, 4, 2)
    assert hashes(tmp_path / "out") == hashes(whole(twist, batch=2))


def test_arguments_are_computed_with_the_batch_of_the_embedding(
    toy: Callable[[str], Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed job knows it from the record, and later halvings do not change it."""
    batches: list[int] = []
    fill = TokenArguments._fill

    def watched(self: TokenArguments, block: int) -> None:
        batches.append(self.batch())
        fill(self, block)

    monkeypatch.setattr(TokenArguments, "_fill", watched)
    small_device(monkeypatch, 3, embedding=True)
    out, config = tmp_path / "out", job(ids)
    interrupt(3, toy("table"), out, config)
    assert halvings_of(out)[-1] == [0, 0, 0, 2] and set(batches) == {2}
    batches.clear()
    bigq.quantize(str(toy("table")), out, config)
    assert set(batches) == {2}


def test_large_tables_are_read_by_rows(
    toy: Callable[[str], Path], ids: Path, whole: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "TABLE_BYTES", 1)
    rows, seen = random_ids(3, 24), set[int]()
    read = Pager._rows

    def watched(self: Pager, name: str, tokens: Tensor) -> Tensor:
        if name == "table.weight":
            seen.update(tokens.tolist())
        return read(self, name, tokens)

    monkeypatch.setattr(Pager, "_rows", watched)
    with torch.no_grad():
        pager = Pager(toy("table"), device=choose_device("cpu"), trust_remote_code=True)
        with pager.rest_loaded():
            assert pager.model.get_submodule("table").weight.is_meta
    got = streamed(toy("table"), rows, 2)
    assert seen >= set(rows.unique().tolist()) and len(seen) < VOCABULARY
    monkeypatch.undo()
    assert torch.equal(got, own_logits(toy("table"), rows, 2))
    with monkeypatch.context() as patch:
        patch.setattr(lookup, "TABLE_BYTES", 1)
        shutil.copytree(toy("table"), tmp_path / "copy")  # known surveys are known by their folder
        bigq.quantize(str(tmp_path / "copy"), tmp_path / "out", job(ids))
    names = {"README.md"}  # it names the source
    made, expected = (hashes(out) for out in (tmp_path / "out", whole("table")))
    assert {k: v for k, v in made.items() if k not in names} == {k: v for k, v in expected.items() if k not in names}


def test_the_plan_counts_them(toy: Callable[[str], Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {twist: plan(str(toy(twist)), tmp_path / "out", job(ids)) for twist in ("none", *STREAMED)}
    per_row = {twist: (found.shape.of_tokens, found.shape.handed_on) for twist, found in shapes.items()}
    token = 24 * 4
    assert per_row["none"] == (0, 0)
    assert per_row["table"] == per_row["first_embedding"] == (token * WIDTH, 0)
    assert per_row["handed_on"] == (0, token * 8)
    assert per_row["handed_on_ranks"] == (0, 24 * 8 * 3)
    assert shapes["table"].shape.around.at(2) > 2 * token * WIDTH * BLOCKS
    with monkeypatch.context() as patch:
        patch.setattr(lookup, "TABLE_BYTES", 1)
        shutil.copytree(toy("table"), tmp_path / "copy")
        by_rows = plan(str(tmp_path / "copy"), tmp_path / "out", job(ids)).shape
    assert by_rows.table_row == WIDTH * BLOCKS * 4
    assert shapes["table"].shape.rest_loaded - by_rows.rest_loaded == VOCABULARY * WIDTH * BLOCKS * 4


def test_buffers_of_a_block_are_freed_with_the_store() -> None:
    closed: list[int] = []

    class Buffer:
        def put(self, lo: int, rows: Tensor) -> None: ...

        def close(self) -> None:
            closed.append(1)

    class FakeTier:
        def buffer(self, *_: Any) -> Any:
            return Buffer()

    def compute(spans: Any, block: int) -> Any:
        for lo, hi in spans:
            yield {0: torch.zeros(hi - lo, 3 + block)} | ({1: torch.zeros(hi - lo, 2)} if block == 0 else {})

    held = TokenArguments(FakeTier(), 5, lambda: 2, compute)  # type: ignore[arg-type]
    for block, expected in ((0, 0), (0, 0), (1, 2)):
        with contextlib.suppress(AttributeError, KeyError):
            held.get(block, 0, 0, 2)
        assert len(closed) == expected, block
    held.close()
    assert len(closed) == 3


def test_a_token_of_several_vectors_is_lost_once() -> None:
    hidden = torch.zeros(3, 5, 4, 8)
    hidden[1, 2, 3, 0] = hidden[1, 2, 0, 1] = hidden[2, 4, 1, 1] = float("nan")
    assert (~sound_tokens(hidden)).nonzero().tolist() == [[1, 2], [2, 4]]
    assert nonfinite_rows(hidden, 10) == "calibration rows 11, 12"
