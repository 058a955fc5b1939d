"""Activation checkpoints: restored rows are right wherever a job was killed, and no error of a checkpoint ends a job."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigq import faults
from bigq.io.checksum import seal
from bigq.job.batches import Batches
from bigq.sched.rows import checkpoint as checkpoint_module
from bigq.sched.rows.checkpoint import EXPECTED_RATE, Checkpoints
from bigq.sched.rows.store import ActivationStore
from bigq.sched.rows.tiers import Tier

SHAPE = (7, 3, 5)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.disarm()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "out" / ".bigq"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Callable[..., ActivationStore]]:
    """(block, …) → a store with the inputs of the block; None: an empty one."""
    made: list[ActivationStore] = []

    def make(
        block: int | None = None,
        kind: str = "host",
        batch: int = 3,
        shape: tuple[int, int, int] = SHAPE,
        dtype: torch.dtype = torch.bfloat16,
    ) -> ActivationStore:
        new = ActivationStore(shape, dtype, Batches(batch), Tier(kind, CPU, tmp_path), lambda _: [])
        made.append(new)
        fill(new, torch.full(shape, -1.0) if block is None else hidden(block, shape), dtype)
        return new

    yield make
    for one in made:
        one.close()


def hidden(block: int, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(block))


def fill(store: ActivationStore, rows: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    for lo, hi in store.spans():
        store.put(lo, rows[lo:hi].to(dtype))


def held(store: ActivationStore) -> Tensor:
    return torch.cat([store.rows(lo, hi).clone() for lo, hi in store.spans()])


def same(store: ActivationStore, block: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    return torch.equal(held(store), hidden(block, store.shape).to(dtype))


def opened(state: Path, every: float | None = 0.0, said: list[str] | None = None) -> Checkpoints:
    return Checkpoints(state, every, ([] if said is None else said).append)


def files(state: Path) -> list[str]:
    return sorted(path.name for path in state.glob("activations-*"))


def name(block: int) -> str:
    return f"activations-{block:05d}.safetensors"


@pytest.fixture
def saved(state: Path, store: Callable[..., ActivationStore]) -> Callable[..., Path]:
    """Save the inputs of these blocks; returns the folder."""

    def save(*blocks: int) -> Path:
        checkpoints = opened(state)
        for block in blocks:
            checkpoints.save(block, store(block))
        return state

    return save


# Saving and restoring.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", ["host", "disk"])
@pytest.mark.parametrize("source", ["host", "disk"])
def test_the_same_bytes_come_back(source: str, target: str, dtype: torch.dtype, state: Path, store: Callable[..., ActivationStore]) -> None:
    """Also NaN, infinities and negative zero, from one tier to another and with another batch."""
    rows = hidden(4).to(dtype)
    rows[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    first = store(kind=source, batch=3, dtype=dtype)
    fill(first, rows, dtype)
    opened(state).save(4, first)
    second = store(kind=target, batch=5, dtype=dtype)
    said: list[str] = []
    assert opened(state, said=said).restore(4, second) == 4 and said == []
    assert torch.equal(held(second).view(torch.uint8), rows.view(torch.uint8))
    assert torch.equal(held(first).view(torch.uint8), rows.view(torch.uint8)), "saving leaves them as they are"


def test_nothing_saved_nothing_restored(state: Path, store: Callable[..., ActivationStore]) -> None:
    empty = store()
    assert opened(state).restore(5, empty) is None
    assert (held(empty) == -1).all() and list(state.iterdir()) == []


@pytest.mark.parametrize(("first", "found"), [(0, None), (2, None), (3, 3), (4, 3), (5, 5), (9, 5)], ids=lambda value: str(value))
def test_the_newest_at_or_before_the_first_missing_block_is_used(
    first: int, found: int | None, saved: Callable[..., Path], store: Callable[..., ActivationStore]
) -> None:
    said: list[str] = []
    target = store()
    assert opened(saved(1, 3, 5), said=said).restore(first, target) == found and said == []
    assert (held(target) == -1).all() if found is None else same(target, found)


def test_only_the_two_newest_are_kept(saved: Callable[..., Path]) -> None:
    state = saved(1, 2, 3, 4)
    assert files(state) == [name(3), name(4)]
    assert [entry["block"] for entry in json.loads((state / "checkpoints.json").read_text())["kept"]] == [3, 4]


def test_at_no_instant_are_there_more_than_two(state: Path, store: Callable[..., ActivationStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files count. The record never names a missing file."""
    seen: set[int] = set()

    def watch(_: str) -> None:
        record = state / "checkpoints.json"
        named = [entry["file"] for entry in json.loads(record.read_text())["kept"]] if record.exists() else []
        assert set(named) <= set(files(state))
        seen.add(len(files(state)))

    monkeypatch.setattr(faults, "point", watch)
    checkpoints = opened(state)
    for block in (1, 2, 3, 4):
        checkpoints.save(block, store(block))
    assert seen == {0, 1, 2}


