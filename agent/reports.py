"""What an agent tells the coordinator's diagnosis, and what it does on its orders."""

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import structlog

from ckptd.agent import witness
from ckptd.agent.cells import Peers
from ckptd.agent.diagnosis import Diagnosis
from ckptd.agent.watcher import SetClock
from ckptd.collectives import GroupInfo
from ckptd.sketches import Aggregator, Sketch
from ckptd.watching import Introduction, Observed, started_ticks
from ckptd.wire import (
    PROBE_LIMIT_BYTES,
    AgentMessage,
    AskClock,
    Clock,
    Collect,
    Collected,
    Counted,
    DiagnosisOrder,
    KillWorkers,
    Look,
    LookAt,
    Looked,
    Pause,
    Probe,
    Probed,
    Sketched,
    TellAll,
    Transfer,
    Transferred,
)

SKETCH_EVERY_S = 0.5
_IDLE_SKETCH_S = 1.0
_SKETCH_S_PER_RANK = 25e-6
"""Jobs are told of the less often the more ranks they have, for one coordinator hears of all: each
2 s of one with 80,000."""
_TRANSFERS_EVERY_S = 2.0
_HURRY_S = 30.0
_STACK_LINES = 40
_STACK_LIMIT = 6000
_HELPERS_SHARE = 0.1
_CHILDREN_LIMIT = 256
_MOVED_BYTES = 1 << 20
"""Less is the pulse, and answers to the agent."""
_LIVES_LIMIT = 64
_ORDERS_LIMIT = 64
_PATIENCE_S = 10.0
_PROBES = 4
"""Of one pair; the first opens the connection."""
_PROBE_S = 1.5
"""Patience for one pair, in seconds: what takes longer has failed."""
_PROBED_NODES_LIMIT = 5
_LETTERS = {
    "running": "R",
    "sleeping": "S",
    "waiting for a device": "D",
    "stopped": "T",
    "stopped by a debugger": "t",
    "a zombie": "Z",
    "dead": "X",
    "gone": "",
}

Run = tuple[str, int]
"""A job and one of its lives."""

log = structlog.get_logger()


@dataclass(slots=True)
class _Life:
    aggregator: Aggregator
    moved: bool = True
    whole: bool = True
    sent_at: float = float("-inf")
    learned: dict[int, tuple[GroupInfo, ...]] = field(default_factory=dict)


