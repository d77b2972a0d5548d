"""The story that `ckptd demo` tells: train, lose processes and nodes, hang, compare with calm."""

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import time
from typing import Any

import psutil

from ckptd.cli.local_cluster import ClusterError, LocalCluster

JOB = "demo"
NODES = ("n1", "n2", "n3", "n4")
SPARES = ("n5", "n6", "n7")
_STEPS_BETWEEN_FAULTS = 6
_RECOVERY_TIMEOUT_S = 120.0
_ARMED_S = 100.0
"""A hang time-out below this is one that was learnt from the job."""
_LEAST_STEP_S = 0.2
_STOPPED_S, _RUNS_S = 0.15, 0.05

Tell = Callable[[str], None]


@dataclass
class Fault:
    """One injected fault, and what became of it. Times in seconds after it was injected."""

    what: str
    at: float
    """Unix seconds."""
    noticed_s: float = 0.0
    state_back_s: float = 0.0
    training_s: float = 0.0
    steps_lost: int = 0
    resumed_from: int = 0
    rebuilt_cells: int = 0
    fetched_cells: int = 0
    named: str = ""
    """Who hangs, in the diagnosis's words, where that was to be found out."""
    equal: bool = False
    """Every loss of the life that followed is the calm run's."""


@dataclass
class Slowness:
    """A rank that was slowed down, and how it was found. Times in seconds after that began."""

    what: str
    at: float
    """Unix seconds."""
    named_s: float = 0.0
    named: str = ""
    """Who is to blame, in the diagnosis's words."""
    right: bool = False
    """It is the one that was slowed down."""


