"""Standby processes: what is started from one runs as if it had been started by itself."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ckptd.cli.local_cluster import wait_until
from ckptd.trainer import standby
from ckptd.trainer.standby import Standbys

WORKER = [sys.executable, "-u", "-m", "ckptd.trainer.script"]
SCRIPT = """
import json, os, subprocess, sys
from pathlib import Path

from ckptd.watching import launcher_of

if __name__ == "__main__":
    print(json.dumps({
        "argv": sys.argv[1:], "file": Path(__file__).name, "path": sys.path[0],
        "environ": {name: os.environ.get(name) for name in ("RANK", "GONE", "CKPTD_WATCH")},
        "seen by children": subprocess.check_output("echo $RANK", shell=True, text=True),
        "is its parent's": launcher_of(os.getpid()) == os.getppid(),
        "leads": os.getsid(0) == os.getpgid(0) == os.getpid(),
        "directory": os.getcwd(), "stdin": sys.stdin.read(),
        "first to go": Path("/proc/self/oom_score_adj").read_text(),
        "open": sorted(os.listdir("/proc/self/fd")),
    }))
    print("an error", file=sys.stderr)
    if "raise" in sys.argv:
        raise ValueError("wrong")
    sys.exit(7)
"""


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Standbys that import next to nothing, so that this does not take long."""
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "sleeps.py").write_text("import time; print('up', flush=True); time.sleep(1000)")
    (tmp_path / "empty").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(standby, "_MODULES", ("json",))
    monkeypatch.setattr(standby, "_QUIET_S", 0.0)
    monkeypatch.setenv("GONE", "when it is handed over")
    made: list[Standbys] = []

    def make(count=1, modules=()):
        with (tmp_path / "empty").open() as nothing, _stdin(nothing.fileno()):
            made.append(Standbys(count, modules, ["train.py"]))
            if not modules:
                wait_until("standbys", lambda: _is_full(made[-1]))
        return made[-1]

    yield make
    for each in made:
        for one in [*each._ready, *([each._warming] if each._warming else [])]:
            one.kill()


@contextlib.contextmanager
def _stdin(number):
    """Processes that are started meanwhile read from there."""
    own = os.dup(0)
    os.dup2(number, 0)
    try:
        yield
    finally:
        os.dup2(own, 0)
        os.close(own)


def _is_full(standbys):
    standbys._look()
    return len(standbys._ready) == standbys._count


def environ(**more):
    kept = {name: value for name, value in os.environ.items() if name != "GONE"}
    return {**kept, "CKPTD_WATCH": "0", **more}


@pytest.mark.parametrize("how", [["train.py"], ["--module", "train"], ["train.py", "raise"]])
def test_a_worker_from_a_standby_is_as_one_that_was_started_cold(make, tmp_path, how):
    env = environ(RANK="3", TORCHELASTIC_RUN_ID="run", ODD=os.fsdecode(b"\xff"))
    cold = subprocess.run(
        [*WORKER, *how, "--a", "b c"], env=env, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=100, check=False, start_new_session=True,
    )  # fmt: skip
    standbys = make()
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        files = (out.fileno(), err.fileno())
        process = standbys.take([*WORKER, *how, "--a", "b c"], env, files)
        assert process is not None
        assert process.wait(100) == cold.returncode == (1 if "raise" in how else 7)
    told, expected = json.loads((tmp_path / "out").read_text()), json.loads(cold.stdout)
    assert told == expected
    assert told["is its parent's"]
    assert told["environ"] == {"RANK": "3", "GONE": None, "CKPTD_WATCH": "0"}
    ends = [text.splitlines()[-1] for text in ((tmp_path / "err").read_text(), cold.stderr)]
    assert ends[0] == ends[1] == ("ValueError: wrong" if "raise" in how else "an error")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_end_the_worker_itself_as_torchrun_sends_them(make, tmp_path, number):
    with (tmp_path / "out").open("w") as out:
        process = make().take([*WORKER, "sleeps.py"], environ(), (out.fileno(), None))
    wait_until("the script to run", lambda: (tmp_path / "out").read_text())
    os.killpg(process.pid, number)
    assert process.wait(10) == -number


def test_what_is_dead_stopped_or_not_ready_is_not_used_and_does_not_stay(make, monkeypatch):
    monkeypatch.setattr(standby, "_ANSWER_S", 0.2)
    standbys = make(2)
    dead, stopped = (one.process for one in standbys._ready)
    dead.kill()
    stopped.send_signal(signal.SIGSTOP)
    assert standbys.take([*WORKER, "train.py"], environ(), (None, None)) is None
    assert dead.wait(10) == stopped.wait(10) == -signal.SIGKILL

    standbys._look()
    coming = standbys._warming
    assert coming is not None
    assert standbys.take([*WORKER, "train.py"], environ(), (None, None)) is None
    assert coming.process.wait(10) == -signal.SIGKILL
    wait_until("others in their places", lambda: _is_full(standbys))


def test_what_is_no_script_of_ours_is_left_to_torchrun(make):
    standbys = make()
    for args in (["numactl", *WORKER, "train.py"], ["bash"], WORKER[:3]):
        assert standbys.take(args, environ(), (None, None)) is None
    assert len(standbys._ready) == 1


def test_they_end_with_the_launcher(make):
    (one,) = make()._ready
    one._sock.close()
    assert one.process.wait(10) == 0


def test_one_that_dies_is_replaced_and_one_that_cannot_come_up_is_given_up(make, caplog):
    standbys = make()
    standbys._ready[0].process.kill()
    standbys._ready[0].process.wait(10)
    wait_until("another", lambda: _is_full(standbys))

    cannot = make(modules=["no.such.module"])
    started = time.monotonic()
    cannot._keep()  # comes back
    assert time.monotonic() - started < 100
    assert "ranks are started without them" in caplog.text