def test_a_saved_checkpoint_is_not_written_again(saved: Callable[..., Path], store: Callable[..., ActivationStore]) -> None:
    state = saved(1, 2)
    before = {path.name: path.stat().st_mtime_ns for path in state.iterdir()}
    checkpoints = opened(state)
    checkpoints.add_replay_time(5.0)
    checkpoints.save(2, store(2))
    assert {path.name: path.stat().st_mtime_ns for path in state.iterdir()} == before
    assert not checkpoints.due, "and it counts as just saved"


def test_discarding_leaves_nothing(saved: Callable[..., Path], store: Callable[..., ActivationStore]) -> None:
    state = saved(1, 2)
    (state / "other.json").write_text("x")
    checkpoints = opened(state)
    checkpoints.discard()
    assert [path.name for path in state.iterdir()] == ["other.json"]
    assert opened(state).restore(9, store()) is None
    checkpoints.discard()


def test_a_folder_that_is_gone_is_discarded_too(saved: Callable[..., Path]) -> None:
    checkpoints = opened(saved(1))
    checkpoints._state.rename(checkpoints._state.with_name("away"))
    checkpoints.discard()


# When to save.


def test_due_when_replaying_would_take_too_long(state: Path, store: Callable[..., ActivationStore]) -> None:
    checkpoints = opened(state, every=60.0)
    for seconds, due in ((0.0, False), (30.0, False), (29.9, False), (0.2, True), (100.0, True)):
        checkpoints.add_replay_time(seconds)
        assert checkpoints.due is due
    checkpoints.save(3, store(3))
    assert not checkpoints.due
    checkpoints.add_replay_time(59.0)
    assert not checkpoints.due
    checkpoints.add_replay_time(1.0)
    assert checkpoints.due


def test_zero_is_after_every_block_and_none_is_never(state: Path, store: Callable[..., ActivationStore]) -> None:
    always, never = opened(state, every=0.0), opened(state, every=None)
    assert not always.due and not never.due
    for checkpoints in (always, never):
        checkpoints.add_replay_time(1e-6)
    assert always.due and not never.due
    never.save(3, store(3))
    assert list(state.iterdir()) == []


def test_saved_checkpoints_are_used_when_no_more_are_saved(saved: Callable[..., Path], store: Callable[..., ActivationStore]) -> None:
    target = store()
    assert opened(saved(2), every=None).restore(2, target) == 2 and same(target, 2)


def test_the_write_rate_is_measured(state: Path, store: Callable[..., ActivationStore], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, rows = opened(state), store(1)
    assert checkpoints.expected_seconds(rows) == pytest.approx(7 * 3 * 5 * 2 / EXPECTED_RATE)
    times = iter([100.0, 104.0])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.time, "monotonic", lambda: next(times))
        checkpoints.save(1, rows)
    size = (state / name(1)).stat().st_size
    assert checkpoints.expected_seconds(rows) == pytest.approx(4.0 * 7 * 3 * 5 * 2 / size)


# Killed.

PLACES = [
    ("checkpoint.begun", 1),
    ("file.opened", 1),  # the record, with the newest only
    ("file.renamed", 1),
    ("file.opened", 2),  # the activations
    ("shard.piece", 1),
    ("shard.piece", 2),
    ("shard.piece", 4),
    ("file.written", 2),
    ("file.synced", 2),
    ("file.renamed", 2),
    ("checkpoint.written", 1),
    ("file.opened", 3),  # the record, with the new one
    ("file.written", 3),
    ("file.renamed", 3),
    ("checkpoint.recorded", 1),
]


