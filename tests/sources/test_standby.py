"""The standby process: what is forked from it runs as if it had been started by itself."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from ckptd.cli.local_cluster import wait_until
from ckptd.trainer import standby
from ckptd.trainer.standby import Standby
from ckptd.watching import STANDBY_NAME

WORKER = [sys.executable, "-u", "-m", "ckptd.trainer.script"]
SCRIPT = """
import json, os, signal, subprocess, sys, threading
from pathlib import Path

from ckptd.watching import launcher_of

if __name__ == "__main__":
    status = Path("/proc/self/status").read_text().splitlines()
    print(json.dumps({
        "argv": sys.argv[1:], "file": Path(__file__).name, "path": sys.path[0],
        "environ": {name: os.environ.get(name) for name in ("RANK", "LOCAL_GONE", "CKPTD_WATCH")},
        "all of it": sorted(os.environ), "name": Path("/proc/self/comm").read_text(),
        "seen by children": subprocess.check_output("echo $RANK", shell=True, text=True),
        "parent": os.getppid(), "is its parent's": launcher_of(os.getpid()) == os.getppid(),
        "leads": os.getsid(0) == os.getpgid(0) == os.getpid(),
        "directory": os.getcwd(), "stdin": sys.stdin.read(), "mask": os.umask(0),
        "signals": [line for line in status if line.startswith("Sig") and "SigQ" not in line],
        "handlers": [str(signal.getsignal(each)) for each in signal.valid_signals()],
        "limits": Path("/proc/self/limits").read_text(),
        "threads": [each.name for each in threading.enumerate()],
        "first to go": Path("/proc/self/oom_score_adj").read_text(),
        "open": sorted(os.listdir("/proc/self/fd")),
    }))
    print("an error", file=sys.stderr)
    if "raise" in sys.argv:
        raise ValueError("wrong")
    sys.exit(7)
"""
SLEEPS = "import time; print('up', flush=True); time.sleep(1000)"
DRAWS = """
import random, numpy, torch
print(random.random(), numpy.random.random(), torch.rand(1).item())
"""
ENDS = "print('began')"


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Standbys that import next to nothing, so that this does not take long."""
    for name, text in {"train": SCRIPT, "sleeps": SLEEPS, "draws": DRAWS, "ends": ENDS}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(standby, "_MODULES", ("json",))
    monkeypatch.setenv("LOCAL_GONE", "when a worker is forked")
    monkeypatch.setenv("CKPTD_WATCH", "0")
    made: list[Standby] = []

    def make(*modules):
        told: list[str] = []
        with open(os.devnull) as nothing, _stdin(nothing.fileno()):
            made.append(Standby(modules, [str(tmp_path)], told.append))
            wait_until("a standby", lambda: made[-1]._ready or made[-1]._given_up)
        return made[-1], told

    yield make
    for each in made:
        each.close()
        each._process.popen.wait(10)


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


def environ(**more):
    kept = {name: value for name, value in os.environ.items() if name != "LOCAL_GONE"}
    return {**kept, **more}


def take(warm, *arguments, env=None, out=None, err=None):
    files = tuple(each and each.fileno() for each in (out, err))
    return warm.take([*WORKER, *arguments], environ() if env is None else env, files)


@pytest.mark.parametrize("how", [["train.py"], ["--module", "train"], ["train.py", "raise"]])
def test_a_forked_worker_is_as_one_that_was_started_cold(make, tmp_path, how):
    env = environ(RANK="3", TORCHELASTIC_RUN_ID="run", LOCAL_ODD=os.fsdecode(b"\xff"))
    cold = subprocess.run(
        [*WORKER, *how, "--a", "b c"], env=env, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=100, check=False, start_new_session=True,
    )  # fmt: skip
    warm, _ = make()
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = take(warm, *how, "--a", "b c", env=env, out=out, err=err)
        assert process is not None
        assert process.wait(100) == cold.returncode == (1 if "raise" in how else 7)
        assert process.poll() == process.returncode
    told, expected = json.loads((tmp_path / "out").read_text()), json.loads(cold.stdout)
    assert told == expected
    assert told["is its parent's"]
    assert told["parent"] == os.getpid()
    assert told["environ"] == {"RANK": "3", "LOCAL_GONE": None, "CKPTD_WATCH": "0"}
    ends = [text.splitlines()[-1] for text in ((tmp_path / "err").read_text(), cold.stderr)]
    assert ends[0] == ends[1] == ("ValueError: wrong" if "raise" in how else "an error")


def test_one_standby_has_many_workers_which_draw_other_random_numbers(make, tmp_path):
    warm, told = make("torch")
    for turn in range(3):
        with (tmp_path / f"drawn-{turn}").open("w") as out:
            assert take(warm, "draws.py", out=out).wait(100) == 0
    drawn = [(tmp_path / f"drawn-{turn}").read_text().split() for turn in range(3)]
    assert [len({each[of] for each in drawn}) for of in range(3)] == [3, 3, 3]
    assert told == []
    assert [one.name() for one in psutil.Process().children() if one.name() == STANDBY_NAME]
    assert psutil.Process(warm._process.popen.pid).children() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_end_the_worker_itself_also_when_the_standby_is_dead(make, tmp_path, number):
    warm, _ = make()
    with (tmp_path / "out").open("w") as out:
        process = take(warm, "sleeps.py", out=out)
    wait_until("the script to run", lambda: (tmp_path / "out").read_text())
    first = warm._process
    first.popen.kill()
    wait_until("another standby", lambda: warm._process is not first and warm._ready)
    assert process.poll() is None
    os.killpg(process.pid, number)
    assert process.wait(10) == -number
    process.kill()  # there is none any more: nobody gets it
    assert take(warm, "ends.py").wait(100) == 0


