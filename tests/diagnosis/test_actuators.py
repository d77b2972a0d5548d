"""Who carries out a decision: what is planned, and what programs get and do."""

import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from msgspec.structs import replace as change

from ckptd.agent.reports import end_launcher
from ckptd.config import watch_config
from ckptd.coordinator import programs
from ckptd.coordinator.diagnosis.actuators import (
    COMMAND,
    KUBERNETES,
    SLURM,
    TORCHRUN,
    Actuator,
    Fault,
    Plan,
    Program,
    check,
    plan,
)
from ckptd.coordinator.programs import run_program
from ckptd.errors import ConfigError
from ckptd.watching import Place, launcher_of, started_ticks

MEMBERS = {0: "n0", 1: "n1", 2: "n1"}
SLURM_PLACES = {
    rank: Place(slurm_job="77", slurm_node=f"s-{node}") for rank, node in MEMBERS.items()
}
PODS = {
    rank: Place(namespace="default", pod=f"lm-{rank}", kubernetes_node=f"k-{node}")
    for rank, node in MEMBERS.items()
}
FAULT = Fault(
    5, "lm", 2, 70, "non-communication hang", "rank 1 on node n1", "rank 1\nhangs", (1,), ("n1",),
    (), MEMBERS,
)  # fmt: skip


def planned(actuator: str, places: dict[int, Place], **changed: object) -> tuple[list[str], Plan]:
    made = plan(Actuator(actuator, ("notify", "-x")), replace(FAULT, places=places, **changed))
    return [str(program) for program in made.programs], made


def test_torchrun_restarts_what_is_killed() -> None:
    assert planned(TORCHRUN, {}) == ([], Plan(kills=True, stops_launchers=True))


def test_slurm_requeues_a_job_that_has_no_launcher_and_else_only_drains() -> None:
    assert planned(SLURM, SLURM_PLACES)[0] == []
    said, made = planned(SLURM, SLURM_PLACES, elastic=False)
    assert (said, made.kills) == (["scontrol requeue 77"], False)
    drain = "scontrol update NodeName=s-n1 State=DRAIN 'Reason=ckptd: incident 5: rank 1 hangs'"
    said, made = planned(SLURM, SLURM_PLACES, isolate=("n1",))
    assert (said, made.kills) == ([drain, "scontrol requeue 77"], False)
    said, made = planned(SLURM, SLURM_PLACES, isolate=("n1",), spares=1)
    assert (said, made.kills, made.stops_launchers) == ([drain], True, True)


def test_kubernetes_cordons_before_it_deletes_and_kills_the_others() -> None:
    assert planned(KUBERNETES, PODS) == ([], Plan(kills=True))
    cordon = "kubectl cordon -- k-n1"
    pods = [
        f"kubectl delete pod --namespace=default --wait=false -- lm-{rank}" for rank in range(3)
    ]
    said, made = planned(KUBERNETES, PODS, isolate=("n1",))
    assert (said, made.kills) == ([cordon, *pods[1:]], True)
    said, made = planned(KUBERNETES, PODS, isolate=("n1",), elastic=False)
    assert (said, made.kills) == ([cordon, *pods], False)


def test_where_one_node_cannot_be_taken_out_none_is_and_the_job_starts_anew() -> None:
    one_job = {rank: change(place, slurm_node="") for rank, place in SLURM_PLACES.items()}
    halves = {0: SLURM_PLACES[0], 1: one_job[1], 2: one_job[2]}
    said, made = planned(SLURM, halves, isolate=("n0", "n1"), elastic=False)
    assert (said, made.kills) == (["scontrol requeue 77"], False)
    assert "trainers on n1 have not said their Slurm node" in made.problem
    said, made = planned(SLURM, halves, isolate=("n0", "n1"))
    assert (said, made.kills, made.stops_launchers) == ([], True, False)
    said, made = planned(SLURM, one_job, isolate=("n1",), spares=1)
    assert (said, made.kills, made.stops_launchers) == ([], True, True), "its launcher can be ended"
    unnamed = {rank: change(place, slurm_job="") for rank, place in SLURM_PLACES.items()}
    said, made = planned(SLURM, unnamed, isolate=("n1",))
    assert (said, made.kills, made.stops_launchers) == ([], True, False)
    hidden = {**PODS, 0: change(PODS[0], pod="")}
    said, made = planned(KUBERNETES, hidden, isolate=("n0", "n1"))
    assert (said, made.kills) == ([], True)
    assert "trainers on n0 have not said their pod" in made.problem


