"""A Slurm cluster of one node: munged, slurmctld and slurmd on the loopback address, in a folder of their own."""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
_CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 CPUs=16 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    """Debian keeps daemons where only root's PATH leads."""
    return f"{os.environ['PATH']}:/usr/sbin"


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs. Commands find it by `variables`."""

    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}

    def call(self, *command: str) -> str:
        """What a command of Slurm prints; it must succeed."""
        environment = os.environ | self.variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def states(self, job: str) -> dict[int, str]:
        """Task -> its state, and why it waits: `RUNNING None`, `PENDING BeginTime`."""
        said = self.call("squeue", "--array", "--noheader", "--states=all", "--job", job, "--format=%K %T %r")
        rows = (line.split(maxsplit=1) for line in said.splitlines())
        return {int(task): state for task, state in rows}

    def until(self, condition: Callable[[], bool], seconds: float) -> None:
        """As tests.waiting, of what is asked of Slurm: each question is a process."""
        until(condition, seconds, every=0.2)

    def start_soon(self, task: str) -> None:
        """Of one that has been queued again, which Slurm lets wait for two minutes. Not in the second of its end: a
        node refuses what was allowed before it killed the task, by the second, and the task has then failed."""
        self.call("scontrol", "update", f"JobId={task}", "StartTime=now+2")


@contextmanager
def one_node() -> Iterator[Cluster]:
    # Not in pytest's folder: the name of a socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as daemons:
        cluster = Cluster(Path(name))
        _configure(cluster.folder)
        for command in _daemons(cluster.folder):
            daemons.enter_context(_daemon(command, cluster))
        cluster.until(lambda: _is_idle(cluster), seconds=30)
        try:
            yield cluster
        finally:
            cluster.call("scancel", "--me")
            cluster.until(lambda: not cluster.call("squeue", "--noheader"), seconds=60)


def _configure(folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = dict(zip(("controller_port", "node_port"), _free_ports(2), strict=True))
    values = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser(), "folder": folder}
    (folder / "slurm.conf").write_text(_CONFIGURATION.format(**values, **ports))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _daemons(folder: Path) -> list[list[str]]:
    """In the foreground, so that each is a child of ours."""
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "seed"}
    munge = [f"--{flag}={folder / name}" for flag, name in files.items()]
    return [
        ["munged", "--foreground", "--force", f"--log-file={folder / 'munge.log'}", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "one"],
    ]


@contextmanager
def _daemon(command: list[str], cluster: Cluster) -> Iterator[None]:
    log = cluster.folder / f"{command[0]}.out"
    environment = os.environ | cluster.variables
    program = shutil.which(command[0], path=_path())
    with log.open("wb") as file:
        running = subprocess.Popen(
            [program, *command[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        if command[0] == "munged":
            until(lambda: (cluster.folder / "munge.socket").exists() or running.poll() is not None)
        assert running.poll() is None, log.read_text()
        yield
    finally:
        running.terminate()
        running.wait(30)


def _is_idle(cluster: Cluster) -> bool:
    command, environment = ["sinfo", "--noheader", "--format=%T"], os.environ | cluster.variables
    said = subprocess.run(command, env=environment, capture_output=True, text=True)
    return said.stdout.strip() == "idle"
