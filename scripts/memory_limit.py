"""Run a program under a limit of host memory, by the first of these means that works on this machine.

    cgroup 2      memory.max; no swap
    cgroup 1      memory.limit_in_bytes, memory.memsw.limit_in_bytes at the same value if swap is counted
    systemd-run   a scope with MemoryMax (cgroup 2, for users who may not create groups)
    rlimit        RLIMIT_DATA, and SIGKILL when a sample of the resident set exceeds the limit

Groups count page cache as well. The kernel reclaims it before it kills, so the peak of a group reaches the limit in any program
that reads enough files. ``anonymous_peak_bytes`` samples the memory that cannot be reclaimed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from facts import status_bytes

PREFIX = "bigq-limit-"


class Limiter(Protocol):
    """name: how the limit is enforced. limit: the limit in bytes, as the system rounded it."""

    name: str
    limit: int

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Run a command under the limit, from its first instruction on. options: of Popen."""

    def sample(self, pid: int) -> None:
        """Record the figures that exist only while the program runs. Call it a few times a second."""

    def figures(self) -> dict[str, Any]:
        """The recorded figures: bytes and counts."""

    def exceeded(self) -> bool:
        """Whether the program was killed because of the limit, as far as this limiter can see."""

    def close(self) -> None:
        """Remove the group or scope."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The file names of a cgroup version. full, kills: files and keys that count how often the limit was reached, and the kills."""

    limit: str
    swap: str
    peak: str
    full: tuple[tuple[str, str], ...]
    kills: tuple[str, str]
    anonymous: str


V2 = Files(
    limit="memory.max",
    swap="memory.swap.max",
    peak="memory.peak",
    full=(("memory.events", "max"),),
    kills=("memory.events", "oom_kill"),
    anonymous="anon",
)
V1 = Files(
    limit="memory.limit_in_bytes",
    swap="memory.memsw.limit_in_bytes",
    peak="memory.max_usage_in_bytes",
    full=(("memory.failcnt", ""), ("memory.memsw.failcnt", "")),
    kills=("memory.oom_control", "oom_kill"),
    anonymous="total_rss",
)


