"""Watches the trainers of a node: finds them, reads their timing records, notices who is silent.

Only asyncio and files; it decides nothing about the job. Slow while all is well, fast for a while
when something looks wrong, and never so often that answering costs a trainer more than a small
share of its time. All agents read at the same instants of the clock, so that what they see of one
another's ranks overlaps.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from ckptd.agent import worker_client
from ckptd.agent.flight_recorder import Reading, RecorderReader
from ckptd.agent.inspector import InspectorReader
from ckptd.agent.timing_ring import TimingReader
from ckptd.collectives import Collective, GroupInfo
from ckptd.errors import CorruptData, Gone, ProtocolError
from ckptd.ring import RingReader
from ckptd.watching import (
    GROUPS_SUFFIX,
    INTRODUCTION_SUFFIX,
    PULSE_SUFFIX,
    Gap,
    Introduction,
    Observed,
    Pulse,
    began_at,
    make_private,
    read_groups,
    read_introduction,
    read_pulse,
    started_ticks,
)

TRAINERS_LIMIT = 256
_SCAN_EVERY_S = 0.5
_CLOCK_SET_S = 0.5
"""Less is adjustment."""
_FILE_S = 0.2
_FILES = ThreadPoolExecutor(1, "ckptd-inspector")
"""Reads what lies on file systems of the users' choice: if one of these is stuck, only this is."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Pace:
    """How often trainers are read. All in seconds."""

    slow_s: float = 1.0
    """While all is well."""
    fast_s: float = 0.2
    """When something looks wrong."""
    fast_for_s: float = 30.0
    """Then slowly again: a long evaluation looks wrong, too."""
    deadline_s: float = 1.0
    """A trainer that has not answered by then is silent."""
    stuck_s: float = 1.0
    """An operation that is open, or a pulse that is old, for so long looks wrong."""
    share: float = 0.02
    """Most of a trainer's time that its answers may take."""


class SetClock:
    """Notices that the clock of this node was set."""

    def __init__(self) -> None:
        self._ahead_s = time.time() - time.monotonic()

    def set_by_s(self) -> float:
        """By how much it was set since this was last asked; 0.0: it was not."""
        ahead_s = time.time() - time.monotonic()
        by_s, self._ahead_s = ahead_s - self._ahead_s, ahead_s
        return by_s if abs(by_s) >= _CLOCK_SET_S else 0.0


@dataclass(slots=True)
class TrainerView:
    """What is seen of one trainer."""

    introduction: Introduction
    source: str = ""
    """"timing", "recorder", or "" as long as nothing is seen."""
    silent_since: float | None = None
    """Since when its worker server has not answered, in seconds since the epoch."""
    answer_s: float = 0.0
    """How long its last answer took."""
    pulse: Pulse | None = None
    looks_wrong_since: float | None = None
    problems: tuple[str, ...] = ()
    """What is not seen of it, and how to switch it on."""


class Watcher:
    """`run()` watches until it is cancelled."""

    def __init__(
        self, directory: Path, deliver: Callable[[Observed], None], pace: Pace | None = None
    ) -> None:
        """`directory`: `watching.trainers_dir` of the agent's socket. `deliver` must not block."""
        self.directory = directory
        self._deliver, self._pace = deliver, pace or Pace()
        self._following: dict[str, _Trainer] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._refused: set[str] = set()
        self._hurry_until = 0.0

    def views(self) -> list[TrainerView]:
        """All live trainers, by rank."""
        found = [each.view for each in self._following.values()]
        return sorted(found, key=lambda view: (view.introduction.job, view.introduction.rank))

    def worker_server(self, view: TrainerView) -> Path | None:
        """Where its worker server listens, if it does."""
        name = view.introduction.socket
        return self.directory / name if name else None

    def hurry(self, for_s: float) -> None:
        """Read all trainers fast for so long: somebody suspects something."""
        self._hurry_until = time.monotonic() + for_s

    async def run(self) -> None:
        """Follow every trainer that shows itself."""
        try:
            make_private(self.directory)
            while True:
                self._scan()
                await asyncio.sleep(_SCAN_EVERY_S)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _scan(self) -> None:
        for stem, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[stem]
                self._following.pop(stem, None)
        for path in sorted(self.directory.glob("*" + INTRODUCTION_SUFFIX)):
            stem = path.name.removesuffix(INTRODUCTION_SUFFIX)
            if stem in self._tasks or stem in self._refused:
                continue
            if len(self._tasks) >= TRAINERS_LIMIT:
                return
            try:
                introduction = read_introduction(path)
            except OSError:
                continue
            except CorruptData as error:
                self._refuse(stem, str(error))
                continue
            trainer = _Trainer(self.directory, stem, introduction, self._deliver, self._pace)
            self._following[stem] = trainer
            self._tasks[stem] = asyncio.create_task(self._follow(stem, trainer))

    async def _follow(self, stem: str, trainer: "_Trainer") -> None:
        try:
            await trainer.follow(lambda: time.monotonic() < self._hurry_until)
        except Exception:  # whatever it is, the other trainers are watched as before
            log.exception("bug while watching a trainer", trainer=stem)
            self._refuse(stem, "it cannot be watched")

    def _refuse(self, stem: str, reason: str) -> None:
        if len(self._refused) < TRAINERS_LIMIT:
            self._refused.add(stem)
            log.warning("trainer not watched", trainer=stem, reason=reason)


