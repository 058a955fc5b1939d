"""The cache of parts: what it holds, in which order it fetches, what it gives up, and what its readers get."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bigq.errors import ResourceError
from bigq.io.byte_file import RemoteFile
from bigq.io.remote import parts
from bigq.io.remote.parts import LARGEST_PART, LEAST_CACHE, SMALLEST_PART, PartCache, part_bytes
from bigq.io.remote.ranged import Closed

MIB = 2**20


class Server:
    """Files of random bytes. asked: (file name, start, stop) in the order of requests. gate: closed, no request is answered."""

    def __init__(self, **sizes: int) -> None:
        self.contents = {name: random.Random(name).randbytes(size) for name, size in sizes.items()}
        self.asked: list[tuple[str, int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failing: set[str] = set()

    def file(self, name: str) -> RemoteFile:
        return RemoteFile(name=name, address=f"here/{name}", size=len(self.contents[name]), version="1", source=self)

    def read(self, file: RemoteFile, view: memoryview, position: int, stopped: Callable[[], bool]) -> int:
        raise AssertionError("files are read through the cache")

    def fetch(self, file: RemoteFile, start: int, stop: int, write: Callable[[bytes, int], None]) -> None:
        self.asked.append((file.name, start, stop))
        assert self.gate.wait(20)
        if file.name in self.failing:
            raise ResourceError(f"{file}: gone")
        middle = (start + stop) // 2
        for a, b in ((start, middle), (middle, stop)):
            write(self.contents[file.name][a:b], a)


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "THREADS", 2)
    monkeypatch.setattr(parts, "LARGEST_PART", MIB)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[Server, int], PartCache]]:
    caches: list[PartCache] = []

    def make(server: Server, slots: int) -> PartCache:
        caches.append(PartCache(tmp_path / "cache", slots * MIB, server.fetch))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()
    assert not list((tmp_path / "cache").iterdir())


def whole(cache: PartCache, server: Server, name: str, start: int = 0, stop: int | None = None) -> bytes:
    stop = len(server.contents[name]) if stop is None else stop
    found = bytearray(stop - start)
    done = 0
    while done < len(found):
        got = cache.read(server.file(name), memoryview(found)[done:], start + done, lambda: False)
        assert got > 0
        done += got
    return bytes(found)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_any_range_has_the_files_bytes(opened: Callable[[Server, int], PartCache]) -> None:
    server = Server(a=3 * MIB + 17, b=5)
    cache = opened(server, 3)
    for name, start, stop in (("a", 0, None), ("a", MIB - 3, 2 * MIB + 5), ("a", 3 * MIB, None), ("b", 1, 4), ("a", 10, 20)):
        assert whole(cache, server, name, start, stop) == server.contents[name][start:stop]


def test_the_file_of_the_cache_stays_within_its_limit(opened: Callable[[Server, int], PartCache], tmp_path: Path) -> None:
    server = Server(a=20 * MIB)
    cache = opened(server, 4)
    cache.follow([("s", [(server.file("a"), 0, 20 * MIB)])])
    for _ in range(2):
        assert whole(cache, server, "a") == server.contents["a"]
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) == 4 * MIB


def test_stages_are_fetched_ahead_in_their_order_while_there_is_room(opened: Callable[[Server, int], PartCache]) -> None:
    server = Server(a=3 * MIB, b=3 * MIB, c=3 * MIB)
    cache = opened(server, 5)
    files = {name: server.file(name) for name in "abc"}
    cache.follow((name, [(files[name], 0, 3 * MIB)]) for name in "bac")
    until(lambda: len(server.asked) == 5)
    assert sorted(server.asked[:3]) == [("b", i * MIB, (i + 1) * MIB) for i in range(3)]
    assert {name for name, *_ in server.asked[3:]} == {"a"}
    assert whole(cache, server, "b") == server.contents["b"]
    time.sleep(0.05)
    assert len(server.asked) == 5  # b is still needed
    cache.done("b")
    until(lambda: len(server.asked) == 8)
    assert {name for name, *_ in server.asked[5:]} == {"a", "c"}


def test_a_stage_may_read_its_parts_again_and_nothing_is_fetched_twice(opened: Callable[[Server, int], PartCache]) -> None:
    server = Server(a=8 * MIB)
    cache = opened(server, 4)
    file = server.file("a")
    cache.follow((i, [(file, 2 * i * MIB, (2 * i + 2) * MIB)]) for i in range(4))
    for i in range(4):
        for _ in range(3):
            assert whole(cache, server, "a", 2 * i * MIB, (2 * i + 2) * MIB) == server.contents["a"][2 * i * MIB : (2 * i + 2) * MIB]
        cache.done(i)
    assert sorted(server.asked) == [("a", i * MIB, (i + 1) * MIB) for i in range(8)]


def test_a_part_that_two_stages_share_stays_until_both_are_done(opened: Callable[[Server, int], PartCache]) -> None:
    server = Server(a=2 * MIB, b=4 * MIB)
    cache = opened(server, 3)
    a, b = server.file("a"), server.file("b")
    cache.follow([("one", [(a, 0, 10)]), ("two", [(a, 20, 30)]), ("three", [(b, 0, 4 * MIB)])])
    until(lambda: len(server.asked) == 3)
    cache.done("one")
    assert whole(cache, server, "a", 0, MIB) == server.contents["a"][:MIB]
    time.sleep(0.05)
    assert len(server.asked) == 3
    cache.done("two")
    until(lambda: len(server.asked) == 4)


def test_what_a_reader_waits_for_comes_before_what_is_fetched_ahead(opened: Callable[[Server, int], PartCache]) -> None:
    """It takes the place of the part that is needed last, which is fetched again in its turn."""
    server = Server(a=4 * MIB, b=MIB)
    cache = opened(server, 4)
    cache.follow([(i, [(server.file("a"), i * MIB, (i + 1) * MIB)]) for i in range(4)])
    until(lambda: sum(part.here for part in cache._parts.values()) == 4)
    assert whole(cache, server, "b") == server.contents["b"]
    assert server.asked[4] == ("b", 0, MIB)
    for i in range(3):
        assert whole(cache, server, "a", i * MIB, (i + 1) * MIB) == server.contents["a"][i * MIB : (i + 1) * MIB]
    until(lambda: len(server.asked) == 6)  # b's place is free again
    assert server.asked[5] == ("a", 3 * MIB, 4 * MIB)


def test_a_stage_that_does_not_fit_is_fetched_ahead_all_the_same(opened: Callable[[Server, int], PartCache]) -> None:
    """What was read gives way to what comes, but not to a stage that nobody reads yet."""
    server = Server(a=12 * MIB, b=MIB)
    cache = opened(server, 4)
    cache.follow([("s", [(server.file("a"), 0, 12 * MIB - 5)]), ("t", [(server.file("b"), 0, MIB)])])
    until(lambda: len(server.asked) == 4)
    for i in range(12):
        stop = min((i + 1) * MIB, 12 * MIB - 5)
        assert whole(cache, server, "a", i * MIB, stop) == server.contents["a"][i * MIB : stop]
        ahead = min(12, 4 + i + 1)
        until(lambda ahead=ahead: len(server.asked) == ahead)  # type: ignore[misc]
    time.sleep(0.05)
    assert sorted(server.asked) == [("a", i * MIB, (i + 1) * MIB) for i in range(12)]
    cache.done("s")
    until(lambda: server.asked[12:] == [("b", 0, MIB)])


def test_an_error_reaches_the_reader_and_not_those_of_other_parts(opened: Callable[[Server, int], PartCache]) -> None:
    server = Server(a=MIB, b=MIB)
    cache = opened(server, 4)
    server.failing.add("a")
    cache.follow([("s", [(server.file(name), 0, MIB) for name in "ab"])])
    for _ in range(2):
        with pytest.raises(ResourceError, match="here/a: gone"):
            whole(cache, server, "a")
    assert whole(cache, server, "b") == server.contents["b"]


def test_a_reader_that_is_not_wanted_any_more_returns(opened: Callable[[Server, int], PartCache]) -> None:
    server = Server(a=MIB)
    cache = opened(server, 4)
    server.gate.clear()
    begun = time.monotonic()
    assert cache.read(server.file("a"), memoryview(bytearray(10)), 0, lambda: time.monotonic() > begun + 0.2) == 0
    server.gate.set()
    assert whole(cache, server, "a") == server.contents["a"]


def test_closing_ends_readers(tmp_path: Path) -> None:
    server = Server(a=MIB)
    cache = PartCache(tmp_path, 4 * MIB, server.fetch)
    server.gate.clear()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            whole(cache, server, "a")
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: len(server.asked) == 1)
    closer = threading.Thread(target=cache.close)
    closer.start()
    reader.join(10)
    assert [type(error) for error in errors] == [Closed]
    server.gate.set()
    closer.join(10)
    assert not closer.is_alive() and not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_an_error_of_the_cache(opened: Callable[[Server, int], PartCache], monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(a=MIB)
    cache = opened(server, 4)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts.os, "pwrite", full)
    with pytest.raises(ResourceError, match=r"fetched.bin: cannot be written: No space left on device; .*smaller with --fetch-cache"):
        whole(cache, server, "a")


@pytest.mark.parametrize("seed", range(4))
def test_many_readers_and_stages_at_random(opened: Callable[[Server, int], PartCache], seed: int) -> None:
    """Bytes are right whatever is read, followed and done in whatever order, with hardly any room."""
    server = Server(**{name: random.Random(seed).randrange(1, 6 * MIB) for name in "abcdef"})
    cache = opened(server, 3)
    draw = random.Random(seed)
    cache.follow((name, [(server.file(name), 0, len(server.contents[name]))]) for name in draw.sample("abcdef", 6))
    wrong: list[str] = []

    def reader(own: random.Random) -> None:
        try:
            for _ in range(25):
                name = own.choice("abcdef")
                size = len(server.contents[name])
                start = own.randrange(size)
                stop = min(size, start + own.randrange(1, 2 * MIB))
                if whole(cache, server, name, start, stop) != server.contents[name][start:stop]:
                    wrong.append(name)
                if own.random() < 0.2:
                    cache.done(own.choice("abcdef"))
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=reader, args=(random.Random(1000 * seed + i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_sizes_of_parts() -> None:
    assert part_bytes(2**40) == parts.LARGEST_PART and part_bytes(LEAST_CACHE) == SMALLEST_PART
    assert LARGEST_PART == 16 * MIB and LEAST_CACHE == 32 * MIB