def count(number: int, what: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


@dataclass
class Losses:
    """What rank 0 logged: (time, step, loss, life) in the order of writing."""

    rows: list[tuple[float, int, float, int]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Losses":
        rows = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a line that is just being written
                if "loss" in row:
                    rows.append((row["time"], row["step"], row["loss"], row["life"]))
        return cls(rows)

    @property
    def step(self) -> int:
        return self.rows[-1][1] if self.rows else 0

    def of_life(self, life: int) -> "Losses":
        return Losses([row for row in self.rows if row[3] == life])

    def by_step(self) -> dict[int, float]:
        return {step: loss for _, step, loss, _ in self.rows}


@dataclass
class Result:
    """All that the demo found out."""

    faults: list[Fault]
    losses: Losses
    final_digest: str
    calm_digest: str
    compared_steps: int
    different_steps: list[int]
    slowness: Slowness | None = None

    @property
    def equal(self) -> bool:
        return (
            not self.different_steps
            and self.compared_steps > 0
            and self.final_digest == self.calm_digest
            and all(fault.equal for fault in self.faults)
        )

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "equal": self.equal,
            "faults": [asdict(fault) for fault in self.faults],
            "slowness": asdict(self.slowness) if self.slowness is not None else None,
            "compared_steps": self.compared_steps,
            "different_steps": self.different_steps,
            "final_digest": self.final_digest,
            "calm_digest": self.calm_digest,
        }


class Story:
    """Runs the faults against a local cluster. `tell` gets a line whenever something happens."""

    def __init__(
        self, cluster: LocalCluster, script: Path, steps: int, tell: Tell, progress: Tell
    ) -> None:
        self._cluster, self._script, self._steps = cluster, script, steps
        self._tell, self._progress = tell, progress
        self._loss_path = cluster.directory / "losses.jsonl"
        self._digest_path = cluster.directory / "digest.json"
        self._placed = list(NODES)
        """Nodes that run ranks now."""
        self.faults: list[Fault] = []
        self.slowness: Slowness | None = None

    def run(self) -> Result:
        """The whole story. Raises ClusterError, with the ends of the logs, if it gets stuck."""
        self._start()
        self._kill_trainer()
        self._stop_trainer()
        self._destroy(1)
        self._destroy(2)
        self._slow_down()
        self._wait(f"step {self._steps}", self._digest_path.exists, 60.0 + 2.0 * self._steps)
        self._tell(f"trained to step {self._steps} through {len(self.faults)} faults")
        calm_losses, calm_digest = self._calm_run()
        return self._compare(calm_losses, calm_digest)

    # The faults.

    def _start(self) -> None:
        cluster = self._cluster
        self._tell("starting a coordinator, 4 nodes and 3 spares")
        cluster.start_coordinator()
        cluster.start_rendezvous()
        for number, node in enumerate((*NODES, *SPARES)):
            spare = ["--spare"] if node in SPARES else []
            cluster.start_agent(node, *spare, address=f"127.0.0.{11 + number}")
        cluster.wait_for_nodes(len(NODES) + len(SPARES))
        arguments = self._torchrun("--nnodes=4", "--nproc-per-node=1")
        for node in NODES:
            cluster.start_launcher(node, JOB, arguments, "--timing")
        self._tell("training a byte-level transformer with FSDP2 over 4 ranks")
        self._wait_for_training(1, _STEPS_BETWEEN_FAULTS)
        for node in SPARES:
            cluster.start_launcher(node, JOB, arguments, "--timing", "--spare")
        self._wait("three spares to wait", self._spares_waiting, 60.0)

    def _kill_trainer(self) -> None:
        node = self._placed[2]
        self._wait_for_training(1, _STEPS_BETWEEN_FAULTS)
        trainer = self._trainer(node)
        fault = self._inject(f"trainer on {node} killed")
        trainer.kill()
        self._recover(fault, "rank_left", [node])

    def _stop_trainer(self) -> None:
        """It does not die, so nobody is told: only its peers, who wait, say that it hangs."""
        node = self._placed[1]
        self._wait_for_training(len(self.faults) + 1, _STEPS_BETWEEN_FAULTS)
        self._wait("diagnosis to know the job", self._is_armed)
        trainer = self._trainer(node)
        fault = self._inject(f"trainer on {node} stopped")
        trainer.send_signal(signal.SIGSTOP)
        self._wait("the hang to be found", lambda: self._of_kind("restart_ordered", fault.at))
        ordered = self._of_kind("restart_ordered", fault.at)[0]
        incidents = self._cluster.status()["incidents"]
        incident = next(one for one in incidents if one["number"] == ordered["incident"])
        fault.named = f"{incident['culprit']}: {incident['kind']}; {incident['witness']}"
        self._tell(f"  {fault.named}")
        self._tell(f"  all trainers killed after {ordered['time'] - fault.at:.1f} s, by itself")
        self._recover(fault, "restart_ordered", [])

    def _slow_down(self) -> None:
        """One rank gets a part of its processor's time only: it goes on, and all wait for it."""
        node = self._placed[1]
        self._wait_for_training(len(self.faults) + 1, _STEPS_BETWEEN_FAULTS)
        self._wait("diagnosis to know what is usual", self._has_learnt)
        trainer = self._trainer(node)
        found = self.slowness = Slowness(f"trainer on {node} slowed down", time())
        self._tell(f"✗ {found.what} at step {self._losses().step}")
        with _throttled(trainer):
            self._wait("the straggler to be named", lambda: self._stragglers(found.at))
        at, incident = self._stragglers(found.at)[0]
        found.named_s, found.named = at - found.at, incident["culprit"]
        found.right = incident["nodes"] == [node]
        self._tell(f"✓ named after {found.named_s:.1f} s: {found.named}; training went on")

    def _stragglers(self, since: float) -> list[tuple[float, dict[str, Any]]]:
        """When a rank or node was said to be slow, and the incident."""
        status = self._cluster.status()
        numbered = {incident["number"]: incident for incident in status["incidents"]}
        found = [
            (event["time"], numbered[event["incident"]])
            for event in status["events"]
            if event["kind"] == "slow" and event["time"] >= since
        ]
        # At first it may only be seen that everything is slow.
        kind = "non-communication slow"
        return [(at, one) for at, one in found if one["kind"] == kind and one["ranks"]]

    def _trainer(self, node: str) -> psutil.Process:
        trainers = self._cluster.trainers(node)
        if not trainers:
            raise ClusterError(f"no trainer runs on {node}")
        return trainers[-1]

    def _diagnosis(self) -> dict[str, Any]:
        """What diagnosis knows of the life that runs; {} if it is not that yet."""
        found: dict[str, Any] = self._cluster.status()["diagnosis"]["jobs"].get(JOB, {})
        return found if found.get("life") == len(self.faults) + 1 else {}

    def _is_armed(self) -> bool:
        return float(self._diagnosis().get("hang_timeout_s", _ARMED_S)) < _ARMED_S

    def _has_learnt(self) -> bool:
        return bool(self._diagnosis().get("quiet_because", "not yet") == "")

    def _of_kind(self, kind: str, since: float) -> list[dict[str, Any]]:
        return [event for event in self._events(since) if event["kind"] == kind]

    def _destroy(self, count: int) -> None:
        victims = self._placed[:count]
        life = len(self.faults) + 1
        self._wait_for_training(life, _STEPS_BETWEEN_FAULTS)
        names = " and ".join(victims)
        fault = self._inject(f"{'nodes' if count > 1 else 'node'} {names} destroyed")
        for node in victims:
            self._cluster.destroy_node(node)
        self._recover(fault, "node_lost", victims)
        self._placed = self._placed[count:]
        self._placed += [
            event["node"]
            for event in self._events(fault.at)
            if event["kind"] == "spare_called" and event["lost"] in victims
        ]

    def _inject(self, what: str) -> Fault:
        fault = Fault(what, time())
        self.faults.append(fault)
        self._tell(f"✗ {what} at step {self._losses().step}")
        return fault

    def _recover(self, fault: Fault, kind: str, nodes: Sequence[str]) -> None:
        life = len(self.faults) + 1
        self._wait(
            f"the loss of {', '.join(nodes)} to be noticed",
            lambda: {e.get("node") for e in self._of_kind(kind, fault.at)} >= {*nodes},
        )
        events = self._of_kind(kind, fault.at)
        noticed = [event for event in events if not nodes or event["node"] in nodes]
        fault.noticed_s = max(event["time"] for event in noticed) - fault.at
        self._tell(f"  noticed after {fault.noticed_s:.1f} s")
        self._wait(f"life {life} to train", lambda: self._losses().of_life(life).rows)
        events = self._events(fault.at)
        ready = [e for e in events if e["kind"] == "segment_ready" and e["life"] == life]
        granted = next(e for e in events if e["kind"] == "life_granted" and e["life"] == life)
        fault.resumed_from = granted["step"]
        fault.state_back_s = max(event["time"] for event in ready) - fault.at
        fault.rebuilt_cells = sum(event["rebuilt_cells"] for event in ready)
        fault.fetched_cells = sum(event["fetched_cells"] for event in ready)
        fault.training_s = self._losses().of_life(life).rows[0][0] - fault.at
        reached = self._losses().of_life(life - 1).step
        fault.steps_lost = max(0, reached - fault.resumed_from)
        how = f"{fault.rebuilt_cells} cells rebuilt" if fault.rebuilt_cells else "all in memory"
        self._tell(
            f"✓ training again after {fault.training_s:.1f} s from step {fault.resumed_from}: "
            f"{how}, {count(fault.steps_lost, 'step')} lost"
        )

    # The calm run, and comparing.

    def _calm_run(self) -> tuple[Losses, str]:
        """The same training without faults and without ckptd."""
        cluster = self._cluster
        cluster.kill_all()
        self._tell("training the same again, without faults and without ckptd")
        losses, digest = cluster.directory / "calm.jsonl", cluster.directory / "calm.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=4",
            *self._script_arguments(losses, digest),
            "--no-ckptd",
        ]
        process = cluster.spawn("calm", command, {"OMP_NUM_THREADS": "1"})

        def over() -> bool:
            self._progress(f"without ckptd: step {Losses.read(losses).step} of {self._steps}")
            return process.poll() is not None

        cluster.wait("the calm run", over, 300.0)
        if process.returncode or not digest.exists():
            raise ClusterError(f"the calm run failed:\n{cluster.log('calm')[-3000:]}")
        return Losses.read(losses), json.loads(digest.read_text())["sha256"]

    def _compare(self, calm: Losses, calm_digest: str) -> Result:
        losses = Losses.read(self._loss_path)
        expected = calm.by_step()
        different = sorted({row[1] for row in losses.rows if expected.get(row[1]) != row[2]})
        for number, fault in enumerate(self.faults):
            after = losses.of_life(number + 2).rows
            fault.equal = bool(after) and not any(row[1] in different for row in after)
        digest = json.loads(self._digest_path.read_text())["sha256"]
        return Result(
            self.faults, losses, digest, calm_digest, len(losses.rows), different, self.slowness
        )

    # Looking.

    def _torchrun(self, *flags: str) -> list[str]:
        script = self._script_arguments(self._loss_path, self._digest_path)
        # On a fast machine the steps would be over before all has been told.
        return [*flags, *script, f"--min-step-seconds={_LEAST_STEP_S}"]

    def _script_arguments(self, losses: Path, digest: Path) -> list[str]:
        return [
            str(self._script),
            f"--steps={self._steps}",
            f"--log-file={losses}",
            f"--digest={digest}",
        ]

    def _losses(self) -> Losses:
        return Losses.read(self._loss_path)

    def _events(self, since: float) -> list[dict[str, Any]]:
        return [e for e in self._cluster.status()["events"] if e["time"] >= since]

    def _spares_waiting(self) -> bool:
        nodes = self._cluster.status()["nodes"]
        return {n["node"] for n in nodes if JOB in n["waiting_launchers"]} >= {*SPARES}

    def _wait_for_training(self, life: int, steps: int) -> None:
        """Wait until `life` has made so many steps, and has a protected snapshot of its own."""

        def far_enough() -> bool:
            job = self._cluster.job(JOB)
            protected = any(
                s["life"] == life and s["state"] == "protected" for s in job.get("snapshots", [])
            )
            return protected and len(self._losses().of_life(life).rows) >= steps

        self._wait(f"{steps} steps of life {life}, protected", far_enough)

    def _wait(
        self, what: str, check: Callable[[], Any], timeout_s: float = _RECOVERY_TIMEOUT_S
    ) -> None:
        def look() -> Any:
            job = self._cluster.job(JOB)
            newest = next((s for s in job.get("snapshots", []) if "group" in s["tiers"]), None)
            self._progress(
                f"step {self._losses().step} of {self._steps}, protected: "
                f"{newest['step'] if newest else 'none yet'}; waiting for {what}"
            )
            launchers = [f"launcher-{node}" for node in self._placed]
            ended = [n for n in launchers if self._cluster.processes[n].poll() not in (None, 0)]
            if ended and not self.faults:
                raise ClusterError(f"{ended[0]} has failed:\n{self._cluster.log(ended[0])[-3000:]}")
            return check()

        self._cluster.wait(what, look, timeout_s)


@contextlib.contextmanager
def _throttled(process: psutil.Process) -> Iterator[None]:
    """The process is stopped most of the time, for moments."""
    over = threading.Event()

    def stop_and_go() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not over.is_set():
                process.send_signal(signal.SIGSTOP)
                over.wait(_STOPPED_S)
                process.send_signal(signal.SIGCONT)
                over.wait(_RUNS_S)

    thread = threading.Thread(target=stop_and_go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