class _Trainer:
    """Follows one trainer process until it is dead."""

    def __init__(
        self,
        directory: Path,
        stem: str,
        introduction: Introduction,
        deliver: Callable[[Observed], None],
        pace: Pace,
    ) -> None:
        self._base, self._stem = directory, stem
        self._deliver, self._pace = deliver, pace
        self.view = TrainerView(introduction)
        self._groups: tuple[GroupInfo, ...] = ()
        self._told_groups: tuple[GroupInfo, ...] = ()
        self._stamps: dict[str, tuple[int, int]] = {}
        self._recorders: dict[str, RecorderReader] = {}
        self._ring: RingReader | None = None
        self._timing: TimingReader | None = None
        self._inspector: InspectorReader | None = None
        self._inspecting: asyncio.Future[Reading] | None = None
        self._open_since: dict[tuple[str, int, str], float] = {}
        self._notes: set[str] = set()
        self._moved = time.time()
        self._counters: object = None
        self._due = 0.0
        self._clock = SetClock()

    async def follow(self, hurried: Callable[[], bool]) -> None:
        """Read, deliver, wait; until the process is dead."""
        try:
            while True:
                self._heed_clock()
                self._reread()
                dead = self._is_dead()
                wrong = self._looks_wrong(time.time())
                if (
                    dead
                    or self._due <= time.time()
                    or (wrong and self.view.looks_wrong_since is None)
                ):
                    await self._read(dead)
                    now = time.time()
                    self._note_wrong(now)
                    self._due = self._next(now, hurried())
                if dead:
                    return
                await asyncio.sleep(min(self._pace.fast_s, max(0.0, self._due - time.time())))
        finally:
            if self._ring is not None:
                self._ring.close()
            if self._is_dead():
                self._clear_away()

    def _heed_clock(self) -> None:
        """If the clock was set, all times that are remembered move with it."""
        by_s = self._clock.set_by_s()
        if not by_s:
            return
        log.warning("the clock was set", by_s=round(by_s, 3))
        self._due += by_s
        self._moved += by_s
        self._open_since = {key: at + by_s for key, at in self._open_since.items()}
        if self.view.silent_since is not None:
            self.view.silent_since += by_s
        if self.view.looks_wrong_since is not None:
            self.view.looks_wrong_since += by_s
        for recorder in self._recorders.values():
            recorder.began_at += by_s
        if self._timing is not None:
            self._timing.began_at += by_s
        if self._inspector is not None:
            self._inspector.began_at += by_s

    # What it shows.

    def _reread(self) -> None:
        if self._changed(INTRODUCTION_SUFFIX):
            with contextlib.suppress(OSError, CorruptData):
                self.view.introduction = read_introduction(self._path(INTRODUCTION_SUFFIX))
        self.view.pulse = read_pulse(self._path(PULSE_SUFFIX))
        self.view.problems = tuple(sorted({*self.view.introduction.problems, *self._notes}))

    def _reread_groups(self) -> None:
        if not self._changed(GROUPS_SUFFIX):
            return
        try:
            self._groups = read_groups(self._path(GROUPS_SUFFIX))
        except (OSError, CorruptData) as error:
            self._notes.add(f"process groups are not seen: {error}")

    def _path(self, suffix: str) -> Path:
        return self._base / (self._stem + suffix)

    def _changed(self, suffix: str) -> bool:
        try:
            found = self._path(suffix).stat()
        except OSError:
            return False
        stamp = found.st_ino, found.st_mtime_ns
        before, self._stamps[suffix] = self._stamps.get(suffix), stamp
        return before != stamp

    def _is_dead(self) -> bool:
        told = self.view.introduction
        return started_ticks(told.pid) != told.started_ticks

    # Reading.

    async def _read(self, dead: bool) -> None:
        now = time.time()
        self._reread_groups()
        observed = self._read_ring(now)
        if observed is None and not dead:
            observed = await self._ask_recorder(now)
        if observed is None:
            observed = self._observed("", now)
        timed = await self._read_inspector(now)
        known = self._inspector.groups.values() if self._inspector is not None else ()
        groups = (*self._groups, *known)
        is_told = groups == self._told_groups
        self._told_groups = groups
        self._follow_open(observed)
        self._deliver(
            msgspec.structs.replace(
                observed,
                collectives=(*timed.collectives, *observed.collectives),
                dropped=timed.dropped + observed.dropped,
                groups=() if is_told else groups,
            )
        )

    def _observed(
        self,
        source: str,
        at: float,
        found: Sequence[Collective] = (),
        gaps: Sequence[Gap] = (),
        dropped: int = 0,
    ) -> Observed:
        self.view.source = source or self.view.source
        told = self.view.introduction
        return Observed(
            told.job, told.rank, told.life, source, at, tuple(found), tuple(gaps), (), dropped
        )

    def _read_ring(self, now: float) -> Observed | None:
        """The timing source, where there is one."""
        told = self.view.introduction
        if not told.ring:
            return None
        try:
            if self._ring is None or self._timing is None:
                self._ring = RingReader(self._checked_ring())
                self._timing = TimingReader(told.rank, began_at(told.started_ticks))
            records, lost = self._ring.read()
            if any(record.group >= len(self._groups) for record in records):
                self._reread_groups()  # a group that was made a moment ago
        except (OSError, CorruptData) as error:
            self._notes.add(f"the timing records cannot be read: {error}")
            return None
        found, gaps, dropped = self._timing.take(records, self._groups, now)
        if lost:
            log.info("timing records lost", rank=told.rank, records=lost)
        return self._observed("timing", now, found, gaps, dropped)

    def _checked_ring(self) -> Path:
        """Only the file that this process would have made: the path comes from outside."""
        expected = Path("/dev/shm") / f"ckptd-{os.getuid()}-{self._stem}.ring"
        if self.view.introduction.ring != str(expected):
            raise CorruptData(f"{self.view.introduction.ring[:200]} is not {expected}")
        return expected

    async def _ask_recorder(self, now: float) -> Observed | None:
        told = self.view.introduction
        if not told.socket or not told.recorder_entries or "/" in told.socket:
            return None
        readings: dict[str, Reading] = {}
        is_silent = False
        began = time.perf_counter()
        for handler in self._recorders_to_ask():
            try:
                readings[handler] = await self._ask_one(handler, now)
            except (TimeoutError, Gone):
                is_silent = True
                break
            except ProtocolError as error:
                self._notes.add(f"collectives are not seen: {str(error)[:300]}")
        self.view.answer_s = time.perf_counter() - began
        if is_silent and self.view.silent_since is None:
            self.view.silent_since = now
        if readings and not is_silent:
            self.view.silent_since = None
        return self._all_of(readings, now) if readings else None

    def _all_of(self, readings: dict[str, Reading], now: float) -> Observed:
        """A group with two backends counts in each recorder: NCCL's operations are followed."""
        of_nccl = {info.group for info in self._groups if info.is_nccl}
        found: list[Collective] = []
        gaps: list[Gap] = []
        for handler, reading in readings.items():
            other = of_nccl if handler == worker_client.ENTRIES else set()
            found += [each for each in reading.collectives if each.group not in other]
            gaps += [gap for gap in reading.gaps if gap.group not in other]
        dropped = sum(reading.dropped for reading in readings.values())
        return self._observed("recorder", now, found, gaps, dropped)

    def _recorders_to_ask(self) -> list[str]:
        """That of NCCL if a group is its; that of gloo if one may be, or none is known."""
        has_nccl = any(info.is_nccl for info in self._groups)
        only_nccl = all(info.is_nccl and "gloo" not in info.backend for info in self._groups)
        handlers = [worker_client.ENTRIES_OF_NCCL] if has_nccl else []
        return handlers if has_nccl and only_nccl else [*handlers, worker_client.ENTRIES]

    async def _ask_one(self, handler: str, now: float) -> Reading:
        told = self.view.introduction
        if handler not in self._recorders:
            on_streams = handler == worker_client.ENTRIES_OF_NCCL
            began = began_at(told.started_ticks)
            self._recorders[handler] = RecorderReader(told.rank, began, on_streams)
        recorder = self._recorders[handler]
        raw = await worker_client.ask(self._base / told.socket, handler, self._pace.deadline_s)
        reading = recorder.take(raw, now)
        self._notes |= recorder.problems
        return reading

    async def _read_inspector(self, now: float) -> Reading:
        """How long operations took, where NCCL's Inspector tells and nothing better does."""
        told = self.view.introduction
        if not told.inspector or told.ring:
            return Reading()
        try:
            if self._inspector is None:
                began = began_at(told.started_ticks)
                path = self._checked_inspector()
                self._inspector = InspectorReader(path, told.pid, told.rank, began)
            patience_s = 0.0  # one that has been waited for is waited for no more
            if self._inspecting is None:
                loop = asyncio.get_running_loop()
                self._inspecting = loop.run_in_executor(_FILES, self._inspector.read, now)
                patience_s = _FILE_S
            done, _ = await asyncio.wait([self._inspecting], timeout=patience_s)
            if not done:
                return Reading()  # it is told when it is there
            reading, self._inspecting = self._inspecting, None
            return reading.result()
        except (OSError, CorruptData) as error:
            self._notes.add(f"what NCCL's Inspector writes cannot be read: {error}")
            return Reading()

    def _checked_inspector(self) -> Path:
        """Only such a file as the plugin writes for this process: the path comes from outside."""
        told = self.view.introduction
        path = Path(told.inspector)
        if not path.is_absolute() or not path.name.endswith(f"-pid{told.pid}.log"):
            raise CorruptData(f"{told.inspector[:200]} is not HOST-pid{told.pid}.log")
        return path

    # Pace.

    def _follow_open(self, observed: Observed) -> None:
        for each in observed.collectives:
            key = (each.group, each.seq, each.op)
            if each.ended:
                self._open_since.pop(key, None)
            else:
                self._open_since[key] = each.entered_at
        newest = max((each.entered_at for each in observed.collectives), default=0.0)
        # What an overrun has hidden has ended, or it would not have gone on.
        for key, at in list(self._open_since.items()):
            if observed.gaps and at < newest:
                del self._open_since[key]

    def _looks_wrong(self, now: float) -> bool:
        stuck = now - self._pace.stuck_s
        pulse = self.view.pulse
        counters = None if pulse is None else (pulse.enqueued, pulse.completed)
        if counters != self._counters:
            self._counters, self._moved = counters, now
        waits = pulse is not None and pulse.enqueued != pulse.completed and self._moved < stuck
        no_pulse = pulse is not None and pulse.at < stuck
        is_open = any(at < stuck for at in self._open_since.values())
        return waits or no_pulse or is_open or self.view.silent_since is not None

    def _note_wrong(self, now: float) -> None:
        if not self._looks_wrong(now):
            self.view.looks_wrong_since = None
        elif self.view.looks_wrong_since is None:
            self.view.looks_wrong_since = now

    def _next(self, now: float, hurried: bool) -> float:
        """When to read next: a whole multiple of the interval, on every node."""
        wrong = self.view.looks_wrong_since
        fast = hurried or (wrong is not None and now - wrong < self._pace.fast_for_s)
        interval_s = self._pace.fast_s if fast else self._pace.slow_s
        if self.view.source == "recorder" and self.view.silent_since is None:
            interval_s = max(interval_s, self.view.answer_s / self._pace.share)
        return (now // interval_s + 1) * interval_s

    def _clear_away(self) -> None:
        """A process that was killed leaves its files."""
        for path in self._base.glob(self._stem + ".*"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError, CorruptData):
            self._checked_ring().unlink(missing_ok=True)
