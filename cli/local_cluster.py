"""A whole cluster on this machine: every node with processes, memory and an address of its own.

For `ckptd demo` and the tests. Nothing in it is a stand-in: it runs the commands that a real
cluster runs, and kills them the way that real nodes die.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar

import psutil

from ckptd.client import ask_status
from ckptd.config import ENV_AGENT, ENV_COORDINATOR, ENV_KEEP
from ckptd.errors import CkptdError, CorruptData
from ckptd.keys import ClusterKey
from ckptd.watching import INTRODUCTION_SUFFIX, STANDBY_NAME, read_introduction

_MARK = "CKPTD_LOCAL_CLUSTER"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_T = TypeVar("_T")


class ClusterError(CkptdError):
    """Something in the local cluster did not happen in time; the message has the log's end."""


def wait_until(what: str, check: Callable[[], _T | None], timeout_s: float = 30.0) -> _T:
    """The first truthy result of `check`. Raises ClusterError after `timeout_s`."""
    deadline = monotonic() + timeout_s
    while True:
        found = check()
        if found:
            return found
        if monotonic() > deadline:
            raise ClusterError(f"waited {timeout_s:g} s in vain for {what}")
        sleep(0.05)


class LocalCluster:
    """Coordinator, agents and launchers as processes of this machine. A context manager.

    `agent_flags` and `coordinator_flags` are added to the commands. Memory lies in `memory_base`
    (tmpfs), logs and sockets in a temporary directory.
    """

    def __init__(
        self,
        *,
        coordinator_flags: Sequence[str] = (),
        agent_flags: Sequence[str] = (),
        memory_base: Path = Path("/dev/shm"),
        environ: Mapping[str, str] | None = None,
        key_file: Path | None = None,
    ) -> None:
        self.key = ClusterKey.read(key_file)
        if key_file is not None:
            key_flags = ("--key-file", str(key_file))
            coordinator_flags = (*coordinator_flags, *key_flags)
            agent_flags = (*agent_flags, *key_flags)
        self.mark = secrets.token_hex(6)
        self.directory = Path(tempfile.mkdtemp(prefix="ckptd-"))
        self.memory = memory_base / f"ckptd-{self.mark}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._coordinator_flags, self._agent_flags = list(coordinator_flags), list(agent_flags)
        self._environ = {**os.environ, **(environ or {}), _MARK: self.mark}
        self._environ["TMPDIR"] = str(self.directory)  # torchrun leaves things behind when killed
        for name in (ENV_AGENT, ENV_COORDINATOR, ENV_KEEP, "CKPTD_JOB", "CKPTD_RENDEZVOUS"):
            if name not in (environ or {}):
                self._environ.pop(name, None)
        self.endpoint = ""
        self.rendezvous = ""

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every process of the cluster, trainers included, and delete its memory."""
        self.kill_all()
        for path in self.directory.glob(f"*/*.trainers/*{INTRODUCTION_SUFFIX}"):
            with contextlib.suppress(OSError, CorruptData):  # its agent is dead, too
                ring = read_introduction(path).ring
                if ring:
                    Path(ring).unlink(missing_ok=True)
        shutil.rmtree(self.memory, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    # Daemons.

    def start_coordinator(self, *flags: str, listen: str | None = None) -> str:
        """Start it, and wait until it has bound its address; returns the address."""
        announce = self.directory / "coordinator.address"
        announce.unlink(missing_ok=True)
        self.spawn(
            "coordinator",
            [
                *_ckptd("coordinator"),
                "--listen",
                listen or self.endpoint or "tcp://127.0.0.1:*",
                "--announce",
                str(announce),
                *self._coordinator_flags,
                *flags,
            ],
        )
        self.endpoint = self._announced("coordinator", announce)
        return self.endpoint

    def start_rendezvous(self) -> str:
        """Start the launchers' store; returns its address."""
        announce = self.directory / "rendezvous.address"
        command = [*_ckptd("rendezvous"), "--listen", "127.0.0.1:0", "--announce", str(announce)]
        self.spawn("rendezvous", command)
        self.rendezvous = self._announced("rendezvous", announce)
        return self.rendezvous

    def start_agent(
        self, node: str, *flags: str, address: str = "127.0.0.1", inside: Sequence[str] = ()
    ) -> None:
        """Start the agent of `node`; does not wait for it.

        `inside`: what is put before its command, as `Network.inside` says.
        """
        self.spawn(
            f"agent-{node}",
            [
                *inside,
                *_ckptd("agent"),
                "--node",
                node,
                "--coordinator",
                self.endpoint,
                "--socket",
                str(self.socket(node)),
                "--memory-dir",
                str(self.memory_of(node)),
                "--listen",
                address,
                *self._agent_flags,
                *flags,
            ],
        )

    def start_launcher(self, node: str, job: str, arguments: Sequence[str], *flags: str) -> None:
        """`ckptd run` on `node`; `arguments` are torchrun's."""
        self.spawn(
            f"launcher-{node}",
            [
                *_ckptd("run"),
                "--job",
                job,
                "--agent",
                str(self.socket(node)),
                *(["--rendezvous", self.rendezvous] if self.rendezvous else []),
                *flags,
                "--",
                *arguments,
            ],
        )

    def spawn(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start any process as part of the cluster; its output goes to `log(name)`."""
        with self.log_path(name).open("ab") as log:
            process = subprocess.Popen(
                list(command),
                stdin=stdin,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self._environ, **(environ or {})},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.processes[name] = process
        return process

    # Looking.

    def socket(self, node: str) -> Path:
        return self.directory / node / "agent.sock"

    def memory_of(self, node: str) -> Path:
        return self.memory / node

    def log_path(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def log(self, name: str) -> str:
        """All that a process has printed."""
        path = self.log_path(name)
        return path.read_text(errors="replace") if path.exists() else ""

    def status(self) -> dict[str, Any]:
        """What the coordinator says."""
        return ask_status(self.endpoint, self.key, timeout_s=10.0)

    def job(self, job: str) -> dict[str, Any]:
        """What the coordinator says of one job; {} if it does not know it."""
        found: dict[str, Any] = next((j for j in self.status()["jobs"] if j["job"] == job), {})
        return found

    def wait_for_nodes(self, count: int, timeout_s: float = 30.0) -> None:
        """Wait until so many agents are live."""

        def there() -> bool:
            nodes = self.status()["nodes"]
            return len([node for node in nodes if node["state"] != "lost"]) >= count

        self.wait(f"{count} live agents", there, timeout_s)

    def wait(self, what: str, check: Callable[[], _T | None], timeout_s: float = 30.0) -> _T:
        """`wait_until`, with the ends of the logs in the error."""
        try:
            return wait_until(what, check, timeout_s)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self.log_ends()}") from error

    def log_ends(self, lines: int = 15) -> str:
        """The ends of all logs, for an error message."""
        parts = []
        for path in sorted(self.directory.glob("*.log")):
            end = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {path.name}\n" + "\n".join(end))
        return "\n".join(parts)

    # Killing.

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Signal one process, and wait for its end if the signal ends it."""
        process = self.processes[name]
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait(10)

    def kill_tree(self, name: str) -> None:
        """SIGKILL a process and all its descendants (torchrun's workers have their own session)."""
        process = self.processes.get(name)
        if process is None:
            return
        victims = [process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            victims += [c.pid for c in psutil.Process(process.pid).children(recursive=True)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)

    def destroy_node(self, node: str) -> None:
        """What a machine does that burns: all its processes and its memory are gone at once."""
        self.kill_tree(f"launcher-{node}")
        self.kill_tree(f"agent-{node}")
        shutil.rmtree(self.memory_of(node), ignore_errors=True)

    def trainers(self, node: str) -> list[psutil.Process]:
        """The trainer processes that the node's launcher started."""
        process = self.processes.get(f"launcher-{node}")
        if process is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            return [
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if child.is_running()
                and child.status() != psutil.STATUS_ZOMBIE
                and child.name() != STANDBY_NAME
            ]
        return []

    def kill_all(self) -> None:
        """SIGKILL every process that carries this cluster's mark, orphans included."""
        for _ in range(3):
            marked = self.members()
            for process in marked:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(marked, timeout=5)
            for popen in self.processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    popen.wait(5)
            if not marked:
                return

    def members(self) -> list[psutil.Process]:
        """Every live process of the cluster."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self.mark and process.pid != os.getpid():
                    found.append(process)
        return found

    def _announced(self, name: str, path: Path) -> str:
        def address() -> str | None:
            if self.processes[name].poll() is not None:
                raise ClusterError(f"{name} has ended:\n{self.log(name)}")
            return path.read_text().strip() if path.exists() else None

        return self.wait(f"{name} to listen", address)


def _ckptd(verb: str) -> list[str]:
    return [sys.executable, "-m", "ckptd.cli", verb]


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
