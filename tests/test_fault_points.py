"""Fault points: POINTS lists all calls in the code, an armed fault occurs once and at the right time, and invalid specs are refused."""

from __future__ import annotations

import ast
import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import bigq
from bigq import faults
from bigq.errors import UsageError

ROOT = Path(bigq.__file__).parent


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    faults.disarm()


def passed_in(source: str) -> list[str]:
    """The arguments of ``faults.point`` in a source file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "point":
            assert isinstance(node.func.value, ast.Name) and node.func.value.id == "faults", ast.unparse(node)
            assert isinstance(node.args[0], ast.Constant), f"{ast.unparse(node)} has no literal name"
            found.append(node.args[0].value)
    return found


def test_points_lists_all_calls_in_the_code() -> None:
    found = [name for path in sorted(ROOT.rglob("*.py")) for name in passed_in(path.read_text())]
    assert len(set(faults.POINTS)) == len(faults.POINTS)
    assert sorted(found) == sorted(faults.POINTS), "every point is in POINTS, and is passed in one place"


def test_nothing_happens_unless_it_is_armed() -> None:
    for name in faults.POINTS:
        faults.point(name)
    faults.arm("file.opened:1:ENOSPC")
    faults.disarm()
    faults.point("file.opened")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_fault_happens_the_count_th_time_and_once(count: int) -> None:
    faults.arm(f"file.opened:{count}:ENOSPC")
    for number in range(1, 12):
        faults.point("file.synced")
        if number == count:
            with pytest.raises(OSError, match="No space left"):
                faults.point("file.opened")
        else:
            faults.point("file.opened")


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EDQUOT", "ESTALE", "EROFS"])
def test_errors_are_those_of_the_system(name: str) -> None:
    faults.arm(f"file.written:1:{name}")
    with pytest.raises(OSError, match=r".") as caught:
        faults.point("file.written")
    assert caught.value.errno == getattr(errno, name) and caught.value.strerror == os.strerror(caught.value.errno)


def test_several_faults_of_one_list_and_of_one_point() -> None:
    faults.arm("file.opened:1:EIO, shard.piece:2:ENOSPC,file.opened:3:EROFS")
    seen = []
    for name in ("file.opened", "shard.piece", "file.opened", "shard.piece", "file.opened"):
        try:
            faults.point(name)
            seen.append(0)
        except OSError as error:
            seen.append(error.errno)
    assert seen == [errno.EIO, 0, 0, errno.ENOSPC, errno.EROFS]


def test_sleeping() -> None:
    faults.arm("file.opened:1:sleep=0.2")
    began = time.monotonic()
    faults.point("file.opened")
    assert time.monotonic() - began >= 0.2
    faults.point("file.opened")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("spec", ["file.opened", "file.opened:1", "file.opened::kill", "file.opened:1:kill"])
def test_killing(spec: str) -> None:
    pid = os.fork()
    if pid == 0:
        faults.arm(spec)
        faults.point("file.opened")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


BAD = [
    "",
    ",",
    "file.open",
    "file.opened:x",
    "file.opened:0",
    "file.opened:-1",
    "file.opened:1.5",
    "file.opened:²",
    "file.opened:1:explode",
    "file.opened:1:28",
    "file.opened:1:enospc",
    "file.opened:1:sleep=",
    "file.opened:1:sleep=x",
    "file.opened:1:sleep=-1",
    "file.opened:1:sleep=inf",
    "file.opened:1:sleep=nan",
    "file.opened:1:kill:again",
    "file.opened:1:EIO,",
    "file.opened:1:EIO,nonsense",
]


@pytest.mark.parametrize("spec", BAD)
def test_an_invalid_spec_is_refused_and_arms_nothing(spec: str) -> None:
    with pytest.raises(UsageError, match=r"is not NAME\[:COUNT\[:ACTION\]\] with a valid action and a NAME of lock\.taken,") as caught:
        faults.arm(spec)
    assert str(caught.value).startswith(f"BIGQ_FAULT={spec}: ") and "\n" not in str(caught.value)
    for name in faults.POINTS:
        faults.point(name)