@pytest.mark.parametrize(("place", "count"), PLACES)
def test_killed_anywhere_the_restored_rows_are_right(
    place: str, count: int, saved: Callable[..., Path], store: Callable[..., ActivationStore]
) -> None:
    """Blocks 1 and 2 are saved when block 3 is being saved."""
    state = saved(1, 2)
    checkpoints, rows = opened(state), store(3)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        faults.arm(f"{place}:{count}")
        checkpoints.save(3, rows)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, "the place is not passed so often"
    assert len(files(state)) <= 2
    recorded = (place, count) in PLACES[-2:]
    said: list[str] = []
    target = store()
    again = opened(state, said=said)
    assert again.restore(9, target) == (3 if recorded else 2) and said == []
    assert same(target, 3 if recorded else 2)
    # And the job continues.
    again.save(3, rows)
    again.save(4, store(4))
    assert files(state) == [name(3), name(4)]
    assert opened(state).restore(9, target) == 4 and same(target, 4)


@pytest.mark.parametrize(("place", "count"), [(place, count) for place, count in PLACES if count == 1])
def test_killed_at_the_first_of_all(place: str, count: int, state: Path, store: Callable[..., ActivationStore]) -> None:
    checkpoints, rows = opened(state), store(3)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        faults.arm(f"{place}:{count}")
        checkpoints.save(3, rows)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    target = store()
    found = opened(state).restore(9, target)
    assert found == (3 if place == "checkpoint.recorded" else None)
    assert found is None or same(target, 3)
    assert len([file for file in files(state) if not file.endswith(".bigq-tmp")]) == (found is not None), "what is not recorded is removed"


# Damaged.


def _flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    there = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "last byte": _flip,
    "header": lambda path: _flip(path, 20),
    "header's length": lambda path: _flip(path, 7),
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_skipped(
    damage: Callable[[Path], Any], saved: Callable[..., Path], store: Callable[..., ActivationStore]
) -> None:
    state, said, target = saved(1, 2), list[str](), store()
    damage(state / name(2))
    checkpoints = opened(state, said=said)
    assert checkpoints.restore(9, target) == 1 and same(target, 1)
    assert any(line.startswith(f"{name(2)}: is damaged or of another shape") for line in said)
    # It prevents neither keeping the valid one nor saving its own block again.
    faults.arm("file.opened:2:ENOSPC")
    checkpoints.save(5, store(5))
    faults.disarm()
    assert opened(state).restore(9, store()) == 1
    opened(state).save(2, store(2))
    assert opened(state).restore(9, target) == 2 and same(target, 2)


def test_both_damaged_nothing_is_restored(saved: Callable[..., Path], store: Callable[..., ActivationStore]) -> None:
    state, said = saved(1, 2), list[str]()
    for block in (1, 2):
        _flip(state / name(block))
    assert opened(state, said=said).restore(9, store()) is None
    assert sum("is damaged" in line for line in said) == 2