def test_no_more_nodes_are_drained_than_were_to_be_taken_out() -> None:
    for actuator, places in (
        (SLURM, {**SLURM_PLACES, 2: Place(slurm_job="77", slurm_node="s-other")}),
        (KUBERNETES, {**PODS, 2: change(PODS[2], kubernetes_node="k-other")}),
    ):
        said, made = planned(actuator, places, isolate=("n1",))
        assert (said, made.kills) == ([], True)
        assert "or more than one" in made.problem


@pytest.mark.parametrize("name", ["-all", "n[1-9]", "a,b", "ALL", "all", "", "../x"])
def test_a_name_that_could_mean_more_than_one_thing_is_not_passed_on(name: str) -> None:
    odd = {1: Place(name, name, name, name, name)}
    for actuator in (SLURM, KUBERNETES):
        said, made = planned(actuator, odd, isolate=("n1",), elastic=False)
        assert said == []
        assert "docs/diagnosis.md" in made.problem
    for job in ("77_[1-9]", "77,78", "0", "lm"):
        odd = {0: Place(slurm_job=job)}
        assert planned(SLURM, odd, elastic=False)[0] == []


def test_a_command_gets_the_facts_twice(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("sh", "-c", f"env | grep ^CKPTD_ > {out}; cat > {out}.json")
    made = plan(Actuator(COMMAND, command), replace(FAULT, isolate=("n1",), places=SLURM_PLACES))
    assert made.kills
    assert asyncio.run(run_program(made.programs[0], 60.0)) == ""
    environ = dict(line.split("=", 1) for line in out.read_text().splitlines())
    facts = json.loads(Path(f"{out}.json").read_text())
    assert environ["CKPTD_ACTION"] == facts["action"] == "isolate"
    assert (environ["CKPTD_ISOLATE"], environ["CKPTD_STEP"]) == ("n1", "70")
    assert (environ["CKPTD_TEXT"], facts["text"]) == ("rank 1 hangs", "rank 1\nhangs")
    assert facts["places"]["1"] == {"slurm_job": "77", "slurm_node": "s-n1"}
    assert facts["members"] == {"0": "n0", "1": "n1", "2": "n1"}


def is_alive(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_program_that_fails_or_hangs_is_tried_again_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "_PAUSE_S", 0.01)
    counter = tmp_path / "count"

    def outcome(script: str, timeout_s: float = 60.0) -> str:
        return asyncio.run(run_program(Program(("sh", "-c", script)), timeout_s))

    said = outcome(f"echo x >> {counter}; yes no quota | head -5000; exit 3")
    assert said.startswith("exit status 3: ")
    assert said.endswith("no quota (3 times)")
    assert len(said) < 1100
    assert counter.read_text() == "x\n" * 3
    assert outcome(f"test $(wc -l < {counter}) = 4 && exit 0; echo x >> {counter}; exit 1") == ""
    hangs = f"sleep 1000 & echo $! >> {tmp_path}/pids; wait"
    assert "killed after 0.5 s" in outcome(hangs, 0.5)
    killed = (tmp_path / "pids").read_text().split()
    deadline = time.monotonic() + 60
    while any(map(is_alive, killed)):  # they die after the shell that had started them
        assert time.monotonic() < deadline
        time.sleep(0.02)
    left = f"sleep 1000 & echo $! > {tmp_path}/left"
    assert outcome(left) == ""  # what it leaves behind keeps nobody waiting
    psutil.Process(int((tmp_path / "left").read_text())).kill()
    assert "cannot be run" in asyncio.run(run_program(Program(("/nowhere",)), 1.0))


def test_what_a_program_says_is_on_no_disk_and_what_cannot_be_run_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "_PAUSE_S", 0.01)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))

    def outcome(script: str) -> str:
        return asyncio.run(run_program(Program(("sh", "-c", script)), 60.0))

    assert outcome("readlink /proc/self/fd/1; exit 3").startswith("exit status 3: pipe:")
    opened = len(os.listdir("/proc/self/fd"))
    assert outcome("head -c 20000000 /dev/zero; echo; echo done; exit 4").endswith("done (3 times)")
    assert len(os.listdir("/proc/self/fd")) == opened

    def no_pipe() -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pipe", no_pipe)
        running = programs._run_once(Program(("true",)), 60.0)
        with pytest.raises(StopIteration) as ended:
            running.send(None)
    assert "cannot be run: [Errno 24] Too many" in ended.value.value


def test_what_is_missing_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for actuator, missing in (
        (Actuator(SLURM), "scontrol"),
        (Actuator(KUBERNETES), "kubectl"),
        (Actuator(COMMAND, ("restart-it", "now")), "restart-it"),
    ):
        with pytest.raises(ConfigError, match=f"needs {missing}.*PATH"):
            check(actuator)
    check(Actuator(TORCHRUN))


