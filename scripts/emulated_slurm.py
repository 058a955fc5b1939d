"""A Slurm of two nodes on one machine: munged, slurmctld and a slurmd for each node, in namespaces of their own.

Needs root and Debian's packages (22.05 was used): ``apt-get install --no-install-recommends munge slurmctld slurmd slurm-client``.
Nothing outside of its folder changes. Names of nodes resolve by an /etc/hosts that only its own processes see, and all of them end with
the process that ``enter`` starts. Each node pretends to have 16 CPUs and 4 GPUs, so that jobs for real clusters are accepted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NODES = ("n1", "n2")
GPUS = 4
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "ip")
#: Set in the namespaces.
INSIDE = "EMULATED_SLURM"
#: Seconds until a node that is silent counts as lost. Slurm's default is 300.
NODE_TIMEOUT = 30

CONF = """ClusterName=emulated
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is requeued waits until its credential has expired, by default for 120 s.
AuthInfo=socket={base}/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
SlurmdTimeout={timeout}
MinJobAge=3600
ReturnToService=2
InactiveLimit=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10
"""


def missing() -> str | None:
    """What this machine lacks, as text; None if a cluster can be started."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    packages = "munge slurmctld slurmd slurm-client iproute2 util-linux"
    return f"needs {', '.join(absent)}: apt-get install --no-install-recommends {packages}" if absent else None


def enter() -> None:
    """Run this program again in network, mount and process namespaces of its own, unless it is there. Returns only in there."""
    if os.environ.get(INSIDE) != "1":
        environment = {**os.environ, INSIDE: "1", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        spaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        sys.stdout.flush()
        os.execvpe("unshare", [*spaces, sys.executable, *sys.argv], environment)
    # Names are looked up only where there is an address that is not of the loopback network.
    for words in ("link set lo up", "addr add 10.99.0.1/32 dev lo"):
        subprocess.run(["ip", *words.split()], check=True)


def until(what: Callable[[], bool], seconds: float, name: str) -> float:
    """Wait until something holds. Returns for how many seconds it did not. Raises TimeoutError."""
    began = time.monotonic()
    while not what():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"{name}: not within {seconds:g} s")
        time.sleep(0.1)
    return time.monotonic() - began


class Cluster:
    """The cluster in an empty folder. Its processes end with this one's namespace."""

    def __init__(self, base: Path) -> None:
        self.base = base
        for name in ("state", "log", "munge"):
            (base / name).mkdir(parents=True)
        (base / "munge").chmod(0o700)
        hosts = base / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {socket.gethostname()} {' '.join(NODES)}\n")
        subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)
        key = base / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {
            "key-file": "munge/key",
            "socket": "munge.sock",
            "pid-file": "munge/pid",
            "log-file": "munge/log",
            "seed-file": "munge/seed",
        }
        _run("munged", "--force", "--num-threads=2", *(f"--{name}={base / file}" for name, file in files.items()))
        self.conf = base / "slurm.conf"
        self._write_conf()
        os.environ["SLURM_CONF"] = str(self.conf)
        _run("slurmctld", "-f", str(self.conf))
        for node in NODES:
            self.start_node(node)
        until(self._idle, 60, "nodes")

    def _idle(self) -> bool:
        try:
            return _run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * len(NODES)
        except RuntimeError:  # slurmctld does not listen yet
            return False

    def _write_conf(self) -> None:
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(len(NODES) + 1)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in sockets]
        host = socket.gethostname()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory={memory} Gres=gpu:{GPUS} State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        self.conf.write_text(CONF.format(host=host, ports=ports, base=self.base, timeout=NODE_TIMEOUT, nodes=nodes))
        for i in range(GPUS):  # Slurm counts the files of devices
            (self.base / f"gpu{i}").touch()
        devices = f"{self.base}/gpu[0-{GPUS - 1}]"
        (self.base / "gres.conf").write_text("".join(f"NodeName={node} Name=gpu File={devices}\n" for node in NODES))

    def start_node(self, node: str) -> None:
        (self.base / f"spool.{node}").mkdir(exist_ok=True)
        _run("slurmd", "-f", str(self.conf), "-N", node)

    def kill_node(self, node: str) -> int:
        """SIGKILL to a node's slurmd and to all that runs on it, as if it lost its power. Returns the number of processes."""
        slurmd = int((self.base / f"slurmd.{node}.pid").read_text())
        own = [process for process in psutil.process_iter() if _node_of(process) == node]
        parents = [parent for process in own if (parent := process.parent()) is not None and parent.name().startswith("slurmstepd")]
        pids = {slurmd, *(process.pid for process in [*own, *parents])}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def submit(self, *words: object, environment: dict[str, str] | None = None) -> str:
        """``sbatch``; returns the number of the job."""
        return _run("sbatch", "--parsable", *map(str, words), environment=environment)

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by field."""
        return dict(word.split("=", 1) for word in _run("scontrol", "show", "job", "-o", number).split() if "=" in word)

    def node(self, name: str) -> str:
        """The state of a node."""
        return _run("sinfo", "-h", "-N", "-n", name, "-p", "main", "-o", "%T").upper()

    def pids(self, node: str, word: str) -> list[int]:
        """Processes on a node that have a word among their arguments."""
        return [process.pid for process in psutil.process_iter() if _node_of(process) == node and word in process.cmdline()]


def _node_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("SLURMD_NODENAME")
    except psutil.Error:
        return None


def _run(*words: str, environment: dict[str, str] | None = None) -> str:
    """A program's output. Raises RuntimeError with what it said if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()
