"""Notices that a rank has ended or is silent, and ends this process too: its main thread may wait for that rank for ever.

Each rank writes a beat to a shared store, and watches that of the next rank. The first that finds something wrong says so in the store,
which all of them read. So within about half a minute all have ended, and one line says which rank on which host began it. Another thread
watches whether the store answers at all: if the first rank, which may hold it, is stopped or cut off, requests wait for ever.

Time in which this process itself was suspended does not count as silence of others: they may have been suspended with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from bigq.errors import RESUME, BigqError, RankLostError

#: The exit code if a rank is gone, unless another is asked for: the job can be resumed.
GONE = 75
#: Seconds between two beats.
BEAT = 1.0
#: Seconds without a beat until a rank counts as gone.
SILENCE = 20.0
#: Seconds in which a process may end by itself, once another has: it may have met the same error.
PATIENCE = 10.0


class Store(Protocol):
    """What ranks share: a small table of strings."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def compare_set(self, key: str, expected: str, value: str) -> bytes: ...


class RankWatch:
    """The watch of one rank. host: this machine's name. say: receives the line that says why this process ends.

    code: with which it ends if another one is gone. advice: what to do then.
    """

    def __init__(
        self, store: Store, index: int, count: int, host: str, say: Callable[[str], None], code: int = GONE, advice: str = RESUME
    ) -> None:
        self._store, self._index, self._count, self._say, self._code = store, index, count, say, code
        self._advice = advice
        #: The store is where the first rank is, or the launcher.
        self._first_gone: dict[str, object] = {"rank": 0, "host": "", "what": "cannot be reached any more", "code": code}
        self._ended = threading.Event()
        self._found: dict[str, object] | None = None
        self._answers = 0
        self._store.set(f"host/{index}", host)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the context is open. If it ends with an error, tell the others."""
        threads = [threading.Thread(target=run, name="ranks", daemon=True) for run in (self._watch, self._watch_store)]
        for thread in threads:
            thread.start()
        try:
            yield
        except BaseException as error:
            if not isinstance(error, RankLostError):
                code = error.exit_code if isinstance(error, BigqError) else 1
                self._declare(self._index, "has ended", code)
            self._tell()
            raise
        finally:
            self._ended.set()
            for thread in threads:  # one that waits for a silent store stays, and does nothing any more
                thread.join(2 * BEAT)

    def meet(self, check: Callable[[], None], until: float) -> None:
        """Wait until all ranks have come. check: called again and again; may raise. until: by ``time.monotonic``.

        Raises TimeoutError, RankLostError.
        """
        while not self._asked([f"host/{rank}" for rank in range(self._count)]):
            check()
            if time.monotonic() > until:
                missing = [rank for rank in range(self._count) if not self._asked([f"host/{rank}"])]
                raise TimeoutError(f"rank {', '.join(map(str, missing))} did not come")
            time.sleep(0.02)

    def leaving(self) -> None:
        """Wait until all ranks are done with what they share. Raises RankLostError."""
        try:
            self._store.set(f"done/{self._index}", "")
        except RuntimeError as error:
            raise self.lost(str(error)) from error
        while not self._asked([f"done/{rank}" for rank in range(self._count)]):
            time.sleep(0.05)

    def left(self) -> None:
        """The last use of the store, which the first rank may hold: it leaves last."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self._index}", "")
            self._wait_for("left", range(self._count), PATIENCE)

    def lost(self, why: str) -> RankLostError:
        """The error of an operation that failed since another rank is gone. Waits until it is known which. why: the operation's error."""
        deadline = time.monotonic() + SILENCE + PATIENCE
        while self._found is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._found is None:
            return RankLostError(f"the ranks have lost each other: {why.splitlines()[0]}", self._code)
        return self._error()

    def _asked(self, keys: list[str]) -> bool:
        """Whether the store has these keys. Raises RankLostError if a rank is lost."""
        if self._found is not None:
            raise self._error()
        try:
            return self._store.check(keys)
        except RuntimeError as error:
            raise self.lost(str(error)) from error

    def _error(self) -> RankLostError:
        assert self._found is not None
        return RankLostError(self._text(), int(str(self._found["code"])))

    def _watch(self) -> None:
        """Write beats, watch those of the next rank that is not done, and read what others have found."""
        beat, other, seen, silence = 0, self._following(self._index), b"", _Silence()
        while not self._ended.wait(BEAT):
            try:
                beat += 1
                self._store.set(f"beat/{self._index}", str(beat))
                while other != self._index and self._store.check([f"done/{other}"]):
                    other, seen = self._following(other), b""
                now = self._store.get(f"beat/{other}") if self._store.check([f"beat/{other}"]) else b""
                there = other != self._index and self._store.check([f"host/{other}"])
                if silence.lasts(heard=now != seen or not there) > SILENCE:
                    self._declare(other, f"has given no sign of life for {SILENCE:g} s", self._code)
                seen = now
                if self._store.check(["failed"]):
                    self._found = json.loads(self._store.get("failed"))
                    self._store.set(f"told/{self._index}", "")
                self._answers += 1
            except RuntimeError:
                self._found = self._found or self._first_gone
            if self._found is not None:
                self._end()
                return

    def _watch_store(self) -> None:
        """End this process if the store, which the first rank or the launcher holds, does not answer."""
        answers, silence = 0, _Silence()
        while self._found is None and not self._ended.wait(BEAT):
            if silence.lasts(heard=self._answers != answers) > SILENCE:
                self._found = self._found or self._first_gone
                self._end()
                return
            answers = self._answers

    def _following(self, rank: int) -> int:
        return (rank + 1) % self._count

    def _declare(self, rank: int, what: str, code: int) -> None:
        with contextlib.suppress(RuntimeError):
            key = f"host/{rank}"
            host = self._store.get(key).decode() if self._store.check([key]) else ""
            self._store.compare_set("failed", "", json.dumps({"rank": rank, "host": host, "what": what, "code": code}))

    def _tell(self) -> None:
        """Before this process ends by an error: the store ends with the first rank, so that one waits until the others know why."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"told/{self._index}", "")
            lost = None if self._found is None else self._found["rank"]
            self._wait_for("told", [rank for rank in range(self._count) if rank != lost], 5 * BEAT)

    def _wait_for(self, what: str, ranks: Sequence[int], seconds: float) -> None:
        """Let the first rank wait for others."""
        until = time.monotonic() + seconds
        while self._index == 0 and time.monotonic() < until and not self._store.check([f"{what}/{rank}" for rank in ranks]):
            time.sleep(0.02)

    def _text(self) -> str:
        assert self._found is not None
        host = f" on {self._found['host']}" if self._found["host"] else ""
        return f"rank {self._found['rank']} of {self._count}{host} {self._found['what']}; {self._advice}"

    def _end(self) -> None:
        """End this process, unless it does so by itself soon."""
        assert self._found is not None
        if self._ended.wait(PATIENCE):
            return
        first = self._found["rank"] != 0
        if self._index == (0 if first else 1):
            self._say(self._text())
        os._exit(int(str(self._found["code"])))


class _Silence:
    """How long something was not heard, in seconds in which this process ran."""

    def __init__(self) -> None:
        self._seconds, self._last = 0.0, time.monotonic()

    def lasts(self, *, heard: bool) -> float:
        """The silence until now; called about once a beat. heard: whether something was heard since the last call."""
        now = time.monotonic()
        self._seconds = 0.0 if heard else self._seconds + min(now - self._last, 2 * BEAT)
        self._last = now
        return self._seconds