class Sketcher:
    """Records of this node's trainers in, sketches out: one for each life of a job that is here."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._clock = SetClock()
        self._lives: dict[Run, _Life] = {}
        self._groups: dict[tuple[str, int], tuple[GroupInfo, ...]] = {}
        """What each rank of a job has told last: it tells only changes, and not for each life."""

    def add(self, observed: Observed) -> None:
        """Take in what a source has seen."""
        self._heed_clock()
        run = observed.job, observed.life
        rank = observed.job, observed.rank
        if observed.groups:
            self._groups[rank] = observed.groups
            while len(self._groups) > _LIVES_LIMIT * 256:
                del self._groups[next(iter(self._groups))]
        life = self._lives.get(run)
        if life is None:
            if not observed.collectives:
                return
            life = self._lives[run] = _Life(Aggregator(*run, self._node))
            while len(self._lives) > _LIVES_LIMIT:
                del self._lives[next(iter(self._lives))]
        groups = self._groups.get(rank, ())
        if life.learned.get(observed.rank) is not groups:
            life.learned[observed.rank] = groups
            for info in groups:
                life.aggregator.learn(info)
        for record in observed.collectives:
            life.aggregator.add(record)
        life.aggregator.read(observed.rank, observed.at)
        life.moved = life.moved or bool(observed.collectives)

    def tell_all(self, job: str, life: int) -> None:
        """The next sketch of this life has its whole layout."""
        if (job, life) in self._lives:
            self._lives[job, life].whole = True

    def sketches(self, at: float, live: Mapping[Run, int], wrong: Collection[Run]) -> list[Sketch]:
        """What there is to say at `at`, epoch seconds, of those lives that have live trainers.

        `live`: how many ranks each has, on all nodes. A life in which nothing moves, and nothing
        looks `wrong`, is told of less often.
        """
        self._heed_clock()
        found = []
        for run in [run for run in self._lives if run not in live]:
            del self._lives[run]
        for run, life in self._lives.items():
            # By the clock, not since the last one: all agents tell at the same instants.
            turns = max(1, round(live[run] * _SKETCH_S_PER_RANK / SKETCH_EVERY_S))
            if round(at / SKETCH_EVERY_S) % turns and not life.whole:
                continue
            idle = not (life.moved or life.whole or run in wrong)
            if idle and 0 <= at - life.sent_at < _IDLE_SKETCH_S:  # the clock may have been set
                continue
            found.append(life.aggregator.sketch(at, life.whole))
            life.moved, life.whole, life.sent_at = False, False, at
        return found

    def _heed_clock(self) -> None:
        if by_s := self._clock.set_by_s():
            for life in self._lives.values():
                life.aggregator.shift(by_s)


class Reports:
    """The agent's part of diagnosis. Its coroutines run in the agent's event loop."""

    def __init__(
        self,
        node: str,
        socket: Path,
        send: Callable[[AgentMessage], None],
        tell: Callable[[str], None],
        pidfds: Callable[[str, int], Iterable[int]],
        peers: Peers,
    ) -> None:
        """`socket`: the agent's. `send` takes messages for the coordinator.

        `tell` takes what is not seen; `pidfds` gives the attached trainers of a life of a job.
        """
        self._send, self._pidfds, self._peers = send, pidfds, peers
        self._node = node
        self._sketcher = Sketcher(node)
        self.diagnosis = Diagnosis(node, socket, self._sketcher.add, tell)
        self.killed = 0
        """Trainers that were killed on the coordinator's order."""
        self._orders: dict[object, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Watch and tell, until cancelled."""
        watching = asyncio.create_task(self.diagnosis.run())
        try:
            told_transfers_at = time.monotonic()
            while True:
                # All agents tell at the same instants, so that what they tell belongs together.
                await asyncio.sleep(SKETCH_EVERY_S - time.time() % SKETCH_EVERY_S)
                now = time.time()
                views = self.diagnosis.views()
                live = {
                    (v.introduction.job, v.introduction.life): v.introduction.world_size
                    for v in views
                }
                wrong = {
                    (v.introduction.job, v.introduction.life)
                    for v in views
                    if v.looks_wrong_since is not None or v.introduction.paused is not None
                }
                for sketch in self._sketcher.sketches(now, live, wrong):
                    shown = self._shown(sketch.job, sketch.life)
                    self._send(Sketched(sketch, pauses_of(shown, time.monotonic())))
                if time.monotonic() - told_transfers_at >= _TRANSFERS_EVERY_S:
                    told_transfers_at = time.monotonic()
                    if transfers := self._peers.take_transfers():
                        self._send(Transferred(transfers))
        finally:
            for task in (watching, *self._orders.values()):
                task.cancel()

    def order(self, order: DiagnosisOrder) -> None:
        """Do what the coordinator says. The same order twice at a time is one."""
        match order:
            case TellAll():
                self._sketcher.tell_all(order.job, order.life)
            case AskClock():
                self._send(Clock(order.asked, time.time()))
            case LookAt():
                self.diagnosis.hurry(_HURRY_S)
                self._begin(("look", order.job, order.life, order.finding), self._look(order))
                if order.counts:
                    self._begin(("count", order.job), self._count(order))
            case Collect():
                self._begin(("collect", order.job, order.incident), self._collect(order))
            case KillWorkers():
                self._kill(order)
            case Probe():
                self._begin(("probe", order.job, order.finding), self._probe(order))

    def _begin(self, key: object, work: Awaitable[None]) -> None:
        if key in self._orders or len(self._orders) >= _ORDERS_LIMIT:
            if asyncio.iscoroutine(work):
                work.close()
            return
        task = asyncio.ensure_future(work)
        self._orders[key] = task

        def ended(done: "asyncio.Future[None]") -> None:
            self._orders.pop(key, None)
            if not done.cancelled() and (error := done.exception()) is not None:
                log.error("an order of the diagnosis failed", order=str(key), error=str(error))

        task.add_done_callback(ended)

    def _shown(self, job: str, life: int) -> list[Introduction]:
        """The live trainers of a life of a job on this node, as they have shown themselves."""
        shown = (view.introduction for view in self.diagnosis.views(job))
        return [told for told in shown if told.life == life]

    async def _look(self, order: LookAt) -> None:
        shown = [told for told in self._shown(order.job, order.life) if told.rank in order.ranks]
        before = {told.pid: family_used(told.pid) for told in shown}
        pairs = await self.diagnosis.look_twice_at(shown, order.apart_s)
        looks = {}
        for first, second in pairs:
            cpu_s, moved = (
                now - then
                for now, then in zip(family_used(second.pid), before[second.pid], strict=True)
            )
            looks[second.rank] = looks_of(first, second, cpu_s, int(moved))
        self._send(Looked(order.job, order.life, order.finding, looks))

    async def _count(self, order: LookAt) -> None:
        """Apart from the looks, which must not wait for it."""
        counts = await self.diagnosis.counts(order.job, self._shown(order.job, order.life))
        if counts is not None:
            self._send(
                Counted(
                    order.job, order.life, order.finding, counts.behind, counts.silent, counts.text
                )
            )

    async def _collect(self, order: Collect) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                folder = await self.diagnosis.collect(order.job, order.reason, apart_s=0.3)
                path, problem = str(folder), ""
        except (OSError, TimeoutError) as error:
            path, problem = "", f"{self._node}: no incident folder: {error or 'it took too long'}"
        places = {told.rank: told.place for told in self._shown(order.job, order.life)}
        self._send(Collected(order.job, order.life, order.incident, path, problem, places))

    async def _probe(self, order: Probe) -> None:
        """One after another, so that they do not slow one another; the best of some tries."""
        found = []
        for node, address in list(order.cells.items())[:_PROBED_NODES_LIMIT]:
            seconds, until = float("inf"), time.monotonic() + _PROBE_S
            for _ in range(_PROBES):
                trial = asyncio.to_thread(self._peers.probe, address, PROBE_LIMIT_BYTES)
                with contextlib.suppress(TimeoutError):
                    left_s = until - time.monotonic()
                    seconds = min(seconds, await asyncio.wait_for(trial, max(0.0, left_s)))
                if time.monotonic() >= until:
                    break
            found.append(Transfer(node, 1, PROBE_LIMIT_BYTES, seconds))
        self._send(Probed(order.job, order.life, order.finding, tuple(found)))

    def _end_launchers(self, job: str) -> int:
        """End what starts trainers of this job here, whatever life they are in by now."""
        shown = [view.introduction for view in self.diagnosis.views(job)]
        launchers = {(told.launcher_pid, told.launcher_ticks) for told in shown}
        return sum(end_launcher(*each) for each in launchers)

    def _kill(self, order: KillWorkers) -> None:
        """SIGKILL, for a stopped process ignores all else; and only whom the order means."""
        killed = self._end_launchers(order.job) if order.launchers else 0
        for pidfd in self._pidfds(order.job, order.life):
            killed += _kill(pidfd)
        for told in self._shown(order.job, order.life):
            # One that has stopped reading is not attached any more.
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(told.pid)
                try:
                    if started_ticks(told.pid) == told.started_ticks:
                        killed += _kill(pidfd)
                finally:
                    os.close(pidfd)
        if killed:
            self.killed += killed
            log.warning("trainers killed", job=order.job, life=order.life, reason=order.reason)


def end_launcher(pid: int, ticks: int) -> int:
    """SIGKILL a launcher with all that it has started; returns how many that were."""
    if pid <= 1 or not ticks or started_ticks(pid) != ticks:
        return 0
    family = []
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGSTOP)  # it shall start no more
        try:
            with contextlib.suppress(psutil.Error):
                family = psutil.Process(pid).children(recursive=True)
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        finally:
            os.kill(pid, signal.SIGKILL)
        return len(family) + 1
    return 0


def pauses_of(shown: Iterable[Introduction], now: float) -> dict[int, Pause]:
    """By rank, what trainers have said that they do instead of training; `now` is monotonic."""
    return {
        told.rank: Pause(paused.what, max(0.0, now - paused.since), paused.at_most_s)
        for told in shown
        if (paused := told.paused) is not None
    }


def looks_of(
    first: witness.Sample, second: witness.Sample, children_s: float = 0.0, children_bytes: int = 0
) -> tuple[Look, Look]:
    """Two samples as the coordinator judges them.

    `children_s` and `children_bytes`: what its child processes did meanwhile. One that waits for
    its data loader's workers does something, though itself it does not.
    """
    compared = witness.compare(first, second)
    main_s = second.cpu_s.get(second.pid, 0.0) - first.cpu_s.get(first.pid, 0.0)
    others_s = compared.cpu_s - main_s
    if others_s < _HELPERS_SHARE * (second.at - first.at):
        others_s = 0.0  # the pulse, and answers to the agent
    moved = compared.moved_bytes + max(0, children_bytes)
    cpu_s = max(0.0, main_s) + others_s + max(0.0, children_s)
    return _look_of(first, 0.0, 0), _look_of(second, cpu_s, moved if moved >= _MOVED_BYTES else 0)


def family_used(pid: int) -> tuple[float, int]:
    """CPU seconds and bytes read and written, of all descendants of a process so far."""
    cpu_s, moved = 0.0, 0
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True)[:_CHILDREN_LIMIT]:
            with contextlib.suppress(psutil.Error):
                times, io = child.cpu_times(), child.io_counters()
                cpu_s += times.user + times.system
                moved += io.read_chars + io.write_chars
    return cpu_s, moved


def _look_of(sample: witness.Sample, cpu_s: float, io_bytes: int) -> Look:
    state = _LETTERS.get(sample.state, sample.state)
    stack = main_stack(sample.stacks) or None
    return Look(sample.at, state, cpu_s, io_bytes, stack)


def main_stack(stacks: str) -> str:
    """Of a dump of all threads the main one's stack, innermost call last; "" if there is none.

    Python dumps the newest thread first, so the main thread comes last, and the innermost call of
    each first.
    """
    python = stacks.partition("\n-- py-spy --")[0]
    threads = re.split(r"^(?:Current thread|Thread) .*\n", python, flags=re.MULTILINE)
    if len(threads) < 2:
        return ""
    lines = [line.strip() for line in threads[-1].splitlines() if line.startswith("  ")]
    return "\n".join(reversed(lines[:_STACK_LINES]))[-_STACK_LIMIT:]


def _kill(pidfd: int) -> int:
    """1 if the process was there to be killed."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        return 0
    return 1