class Seen:
    """The figures of a group's files. They are kept, because a group may disappear with its program."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.peak = self.anonymous = self.full = self.kills = 0

    def look(self, group: Path) -> None:
        files = self._files
        self.peak = max(self.peak, _number(group / files.peak))
        self.anonymous = max(self.anonymous, _number(group / "memory.stat", files.anonymous))
        self.full = max(self.full, sum(_number(group / name, key) for name, key in files.full))
        self.kills = max(self.kills, _number(group / files.kills[0], files.kills[1]))

    def figures(self) -> dict[str, Any]:
        found = {"group_peak_bytes": self.peak, "anonymous_peak_bytes": self.anonymous, "kills": self.kills}
        # Some kernels never count this, so 0 may mean "not known".
        return found | ({"times_full": self.full} if self.full else {})


class Group:
    """A control group for one program."""

    def __init__(self, name: str, files: Files, folder: Path, limit: int) -> None:
        """Raises OSError if the group cannot be created, or cannot limit swap."""
        self.name, self._folder, self._files, self._seen = name, folder, files, Seen(files)
        folder.mkdir()
        try:
            (folder / files.limit).write_text(str(limit))
            self.limit = int((folder / files.limit).read_text())
            swap = folder / files.swap
            if swap.exists():
                swap.write_text("0" if files is V2 else str(limit))
            elif _swap():
                raise OSError("the group does not limit swap, and swap is on")
            (folder / "cgroup.procs").read_text()
        except (OSError, ValueError):
            folder.rmdir()
            raise

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        def join() -> None:
            (self._folder / "cgroup.procs").write_text(str(os.getpid()))

        return subprocess.Popen(command, preexec_fn=join, **options)

    def sample(self, pid: int) -> None:
        self._seen.look(self._folder)

    def figures(self) -> dict[str, Any]:
        self._seen.look(self._folder)
        return self._seen.figures()

    def exceeded(self) -> bool:
        self._seen.look(self._folder)
        return self._seen.kills > 0

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._folder.rmdir()


class Scope:
    """A systemd scope."""

    name = "systemd-run"

    def __init__(self, limit: int) -> None:
        """Raises OSError if systemd cannot create a scope with a memory limit here."""
        if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
            raise OSError("systemd limits memory with cgroup 2 only")
        whose = [] if os.geteuid() == 0 else ["--user"]
        self._prefix = ["systemd-run", *whose, "--scope", "--quiet", "--collect"]
        self._prefix += ["-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0", "--"]
        if subprocess.run([*self._prefix, "true"], capture_output=True, check=False, timeout=30).returncode:
            raise OSError("systemd-run cannot create a scope")
        self.limit, self._seen = limit, Seen(V2)

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self._prefix, *command], **options)

    def sample(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            own = Path(f"/proc/{pid}/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
            if own.endswith(".scope"):
                self._seen.look(Path("/sys/fs/cgroup") / own)

    def figures(self) -> dict[str, Any]:
        return self._seen.figures()

    def exceeded(self) -> bool:
        return self._seen.kills > 0

    def close(self) -> None:
        pass


class Rlimit:
    """A limit without groups: RLIMIT_DATA bounds private writable memory, and samples bound resident memory."""

    name = "RLIMIT_DATA and sampled resident memory"

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._resident = 0

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        def confine() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (self.limit, self.limit))

        return subprocess.Popen(command, preexec_fn=confine, **options)

    def sample(self, pid: int) -> None:
        self._resident = max(self._resident, status_bytes(pid, "VmRSS"))
        if self.exceeded():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def figures(self) -> dict[str, Any]:
        return {"resident_peak_bytes": self._resident}

    def exceeded(self) -> bool:
        return self._resident > self.limit

    def close(self) -> None:
        pass


LIMITERS = ("cgroup2", "cgroup1", "systemd", "rlimit")


def make_limiter(limit: int, wanted: str = "auto") -> Limiter:
    """The first limiter that works here, or the one named ``wanted``. Raises OSError with all reasons if none works."""
    reasons = []
    for kind in LIMITERS if wanted == "auto" else (wanted,):
        try:
            return _make(kind, limit)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            reasons.append(f"{kind}: {error}")
    raise OSError("memory cannot be limited here: " + "; ".join(reasons))


def _make(kind: str, limit: int) -> Limiter:
    if kind == "rlimit":
        return Rlimit(limit)
    if kind == "systemd":
        if shutil.which("systemd-run") is None:
            raise OSError("systemd-run is not installed")
        return Scope(limit)
    files, name = (V2, "cgroup 2 (memory.max)") if kind == "cgroup2" else (V1, "cgroup 1 (memory.limit_in_bytes)")
    reasons = []
    for parent in _parents(kind):
        _sweep(parent)
        try:
            return Group(name, files, parent / f"{PREFIX}{os.getpid()}", limit)
        except (OSError, ValueError) as error:
            reasons.append(str(error))
    raise OSError("; ".join(reasons) or "not mounted")


def _parents(kind: str) -> Iterator[Path]:
    """Groups to create ours in: this process's own group, so that outer limits hold, then the top one."""
    own = dict(_memberships()).get("" if kind == "cgroup2" else "memory", "/")
    for mount in _mounts("cgroup2" if kind == "cgroup2" else "cgroup"):
        candidates = [mount / own.lstrip("/"), mount]
        yield from dict.fromkeys(folder for folder in candidates if folder.is_dir())


def _memberships() -> Iterator[tuple[str, str]]:
    """(controller, path) of the groups that this process is in; cgroup 2 under the name ""."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _mounts(kind: str) -> list[Path]:
    """Mount points of groups that can limit memory."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, filesystem, options, *_ = line.split()
        if filesystem == kind and (kind == "cgroup2" or "memory" in options.split(",")):
            found.append(Path(place))
    return found


def _sweep(parent: Path) -> None:
    """Remove groups that a killed benchmark has left; the system keeps groups that are in use."""
    for folder in parent.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _swap() -> bool:
    return len(Path("/proc/swaps").read_text().splitlines()) > 1


def _number(path: Path, key: str = "") -> int:
    """The number in a file, or the number after a key; 0 if there is none."""
    try:
        text = path.read_text()
    except OSError:
        return 0
    if not key:
        return int(text)
    table: Mapping[str, str] = dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line)
    return int(table.get(key, "0"))