def test_damage_that_shows_only_while_reading(
    saved: Callable[..., Path], store: Callable[..., ActivationStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the rows are in the store by then; the older checkpoint overwrites all of them."""
    state, target, said = saved(1, 2), store(), list[str]()
    read_range, calls = checkpoint_module.read_range, list[int]()

    def failing(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise checkpoint_module.ResourceError("x: reading failed: Input/output error")
        read_range(*args)

    monkeypatch.setattr(checkpoint_module, "read_range", failing)
    assert opened(state, said=said).restore(9, target) == 1 and same(target, 1)
    assert any("Input/output error" in line for line in said)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((7, 3, 6), torch.bfloat16), ((6, 3, 5), torch.bfloat16), ((7, 5, 3), torch.bfloat16), (SHAPE, torch.float16), (SHAPE, torch.float32)],
)
def test_a_checkpoint_of_another_shape_or_dtype_is_skipped(
    shape: tuple[int, int, int], dtype: torch.dtype, saved: Callable[..., Path], store: Callable[..., ActivationStore]
) -> None:
    said: list[str] = []
    target = store(shape=shape, dtype=dtype)
    assert opened(saved(2), said=said).restore(9, target) is None
    assert (held(target) == -1).all()
    assert f"holds [7, 3, 5] torch.bfloat16 instead of {list(shape)} {dtype}" in said[0]


def test_a_checkpoint_with_other_contents_is_skipped(
    saved: Callable[..., Path], store: Callable[..., ActivationStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "TENSORS", ("other",))
        state = saved(2)
    said: list[str] = []
    assert opened(state, said=said).restore(9, store()) is None and "no such tensor" in said[0]


RECORDS = {
    "empty": b"",
    "garbage": b"\x00" * 100,
    "not sealed": b'{"kept": []}\n',
    "no list": seal({}),
    "number": seal({"kept": 5}),
    "numbers": seal({"kept": [5]}),
    "other fields": seal({"kept": [{"block": 1, "file": "x"}]}),
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())
def test_a_damaged_record_names_nothing(record: bytes, saved: Callable[..., Path], store: Callable[..., ActivationStore]) -> None:
    state, said = saved(1, 2), list[str]()
    (state / "checkpoints.json").write_bytes(record)
    checkpoints = opened(state, said=said)
    assert checkpoints.restore(9, store()) is None
    assert len(said) == 1 and "checkpoints.json: is damaged or cannot be read" in said[0]
    assert files(state) == [], "what it does not name would never go"
    checkpoints.save(3, store(3))
    assert opened(state).restore(9, store()) == 3


def test_a_record_altered_in_a_byte_names_nothing(saved: Callable[..., Path], store: Callable[..., ActivationStore]) -> None:
    state = saved(2)
    record = state / "checkpoints.json"
    record.write_bytes(record.read_bytes().replace(b'"block": 2', b'"block": 1'))
    assert opened(state).restore(1, store()) is None


@pytest.mark.parametrize("place", ["record", "file"])
def test_a_disk_that_cannot_be_read_does_not_end_the_job(
    place: str, saved: Callable[..., Path], store: Callable[..., ActivationStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, said = saved(1, 2), list[str]()
    failing = {"record": "load_record", "file": "file_sha256"}[place]

    def fail(*_: Any) -> Any:
        raise checkpoint_module.ResourceError("x: cannot be read: Input/output error")

    monkeypatch.setattr(checkpoint_module, failing, fail)
    assert opened(state, said=said).restore(9, store()) is None and said


# A full disk.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize(("place", "count"), PLACES)
def test_without_room_there_is_a_word_and_the_job_goes_on(
    place: str, count: int, number: int, saved: Callable[..., Path], store: Callable[..., ActivationStore]
) -> None:
    state, said, target = saved(1, 2), list[str](), store()
    checkpoints = opened(state, every=0.0, said=said)
    checkpoints.add_replay_time(5.0)
    faults.arm(f"{place}:{count}:{errno.errorcode[number]}")
    checkpoints.save(3, store(3))
    assert len(said) == 1 and said[0].startswith("no more activation checkpoints (")
    assert said[0].endswith("; a resumed job may have to replay its finished blocks")
    assert os.strerror(number) in said[0]
    record = json.loads((state / "checkpoints.json").read_text())
    assert {entry["file"] for entry in record["kept"]} >= set(files(state)), "unused files must not take space"
    checkpoints.add_replay_time(5.0)
    assert not checkpoints.due
    before = files(state)
    checkpoints.save(4, store(4))
    assert files(state) == before and len(said) == 1
    assert opened(state).restore(9, target) in (2, 3) and (same(target, 2) or same(target, 3))


def test_a_file_size_limit(saved: Callable[..., Path], store: Callable[..., ActivationStore]) -> None:
    """Set for the process: data is written up to the limit."""
    state = saved(1, 2)
    size = (state / name(2)).stat().st_size
    checkpoints, rows, said = opened(state), store(3), list[str]()
    checkpoints._say = said.append
    pid = os.fork()
    if pid == 0:
        import resource

        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 10, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        checkpoints.save(3, rows)
        os._exit(len(said))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert files(state) == [name(2)]
    target = store()
    assert opened(state).restore(9, target) == 2 and same(target, 2)
