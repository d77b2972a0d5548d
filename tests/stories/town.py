"""A local cluster with the stories' trainer on it."""

import json
import sys
import uuid
from pathlib import Path
from typing import Any

from ckptd.cli.local_cluster import LocalCluster

TRAINER = Path(__file__).with_name("train.py")
JOB = "story"


class Town(LocalCluster):
    """A cluster of nodes n0, n1, … that trains one job, one rank a node."""

    def __init__(
        self,
        nodes: int,
        *,
        agent_flags: tuple[str, ...] = (),
        coordinator_flags: tuple[str, ...] = (),
        key_file: Path | None = None,
    ) -> None:
        super().__init__(
            coordinator_flags=[
                *("--cell-size", "4096", "--beat", "0.2", "--lease", "1.5"),
                *coordinator_flags,
            ],
            agent_flags=["--memory-limit", "64MiB", *agent_flags],
            environ={"CKPTD_JOB": JOB, "OMP_NUM_THREADS": "1"},
            key_file=key_file,
        )
        self.nodes = [f"n{number}" for number in range(nodes)]
        self.round = 0

    def open(self) -> "Town":
        """Start the coordinator and the agents."""
        self.start_coordinator()
        for node in self.nodes:
            self.start_agent(node)
        self.wait_for_nodes(len(self.nodes))
        return self

    def train(self, *flags: str, nodes: list[str] | None = None) -> list[str]:
        """Start one rank on each node; returns the names of the trainer processes."""
        self.round += 1
        nodes = self.nodes if nodes is None else nodes
        init = f"file://{self.directory}/init-{uuid.uuid4().hex}"
        names = []
        for rank, node in enumerate(nodes):
            name = f"trainer-{self.round}-{rank}"
            environ = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(nodes)),
                "INIT": init,
                "CKPTD_AGENT": str(self.socket(node)),
            }
            self.spawn(name, [sys.executable, str(TRAINER), *flags], environ)
            names.append(name)
        return names

    def said(self, name: str) -> list[dict[str, Any]]:
        """The JSON lines that a trainer has printed."""
        found = []
        for line in self.log(name).splitlines():
            if line.startswith("{"):
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError:
                    continue  # a line that is just being written
        return found

    def event(self, name: str, event: str) -> dict[str, Any] | None:
        """The first line of this event, if there is one yet."""
        return next((line for line in self.said(name) if line.get("event") == event), None)

    def steps(self, name: str) -> dict[int, str]:
        """Digest by step."""
        return {line["step"]: line["digest"] for line in self.said(name) if "digest" in line}

    def wait_for_start(self, names: list[str]) -> int:
        """Wait until all ranks train; returns the step that they started from."""
        starts = set()
        for name in names:

            def started(name: str = name) -> dict[str, Any] | None:
                if self.processes[name].poll() is not None:
                    raise AssertionError(f"{name} has ended:\n{self.log(name)}")
                return self.event(name, "start")

            starts.add(self.wait(f"{name} to start", started, 60)["step"])
        assert len(starts) == 1, f"ranks started from different steps: {starts}"
        return starts.pop()

    def snapshot(self, state: str, after: int = 0) -> dict[str, Any] | None:
        """The newest snapshot in this state beyond step `after`."""
        for snapshot in self.job(JOB).get("snapshots", []):
            if snapshot["state"] == state and snapshot["step"] > after:
                return snapshot
        return None

    def wait_for_snapshot(self, state: str, after: int = 0) -> int:
        """Wait for one; returns its step."""
        what = f"a {state} snapshot after step {after}"
        return self.wait(what, lambda: self.snapshot(state, after), 60)["step"]

    def kill_trainers(self, names: list[str]) -> None:
        for name in names:
            self.kill(name)

    def calm_digests(self, ranks: int, steps: int) -> list[dict[int, str]]:
        """By rank, what it computes without ckptd and without faults."""
        flags = ["--plain", str(ranks), "--steps", str(steps), "--step-s", "0"]
        self.spawn("calm", [sys.executable, str(TRAINER), *flags])
        self.wait("the calm run", lambda: self.processes["calm"].poll() is not None, 100)
        assert self.processes["calm"].returncode == 0, self.log("calm")
        found: list[dict[int, str]] = [{} for _ in range(ranks)]
        for line in self.said("calm"):
            if "digest" in line:
                found[line["rank"]][line["step"]] = line["digest"]
        return found

    def check_equal(self, runs: list[list[str]]) -> int:
        """Every step that every rank ever made gave the calm run's digest; returns how many."""
        made = [[self.steps(name) for name in names] for names in runs]
        last = max(step for run in made for steps in run for step in steps)
        calm = self.calm_digests(len(runs[0]), last)
        compared = 0
        for run in made:
            for rank, steps in enumerate(run):
                for step, digest in steps.items():
                    assert calm[rank][step] == digest, f"rank {rank}, step {step} differs"
                    compared += 1
        return compared
