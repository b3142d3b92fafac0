"""A real SLURM on this machine alone: munged, slurmctld and a slurmd per node, with own files and ports.

The nodes are names of this machine (`n1`, `n2`), so jobs run as they would on a cluster: a batch script on
the first node, `srun` steps over both. The daemons run as root, because SLURM's job steps change users.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

from megads.ports import free_port

NODES = ("n1", "n2")
LONGEST_SECONDS = 600.0
DAEMONS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")


def missing() -> str | None:
    """Why there can be no cluster here; None: there can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    absent = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)"
    return None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class SlurmCluster:
    """Two nodes below `directory`; `environment` makes SLURM's commands speak to them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": _path()}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for name in ("state", "log", "munge"):
            (self.directory / name).mkdir()
        # munged and SLURM refuse directories that others may write to.
        self.directory.chmod(0o755)
        (self.directory / "munge").chmod(0o755)
        self._write_configuration()
        key = self.directory / "munge" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._start(
            "munged", "--foreground", "--force", "--key-file", key, "--socket", self._socket,
            "--pid-file", key.with_name("pid"), "--seed-file", key.with_name("seed"),
            "--log-file", key.with_name("log"),
        )  # fmt: skip
        # The socket is there before munged listens.
        self.wait_for(self._munge_answers, "munged")
        self._start("slurmctld", "-D", "-i")
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        self._start(node, "-D", "-N", node, program="slurmd")
        self.wait_for(lambda: self.state_of(node) in ("idle", "mixed", "allocated"), f"{node} at work")

    def _munge_answers(self) -> bool:
        asked = ["munge", "--no-input", "--socket", str(self._socket)]
        return subprocess.run(asked, capture_output=True, check=False, timeout=60).returncode == 0

    @property
    def _socket(self) -> Path:
        return self.directory / "munge" / "socket"

    def _write_configuration(self) -> None:
        ports: set[int] = set()
        while len(ports) < 1 + len(NODES):
            ports.add(free_port())
        controller, *daemons = ports
        host = socket.gethostname()
        lines = [
            "ClusterName=megads",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={controller}",
            "SlurmUser=root",
            "AuthType=auth/munge",
            # A requeued job must outwait the credentials of a job: 20 s instead of 120, and a launch may take
            # that long.
            f"AuthInfo=socket={self._socket},cred_expire=20",
            # The ranks meet at a port that follows from the number of the job: two clusters on this machine
            # must not have the same ones.
            f"FirstJobId={100 * random.SystemRandom().randrange(1, 600_000)}",
            f"StateSaveLocation={self.directory}/state",
            f"SlurmdSpoolDir={self.directory}/spool-%n",
            f"SlurmctldPidFile={self.directory}/slurmctld.pid",
            f"SlurmdPidFile={self.directory}/slurmd-%n.pid",
            f"SlurmctldLogFile={self.directory}/log/slurmctld",
            f"SlurmdLogFile={self.directory}/log/slurmd-%n",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "SwitchType=switch/none",
            "JobAcctGatherType=jobacct_gather/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "ReturnToService=2",
            # On a busy machine nothing is lost for being late.
            "SlurmdTimeout=300",
            "MessageTimeout=60",
            "TCPTimeout=30",
            "BatchStartTimeout=120",
            "InactiveLimit=0",
            "KillWait=120",
            # A slow machine may take a minute longer than the time limit to save.
            "OverTimeLimit=1",
            "SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=5",
        ]
        lines += [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000"
            for node, port in zip(NODES, daemons, strict=True)
        ]
        lines += [f"PartitionName=debug Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP"]
        Path(self.environment["SLURM_CONF"]).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _start(self, name: str, *arguments: object, program: str | None = None) -> None:
        with (self.directory / "log" / f"{name}.out").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [program or name, *map(str, arguments)],
                env=os.environ | self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def command(self, *words: object) -> str:
        """What one of SLURM's commands prints; it must succeed."""
        done = subprocess.run(
            [str(word) for word in words], env=os.environ | self.environment, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def state_of(self, node: str) -> str:
        done = subprocess.run(
            ["sinfo", "--noheader", "--nodes", node, "--format", "%T"],
            env=os.environ | self.environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.command("scontrol", "show", "job", "--oneliner", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, job_id: str, *states: str) -> dict[str, str]:
        """Wait until the job is in one of `states`; it must not end in another one."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}

        def reached() -> bool:
            state = self.job(job_id)["JobState"]
            assert state in states or state not in ends, f"job {job_id} is {state}"
            return state in states

        self.wait_for(reached, f"job {job_id} {' or '.join(states)}")
        return self.job(job_id)

    @contextlib.contextmanager
    def nothing_starts(self) -> Iterator[None]:
        """Jobs wait in the queue meanwhile, also those that come back to it; those that run go on."""
        self.command("scontrol", "update", "PartitionName=debug", "State=DOWN")
        yield
        self.command("scontrol", "update", "PartitionName=debug", "State=UP")

    def wait_for_restart(self, job_id: str) -> None:
        self.wait_for(lambda: int(self.job(job_id)["Restarts"]) > 0, f"the requeue of job {job_id}")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LONGEST_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for: {what}"
            time.sleep(0.2)

    def kill_node(self, node: str) -> None:
        """What a power failure does: the daemon and all that it started are gone at once, and SLURM, which
        would find out after SlurmdTimeout, is told so.
        """
        daemon = psutil.Process(self._running.pop(node).pid)
        # Jobs and their keepers (slurmstepd) are no children of the daemon; what they run knows its node.
        victims = [daemon, *daemon.children(recursive=True), *self._steps_of(node)]
        _kill(victims)
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")

    def _steps_of(self, node: str) -> Iterable[psutil.Process]:
        for process in psutil.process_iter(["environ"]):
            environment = process.info["environ"] or {}
            if environment.get("SLURMD_NODENAME") == node and self._is_ours(environment):
                yield process
                with contextlib.suppress(psutil.NoSuchProcess):  # it may end meanwhile
                    parent = process.parent()
                    if parent is not None and parent.name() == "slurmstepd":
                        yield parent

    def _is_ours(self, environment: dict[str, str]) -> bool:
        return environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]

    def processes_of_jobs(self) -> list[psutil.Process]:
        """What jobs have left running on any node."""
        found = psutil.process_iter(["environ"])
        return [
            process
            for process in found
            if "SLURM_JOB_ID" in (process.info["environ"] or {}) and self._is_ours(process.info["environ"])
        ]

    def stop(self) -> None:
        subprocess.run(
            ["scancel", "--user", "root"], env=os.environ | self.environment, check=False, timeout=120
        )
        deadline = time.monotonic() + 10
        while self.processes_of_jobs() and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        _kill(self.processes_of_jobs())


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
