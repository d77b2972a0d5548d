"""What is planned for Slurm, done to a real one: a controller and one node, on this machine."""

import asyncio
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ckptd.coordinator.diagnosis.actuators import SLURM, Actuator, Fault, plan
from ckptd.coordinator.programs import run_program
from ckptd.watching import Place

NEEDED = ("munged", "slurmctld", "slurmd", "scontrol", "sbatch")
pytestmark = [
    pytest.mark.skipif(
        os.getuid() != 0 or not all(map(shutil.which, NEEDED)),
        reason=f"needs root, and {', '.join(NEEDED)}",
    ),
    pytest.mark.timeout(200),
]

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={directory}/munge.sock
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
NodeName=node-1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def wait_for(what: str, check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    host = socket.gethostname().partition(".")[0]
    config = tmp_path / "slurm.conf"
    config.write_text(CONFIG.format(host=host, ports=ports, directory=tmp_path))
    monkeypatch.setenv("SLURM_CONF", str(config))
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    key = tmp_path / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    files = [
        f"--{option}={tmp_path}/munge.{suffix}"
        for option, suffix in (
            ("socket", "sock"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"),
        )
    ]  # fmt: skip
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *files],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "node-1"],
    ]
    running = []
    try:
        with (tmp_path / "log").open("wb") as log:
            for command in daemons:
                running.append(subprocess.Popen(command, stdout=log, stderr=log))
                if command[0] == "munged":
                    wait_for("munged", (tmp_path / "munge.sock").exists)
        is_up = lambda: "State=IDLE" in said("scontrol", "show", "node", "node-1")  # noqa: E731
        wait_for("the node to be up", is_up)
        yield tmp_path
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)
        for process in psutil.process_iter():  # steps outlive their daemon
            try:
                if process.environ().get("SLURM_CONF") == str(config):
                    process.kill()
            except psutil.Error:
                continue


def test_a_node_is_drained_and_its_job_waits_to_run_elsewhere(slurm: Path) -> None:
    script = f"env > {slurm}/env.new; mv {slurm}/env.new {slurm}/env; exec sleep 600"
    job = said("sbatch", "--parsable", "--requeue", "--output=/dev/null", "--wrap", script).strip()
    wait_for("the job to run", (slurm / "env").exists)
    lines = (slurm / "env").read_text().splitlines()
    environ = dict(line.split("=", 1) for line in lines if "=" in line)
    place = Place(environ["SLURM_JOB_ID"], environ["SLURMD_NODENAME"])
    assert (place.slurm_job, place.slurm_node) == (job, "node-1")
    fault = Fault(
        5, "lm", 2, 70, "non-communication hang", "rank 0 on node n0", "rank 0: it's \"stuck\"=1",
        (0,), ("n0",), ("n0",), {0: "n0"}, {0: place}, elastic=False,
    )  # fmt: skip
    made = plan(Actuator(SLURM), fault)
    assert len(made.programs) == 2
    for _ in range(2):  # after a coordinator that has died in between
        assert asyncio.run(run_program(made.programs[0], 60.0)) == ""
    assert asyncio.run(run_program(made.programs[1], 60.0)) == ""
    node = said("scontrol", "show", "node", "node-1")
    assert "+DRAIN" in node
    assert 'Reason=ckptd: incident 5: rank 0: it\'s "stuck"=1' in node
    wait_for("the job to wait", lambda: "JobState=PENDING" in said("scontrol", "show", "job", job))
    assert "Restarts=1" in said("scontrol", "show", "job", job)
    said("scancel", job)


def test_what_slurm_refuses_is_said(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptd.coordinator.programs._PAUSE_S", 0.01)
    places = {0: Place("999999", "node-1")}
    fault = Fault(1, "lm", 1, 1, "hang", "x", "x", (0,), ("n0",), (), {0: "n0"}, places, False)
    (program,) = plan(Actuator(SLURM), fault).programs
    assert "Invalid job id" in asyncio.run(run_program(program, 60.0))
