"""Running a program with no more host memory than it is given, by whatever of the system's means works here.

    cgroup 2      memory.max; no swap
    cgroup 1      memory.limit_in_bytes, memory.memsw.limit_in_bytes at the same value where swap is counted
    systemd-run   a scope with MemoryMax (cgroup 2 under the hood, for those who may not make groups themselves)
    rlimit        RLIMIT_DATA, and an end to the program when a sample of its resident set exceeds the limit

Groups count page cache too: the kernel reclaims that before it kills, so a group's own peak reaches the limit in any
program that reads more files than fit, and says little; what cannot be reclaimed is sampled as ``anonymous_peak_bytes``.
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
    """name: how the limit is kept. limit: the bytes that it came out as."""

    name: str
    limit: int

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Run a command, limited from its first instruction on; options go to Popen."""

    def sample(self, pid: int) -> None:
        """Note what can only be seen while the program runs. To be called a few times a second."""

    def figures(self) -> dict[str, Any]:
        """What was seen, in bytes and counts."""

    def exceeded(self) -> bool:
        """Whether the program was killed because of the limit, as far as this limiter can tell."""

    def close(self) -> None:
        """Remove what was set up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """How a version of cgroups names things. full, kills: files and keys that count how often the limit was reached, and kills."""

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
    """What a group's files say, kept from sample to sample because a group may be gone with its program."""

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
        # Some kernels never count this: a 0 would say more than is known.
        return found | ({"times_full": self.full} if self.full else {})


class Group:
    """A control group made for one program."""

    def __init__(self, name: str, files: Files, folder: Path, limit: int) -> None:
        """Raises OSError where such a group cannot be made, or would let swap help."""
        self.name, self._folder, self._files, self._seen = name, folder, files, Seen(files)
        folder.mkdir()
        try:
            (folder / files.limit).write_text(str(limit))
            self.limit = int((folder / files.limit).read_text())
            swap = folder / files.swap
            if swap.exists():
                swap.write_text("0" if files is V2 else str(limit))
            elif _swap():
                raise OSError("the group does not limit swap, and there is some")
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
    """A scope of systemd's."""

    name = "systemd-run"

    def __init__(self, limit: int) -> None:
        """Raises OSError where systemd makes none with a memory limit here."""
        if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
            raise OSError("systemd limits memory with cgroup 2 only")
        whose = [] if os.geteuid() == 0 else ["--user"]
        self._prefix = ["systemd-run", *whose, "--scope", "--quiet", "--collect"]
        self._prefix += ["-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0", "--"]
        if subprocess.run([*self._prefix, "true"], capture_output=True, check=False, timeout=30).returncode:
            raise OSError("systemd-run makes no scope")
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
    """What is left without groups: private writable memory that may be asked for, and resident memory by samples."""

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
    """The first means that works here, or the one named. Raises OSError with every reason where none does."""
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
            raise OSError("no systemd-run")
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
    """Groups in which ours may be made: the own one, so that limits around it hold, and the top."""
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
    """Where groups are mounted that can limit memory."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, filesystem, options, *_ = line.split()
        if filesystem == kind and (kind == "cgroup2" or "memory" in options.split(",")):
            found.append(Path(place))
    return found


def _sweep(parent: Path) -> None:
    """Remove groups that a killed benchmark left behind; those in use cannot be removed."""
    for folder in parent.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _swap() -> bool:
    return len(Path("/proc/swaps").read_text().splitlines()) > 1


def _number(path: Path, key: str = "") -> int:
    """A file's number, or the one behind a key; 0 where there is none."""
    try:
        text = path.read_text()
    except OSError:
        return 0
    if not key:
        return int(text)
    table: Mapping[str, str] = dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line)
    return int(table.get(key, "0"))
