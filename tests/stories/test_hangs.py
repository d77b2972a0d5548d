"""Jobs that hang or are slow: found, named, and, where that is sure, run again by themselves."""

import os
import signal
from typing import Any

import pytest

from .town import JOB, TRAINER, Town

pytestmark = pytest.mark.timeout(300)


class Watched(Town):
    """A town whose trainers torchrun starts, and starts again."""

    def launch(self, node: str, ranks: int, *flags: str, timing: bool = False) -> None:
        evaluated = str(self.directory / "evaluated")
        self._environ["EVALUATED"] = evaluated
        arguments = ["--standalone", f"--nproc-per-node={ranks}", str(TRAINER), *flags]
        self.start_launcher(node, JOB, arguments, *(["--timing"] if timing else []))

    def launch_over(self, *flags: str) -> None:
        """One rank on each node."""
        self.start_rendezvous()
        arguments = [f"--nnodes={len(self.nodes)}", "--nproc-per-node=1", str(TRAINER), *flags]
        for node in self.nodes:
            self.start_launcher(node, JOB, arguments)

    def lines(self) -> list[dict[str, Any]]:
        return [line for node in self.nodes for line in self.said(f"launcher-{node}")]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.status()["events"] if event["kind"] == kind]

    def incidents(self) -> list[dict[str, Any]]:
        return self.status()["incidents"]

    def diagnosis(self) -> dict[str, Any]:
        return self.status()["diagnosis"]["jobs"].get(JOB, {})

    def wait_until_watched(self) -> None:
        """Until what is usual is known, and a hang would be found."""

        def armed() -> bool:
            found = self.diagnosis()
            return found.get("life") and found["hang_timeout_s"] < 100

        self.wait("the detector to know the job", armed, 60)

    def trained(self, life: int) -> bool:
        """Whether a life has got somewhere."""
        return any(line.get("event") == "start" and line["life"] == life for line in self.lines())

    def check_digests(self, ranks: int) -> int:
        """Every step that was ever made gave the calm run's digest; returns how many."""
        made = [line for line in self.lines() if "digest" in line]
        calm = self.calm_digests(ranks, max(line["step"] for line in made))
        for line in made:
            assert calm[line["rank"]][line["step"]] == line["digest"], line
        return len(made)


@pytest.fixture
def watched():
    opened: list[Watched] = []

    def make(nodes: int = 1, policy: str = "restart") -> Watched:
        flags = ("--policy", policy, "--window", "0.5")
        opened.append(Watched(nodes, coordinator_flags=flags))
        return opened[-1].open()

    yield make
    for each in opened:
        each.close()


def test_a_stopped_rank_is_named_and_killed_and_the_job_ends_equal(watched):
    here = watched(3)
    here.launch_over("--steps", "300", "--step-s", "0.05")
    here.wait_until_watched()
    victim = here.trainers("n1")[-1]
    victim.send_signal(signal.SIGSTOP)
    here.wait("life 2", lambda: here.trained(2), 60)
    (incident,) = here.incidents()
    rank = next(e["rank"] for e in here.events("rank_attached") if e["node"] == "n1")
    assert incident["culprit"] == f"rank {rank} on node n1"
    assert incident["kind"] == "non-communication hang"
    assert incident["doing"][str(rank)] == "stopped"
    parts = ("lost_work_s", "detection_s", "diagnosis_s", "restart_s")
    here.wait(
        "the four parts", lambda: all(here.incidents()[0][part] is not None for part in parts)
    )
    assert sorted(incident["folders"]) == here.nodes
    assert all(os.path.isdir(path) for path in incident["folders"].values())
    here.wait("the end", lambda: len([e for e in here.lines() if e.get("event") == "end"]) == 3, 60)
    assert here.check_digests(3) >= 3 * 300
