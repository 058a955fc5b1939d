"""Ranges are read to their end, whatever single requests do; patience ends in one error."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest

from bigq.errors import CheckpointError, ResourceError
from bigq.io.remote.ranged import Closed, Patience, RangeReader
from bigq.io.remote.transport import Status, Transient

DATA = bytes(range(256)) * 4
STATUS = Status(size=len(DATA), version="1")
QUICK = Patience(silence=0.3, first=0.001, longest=0.01)


class Line:
    """A transport whose answers are a script: what each request sends before it ends, or raises."""

    def __init__(self, answers: Iterator[Callable[[int, int], Iterator[bytes]]]) -> None:
        self._answers = answers
        self.asked: list[tuple[int, int]] = []

    def address(self, name: str) -> str:
        return f"far/{name}"

    def status(self, name: str) -> Status:
        for _ in self.stream(name, STATUS, 0, 0):
            pass
        return STATUS

    def stream(self, name: str, status: Status, start: int, stop: int) -> Iterator[bytes]:
        self.asked.append((start, stop))
        yield from next(self._answers)(start, stop)


def all_of_it(start: int, stop: int) -> Iterator[bytes]:
    for at in range(start, stop, 100):
        yield DATA[at : min(at + 100, stop)]


def first(count: int) -> Callable[[int, int], Iterator[bytes]]:
    return lambda start, stop: iter([DATA[start : start + count]])


def fails(error: Exception) -> Callable[[int, int], Iterator[bytes]]:
    def answer(start: int, stop: int) -> Iterator[bytes]:
        raise error
        yield b""

    return answer


def read(line: Line, start: int = 3, stop: int = 900, patience: Patience = QUICK, say: Callable[[str], None] = lambda _: None) -> bytes:
    found = bytearray()

    def write(piece: bytes, at: int) -> None:
        assert at == start + len(found)
        found.extend(piece)

    RangeReader(line, patience, say).read("f", STATUS, start, stop, write)
    return bytes(found)


def test_a_request_goes_on_where_the_one_before_ended() -> None:
    line = Line(iter([first(50), fails(Transient("reset")), first(0), all_of_it]))
    assert read(line) == DATA[3:900]
    assert line.asked == [(3, 900), (53, 900), (53, 900), (53, 900)]


def test_bytes_beyond_the_range_are_not_taken() -> None:
    line = Line(iter([lambda start, stop: iter([DATA[start : stop + 1]]), all_of_it]))
    assert read(line) == DATA[3:900]
    assert line.asked == [(3, 900), (3, 900)]


def test_patience_is_for_silence_and_not_for_slowness() -> None:
    """A server that sends one byte per request goes on; one that sends none ends in one error, with the reason and what to do."""
    assert read(Line(itertools.repeat(first(1))), 0, 900) == DATA[:900]
    line = Line(itertools.chain([first(10)], itertools.repeat(fails(Transient("the server is down")))))
    with pytest.raises(
        ResourceError, match=r"far/f: cannot be fetched: the server is down, for \d+ s; check the network, then run the same"
    ):
        read(line)
    assert len(line.asked) > 5


def test_a_silent_server_is_mentioned_once() -> None:
    said: list[str] = []
    failures = [fails(Transient("reset"))] * 20
    assert (
        read(Line(iter([*failures, all_of_it])), patience=Patience(silence=10, first=0.001, longest=0.01), say=said.append) == DATA[3:900]
    )
    assert len(said) == 1 and said[0].startswith("warning: far/f: reset; trying again for up to ")


def test_a_wait_that_the_server_asks_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: waits.append(timeout))
    read(Line(iter([fails(Transient("busy", 7.0)), fails(Transient("busy")), all_of_it])), patience=Patience(silence=100))
    assert 7.0 <= waits[0] <= 7.0 * 1.25 and 0.5 <= waits[1] <= 0.5 * 1.25


def test_pauses_grow_and_begin_anew_after_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: waits.append(timeout))
    monkeypatch.setattr("random.uniform", lambda low, high: 1.0)
    bad = fails(Transient("x"))
    read(Line(iter([bad, bad, bad, bad, first(5), bad, all_of_it])), patience=Patience(silence=1000, first=1, longest=4))
    assert waits == [1, 2, 4, 4, 1, 2]


@pytest.mark.parametrize("error", [CheckpointError("changed"), ResourceError("denied")])
def test_other_errors_end_the_reading_at_once(error: Exception) -> None:
    line = Line(iter([fails(error)]))
    with pytest.raises(type(error), match=str(error)):
        read(line)
    with pytest.raises(type(error), match=str(error)):
        RangeReader(Line(iter([fails(error)])), QUICK).status("f")


def test_status_is_asked_for_again_too() -> None:
    line = Line(iter([fails(Transient("x")), first(0)]))
    assert RangeReader(line, QUICK).status("f") == STATUS


def test_closing_ends_a_pause_and_a_stream() -> None:
    reader = RangeReader(Line(itertools.repeat(fails(Transient("x")))), Patience(silence=1000, first=500, longest=500))
    threading.Timer(0.05, reader.close).start()
    with pytest.raises(Closed):
        reader.read("f", STATUS, 0, 10, lambda *_: None)

    def closing(start: int, stop: int) -> Iterator[bytes]:
        yield DATA[:1]
        streaming.close()
        yield DATA[1:2]

    streaming = RangeReader(Line(iter([closing])), QUICK)
    found: list[bytes] = []
    with pytest.raises(Closed):
        streaming.read("f", STATUS, 0, 10, lambda piece, _: found.append(piece))
    assert found == [DATA[:1]]
