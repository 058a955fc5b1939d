"""A process beside the session that ends what is left when the session is killed: processes of its steps, and its work folder.

A killed program cannot clean up. The kernel ends a step with the session, but not the processes that the step started; so this
process is told of every step's process group, and acts when its input ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

#: Time for killed processes to end before the folder is deleted.
ENDING_SECONDS = 0.5


class Watcher:
    """folder: deleted if the session is killed; None deletes nothing."""

    def __init__(self, folder: Path | None) -> None:
        command = [sys.executable, "-I", str(Path(__file__).resolve()), *([] if folder is None else [str(folder)])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)

    def watch(self, group: int) -> None:
        """End this process group if the session is killed."""
        self._tell(f"{group}")

    def forget(self, group: int) -> None:
        """The group has ended; its number may belong to others from now on."""
        self._tell(f"-{group}")

    def close(self) -> None:
        self._tell("done")
        with contextlib.suppress(OSError):
            self._process.communicate()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a watcher that someone has killed does not stop the session
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()


def main() -> None:
    groups: set[int] = set()
    for line in sys.stdin:
        if line == "done\n":
            return
        number = int(line)
        groups.add(number) if number > 0 else groups.discard(-number)
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    for folder in sys.argv[1:]:
        time.sleep(ENDING_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
