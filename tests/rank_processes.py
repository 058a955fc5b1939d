"""Jobs of several processes: each is forked from a server that has imported everything, and runs the command line."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

#: What a job imports.
PRELOADED = ["bigq.cli.main", "bigq.cli.job", "bigq.sched.run", "bigq.machine.process_group", "transformers.models.llama.modeling_llama"]
#: No job here takes so long, whatever happens to it.
LIMIT = 90.0


def run_rank(
    environment: Mapping[str, str],
    arguments: Sequence[str],
    told: str,
    met: str | None = None,
    *,
    small: bool = False,
    prepare: Callable[[], None] | None = None,
) -> None:
    """The main function of a process. told: the file that stderr and stdout go to. met: a file that is made once it has met the others.

    small: processes share the factorization of small matrices too, as they do of large ones. prepare: called before the command line runs.
    """
    os.environ.update(environment)
    if small:
        importlib.import_module("bigq.solver.hessian").SHARED_FROM = 1  # type: ignore[attr-defined]
    if met is not None:
        _note_meeting(Path(met))
    with open(told, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if prepare is not None:
        prepare()
    main = importlib.import_module("bigq.cli.main").main
    os._exit(main(arguments))


def _note_meeting(file: Path) -> None:
    distributed = importlib.import_module("torch.distributed")
    meet = distributed.init_process_group

    def noted(*args: object, **named: object) -> None:
        meet(*args, **named)
        file.touch()

    distributed.init_process_group = noted  # type: ignore[attr-defined]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        number: int = found.getsockname()[1]
        return number


def places(count: int) -> list[dict[str, str]]:
    """What torchrun tells the processes of one host."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


@dataclass
class Together:
    """The processes of one job. told: the file of each one's output."""

    processes: list[ForkServerProcess]
    told: list[Path]

    def ended(self, limit: float = LIMIT) -> list[int]:
        """Their exit codes, negative for signals. Fails if one of them is still there after the limit."""
        until = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for process in self.processes:
            process.kill()
        assert not hanging, f"ranks {hanging} hang: {self.texts}"
        return [code for process in self.processes if (code := process.exitcode) is not None]

    @property
    def texts(self) -> list[str]:
        return [path.read_text() if path.exists() else "" for path in self.told]


def start(
    count: int,
    arguments: Sequence[object],
    logs: Path,
    faults: Mapping[int, str] | None = None,
    prepare: Callable[[], None] | None = None,
    own: Mapping[int, Sequence[object]] | None = None,
) -> Together:
    """Start ``bigq ARGUMENTS`` in so many processes. faults: BIGQ_FAULT by rank. prepare: called in each of them first.

    own: more arguments by rank. A process that has met the others makes the file ``logs / RANK.met``.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line does, before torch is imported in the server
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    logs.mkdir(exist_ok=True)
    told = [logs / f"{rank}.txt" for rank in range(count)]
    processes = []
    for rank, place in enumerate(places(count) if count > 1 else [{}]):
        fault = (faults or {}).get(rank)
        environment = {**place, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **({"BIGQ_FAULT": fault} if fault else {})}
        words = [str(word) for word in (*arguments, *(own or {}).get(rank, ()))]
        args = (environment, words, str(told[rank]), str(logs / f"{rank}.met") if count > 1 else None)
        process = context.Process(target=run_rank, args=args, kwargs={"small": True, "prepare": prepare})
        process.start()
        processes.append(process)
    return Together(processes, told)
