"""Jobs that hang or are slow: found, named, and, where that is sure, run again by themselves."""

import json
import os
import signal
from typing import Any

import pytest
from click.testing import CliRunner

from ckptd.cli.main import main

from .town import JOB, TRAINER, Town

pytestmark = pytest.mark.timeout(300)

PARTS = ("lost_work_s", "detection_s", "diagnosis_s", "restart_s")


class Watched(Town):
    """A town whose trainers torchrun starts, and starts again."""

    def launch(self, *flags: str, ranks: int = 1, timing: bool = False, spares: int = 0) -> None:
        """So many ranks on each node but the last few, which wait as spares."""
        working = self.nodes[: len(self.nodes) - spares]
        self.faults.mkdir()
        self._environ["FAULTS"] = str(self.faults)
        arguments = [f"--nproc-per-node={ranks}", str(TRAINER), *flags]
        arguments += ["--steps", "100000", "--until", str(self.directory / "until")]
        if len(working) > 1:
            self.start_rendezvous()
        arguments.insert(0, f"--nnodes={len(working)}" if self.rendezvous else "--standalone")
        for node in self.nodes:
            more = ["--timing"] if timing else []
            more += [] if node in working else ["--spare"]
            self.start_launcher(node, JOB, arguments, *more)
        self.wait("the detector to know the job", self.is_armed, 100)

    @property
    def faults(self):
        return self.directory / "faults"

    def is_armed(self, life: int = 1) -> bool:
        """Whether what is usual in this life is known, and a hang would be found."""
        found = self.diagnosis()
        return found.get("life") == life and found["hang_timeout_s"] < 100

    def begin(self, fault: str) -> None:
        (self.faults / fault).touch()

    def end(self, fault: str) -> None:
        (self.faults / fault).unlink()

    def lines(self) -> list[dict[str, Any]]:
        return [line for node in self.nodes for line in self.said(f"launcher-{node}")]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.status()["events"] if event["kind"] == kind]

    def incidents(self) -> list[dict[str, Any]]:
        return self.status()["incidents"]

    def diagnosis(self) -> dict[str, Any]:
        return self.status()["diagnosis"]["jobs"].get(JOB, {})

    def findings(self) -> list[dict[str, Any]]:
        return self.diagnosis()["findings"]

    def witness(self) -> str:
        """What the second witness says of the hang that is suspected."""
        return next((one["witness"] for one in self.findings() if one["is_hang"]), "")

    def wait_for_life(self, life: int) -> None:
        def started() -> bool:
            starts = (line for line in self.lines() if line.get("event") == "start")
            return any(line["life"] == life for line in starts)

        self.wait(f"life {life}", started, 100)

    def finish(self, ranks: int) -> None:
        """Let the job train a bit further, and end."""
        reached = self.step()
        self.wait("training to go on", lambda: self.step() > reached + 5, 60)
        (self.directory / "until").touch()
        ends = lambda: [line for line in self.lines() if line.get("event") == "end"]  # noqa: E731
        self.wait("the end", lambda: len(ends()) == ranks, 100)

    def step(self) -> int:
        """The last that was made."""
        return next((line["step"] for line in reversed(self.lines()) if "digest" in line), 0)

    def check_digests(self, ranks: int) -> None:
        """Every step that was ever made gave the calm run's digest, up to the last of each rank."""
        made = [line for line in self.lines() if "digest" in line]
        last = max(line["step"] for line in made)
        calm = self.calm_digests(ranks, last)
        for line in made:
            assert calm[line["rank"]][line["step"]] == line["digest"], line
        assert {line["rank"] for line in made if line["step"] == last} == {*range(ranks)}

    def cli(self, *arguments: str) -> str:
        result = CliRunner().invoke(main, [*arguments, "--coordinator", self.endpoint])
        assert result.exit_code == 0, result.output
        return result.output


@pytest.fixture
def watched():
    opened: list[Watched] = []

    def make(nodes: int, policy: str, *more: str) -> Watched:
        flags = ("--policy", policy, "--window", "0.5", *more)
        opened.append(Watched(nodes, coordinator_flags=flags))
        return opened[-1].open()

    yield make
    for each in opened:
        each.close()