def test_trainers_say_where_their_scheduler_has_put_them() -> None:
    slurm = {"SLURM_JOB_ID": "77", "SLURMD_NODENAME": "s1"}
    assert watch_config(slurm).place.told == {"slurm_job": "77", "slurm_node": "s1"}
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "lm-0", "NODE_NAME": "k1"}
    told = watch_config({**pod, "POD_NAMESPACE": "ml"}).place.told
    assert told == {"namespace": "ml", "pod": "lm-0", "kubernetes_node": "k1"}
    assert watch_config({"HOSTNAME": "laptop"}).place.told == {}


LAUNCHER = """
import os, subprocess, sys, time
environ = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
code = "import subprocess as s, sys; s.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
subprocess.run([sys.executable, "-c", code], env=environ)
"""
"""Starts a process that wraps another, as numactl does."""


def test_a_launcher_is_found_from_its_trainer_and_ended_with_all_that_it_started() -> None:
    environ = {name: value for name, value in os.environ.items() if "TORCHELASTIC" not in name}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], env=environ, stdin=-1, stdout=-1, start_new_session=True
    )
    assert launcher.stdout is not None
    launcher.stdout.readline()
    family = psutil.Process(launcher.pid).children(recursive=True)
    assert len(family) == 2
    assert {launcher_of(process.pid) for process in family} == {launcher.pid}
    assert launcher_of(launcher.pid) == launcher_of(os.getpid()) == 0
    ticks = started_ticks(launcher.pid)
    assert end_launcher(launcher.pid, ticks + 1) == end_launcher(0, 0) == 0
    assert end_launcher(launcher.pid, ticks) == 3
    launcher.wait(30)
    psutil.wait_procs(family, timeout=30)
    assert not any(p.is_running() and p.status() != "zombie" for p in family)
    assert end_launcher(launcher.pid, ticks) == 0


def test_no_process_is_no_launcher_whatever_its_trainer_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signalled: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *told: signalled.append(told))
    for pid in (-1, 0, -os.getpid()):
        assert end_launcher(pid, 0) == 0
    assert end_launcher(1, started_ticks(1)) == 0
    assert signalled == []


def test_a_launcher_whose_children_cannot_be_found_is_not_left_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)

    def children(process: psutil.Process, recursive: bool) -> list[psutil.Process]:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "children", children)
    try:
        assert end_launcher(launcher.pid, started_ticks(launcher.pid)) == 1
        assert launcher.wait(30) == -signal.SIGKILL
    finally:
        launcher.kill()
        launcher.wait()


class FakeApi(BaseHTTPRequestHandler):
    """As much of a Kubernetes API server as kubectl asks for to cordon a node and delete a pod."""

    asked: ClassVar[list[tuple[str, str, str]]] = []

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        path = self.path.partition("?")[0]
        self.asked.append((self.command, path, self.rfile.read(size).decode()))
        kind = "Node" if "/nodes/" in path else "Pod"
        thing = {"kind": kind, "apiVersion": "v1", "metadata": {"name": path.rpartition("/")[2]}}
        verbs = ["get", "patch", "delete"]
        resources = [
            {"name": "nodes", "kind": "Node", "namespaced": False, "verbs": verbs},
            {"name": "pods", "kind": "Pod", "namespaced": True, "verbs": verbs},
        ]
        found = {
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "groups": []},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": resources},
        }
        body = json.dumps(found.get(path, thing)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PATCH = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_the_real_kubectl_asks_the_api_server_for_what_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is a stand-in; what a real one answers is not tested."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeApi)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = tmp_path / "config"
    url = f"http://127.0.0.1:{server.server_address[1]}"
    cluster = {"name": "c", "cluster": {"server": url}}
    context = {"name": "c", "context": {"cluster": "c", "user": ""}}
    kube = {"clusters": [cluster], "contexts": [context], "current-context": "c"}
    config.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **kube}))
    monkeypatch.setenv("KUBECONFIG", str(config))
    monkeypatch.setenv("HOME", str(tmp_path))
    one_pod = {1: PODS[1]}
    made = plan(Actuator(KUBERNETES), replace(FAULT, places=one_pod, isolate=("n1",)))
    try:
        for program in made.programs:
            assert asyncio.run(run_program(program, 60.0)) == ""
    finally:
        server.shutdown()
        server.server_close()
    changed = [one for one in FakeApi.asked if one[0] != "GET"]
    assert [one[:2] for one in changed] == [
        ("PATCH", "/api/v1/nodes/k-n1"),
        ("DELETE", "/api/v1/namespaces/default/pods/lm-1"),
    ]
    assert json.loads(changed[0][2]) == {"spec": {"unschedulable": True}}
