"""The clock of a node is set while its trainers are watched."""

import asyncio
import os
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from ckptd.agent import watcher
from ckptd.agent.reports import Sketcher
from ckptd.agent.watcher import Pace, Watcher
from ckptd.collectives import Collective, GroupInfo
from ckptd.sketches import unpack
from ckptd.watching import Introduction, Observed, publish, started_ticks

HOUR_S = 3600.0


@pytest.mark.parametrize("by_s", [-HOUR_S, HOUR_S])
def test_they_are_watched_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_s: float
) -> None:
    ahead_s = 0.0
    clock = SimpleNamespace(
        time=lambda: time.time() + ahead_s,
        monotonic=time.monotonic,
        perf_counter=time.perf_counter,
    )
    monkeypatch.setattr(watcher, "time", clock)
    reads: list[bool] = []

    async def read(trainer: object, dead: bool) -> None:
        reads.append(dead)

    monkeypatch.setattr(watcher._Trainer, "_read", read)
    me = Introduction(os.getpid(), started_ticks(os.getpid()), "job", 0)
    tmp_path.chmod(0o700)
    publish(tmp_path / "me.json", me)

    async def watch() -> None:
        nonlocal ahead_s
        watching = Watcher(tmp_path, lambda seen: None, Pace(slow_s=0.1, fast_s=0.02))
        task = asyncio.create_task(watching.run())
        for step_s in (0.0, by_s):
            ahead_s += step_s
            known = len(reads)
            async with asyncio.timeout(30):
                while len(reads) < known + 3:
                    await asyncio.sleep(0.01)
            assert watching.views()[0].looks_wrong_since is None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(watch())


@pytest.mark.parametrize("by_s", [-HOUR_S, HOUR_S])
def test_a_rank_was_silent_for_as_long_as_it_was(
    monkeypatch: pytest.MonkeyPatch, by_s: float
) -> None:
    clock = SimpleNamespace(time=lambda: now, monotonic=lambda: up)
    monkeypatch.setattr(watcher, "time", clock)
    now, up = 2 * HOUR_S, 50.0
    sketcher, run = Sketcher("a"), ("job", 1)
    groups = (GroupInfo("g", (0, 1), "gloo"),)

    def tell(*records: Collective) -> None:
        sketcher.add(Observed("job", 0, 1, "recorder", now, records, (), groups, 0))

    ended = Collective("g", 1, "all_reduce", 64, 0, now, 1e-6, True, 0.5)
    hangs = Collective("g", 2, "all_reduce", 64, 0, now + 1.0, 1e-6)
    tell(ended, hangs)
    sketcher.sketches(now + 1.0, {run: 2}, ())
    now, up = now + 61.0 + by_s, up + 61.0
    tell()
    (sketch,) = sketcher.sketches(now, {run: 2}, {run})
    assert (sketch.still_s, sketch.waiting_s, sketch.read_s) == ((60.0,), (60.0,), (0.0,))
    tell(msgspec.structs.replace(hangs, ended=True, duration_s=60.0))
    (sketch,) = sketcher.sketches(now, {run: 2}, ())
    assert (sketch.still_s, sketch.gap_s) == ((0.0,), 60.0)
    assert [sample.entered_s for sample in unpack(sketch.samples)] == [60.0]


def test_what_does_not_move_is_still_told() -> None:
    sketcher, run = Sketcher("a"), ("job", 1)
    record = Collective("g", 1, "all_reduce", 64, 0, 100.0, None, None, True)
    sketcher.add(Observed("job", 0, 1, "recorder", 100.0, (record,), (), (), 0))
    assert sketcher.sketches(100.0 + HOUR_S, {run: 2}, ())
    assert sketcher.sketches(100.0, {run: 2}, ()), "after the clock was set back"