def test_a_stopped_rank_is_named_and_killed_and_at_the_second_time_so_is_its_node(
    watched, tmp_path
):
    told = tmp_path / "told"
    command = ("--actuator-command", f"sh -c 'cat >> {told}; echo >> {told}'")
    here = watched(3, "restart+isolate", "--actuator", "command", *command)
    here.launch(spares=1)
    rank = next(e["rank"] for e in here.events("rank_attached") if e["node"] == "n1")
    here.trainers("n1")[-1].send_signal(signal.SIGSTOP)
    here.wait_for_life(2)
    (incident,) = here.incidents()
    assert incident["culprit"] == f"rank {rank} on node n1"
    # It may have been stopped before it entered a collective, or within: then all have entered.
    assert incident["kind"] in ("non-communication hang", "communication hang")
    assert incident["doing"][str(rank)] == "stopped"
    assert sorted(incident["folders"]) == ["n0", "n1"]
    assert all(os.path.isdir(path) for path in incident["folders"].values())

    def four_parts() -> bool:
        return all(here.incidents()[0][part] is not None for part in PARTS)

    here.wait("the four parts of downtime", four_parts)
    assert f"rank {rank} on node n1" in here.cli("incidents")
    assert "life 2 trains again" in here.cli("incidents", "show", "1")
    assert here.events("node_isolated") == []

    here.wait("the detector to know the second life", lambda: here.is_armed(2), 100)
    here.trainers("n1")[-1].send_signal(signal.SIGSTOP)
    here.wait_for_life(3)
    assert [event["node"] for event in here.events("node_isolated")] == ["n1"]
    (called,) = here.events("spare_called")
    assert (called["node"], called["lost"]) == ("n2", "n1")
    assert here.processes["launcher-n1"].wait(30) == -signal.SIGKILL
    (marked,) = [node for node in here.status()["nodes"] if node["isolated"]]
    assert marked["node"] == "n1"
    assert "at fault twice" in marked["isolated"]
    facts = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(one["action"], one["life"], one["isolate"]) for one in facts] == [
        ("restart", 1, []),
        ("isolate", 2, ["n1"]),
    ]
    assert len(here.events("actuated")) == 2
    here.finish(2)
    here.check_digests(2)
    assert {line["rank"] for line in here.said("launcher-n2") if line.get("event") == "end"}


def test_who_evaluates_or_has_paused_is_left_alone_and_who_waits_for_ever_is_not(watched):
    here = watched(1, "restart")
    here.launch("--faulty", "0", ranks=2)
    here.begin("evaluates")
    here.wait("the witness", lambda: "rank 0: making progress" in here.witness(), 60)
    assert "rank 0" in here.cli("status")
    here.end("evaluates")
    reached = here.step()
    here.wait("training to go on", lambda: here.step() > reached + 5, 60)
    here.wait("the finding to be over", lambda: not here.findings(), 60)
    assert here.incidents() == []
    assert here.events("restart_ordered") == []

    here.begin("waits_in_a_pause")
    quiet = "paused: evaluation (rank 0)"
    here.wait("the pause to be known", lambda: here.diagnosis()["quiet_because"] == quiet, 60)
    here.wait_for_life(2)
    kinds = [event["kind"] for event in here.status()["events"]]
    calm, overrun = kinds.index("finding_over"), kinds.index("pause_overrun")
    assert "hang_suspected" not in kinds[calm:overrun]
    assert "hang_suspected" in kinds[overrun:]
    (incident,) = here.incidents()
    assert incident["ranks"] == [0]
    assert "waits_for_ever" in incident["stacks"]["0"]
    assert "waits_for_ever" in here.cli("incidents", "show", "1")
    here.finish(2)
    here.check_digests(2)


def test_what_stops_again_and_again_at_one_step_is_not_restarted_for_ever(watched):
    here = watched(1, "restart")
    here.launch("--every", "150", "--stops-at", "280", ranks=2)
    (event,) = here.wait("restarts to be stopped", lambda: here.events("restarts_stopped"), 200)
    assert "the same fault at step 279 for the 3. time" in event["text"]
    # On a busy machine a stop may once be taken for a stuck transfer, which is another fault.
    named = [one for one in here.incidents() if one["culprit"] == "rank 0 on node n0"]
    assert [one["decision"] for one in named] == ["restart", "restart", "observe"]
    # So it stays, whoever coordinates, until a person says otherwise.
    here.kill("coordinator")
    here.start_coordinator()
    way_out = "ckptd rearm story"
    here.wait("the reason in status", lambda: way_out in here.cli("status"), 60)
    assert here.cli("rearm", JOB) == "story: is restarted again when it hangs\n"
    assert way_out not in here.cli("status")
    again = CliRunner().invoke(main, ["rearm", JOB, "--coordinator", here.endpoint])
    assert "restarts of 'story' are not stopped: there is nothing to rearm" in again.output


def test_who_only_observes_names_a_straggler_and_a_hang_and_kills_nobody(watched):
    here = watched(1, "observe")
    here.launch("--faulty", "2", ranks=3, timing=True)
    here.begin("dawdles")

    def slow() -> dict[str, Any] | None:
        kind = "non-communication slow"
        return next((one for one in here.incidents() if one["kind"] == kind), None)

    assert here.wait("the straggler to be named", slow, 100)["ranks"] == [2]
    here.end("dawdles")
    stopped = here.trainers("n0")[-1]
    stopped.send_signal(signal.SIGSTOP)
    (event,) = here.wait("the hang to be named", lambda: here.events("observed"), 60)
    assert "restarts are not automatic" in event["text"]
    stopped.send_signal(signal.SIGCONT)
    reached = here.step()
    here.wait("training to go on", lambda: here.step() > reached + 5, 60)
    assert here.events("rank_left") == []
    assert here.job(JOB)["life"] == 1