def test_a_stopped_standby_is_waited_for_a_while_and_replaced(make, monkeypatch):
    warm, told = make()
    monkeypatch.setattr(standby, "_ANSWER_S", 0.2)
    stopped = warm._process.popen
    stopped.send_signal(signal.SIGSTOP)
    assert take(warm, "train.py") is None
    assert stopped.wait(10) == -signal.SIGKILL
    (reason,) = told
    assert "started without the standby process: it does not answer" in reason
    wait_until("another", lambda: warm._process.popen is not stopped and warm._ready)


def test_one_that_still_imports_is_waited_for_but_not_for_ever(make, tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        "import os, time\nwhile os.path.exists('slow'): time.sleep(0.01)"
    )
    (tmp_path / "slow").touch()
    monkeypatch.setattr(standby, "_PATIENCE_S", 0.5)
    told: list[str] = []
    warm = Standby(["slow"], [], told.append)
    assert take(warm, "ends.py") is None
    warm._patience_s = 100.0
    ended = threading.Timer(0.2, (tmp_path / "slow").unlink)
    ended.start()
    assert take(warm, "ends.py").wait(100) == 0
    warm.close()


DYING = """
import os, signal, sys
own = sys.modules["__main__"]
begin = own._begin

def die(files):
    os.kill(os.getppid(), signal.SIGKILL)
    return begin(files)

own._begin = die
"""
FAILING = "import sys; sys.modules['__main__']._begin = lambda files: 1 / 0"
LATE = """
import os, sys, time
own = sys.modules["__main__"]
begin = own._begin

def late(files):
    while not os.path.exists("late"): time.sleep(0.01)
    return begin(files)

own._begin = late
"""


def test_a_worker_begins_though_the_standby_dies_as_soon_as_it_has_forked(make, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    warm, told = make("dying")
    first = warm._process.popen
    process = take(warm, "ends.py")
    assert process.wait(100) == 0
    assert first.wait(10) == -signal.SIGKILL
    wait_until("another standby", lambda: warm._process.popen is not first and warm._ready)
    assert told == []


@pytest.mark.parametrize("text", [FAILING, LATE])
def test_a_worker_that_does_not_come_or_comes_too_late_is_none(make, tmp_path, monkeypatch, text):
    (tmp_path / "odd.py").write_text(text)
    warm, told = make("odd")
    first = warm._process.popen
    monkeypatch.setattr(standby, "_ANSWER_S", 0.3)
    with (tmp_path / "out").open("w") as out:
        assert take(warm, "sleeps.py", out=out) is None
    assert len(told) == 1
    (tmp_path / "late").touch()

    def left() -> list[int]:
        """What has the standby's command line, but for the new one."""
        found = psutil.process_iter(["cmdline"])
        pids = [one.pid for one in found if str(tmp_path) in (one.info["cmdline"] or ())]
        return [pid for pid in pids if pid != warm._process.popen.pid]

    wait_until("all that was forked to end", lambda: not left())
    assert first.wait(10) == -signal.SIGKILL
    assert (tmp_path / "out").read_text() == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=[1000], daemon=True, "
         "name='beat').start()", "importing unfit has started a thread beat"),
        ("import sys\nsys.modules['__main__']._HARMLESS_DEVICES = set()\nfile = open('/dev/null')",
         "importing unfit has opened /dev/null"),
        ("import sys, types\nsys.modules['torch.cuda'] = types.SimpleNamespace("
         "_is_in_bad_fork=lambda: True)", "importing unfit has initialised an accelerator"),
        ("import no.such.module", "importing unfit: ModuleNotFoundError: No module named 'no'"),
    ],
)  # fmt: skip
def test_what_is_not_safe_to_be_forked_is_not_and_it_is_said_why(make, tmp_path, text, reason):
    (tmp_path / "unfit.py").write_text(text)
    warm, told = make("unfit")
    assert take(warm, "train.py") is None
    assert take(warm, "train.py") is None
    assert told == [f"ranks are started without the standby process: {reason}"]


def test_standbys_that_only_die_are_given_up(make, tmp_path):
    (tmp_path / "dies.py").write_text("import os; os.abort()")
    warm, told = make("dies")
    assert take(warm, "train.py") is None
    assert told == ["ranks are started without the standby process: 3 of them have died"]


@pytest.mark.parametrize(
    ("args", "env", "reason"),
    [
        (["numactl", *WORKER, "train.py"], {}, "torchrun starts them by way of numactl"),
        (["bash"], {}, "torchrun starts them by way of bash"),
        ([*WORKER, "train.py"], {"OMP_NUM_THREADS": "3", "TORCH_LOGS": "x", "RANK": "1"},
         "since the launcher began there have been changes of OMP_NUM_THREADS, TORCH_LOGS"),
        ([*WORKER, "train.py"], {"CKPTD_WATCH": None},
         "since the launcher began there have been changes of CKPTD_WATCH"),
    ],
)  # fmt: skip
def test_what_a_fork_would_not_be_the_same_for_is_started_cold(make, args, env, reason):
    warm, told = make()
    env = {name: value for name, value in environ(**env).items() if value is not None}
    assert warm.take(args, env, (None, None)) is None
    assert told == [f"ranks are started without the standby process: {reason}"]
    assert warm._process.popen.wait(10) == -signal.SIGKILL


def test_it_ends_with_the_launcher(make):
    warm, _ = make()
    warm._process._sock.close()
    assert warm._process.popen.wait(10) == 0
