"""Notices that a rank has ended or is silent, and ends this process too: its main thread may wait for that rank for ever.

Each rank writes a beat to a shared store, and watches that of the next rank. The first that finds something wrong says so in the store,
which all of them read. So within about half a minute all have ended, and one line says which rank on which host began it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from bigq.errors import BigqError, RankLostError

#: The exit code if a rank is gone: the job can be resumed.
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
    """The watch of one rank. host: this machine's name. say: receives the line that says why this process ends."""

    def __init__(self, store: Store, index: int, count: int, host: str, say: Callable[[str], None]) -> None:
        self._store, self._index, self._count, self._say = store, index, count, say
        self._next = (index + 1) % count
        self._leaving = threading.Event()
        self._ended = threading.Event()
        self._found: dict[str, object] | None = None
        self._store.set(f"host/{index}", host)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the context is open. If it ends with an error, tell the others."""
        thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            if not isinstance(error, RankLostError):
                code = error.exit_code if isinstance(error, BigqError) else 1
                self._declare(self._index, "has ended", code)
            raise
        finally:
            self._ended.set()
            thread.join()

    def leaving(self) -> None:
        """Wait until all ranks are done with what they share."""
        self._leaving.set()
        with contextlib.suppress(RuntimeError):  # the first rank, which may hold the store, has left before
            self._store.set(f"done/{self._index}", "")
            while self._found is None and not self._store.check([f"done/{rank}" for rank in range(self._count)]):
                time.sleep(0.05)
        if self._found is not None:
            raise self._error()

    def left(self) -> None:
        """The last use of the store, which the first rank may hold: it leaves last."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self._index}", "")
            until = time.monotonic() + PATIENCE
            while self._index == 0 and time.monotonic() < until and not self._store.check([f"left/{rank}" for rank in range(self._count)]):
                time.sleep(0.02)

    def lost(self, why: str) -> RankLostError:
        """The error of an operation that failed since another rank is gone. Waits until it is known which. why: the operation's error."""
        deadline = time.monotonic() + SILENCE + PATIENCE
        while self._found is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._ended.set()
        return RankLostError(f"the ranks have lost each other: {why.splitlines()[0]}") if self._found is None else self._error()

    def _error(self) -> RankLostError:
        assert self._found is not None
        return RankLostError(self._text(), int(str(self._found["code"])))

    def _watch(self) -> None:
        beat, seen, since = 0, b"", time.monotonic()
        while not self._ended.wait(BEAT):
            try:
                beat += 1
                self._store.set(f"beat/{self._index}", str(beat))
                if self._store.check([f"beat/{self._next}"]) and (now := self._store.get(f"beat/{self._next}")) != seen:
                    seen, since = now, time.monotonic()
                gone = time.monotonic() - since > SILENCE and not self._store.check([f"done/{self._next}"])
                if gone:
                    self._declare(self._next, f"has given no sign of life for {SILENCE:g} s", GONE)
                if self._store.check(["failed"]):
                    self._found = json.loads(self._store.get("failed"))
            except RuntimeError:
                # The store is where the first rank is, or the launcher.
                if self._leaving.is_set():
                    return
                self._found = {"rank": 0, "host": "", "what": "cannot be reached any more", "code": GONE}
            if self._found is not None:
                self._end()
                return

    def _declare(self, rank: int, what: str, code: int) -> None:
        with contextlib.suppress(RuntimeError):
            key = f"host/{rank}"
            host = self._store.get(key).decode() if self._store.check([key]) else ""
            self._store.compare_set("failed", "", json.dumps({"rank": rank, "host": host, "what": what, "code": code}))

    def _text(self) -> str:
        assert self._found is not None
        host = f" on {self._found['host']}" if self._found["host"] else ""
        return f"rank {self._found['rank']} of {self._count}{host} {self._found['what']}; run the same command again to resume"

    def _end(self) -> None:
        """End this process, unless it does so by itself soon."""
        assert self._found is not None
        if self._ended.wait(PATIENCE):
            return
        first = self._found["rank"] != 0
        if self._index == (0 if first else 1):
            self._say(self._text())
        os._exit(int(str(self._found["code"])))
