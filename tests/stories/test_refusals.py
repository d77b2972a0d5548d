"""What is wrong is refused, with the thing named and the way out, and nothing is lost."""

import os
import socket
import subprocess
import sys

import pytest
import zmq

from ckptd.client import ask_status
from ckptd.errors import CoordinatorUnreachable
from ckptd.keys import ClusterKey
from ckptd.wire import AskStatus, Beat, Decoder, Rejected, encode

from .town import JOB

pytestmark = pytest.mark.timeout(300)


def refusal(here, name):
    return here.wait(f"{name} to be refused", lambda: here.event(name, "refused"), 60)


def run_ckptd(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "ckptd.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_no_agent_at_the_socket(town):
    here = town(0)
    said = refusal(here, here.train("--timeout", "2", nodes=["nowhere"])[0])
    assert said["kind"] == "AgentUnreachable"
    assert str(here.socket("nowhere")) in said["text"]
    assert "ckptd agent" in said["text"]


def test_no_coordinator_at_the_address(town):
    here = town(1)
    here.kill("coordinator")
    here.kill("agent-n0")
    here.start_agent("n0")
    name = here.train("--timeout", "6")[0]
    said = refusal(here, name)
    assert said["kind"] == "AgentUnreachable"
    assert f"reaches no coordinator at {here.endpoint}" in said["text"]
    assert "waiting for" in here.log(name), "it must say what it waits for"


def test_a_job_whose_nodes_cannot_be_reached_waits_and_never_starts_from_nothing(town):
    here = town(2)
    names = here.train()
    here.wait_for_start(names)
    committed = here.wait_for_snapshot("protected", after=3)
    for name in (*names, "agent-n0", "agent-n1"):
        here.kill(name)
    here.start_agent("m0")
    here.start_agent("m1")
    here.wait("the nodes to be lost", lambda: not here.job(JOB)["attached_ranks"])
    second = here.train("--timeout", "5", nodes=["m0", "m1"])
    said = refusal(here, second[0])
    assert said["kind"] == "ResumeImpossible"
    assert "n0, n1" in said["text"]
    # They come back, and with them the snapshot.
    third = here.train("--timeout", "60", nodes=["m0", "m1"])
    here.wait("it to wait", lambda: here.job(JOB).get("waiting_for"))
    here.start_agent("n0")
    here.start_agent("n1")
    assert here.wait_for_start(third) >= committed


def test_memory_that_is_too_small_is_told_with_the_numbers_and_the_flag(town):
    here = town(1, agent_flags=("--memory-limit", "20000"))
    said = refusal(here, here.train()[0])
    assert said["kind"] == "MemoryTooSmall"
    assert "limit is 20000" in said["text"]
    assert "0 bytes are in use" in said["text"]
    assert "--memory-limit" in said["text"]


def test_a_value_that_cannot_be_saved_is_named_at_the_first_capture(town):
    here = town(1)
    said = refusal(here, here.train("--unsavable")[0])
    assert said["kind"] == "UnsavableState"
    assert "['extra']['data']['ballast']" in said["text"]
    assert "datetime.date" in said["text"]


def test_a_model_of_other_shapes_is_refused_and_the_snapshot_stays(town):
    here = town(1)
    names = here.train("--steps", "20")
    here.wait("the end", lambda: here.event(names[0], "end"), 60)
    newest = here.wait_for_snapshot("sealed")
    said = refusal(here, here.train("--width", "32")[0])
    assert said["kind"] == "StateMismatch"
    assert "model.0.weight has shape [32, 16], the snapshot [64, 16]" in said["text"]
    assert here.wait_for_start(here.train()) == newest


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run a trainer as another user")
def test_the_agent_of_another_user_is_refused(town):
    here = town(1)
    here.directory.chmod(0o755)
    script = (
        "import os, sys, time\n"
        "from ckptd.trainer.client import AgentClient\n"
        "from ckptd.wire import Attach\n"
        "os.setuid(65534)\n"
        "AgentClient(sys.argv[1]).attach(Attach('j', 'r', 0, 1, 1, 2), time.monotonic() + 2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(here.socket("n0"))],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "AgentUnreachable" in done.stderr
    assert "not this user's" in done.stderr
    assert "run the agent as the user who trains" in done.stderr


def test_messages_of_another_version_and_garbage_harm_nobody(town):
    here = town(1)
    names = here.train()
    here.wait_for_start(names)
    frame = encode(Beat("n9", "x", 0, ()))
    other_version = frame[:2] + bytes((9,)) + frame[3:]
    context = zmq.Context()
    with context.socket(zmq.DEALER) as dealer:
        dealer.linger = 1000
        dealer.connect(here.endpoint)
        for bad in (other_version, b"", b"ck", os.urandom(1000), frame[:-3]):
            dealer.send(bad)
        dealer.send(encode(AskStatus()))
        answers = [dealer.recv() for _ in range(6)]
    context.term()
    assert b"protocol version 9" in answers[0]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as local:
        local.connect(str(here.socket("n0")))
        for bad in (other_version, b"\xff" * 100):
            local.send(bad)
            said = Decoder(Rejected).decode(local.recv(1 << 16))
            assert said.kind == "ProtocolError"
    reached = max(here.steps(names[0]), default=0)
    here.wait_for_snapshot("sealed", after=reached)


def test_two_agents_do_not_share_a_memory_directory_or_a_socket(town):
    here = town(1)
    base = ["agent", "--node", "x", "--coordinator", here.endpoint]
    same_memory = run_ckptd(
        *base, "--memory-dir", here.memory_of("n0"), "--socket", here.directory / "x.sock"
    )
    assert same_memory.returncode == 1
    assert "another agent uses the memory directory" in same_memory.stderr
    same_socket = run_ckptd(
        *base, "--memory-dir", here.memory_of("x"), "--socket", here.socket("n0")
    )
    assert same_socket.returncode == 1
    assert "another agent listens on" in same_socket.stderr


def test_a_second_node_of_the_same_id_is_refused_with_the_address_of_the_first(town):
    here = town(1)
    done = run_ckptd(
        "agent", "--node", "n0", "--coordinator", here.endpoint,
        "--memory-dir", here.memory_of("x"), "--socket", here.directory / "x.sock",
    )  # fmt: skip
    assert done.returncode == 1
    assert "node id 'n0' is in use by the agent at 127.0.0.1" in done.stderr


def test_nothing_leaves_loopback_without_a_key(tmp_path):
    for verb in (
        [
            "agent",
            "--listen",
            "0.0.0.0",
            "--memory-dir",
            tmp_path / "m",
            "--socket",
            tmp_path / "s",
        ],
        ["coordinator", "--listen", "tcp://0.0.0.0:0"],
    ):
        done = run_ckptd(*verb)
        assert done.returncode == 1
        assert "ckptd keygen" in done.stderr


def test_a_cluster_with_a_key_trains_and_lets_nobody_else_in(town, tmp_path):
    key, other = tmp_path / "key", tmp_path / "other"
    for path in (key, other):
        assert run_ckptd("keygen", path).returncode == 0
    here = town(2, key_file=key)
    names = here.train()
    here.wait_for_start(names)
    here.wait_for_snapshot("protected", after=2)
    wrong = run_ckptd("status", "--coordinator", here.endpoint, "--key-file", other)
    assert wrong.returncode == 1
    assert "--key-file" in wrong.stderr
    with pytest.raises(CoordinatorUnreachable):
        ask_status(here.endpoint, ClusterKey(), timeout_s=2)


def test_rm_gives_up_a_job_and_refuses_while_it_runs(town):
    here = town(1)
    names = here.train()
    here.wait_for_start(names)
    here.wait_for_snapshot("sealed", after=2)
    running = run_ckptd("rm", JOB, "--yes", "--coordinator", here.endpoint)
    assert running.returncode == 1
    assert "is running on n0" in running.stderr
    here.kill_trainers(names)
    here.wait("the trainer to be missed", lambda: not here.job(JOB)["attached_ranks"])
    assert run_ckptd("rm", JOB, "--yes", "--coordinator", here.endpoint).returncode == 0
    unknown = run_ckptd("rm", JOB, "--yes", "--coordinator", here.endpoint)
    assert "no job 'story' is known" in unknown.stderr
    assert here.wait_for_start(here.train()) == 0
