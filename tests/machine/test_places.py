"""A process's place among others, its share of the work, and the watch over the others, on a store that needs no network."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import pytest

from bigq.errors import RankLostError, Stopped, UsageError
from bigq.machine import rank_watch
from bigq.machine.rank_watch import RankWatch
from bigq.machine.ranks import OneProcess, Place, place_of, share

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}


def test_places_of_launchers() -> None:
    place = Place(index=3, count=4, local=1, local_count=2, address="n1", port=29500)
    assert place_of(SRUN) == place
    assert place_of(TORCHRUN) == Place(index=3, count=4, local=1, local_count=2, address="n1", port=29500, agent=True, attempt=2)
    assert place_of(TORCHRUN | SRUN) == place_of(TORCHRUN), "torchrun under srun"
    for tasks in ("2,1", "1(x2),2", "1,2,1"):  # where Slurm gives a node as many as it has room for
        assert place_of(SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks}) == place


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        # A batch script of Slurm, and the shell of salloc, are no steps: there srun starts the processes.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_a_process_alone(environment: dict[str, str]) -> None:
    assert place_of(environment) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "4"}, "RANK=4, WORLD_SIZE=4: there is no such process"),
        ({"RANK": "one"}, "RANK='one': not a number"),
        ({"LOCAL_RANK": "2"}, "there is no such process"),
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE='': not a number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT='': not a number"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        place_of(TORCHRUN | changes)
    assert place_of({name: value for name, value in TORCHRUN.items() if name != "WORLD_SIZE"}) is None, "as advised"


@pytest.mark.parametrize(("count", "ranks"), [(8, 3), (2, 2), (7, 8), (100, 7)])
def test_shares_are_all_of_it_and_alike(count: int, ranks: int) -> None:
    parts = [share(count, rank, ranks) for rank in range(ranks)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert OneProcess().rows(count) == range(count)


class Table:
    """A store that threads share. answers: cleared while it leaves requests without an answer."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.reachable = True
        self.answers = threading.Event()
        self.answers.set()
        self._lock = threading.Lock()

    def _open(self) -> dict[str, str]:
        self.answers.wait()
        if not self.reachable:
            raise RuntimeError("Connection reset by peer")
        return self.values

    def set(self, key: str, value: str) -> None:
        self._open()[key] = value

    def get(self, key: str) -> bytes:
        return self._open()[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self._open() for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        with self._lock:
            return self._open().setdefault(key, value).encode()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Short times; and the codes that processes would have ended with."""
    for name, seconds in (("BEAT", 0.01), ("SILENCE", 0.3), ("PATIENCE", 0.1)):
        monkeypatch.setattr(rank_watch, name, seconds)
    codes: list[int] = []
    monkeypatch.setattr(rank_watch.os, "_exit", codes.append)
    return codes


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("code", [75, 99])
def test_a_silent_rank_ends_the_others_and_one_line_names_it(code: int, ended: list[int]) -> None:
    """With the code that the scheduler expects (``--exit-code-on-stop``)."""
    table, said = Table(), list[str]()
    watches = [RankWatch(table, rank, 3, f"host{rank}", said.append, code) for rank in range(3)]
    with watches[0].watching(), watches[1].watching():  # rank 2 never beats
        until(lambda: len(ended) == 2)
    assert ended == [code, code]
    assert said == ["rank 2 of 3 on host2 has given no sign of life for 0.3 s; run the same command again to resume"]


def test_a_rank_that_fails_ends_the_others_with_its_code(ended: list[int]) -> None:
    table, said = Table(), list[str]()
    watches = [RankWatch(table, rank, 2, f"host{rank}", said.append) for rank in range(2)]
    with watches[0].watching():
        with contextlib.suppress(UsageError), watches[1].watching():
            until(lambda: "beat/0" in table.values)
            raise UsageError("no")
        lost = watches[0].lost("Connection closed by peer")
    assert isinstance(lost, RankLostError) and lost.exit_code == 2 and "rank 1 of 2 on host1 has ended" in str(lost)


def test_a_store_that_is_gone_was_that_of_the_first_rank(ended: list[int]) -> None:
    table, said = Table(), list[str]()
    watch = RankWatch(table, 1, 2, "host1", said.append)
    with watch.watching():
        table.reachable = False
        until(lambda: ended)
    assert ended == [75] and "rank 0 of 2 cannot be reached any more" in said[0]


def test_ranks_leave_together(ended: list[int]) -> None:
    table = Table()
    watches = [RankWatch(table, rank, 2, "host", lambda text: None) for rank in range(2)]
    with watches[0].watching(), watches[1].watching():
        first = threading.Thread(target=watches[0].leaving)
        first.start()
        time.sleep(0.1)
        assert first.is_alive(), "the second one is not done"
        watches[1].leaving()
        first.join(10)
        assert not first.is_alive()
        time.sleep(0.5)
    assert not ended, "who is done need not give a sign of life"


def test_a_store_that_does_not_answer_ends_the_process(ended: list[int]) -> None:
    """Its process is stopped, or cut off: requests wait for ever."""
    table, said = Table(), list[str]()
    watch = RankWatch(table, 1, 2, "host1", said.append)
    with watch.watching():
        until(lambda: "beat/1" in table.values)
        table.answers.clear()
        until(lambda: ended)
        table.answers.set()
    assert ended == [75] and "rank 0 of 2 cannot be reached any more" in said[0]


def test_time_in_which_this_process_was_suspended_is_not_silence(ended: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a job may be suspended together, for a night."""
    away = 0.0
    monkeypatch.setattr(rank_watch.time, "monotonic", lambda real=time.monotonic: real() + away)
    table = Table()
    watches = [RankWatch(table, rank, 2, "host", lambda text: None) for rank in range(2)]
    with watches[0].watching():
        table.set("beat/1", "1")
        until(lambda: int(table.values.get("beat/0", "0")) >= 2)
        away = 3600.0
        beats = int(table.values["beat/0"])
        until(lambda: int(table.values["beat/0"]) >= beats + 3)
        assert not ended and "failed" not in table.values
        until(lambda: ended)


def test_the_first_rank_waits_until_the_others_know_why(ended: list[int]) -> None:
    """The store ends with it."""
    table = Table()
    watches = [RankWatch(table, rank, 2, f"host{rank}", lambda text: None) for rank in range(2)]
    with watches[1].watching():
        with contextlib.suppress(UsageError), watches[0].watching():
            until(lambda: "beat/1" in table.values)
            raise UsageError("no")
        table.reachable = False
        lost = watches[1].lost("Connection closed by peer")
    assert lost.exit_code == 2 and "rank 0 of 2 on host0 has ended" in str(lost)


def test_the_end_of_the_first_rank_in_its_last_step_is_a_loss(ended: list[int]) -> None:
    """It finishes the folder while the others wait."""
    table = Table()
    watch, _ = (RankWatch(table, rank, 2, "host", lambda text: None) for rank in (1, 0))
    timer = threading.Timer(0.1, lambda: setattr(table, "reachable", False))
    timer.start()
    with pytest.raises(RankLostError, match="rank 0 of 2 cannot be reached"), watch.watching():
        watch.leaving()


def test_ranks_wait_for_each_other_until_they_are_asked_to_stop(ended: list[int]) -> None:
    table = Table()
    first = RankWatch(table, 0, 2, "host0", lambda text: None)
    with pytest.raises(TimeoutError, match="rank 1 did not come"):
        first.meet(lambda: None, time.monotonic() + 0.1)
    calls: list[None] = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise Stopped("SIGTERM")

    with first.watching():
        time.sleep(0.5)  # who has not come yet is not silent
        with pytest.raises(Stopped):
            first.meet(check, time.monotonic() + 10)
        RankWatch(table, 1, 2, "host1", lambda text: None)
        first.meet(check, time.monotonic() + 10)
    assert not ended
