"""What an agent tells the coordinator's diagnosis, and whom it kills on its order."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ckptd.agent import witness
from ckptd.agent.cells import Peers
from ckptd.agent.reports import Reports, Sketcher, family_used, looks_of, main_stack, pauses_of
from ckptd.collectives import Collective, GroupInfo
from ckptd.keys import ClusterKey
from ckptd.watching import (
    INTRODUCTION_SUFFIX,
    Introduction,
    Observed,
    Paused,
    publish,
    started_ticks,
    trainers_dir,
)
from ckptd.wire import AskClock, Clock, KillWorkers, Pause, Transfer

WORLD = (GroupInfo("0", (0, 1), "gloo"),)
DUMP = """Current thread 0x00007f1 (most recent call first):
  <no Python frame>

Thread 0x00007f2 (most recent call first):
  File "pulse.py", line 3 in _beat

Thread 0x00007f3 (most recent call first):
  File "train.py", line 2 in locked
  File "train.py", line 9 in <module>
"""


def seen(seq: int, rank: int = 0, life: int = 1, groups=()) -> Observed:
    record = Collective("0", seq, "all_reduce", 8, rank, 100.0 + seq, 1e-6, True)
    return Observed("job", rank, life, "recorder", 100.0, (record,), groups=groups)


def test_a_sketch_is_sent_when_something_moved_and_else_now_and_then():
    sketcher, live = Sketcher("n0"), {("job", 1): 2}
    sketcher.add(seen(1, groups=WORLD))
    (first,) = sketcher.sketches(200.0, live, [])
    assert (first.entered, first.parts[0].size) == ((1,), 2)
    assert sketcher.sketches(200.5, live, []) == []
    assert len(sketcher.sketches(200.5, live, wrong=live)) == 1
    sketcher.add(seen(2))
    (moved,) = sketcher.sketches(201.0, live, [])
    assert (moved.entered, moved.parts) == ((2,), None)
    assert len(sketcher.sketches(203.0, live, [])) == 1


def test_a_large_job_is_told_of_less_often_by_all_agents_at_once():
    sketcher, large = Sketcher("n0"), {("job", 1): 80_000}
    sketcher.add(seen(1, groups=WORLD))
    assert len(sketcher.sketches(200.5, large, [])) == 1, "whole, whenever it is asked for"
    told = []
    for turn in range(8):
        sketcher.add(seen(2 + turn))
        told += [sketch.at for sketch in sketcher.sketches(201.0 + turn / 2, large, large)]
    assert told == [202.0, 204.0]


def test_the_whole_layout_is_told_when_it_is_asked_for():
    sketcher, live = Sketcher("n0"), {("job", 1): 2}
    sketcher.add(seen(1, groups=WORLD))
    sketcher.sketches(200.0, live, [])
    sketcher.tell_all("job", 1)
    (whole,) = sketcher.sketches(200.1, live, [])
    assert whole.parts is not None


def test_a_new_life_knows_the_groups_that_were_told_in_the_one_before():
    sketcher = Sketcher("n0")
    sketcher.add(seen(1, life=0, groups=WORLD))
    sketcher.add(seen(7, life=1))
    (sketch,) = sketcher.sketches(200.0, {("job", 1): 2}, [])
    assert (sketch.life, sketch.entered) == (1, (7,))


def test_a_life_whose_trainers_are_dead_is_told_of_no_more():
    sketcher = Sketcher("n0")
    sketcher.add(seen(1, groups=WORLD))
    assert sketcher.sketches(200.0, [], []) == []
    assert sketcher.sketches(201.0, [("job", 1)], []) == []


def test_the_main_threads_stack_ends_with_the_innermost_call():
    assert main_stack(DUMP).splitlines() == [
        'File "train.py", line 9 in <module>',
        'File "train.py", line 2 in locked',
    ]
    assert main_stack(DUMP + "\n-- py-spy --\nThread 1\n  other\n") == main_stack(DUMP)
    assert main_stack("") == main_stack("nonsense") == ""


def test_looks_have_the_kernels_letters_and_leave_out_the_pulse():
    first = witness.Sample(1.0, 0, 1, "stopped", {1: 1.0, 2: 1.0}, read_bytes=0)
    second = witness.Sample(2.0, 0, 1, "gone", {1: 1.5, 2: 1.05}, read_bytes=5000)
    a, b = looks_of(first, second)
    assert (a.state, b.state) == ("T", "")
    assert b.cpu_s - a.cpu_s == pytest.approx(0.5)
    assert a.io_bytes == b.io_bytes


def test_who_waits_for_busy_children_makes_progress():
    first = witness.Sample(1.0, 0, 1, "sleeping", {1: 1.0})
    second = witness.Sample(2.0, 0, 1, "sleeping", {1: 1.0})
    a, b = looks_of(first, second, children_s=0.4)
    assert b.cpu_s - a.cpu_s == pytest.approx(0.4)
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        until = time.monotonic() + 30
        while family_used(parent.pid)[0] < 0.1:
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        for child in psutil.Process(parent.pid).children():
            child.kill()
        parent.wait()


def test_pauses_are_told_by_rank_with_their_age():
    told = [
        Introduction(1, 1, rank=0, paused=Paused("evaluation", 90.0, 60.0)),
        Introduction(2, 2, rank=1),
        Introduction(3, 3, rank=2, paused=Paused("export", 101.0, 60.0)),  # a clock was set back
    ]
    assert pauses_of(told, 100.0) == {0: Pause("evaluation", 10.0, 60.0), 2: Pause("export", 0, 60)}


@pytest.fixture
def sleepers():
    made = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) for _ in range(3)]
    yield made
    for each in made:
        each.kill()
        each.wait()


async def scanned(reports: Reports, count: int) -> None:
    async with asyncio.timeout(30):
        while len(reports.diagnosis.views()) < count:
            await asyncio.sleep(0.05)


def test_only_trainers_of_that_life_are_killed_stopped_ones_too(tmp_path: Path, sleepers):
    doomed, other_life, attached = sleepers
    directory = trainers_dir(tmp_path / "agent")
    directory.mkdir(mode=0o700)
    for process, life in ((doomed, 1), (other_life, 2)):
        told = Introduction(process.pid, started_ticks(process.pid), "job", 0, 1, life)
        publish(directory / f"{process.pid}-x{INTRODUCTION_SUFFIX}", told)
    os.kill(doomed.pid, signal.SIGSTOP)
    pidfd = os.pidfd_open(attached.pid)
    asked, sent = [], []

    def pidfds(job: str, life: int) -> list[int]:
        asked.append((job, life))
        return [pidfd]

    async def story() -> None:
        peers = Peers(ClusterKey.read(None))
        reports = Reports("n0", tmp_path / "agent", sent.append, print, pidfds, peers)
        running = asyncio.create_task(reports.run())
        await scanned(reports, 2)
        reports.order(AskClock(3.0))
        reports.order(KillWorkers("job", 1, "why"))
        assert reports.killed == 2
        reports.order(KillWorkers("another", 2, "why"))
        running.cancel()

    asyncio.run(story())
    os.close(pidfd)
    assert doomed.wait(10) == attached.wait(10) == -signal.SIGKILL
    assert other_life.poll() is None
    assert asked[0] == ("job", 1)
    assert [type(message) for message in sent if isinstance(message, Clock)] == [Clock]


def test_a_pause_ends_with_its_trainer(tmp_path: Path, sleepers):
    paused, *_ = sleepers
    directory = trainers_dir(tmp_path / "agent")
    directory.mkdir(mode=0o700)
    what = Paused("evaluation", time.time(), 3600.0)
    told = Introduction(paused.pid, started_ticks(paused.pid), "job", 0, 1, 1, paused=what)
    publish(directory / f"{paused.pid}-x{INTRODUCTION_SUFFIX}", told)

    async def story() -> None:
        peers = Peers(ClusterKey.read(None))
        reports = Reports("n0", tmp_path / "agent", print, print, lambda job, life: [], peers)
        running = asyncio.create_task(reports.run())
        await scanned(reports, 1)
        assert pauses_of(reports._shown("job", 1), time.time())[0].what == "evaluation"
        paused.kill()
        paused.wait(30)
        async with asyncio.timeout(30):
            while reports._shown("job", 1):
                await asyncio.sleep(0.05)
        running.cancel()

    asyncio.run(story())


def test_transfers_are_told_once_by_node_and_small_ones_not_at_all():
    peers = Peers(ClusterKey.read(None))
    peers.name_of = lambda address: {"10.0.0.2:9": "b"}.get(address, address)
    peers.note_transfer("10.0.0.2:9", 1 << 20, 0.5)
    peers.note_transfer("10.0.0.2:9", 1 << 20, 0.25)
    peers.note_transfer("10.0.0.2:9", 100, 9.0)
    peers.note_transfer("10.0.0.3:9", 1 << 20, 9.0)  # nobody has said who is there
    assert peers.take_transfers() == (Transfer("b", 2, 2 << 20, 0.75),)
    assert peers.take_transfers() == ()
