"""What people ask of a cluster: to go back, to let a node leave, to do without one, to use less."""

import signal
import subprocess
import sys

import pytest

from .town import JOB, Town

pytestmark = pytest.mark.timeout(300)


def ckptd(here: Town, *arguments: str, ok: bool = True) -> str:
    """What the command says; fails unless it succeeds, or (`ok` False) is refused."""
    done = subprocess.run(
        [sys.executable, "-m", "ckptd.cli", *arguments, "--coordinator", here.endpoint],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def protected(here: Town) -> list[dict]:
    """Newest first."""
    return [s for s in here.job(JOB).get("snapshots", []) if s["state"] == "protected"]


def stop(here: Town, names: list[str]) -> None:
    here.kill_trainers(names)
    here.wait("the trainers to be missed", lambda: not here.job(JOB)["attached_ranks"])


def test_a_job_goes_back_past_a_loss_spike(town):
    here = town(2)
    first = here.train("--keep", "3")
    here.wait_for_start(first)
    here.wait("three protected snapshots", lambda: len(protected(here)) == 3, 60)
    stop(here, first)
    oldest = protected(here)[-1]
    listed = ckptd(here, "rollback", JOB)
    assert all(f"1.{snapshot['step']}" in listed for snapshot in protected(here))
    refused = ckptd(here, "rollback", JOB, "--to", "999999", ok=False)
    assert f"1.{oldest['step']}" in refused
    ckptd(here, "rollback", JOB, "--to", str(oldest["step"]))
    assert "resumes next from 1." in ckptd(here, "status")
    second = here.train("--keep", "3")
    assert here.wait_for_start(second) == oldest["step"]
    # What was given up goes, and its memory serves the new life.
    here.wait(
        "three of the new life",
        lambda: [s["life"] for s in protected(here)] == [2, 2, 2],
        60,
    )
    stop(here, second)
    newest = here.wait_for_snapshot("protected")
    assert all(snapshot["life"] == 2 for snapshot in here.job(JOB)["snapshots"])
    for node in here.nodes:
        files = {path.suffix: 0 for path in here.memory_of(node).glob(f"{JOB}/*")}
        for path in here.memory_of(node).glob(f"{JOB}/*"):
            files[path.suffix] += 1
        assert files[".safetensors"] <= 4
        assert files[".cells"] <= 4
    third = here.train("--keep", "3")
    assert here.wait_for_start(third) >= newest
    assert here.check_equal([first, second, third]) > oldest["step"]


def test_a_node_leaves_without_a_loss(town):
    here = town(3)
    first = here.train(nodes=["n0", "n1"])
    here.wait_for_start(first)
    here.wait_for_snapshot("protected", after=3)
    assert "waits for rank 1 of story" in ckptd(here, "drain", "n1")
    stop(here, first)
    assert "n1: drained: may go" in ckptd(here, "drain", "n1", "--wait")
    newest = here.job(JOB)["snapshots"][0]["step"]
    here.destroy_node("n1")
    second = here.train(nodes=["n0", "n2"])
    assert here.wait_for_start(second) == newest
    here.wait_for_snapshot("protected", after=newest + 2)
    assert here.check_equal([first, second]) > newest


def test_an_isolated_node_has_no_part_until_it_is_readmitted(town):
    here = town(2)
    first = here.train()
    here.wait_for_start(first)
    here.wait_for_snapshot("protected", after=2)
    ckptd(here, "isolate", "n1", "--reason", "flips bits")
    reached = here.wait_for_snapshot("protected")
    here.wait_for_snapshot("protected", after=reached)
    stop(here, first)
    second = here.train()
    waits = here.wait("it to wait", lambda: here.job(JOB)["waiting_for"], 60)
    assert "rank 1 on n1, which is isolated (flips bits)" in waits
    ckptd(here, "readmit", "n1")
    assert here.wait_for_start(second) >= reached


def test_a_job_over_its_quota_is_refused_before_it_trains(town):
    here = town(1)
    ckptd(here, "quota", JOB, "20000")
    first = here.train()
    said = here.wait("the refusal", lambda: here.event(first[0], "refused"), 60)
    assert said["kind"] == "MemoryTooSmall"
    assert "its quota is 20000" in said["text"]
    assert f"ckptd quota {JOB}" in said["text"]
    ckptd(here, "quota", JOB)
    second = here.train()
    here.wait_for_start(second)
    here.wait_for_snapshot("sealed", after=1)


def test_an_order_that_an_agent_has_not_stored_might_be_forgotten_and_says_so(town):
    here = town(2, coordinator_flags=("--lease", "30"))
    here.kill("agent-n1", signal.SIGSTOP)
    said = ckptd(here, "quota", JOB, "20000", ok=False)
    assert "n1 has not stored it yet" in said
    here.kill("agent-n1", signal.SIGCONT)
    ckptd(here, "quota", JOB, "20000")
