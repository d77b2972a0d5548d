"""Nothing is started by hand: stories of the agent that a Checkpointer starts for its machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest

from ckptd.cli.local_cluster import wait_until
from ckptd.config import runtime_dir
from ckptd.errors import AgentUnreachable, ConfigError, ProtocolError
from ckptd.trainer.embedded import Places, ensure
from ckptd.wire import PROTOCOL_VERSION, Here, encode

from .town import JOB, TRAINER, Town

pytestmark = pytest.mark.timeout(240)


class Laptop(Town):
    """One machine, one user, and nothing configured but the job's name."""

    def __init__(self, idle_s: float = 60.0) -> None:
        super().__init__(0)
        run = self.directory / "run"
        run.mkdir(mode=0o700)
        self.places = Places(run / "ckptd")
        self.endpoint = self.places.coordinator
        self.memory_dir = self.memory / "embedded"
        self._environ |= {
            "XDG_RUNTIME_DIR": str(run),
            "CKPTD_MEMORY_DIR": str(self.memory_dir),
            "CKPTD_MEMORY_LIMIT": "64MiB",
            "CKPTD_IDLE": str(idle_s),
        }

    def train(self, *flags: str, ranks: int = 1) -> list[str]:
        """Start so many ranks at once; returns the names of the trainer processes."""
        self.round += 1
        init = f"file://{self.directory}/init-{uuid.uuid4().hex}"
        names = []
        for rank in range(ranks):
            names.append(f"trainer-{self.round}-{rank}")
            environ = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "INIT": init}
            self.spawn(names[-1], [sys.executable, str(TRAINER), *flags], environ)
        return names

    def ckptd(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        command = [sys.executable, "-m", "ckptd.cli", *words]
        return subprocess.run(
            command, env=self._environ, capture_output=True, text=True, timeout=60, check=False
        )

    def agents(self) -> list[psutil.Process]:
        """The embedded agents that live; there should never be two."""
        found = []
        for process in self.members():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "embedded" in process.cmdline():
                    found.append(process)
        return found

    def agent(self) -> psutil.Process:
        (found,) = self.agents()
        return found

    def wait_for_no_agent(self) -> None:
        self.wait("the embedded agent to end", lambda: not self.agents())

    def train_until_sealed(self, ranks: int = 1) -> list[str]:
        names = self.train(ranks=ranks)
        assert self.wait_for_start(names) == 0
        self.wait_for_snapshot("sealed", after=3)
        return names

    def kill_and_settle(self, names: list[str]) -> int:
        """Kill the trainers; returns the step of the newest snapshot once that is known."""
        self.kill_trainers(names)
        self.wait("the ranks to be gone", lambda: not self.job(JOB)["attached_ranks"])
        return self.wait_for_snapshot("sealed")

    def resumes_from(self, first: list[str], newest: int) -> None:
        """A second run goes on from `newest`, and computes what a calm one would."""
        second = self.train(ranks=len(first))
        start = self.wait_for_start(second)
        assert start == newest
        self.wait_for_snapshot("sealed", after=start + 2)
        self.kill_trainers(second)
        assert self.check_equal([first, second]) > start


@pytest.fixture
def laptop():
    opened: list[Laptop] = []

    def make(**kwargs) -> Laptop:
        opened.append(Laptop(**kwargs))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.fixture
def alone(tmp_path_factory, monkeypatch):
    """An empty runtime directory for calls in this process; what they start is ended."""
    here = Laptop()
    for name, value in here._environ.items():
        monkeypatch.setenv(name, value)
    yield here
    here.close()


def test_two_ranks_at_once_start_one_agent_and_after_kill_9_they_go_on_from_its_memory(laptop):
    here = laptop()
    first = here.train_until_sealed(ranks=2)
    started = here.agent()
    said = [name for name in first if "started one for this machine" in here.log(name)]
    assert len(said) == 1
    here.resumes_from(first, here.kill_and_settle(first))
    assert here.agent() == started


def test_the_launcher_without_an_agent_restarts_a_killed_worker_from_memory(laptop):
    here = laptop()
    flags = ["--standalone", "--nproc-per-node=1", str(TRAINER)]
    command = [sys.executable, "-m", "ckptd.cli", "run", "--job", JOB, "--", *flags]
    here.spawn("launcher", command)
    here.wait("a snapshot", lambda: here.agents() and here.snapshot("sealed", after=3), 60)

    def starts() -> list[dict[str, Any]]:
        return [line for line in here.said("launcher") if line.get("event") == "start"]

    (first,) = starts()
    os.kill(first["pid"], signal.SIGKILL)
    here.wait("the worker to go on", lambda: len(starts()) == 2, 60)
    assert starts()[1]["life"] == 2
    assert starts()[1]["step"] > 3


def test_an_idle_agent_ends_and_leaves_nothing_and_the_next_run_starts_another(laptop):
    here = laptop(idle_s=0.5)
    for _ in range(2):
        (name,) = here.train("--steps", "20", "--finish")
        assert here.wait_for_start([name]) == 0
        here.wait("the end", lambda name=name: here.event(name, "end"))
        here.wait_for_no_agent()
        assert not here.memory_dir.exists()
        assert "started one for this machine" in here.log(name)


def test_an_idle_agent_stays_for_an_unfinished_job_until_that_is_given_up(laptop):
    here = laptop(idle_s=0.3)
    here.kill_and_settle(here.train_until_sealed())
    agent = here.agent()

    def up_s() -> float:
        return float(here.status()["coordinator"]["up_s"])

    since = up_s()
    here.wait("several times the idle time", lambda: up_s() > since + 2.0)
    assert here.agent() == agent
    assert here.ckptd("rm", JOB, "--yes").returncode == 0
    here.wait_for_no_agent()
    assert not here.memory_dir.exists()


def test_status_ls_and_rm_find_the_embedded_coordinator_by_themselves(laptop):
    here = laptop()
    here.kill_and_settle(here.train_until_sealed())
    assert JOB in here.ckptd("status").stdout
    assert "sealed" in here.ckptd("ls").stdout
    assert here.ckptd("rm", JOB, "--yes").returncode == 0
    assert not here.job(JOB)


def test_stop_refuses_while_the_agent_is_needed_and_force_gives_everything_up(laptop):
    here = laptop()
    names = here.train_until_sealed()
    refused = here.ckptd("stop")
    assert refused.returncode == 1
    assert f"{JOB!r}" in refused.stderr
    assert "1 trainer attached" in refused.stderr
    newest = here.kill_and_settle(names)
    refused = here.ckptd("stop")
    assert refused.returncode == 1
    assert f"{JOB!r} has its newest snapshot here, of step {newest}" in refused.stderr
    assert "--force" in refused.stderr
    forced = here.ckptd("stop", "--force")
    assert forced.returncode == 0, forced.stderr
    assert not here.agents()
    assert not here.memory_dir.exists()
    assert "no embedded agent is running" in here.ckptd("stop").stdout


def test_stop_right_after_a_finished_job_leaves_no_memory(laptop):
    here = laptop()
    (name,) = here.train("--steps", "20", "--finish")
    here.wait("the end", lambda: here.event(name, "end"), 60)
    here.wait("the job to be forgotten", lambda: not here.job(JOB))
    stopped = here.ckptd("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert not here.agents()
    assert not here.memory_dir.exists()


def test_force_ends_an_agent_that_does_not_react(laptop, monkeypatch):
    here = laptop()
    here.kill_and_settle(here.train_until_sealed())
    os.kill(here.agent().pid, signal.SIGSTOP)
    refused = here.ckptd("stop")
    assert refused.returncode == 1
    assert "does not say what it holds" in refused.stderr
    assert here.ckptd("stop", "--force").returncode == 0
    assert not here.agents()
    assert not here.memory_dir.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_ends_the_trainers_process_group_leaves_the_agent_and_its_memory(laptop, number):
    here = laptop()
    first = here.train_until_sealed()
    trainer, agent = here.processes[first[0]], here.agent()
    assert agent.ppid() != trainer.pid
    assert os.getsid(agent.pid) != os.getsid(trainer.pid)
    assert agent.cwd() == "/"
    held = set()
    for file in Path(f"/proc/{agent.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the agent closes files as we look
            held.add(os.readlink(file))
    assert "/dev/null" in held
    assert str(here.log_path(first[0])) not in held
    os.killpg(trainer.pid, number)
    trainer.wait(20)
    here.wait("the rank to be gone", lambda: not here.job(JOB)["attached_ranks"])
    assert here.agent() == agent
    newest = here.wait_for_snapshot("sealed")
    assert here.wait_for_start(here.train()) == newest


def test_a_killed_agent_costs_no_step_and_the_next_one_adopts_its_memory(laptop):
    here = laptop()
    (name,) = here.train_until_sealed()
    agent = here.agent()
    agent.kill()
    agent.wait(10)
    before = max(here.steps(name))
    here.wait("ten more steps", lambda: max(here.steps(name)) > before + 10)
    # What the dead one left behind is taken for a live one by nobody.
    assert here.places.socket.exists()
    assert here.places.lock.exists()
    assert not here.places.running()
    assert "no embedded agent is running" in here.ckptd("stop").stdout
    here.kill_trainers([name])
    (again,) = here.train()
    start = here.wait_for_start([again])
    assert 3 < start <= before + 1
    assert here.event(again, "start")["life"] == 2
    assert here.agent() != agent
    here.wait_for_snapshot("sealed", after=start + 2)
    assert here.check_equal([[name], [again]]) > start


def test_an_agent_whose_runtime_directory_is_gone_makes_way_for_the_next(laptop):
    here = laptop()
    newest = here.kill_and_settle(here.train_until_sealed())
    here.places.directory.rename(here.places.directory.with_name("gone"))
    here.wait_for_no_agent()
    assert here.wait_for_start(here.train()) == newest


def test_the_lock_lets_no_second_one_in(laptop):
    here = laptop()
    here.train_until_sealed()
    second = here.ckptd("embedded")
    assert second.returncode == 1
    assert str(here.places.lock) in second.stderr


def test_a_hundred_starts_at_once_make_one_agent(alone):
    failures: list[Exception] = []

    def start() -> None:
        try:
            ensure(monotonic() + 60)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert alone.agent().is_running()


def test_a_starter_that_dies_at_any_moment_is_no_obstacle(alone):
    for delay_s in (0.05, 0.2, 0.4, 0.6):
        code = "import time; from ckptd.trainer.embedded import ensure; ensure(time.monotonic()+60)"
        with pytest.raises(subprocess.TimeoutExpired):
            # Whoever is faster: the starter is ended in the middle, or has ended.
            subprocess.run([sys.executable, "-c", f"{code}; time.sleep(60)"], timeout=delay_s)
        ensure(monotonic() + 60)
        alone.agent().kill()
        alone.wait_for_no_agent()


def test_a_runtime_directory_of_somebody_elses_is_refused(alone, monkeypatch):
    me = os.getuid()
    ensure(monotonic() + 60)
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(ConfigError, match=rf"belongs to user {me}.*XDG_RUNTIME_DIR.*CKPTD_AGENT"):
        ensure(monotonic() + 60)
    assert not alone.places.running()  # not for that user


def test_a_runtime_directory_that_others_can_write_to_is_refused(alone):
    alone.places.directory.mkdir()
    alone.places.directory.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        ensure(monotonic() + 60)
    alone.places.directory.rmdir()
    alone.places.directory.symlink_to("/tmp")
    with pytest.raises(ConfigError, match=f"{alone.places.directory} is not a directory"):
        ensure(monotonic() + 60)


def test_a_runtime_directory_too_long_for_a_socket_is_refused(alone, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(alone.directory / ("x" * 100)))
    assert runtime_dir().is_relative_to(alone.directory)
    with pytest.raises(ConfigError, match=r"too long.*XDG_RUNTIME_DIR"):
        ensure(monotonic() + 60)


def test_a_start_that_fails_says_why_at_once(alone, monkeypatch):
    monkeypatch.setenv("CKPTD_MEMORY_DIR", "/proc/self/nowhere")
    begun = monotonic()
    with pytest.raises(AgentUnreachable, match=r"(?s)/proc/self/nowhere.*CKPTD_AGENT"):
        ensure(monotonic() + 300)
    assert monotonic() - begun < 60
    monkeypatch.setenv("CKPTD_MEMORY_DIR", str(alone.memory_dir))
    ensure(monotonic() + 60)


def test_an_agent_of_another_version_is_named_and_so_is_the_way_out(alone):
    alone.places.claim()
    frame = bytearray(encode(Here("n", "127.0.0.1")))
    frame[2] = PROTOCOL_VERSION + 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(alone.places.socket))
        listener.listen()

        def answer() -> None:
            conn, _ = listener.accept()
            with conn:
                conn.recv(1 << 16)
                conn.send(frame)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ProtocolError, match=r"another version.*`ckptd stop`"):
            ensure(monotonic() + 60)
        thread.join()


def test_the_log_is_bounded(alone):
    alone.places.claim()
    code = (
        "from ckptd.cli.embedded import _bound_log; import os, pathlib\n"
        "for n in range(400): os.write(2, b'%07d\\n' % n * 1000); "
        f"_bound_log(pathlib.Path({str(alone.places.log)!r}))"
    )
    with alone.places.log.open("ab") as log:
        subprocess.run([sys.executable, "-c", code], stderr=log, check=True)
    kept = alone.places.log.read_text()
    assert len(kept) <= 1 << 20
    assert kept.endswith("0000399\n")


def test_the_log_and_the_locks_are_the_users_alone(alone):
    ensure(monotonic() + 60)
    wait_until("the log", alone.places.log.exists)
    for path in alone.places.directory.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
