"""Runs real jobs for `ckptd drill`, strikes them, and notes what the diagnosis says."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from time import time
from typing import IO, TypeVar

import msgspec

from ckptd.agent.bench import DEVICE
from ckptd.cli.drill_ear import Ear
from ckptd.cli.drill_faults import DIED, FAULTS, Cgroup, Fault
from ckptd.cli.local_cluster import ClusterError, LocalCluster
from ckptd.cli.netns import Network
from ckptd.client import give_order
from ckptd.coordinator.diagnosis.score import Expected, Said
from ckptd.errors import CkptdError, Refused
from ckptd.keys import new_key
from ckptd.trainer.drill_messages import (
    DDP,
    STRIKE,
    End,
    Setup,
    Start,
    Strike,
    ended_path,
    log_path,
    pid_path,
    steps_path,
    struck_path,
    write,
)
from ckptd.wire import RemoveJob

NODES = ("n1", "n2", "n3", "n4")
_ARMED_S = 100.0
"""A hang time-out below this is one that was learnt from the job."""
_START_S = 120.0
_LOOK_EVERY_S = 0.2
_LEAST_PATIENCE_S = 30.0
_AFTER_S = 3.0
"""What is said is followed for so long after it was said first."""
_CONFIRM_S = 20.0
"""The second witness is given so long to confirm a hang."""
_FIRST_STEPS = 10
_HEALTHY_STEPS = 55
_LINK_BITS_PER_S = 200e6
_LINK_PAYLOAD_BYTES = 1 << 20
_PAYLOAD_BYTES = 1 << 16
_EATEN_BYTES = 48 << 20
_MOST_RANKS = 8

_T = TypeVar("_T")


@dataclass
class Run:
    """One job with one fault, and what was said about it."""

    fault: str
    kind: str
    rank: int
    ranks: int
    source: str
    step_s: float
    said: list[Said] = field(default_factory=list)
    """Everything, in order: a finding each time that it changes, and each incident."""
    suspicions: int = 0
    """Hangs that were suspected of a healthy job, and not confirmed."""
    named: Said | None = None
    """What was right first."""
    confirmed_s: float = inf
    """When the second witness had confirmed it."""
    problem: str = ""
    """Why nothing can be said of the diagnosis: the drill itself has failed."""

    @property
    def final(self) -> tuple[Said, ...]:
        """What counts: the last word, with the time when it was said first."""
        if not self.said:
            return ()
        last = self.said[-1]
        first = next(s for s in self.said if (s.kind, s.culprit) == (last.kind, last.culprit))
        return (replace(last, after_s=first.after_s, after_steps=first.after_steps),)


class Range:
    """Where drills are held: coordinator, four nodes, and a process that forks ranks."""

    def __init__(self, network: bool) -> None:
        """`network`: each node has a link of its own, of a known rate, for agents and ranks."""
        self._secrets = tempfile.TemporaryDirectory(prefix="ckptd-key-")
        self.key_file = Path(self._secrets.name) / "key"
        self.key_file.touch(0o600)
        self.key_file.write_bytes(new_key())
        self.cluster = LocalCluster(
            coordinator_flags=["--policy", "observe", "--lease", "4"],
            agent_flags=["--memory-limit", "1GiB"],
            environ={"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            key_file=self.key_file,
        )
        self.network: Network | None = None
        self.stopped = threading.Event()
        """No drill goes on."""
        try:
            if network:
                self.network = Network(len(NODES), _LINK_BITS_PER_S)
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        # Not by those links: it has to be heard when one of them breaks.
        self.cluster.start_coordinator(listen=f"ipc://{self.cluster.directory}/coordinator")
        for number, node in enumerate(NODES):
            address = f"127.0.0.{11 + number}"
            inside: list[str] = []
            if self.network is not None:
                address, inside = self.network.host(number), self.network.inside(number)
            self.cluster.start_agent(node, address=address, inside=inside)
        self.cluster.wait_for_nodes(len(NODES))
        command = [sys.executable, "-m", "ckptd.trainer.drill"]
        self._nursery = self.cluster.spawn("ranks", command, stdin=subprocess.PIPE)
        self.cluster.wait("the ranks' process", lambda: "ready" in self.cluster.log("ranks"), 120)

    def start(self, setup: Setup) -> None:
        """Start a job."""
        self._tell(Start(setup))

    def end(self, job: str) -> None:
        """Kill what is left of it; its directory says when all ranks have ended."""
        self._tell(End(job))

    def forget(self, job: str) -> bool:
        """Have the coordinator forget it, with its memory. False: it thinks that it still runs."""
        try:
            give_order(self.cluster.endpoint, self.cluster.key, RemoveJob(job))
        except Refused:
            return False
        return True

    def _tell(self, order: Start | End) -> None:
        stream: IO[bytes] | None = self._nursery.stdin
        assert stream is not None
        try:
            stream.write(msgspec.json.encode(order) + b"\n")
            stream.flush()
        except BrokenPipeError as error:
            log = self.cluster.log("ranks")
            raise ClusterError(f"the ranks' process has ended:\n{log[-3000:]}") from error

    def close(self) -> None:
        self.cluster.close()
        self._secrets.cleanup()
        if self.network is not None:
            self.network.close()

    def __enter__(self) -> "Range":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Drill:
    """One run of a fault."""

    def __init__(
        self,
        place: Range,
        fault: Fault,
        number: int,
        *,
        timing: bool,
        step_s: float,
        computes: bool = False,
    ) -> None:
        """`number` chooses the job, the rank and the moment, as a seed."""
        self._random = random.Random(f"{fault.name} {number} {timing}")
        kind = fault.jobs[(number + FAULTS.index(fault)) % len(fault.jobs)]
        ranks = _MOST_RANKS if kind == DDP and self._random.random() < 0.5 else len(NODES)
        rank = 0 if fault.oddity else self._random.randrange(ranks)
        self._place, self._fault, self._computes = place, fault, computes
        self._cluster = place.cluster
        self.run = Run(fault.name, kind, rank, ranks, "timing" if timing else "default", step_s)
        self._job = f"drill-{fault.name}-{self.run.source}-{number}"
        self._directory = self._cluster.directory / self._job
        self._ear = Ear(self._job, self.expected, self._steps_between)
        self._cgroup: Cgroup | None = None

    @property
    def node(self) -> str:
        """The node of the rank that is struck."""
        return NODES[self.run.rank * len(NODES) // self.run.ranks]

    @property
    def expected(self) -> Expected:
        """What is right to be said."""
        if not self._fault.kinds:
            return Expected()
        run, node = self.run, f"node {self.node}"
        rank = f"rank {run.rank} on {node}"
        if not self._fault.whole_node:
            return Expected(self._fault.kinds, (rank,), (run.rank,), (self.node,))
        culprits = (node, rank) if run.ranks == len(NODES) else (node,)
        return Expected(self._fault.kinds, culprits, (), (self.node,))

    def hold(self) -> Run:
        """Start the job, strike, watch, end it."""
        run = self.run
        try:
            self._start()
            self._wait("the diagnosis to know the job", self._is_ready, _START_S)
            run.step_s = self._measured_step_s()
            self._pause(self._random.uniform(0, run.step_s))
            self._strike()
            self._watch()
        except (CkptdError, OSError) as error:
            run.problem = f"{error}\n{self._ends_of_logs()}"
        finally:
            ear = self._ear
            run.said, run.named, run.suspicions = ear.said, ear.named, ear.suspicions
            run.confirmed_s = ear.confirmed_s
            self._end()
        return run

    def _start(self) -> None:
        run, fault = self.run, self._fault
        self._directory.mkdir()
        per_node = run.ranks // len(NODES)
        places = [NODES[rank // per_node] for rank in range(run.ranks)]
        network = self._place.network if fault.needs_network else None
        self._place.start(
            Setup(
                job=self._job,
                kind=run.kind,
                sockets=tuple(str(self._cluster.socket(node)) for node in places),
                directory=str(self._directory),
                step_s=run.step_s,
                timing=run.source == "timing",
                payload_bytes=_LINK_PAYLOAD_BYTES if network else _PAYLOAD_BYTES,
                namespaces=()
                if network is None
                else tuple(network.nodes[NODES.index(node)] for node in places),
                device=DEVICE if network else "",
                oddity=fault.oddity,
                loader=fault.strike == "loader",
                computes=self._computes,
            )
        )

    def _end(self) -> None:
        network = self._place.network
        if network is not None and self._fault.needs_network:
            network.limit(NODES.index(self.node), _LINK_BITS_PER_S)
        with contextlib.suppress(CkptdError):
            self._place.end(self._job)
            ends = [ended_path(self._directory, rank) for rank in range(self.run.ranks)]
            self._cluster.wait("the ranks to end", lambda: all(map(Path.exists, ends)), 20)
            self._wait("it to be forgotten", lambda: self._place.forget(self._job), 20)
        if self._cgroup is not None:
            with contextlib.suppress(OSError):
                self._cgroup.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    # Striking.

    def _strike(self) -> None:
        run, fault = self.run, self._fault
        self._ear.struck_at = time()
        if fault.needs_cgroup:
            self._cgroup = Cgroup(self._job, self._pid(), _EATEN_BYTES)
        if fault.strike:
            strike = Strike(fault.strike, run.rank, fault.seconds, fault.factor)
            write(self._directory / STRIKE, msgspec.json.encode(strike))
            path = struck_path(self._directory, run.rank)
            self._wait("the rank to be struck", path.exists, 60.0)
            self._ear.struck_at = float(path.read_text())
        elif fault.needs_network:
            assert self._place.network is not None
            rate = _LINK_BITS_PER_S / 10 if fault.is_slow else None
            self._place.network.limit(NODES.index(self.node), rate)
            self._ear.struck_at = time()
        elif fault.name == "stop":
            os.kill(self._pid(), signal.SIGSTOP)
        elif fault.name == "kill":
            os.kill(self._pid(), signal.SIGKILL)

    def _pid(self) -> int:
        return int(pid_path(self._directory, self.run.rank).read_text())

    # Watching.

    def _watch(self) -> None:
        """Until the fault was named, and for a while after that; or until patience ends."""
        run, fault = self.run, self._fault
        patience_s = max(_LEAST_PATIENCE_S, fault.patience_steps * run.step_s)
        until = time() + (patience_s if fault.kinds else _HEALTHY_STEPS * run.step_s)
        while time() < until and not self._is_said():
            self._pause(_LOOK_EVERY_S)
            self._look_when_struck()
            self._ear.listen(self._cluster.status())

    def _is_said(self) -> bool:
        """Whether nothing more is to be expected."""
        is_open = self._fault.is_confirmed and self._ear.confirmed_s == inf
        return time() - self._ear.heard_at > (_CONFIRM_S if is_open else _AFTER_S)

    def _look_when_struck(self) -> None:
        """What the rank itself says of it, once it knows."""
        stalls = self._fault.strike == "loader"
        if stalls or DIED in self._fault.kinds:
            path = (struck_path if stalls else ended_path)(self._directory, self.run.rank)
            with contextlib.suppress(FileNotFoundError):
                self._ear.struck_at = float(path.read_text())

    def _steps_between(self, since: float, until: float) -> float:
        """How many steps rank 0 made meanwhile; of a job that stands still, would have made."""
        if self._fault.is_slow:
            return sum(since < step < until for step in self._steps())
        return max(0.0, until - since) / self.run.step_s

    # Small helpers.

    def _steps(self) -> list[float]:
        try:
            lines = steps_path(self._directory).read_text().splitlines()
            return [float(line) for line in lines]
        except (OSError, ValueError):
            return []

    def _measured_step_s(self) -> float:
        steps = self._steps()[-8:]
        if len(steps) < 2:
            return self.run.step_s
        return (steps[-1] - steps[0]) / (len(steps) - 1)

    def _is_ready(self) -> bool:
        ended = [r for r in range(self.run.ranks) if ended_path(self._directory, r).exists()]
        if ended:
            raise ClusterError(f"rank {ended[0]} has ended before it was struck")
        found = self._cluster.status()["diagnosis"]["jobs"].get(self._job, {})
        if not found.get("life"):
            return False
        if self._fault.oddity == "compiles":
            return True
        if len(self._steps()) < _FIRST_STEPS:
            return False
        if self._fault.is_slow or not self._fault.kinds:
            return not found["quiet_because"]
        return bool(found["hang_timeout_s"] < _ARMED_S)

    def _wait(self, what: str, check: Callable[[], _T | None], timeout_s: float) -> _T:
        def look() -> _T | None:
            self._pause(0.0)
            return check()

        return self._cluster.wait(what, look, timeout_s)

    def _pause(self, seconds: float) -> None:
        if self._place.stopped.wait(seconds):
            raise ClusterError("the drill was stopped")

    def _ends_of_logs(self) -> str:
        parts = []
        for rank in range(self.run.ranks):
            with contextlib.suppress(OSError):
                text = log_path(self._directory, rank).read_text(errors="replace")
                parts.append(f"--- rank {rank}\n{text[-1500:]}")
        return "\n".join(parts)
