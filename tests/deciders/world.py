"""A cluster in one thread: the real deciders, and small models of all that is around them.

Messages arrive in order on each link, after random delays; work takes random times; everything is
drawn from one seed. Times are in seconds of the simulation.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ckptd.agent import events as ev
from ckptd.agent.lifecycle import Lifecycle
from ckptd.agent.state import Identity
from ckptd.coordinator import keeping, recovery
from ckptd.coordinator.claim import Claim
from ckptd.coordinator.decider import Coordinator, Send, Settings
from ckptd.coordinator.state import State
from ckptd.ids import SnapshotId
from ckptd.journal import Incident, Journal
from ckptd.manifest import Extent, JobManifest, JobRecord
from ckptd.segment import ParitySidecar, Sidecar
from ckptd.terms import KeptTerm
from ckptd.wire import (
    AskResume,
    Attach,
    Attached,
    CaptureFailed,
    Commit,
    Granted,
    Holding,
    LayoutOpened,
    OpenLayout,
    Progress,
    Rejected,
    Restore,
    Restored,
    Resumed,
    Revoked,
    RollBack,
    Sealed,
    TakeSnapshot,
    Ticket,
    WaitForWork,
    Waiting,
    Work,
)

JOB = "job"
CELL_BYTES = 4
SIZE_BYTES = 12
STEP_S = 0.05
SETTINGS = Settings(cell_bytes=CELL_BYTES, beat_s=0.25, lease_s=1.5, rebuild_after_s=0.3)

Range = tuple[float, float]
"""The least and the most that something takes, in seconds."""


@dataclass(frozen=True)
class Plan:
    """What a world is made of, and how fast things are in it."""

    nodes: int = 4
    """Nodes that the job runs on."""
    ranks_per_node: int = 1
    spares: int = 2
    slots: int = 2
    """Slots of each rank."""
    keep: int = 1
    """How many protected snapshots are kept."""
    control_s: Range = (0.001, 0.02)
    """A message between an agent and the coordinator."""
    control_tail_s: float = 0.0
    """The mean of what may come on top of that, exponentially distributed."""
    local_s: Range = (0.0005, 0.005)
    """A message between a trainer and its agent."""
    step_s: Range = (0.8 * STEP_S, 1.2 * STEP_S)
    """A training step."""
    capture_s: Range = (0.005, 1.5 * STEP_S)
    """From the step to the seal."""
    torn: float = 0.03
    """The share of captures that fail, on each rank."""
    check_s: Range = (0.001, 0.02)
    """A look at a sealed segment."""
    release_s: Range = (0.001, 0.02)
    encode_s: Range = (0.01, 0.1)
    """From the order to protect until all parity is there, if all nodes have the order by then."""
    encode_again_s: Range = (0.02, 0.1)
    """From there to the next look, if they have not."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


class Clock:
    """What happens when."""

    def __init__(self, seed: int) -> None:
        self.now = 1000.0
        self.random = random.Random(seed)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._numbers), what))

    def soon(self, low_s: float, high_s: float, what: Callable[[], None]) -> None:
        self.at(self.now + self.random.uniform(low_s, high_s), what)

    def run_until(self, end: float) -> None:
        while self._queue and self._queue[0][0] <= end:
            self.now, _, what = heapq.heappop(self._queue)
            what()
        self.now = end


class Link:
    """One direction of a connection: in order, each message after a random delay."""

    def __init__(self, clock: Clock, range_s: Range, tail_s: float = 0.0) -> None:
        self._clock, self._range_s, self._tail_s = clock, range_s, tail_s
        self._last = 0.0
        self.open = True

    def carry(self, deliver: Callable[[], None]) -> None:
        delay_s = self._clock.random.uniform(*self._range_s)
        if self._tail_s:
            delay_s += self._clock.random.expovariate(1 / self._tail_s)
        self._last = max(self._last, self._clock.now + delay_s)
        self._clock.at(self._last, lambda: deliver() if self.open else None)


@dataclass
class File:
    """A slot file and what it holds, whole: a segment, or all parity cells of a node."""

    size_bytes: int
    segment: tuple[SnapshotId, int] | None = None
    parity: SnapshotId | None = None
    place: tuple[int, int] = (0, 0)
    """For which the parity is."""


@dataclass
class Disk:
    """The memory directory: it outlives the agent, not the machine."""

    token: str
    ranks: int
    """World size of the job."""
    files: dict[str, File] = field(default_factory=dict)
    manifests: dict[SnapshotId, JobManifest] = field(default_factory=dict)
    records: dict[str, JobRecord] = field(default_factory=dict)
    term: KeptTerm | None = None
    journal: Journal = field(default_factory=Journal)

    def adopt(self) -> ev.Adopted:
        """Keep what is whole, delete the rest, as the store does."""
        for name in [n for n, f in self.files.items() if f.segment is None and f.parity is None]:
            del self.files[name]
        segments, parities = [], []
        for name, file in sorted(self.files.items()):
            if file.segment is not None:
                id, rank = file.segment
                size = file.size_bytes
                segments.append((name, Sidecar(id, rank, self.ranks, size, CELL_BYTES, b"")))
            elif file.parity in self.manifests:
                parity = ParitySidecar(file.parity, *file.place, CELL_BYTES, (), b"")
                parities.append((name, file.size_bytes, parity))
            else:
                del self.files[name]
        return ev.Adopted(
            tuple(segments),
            tuple(parities),
            tuple(self.manifests.values()),
            tuple(self.records.values()),
            term=self.term,
            entries=self.journal.entries,
        )

    def holding(self, id: SnapshotId) -> Holding:
        ranks = {f.segment[1] for f in self.files.values() if f.segment and f.segment[0] == id}
        parity = any(f.parity == id for f in self.files.values())
        return Holding(id, self.ranks, tuple(Extent(r, SIZE_BYTES) for r in sorted(ranks)), parity)


class Machine:
    """A node: its memory, its agent, and the processes on it."""

    def __init__(self, world: "World", name: str, generation: int = 0) -> None:
        self.world, self.clock, self.name = world, world.clock, name
        self.plan = world.plan
        self.disk = Disk(f"{name}.{generation}", self.plan.ranks)
        self.alive = True
        self.agent: Lifecycle | None = None
        self.epoch = 0
        self.cut = False
        self.runs: dict[SnapshotId, ev.Encode] = {}
        self.locals: dict[int, Trainer | Launcher] = {}
        self.start_agent()

    # The agent's process.

    def start_agent(self) -> None:
        self.epoch += 1
        identity = Identity(
            self.name,
            f"{self.disk.token}#{self.epoch}",
            self.disk.token,
            self.name,
            f"{self.name}:1",
            "",
            False,
            "zfec",
            "zfec 1.6",
            "",
            "",
            self.world.memory_limit_bytes,
            "tcp://coordinator:1",
        )
        self.agent = Lifecycle(identity, self.disk.adopt(), self.clock.now)
        self._link()
        self._tick(self.epoch)
        self.connect()

    def kill_agent(self) -> None:
        """It comes back after a while, and so do its trainers."""
        self.agent = None
        self.epoch += 1
        self.runs.clear()
        self.locals.clear()
        self.disconnect()
        self.clock.soon(0.1, 0.6, lambda: self.start_agent() if self.alive else None)

    def connect(self) -> None:
        epoch = self.epoch

        def connected() -> None:
            if self.epoch == epoch and self.agent is not None and not self.cut:
                self.disconnect()
                self._link()
                self.feed(ev.Connected())

        self.clock.soon(0.005, 0.2, connected)

    def _link(self) -> None:
        """A connection to the coordinator."""
        plan = self.plan
        self.up, self.down = (
            Link(self.clock, plan.control_s, plan.control_tail_s) for _ in range(2)
        )

    def disconnect(self) -> None:
        self.up.open = self.down.open = False
        self.feed(ev.Disconnected())

    def _tick(self, epoch: int) -> None:
        if self.epoch != epoch or self.agent is None:
            return
        self.carry_out(self.agent.tick(self.clock.now))
        self.clock.at(self.agent.next_deadline() + 1e-6, lambda: self._tick(epoch))

    def feed(self, event: ev.Event) -> None:
        if self.agent is not None:
            actions = self.agent.handle(event, self.clock.now)
            self.agent.check_invariants()
            self.carry_out(actions)

    def carry_out(self, actions: list[ev.Action]) -> None:
        for action in actions:
            self._carry_out(action)

    def _later(self, range_s: Range, work: Callable[[], ev.Event | None]) -> None:
        """Work in the background of this agent process."""
        epoch = self.epoch

        def done() -> None:
            if self.epoch == epoch and self.alive:
                event = work()
                if event is not None:
                    self.feed(event)

        self.clock.soon(*range_s, done)

    def _carry_out(self, action: ev.Action) -> None:
        disk = self.disk
        match action:
            case ev.Report(message):
                peer = f"{disk.token}#{self.epoch}".encode()
                self.up.carry(lambda: self.world.to_coordinator(peer, message))
            case ev.Tell(conn, message):
                who = self.locals.get(conn)
                if who is not None:
                    who.down.carry(lambda: who.hear(message))
            case ev.KeepTerm(kept):
                assert disk.term is None or disk.term.term.number < kept.term.number
                disk.term = kept
            case ev.KeepEntries(entries):
                disk.journal.merge(entries)
                self.feed(ev.EntriesKept())
            case ev.KeepRecord(record):
                disk.records[record.job] = record
            case ev.KeepManifest(manifest):
                disk.manifests[manifest.id] = manifest
            case ev.ForgetManifests(id):
                disk.manifests.pop(id, None)
            case ev.ForgetJob(job):
                disk.records.pop(job, None)
            case ev.Delete(name):
                disk.files.pop(name, None)
            case ev.Allocate(name, size_bytes):

                def allocate() -> ev.Event:
                    disk.files[name] = File(size_bytes)
                    return ev.Allocated(name)

                self._later((0.005, 0.05), allocate)
            case ev.CheckSegment(name, id, rank):

                def check() -> ev.Event:
                    if disk.files[name].segment != (id, rank):
                        return ev.SegmentChecked(name, None, "it was not sealed")
                    sidecar = Sidecar(id, rank, disk.ranks, SIZE_BYTES, CELL_BYTES, b"")
                    return ev.SegmentChecked(name, sidecar)

                self._later(self.plan.check_s, check)
            case ev.Release(name):

                def release() -> ev.Event:
                    if name in disk.files:
                        disk.files[name].segment = disk.files[name].parity = None
                    return ev.Released(name)

                self._later(self.plan.release_s, release)
            case ev.Encode():
                again = action.manifest.id in self.runs
                self.runs[action.manifest.id] = action
                if not again and not action.serve_only:
                    self._encode(action)
            case ev.StopEncode(id):
                run = self.runs.pop(id, None)
                if run is not None and not run.serve_only:
                    self._later((0.001, 0.02), lambda: ev.EncodeFailed(id, ""))
            case ev.Fetch():
                self._later((0.01, 0.1), lambda: self._fetch(action))

    def _encode(self, action: ev.Encode) -> None:
        """Parity is there once all members have their segments and take part.

        Where it is made anew it is enough that all segments are somewhere.
        """
        id, name = action.manifest.id, action.name

        def made(place: tuple[int, int]) -> ev.Event:
            file = self.disk.files.setdefault(name, File(action.size_bytes))
            file.parity, file.place = id, place
            return ev.Encoded(id)

        def attempt() -> ev.Event | None:
            if id not in self.runs:
                return None
            order = self.runs[id]
            place = order.manifest.place_of(self.name)
            assert place is not None
            if order.ranks:
                found = {
                    extent.rank
                    for machine in self.world.machines.values()
                    if machine.alive and machine.agent is not None
                    for extent in machine.disk.holding(id).extents
                }
                if found < order.ranks.keys():
                    self._later(self.plan.encode_again_s, attempt)
                    return None
                return made(place)
            for member in order.manifest.groups[place[0]].members:
                other = self.world.machines.get(member.node)
                if (
                    other is None
                    or not other.alive
                    or id not in other.runs
                    or not set(member.extents) <= set(other.disk.holding(id).extents)
                ):
                    self._later(self.plan.encode_again_s, attempt)
                    return None
            return made(place)

        self._later(self.plan.encode_s, attempt)

    def _fetch(self, action: ev.Fetch) -> ev.Event | None:
        """As the source says, or from what is left of it."""
        wanted = (action.id, action.rank)
        if action.present:
            assert self.disk.files[action.name].segment == wanted
            return ev.Fetched(action.name, 0, 0)
        found = {}
        away = False
        for node in action.source.cells:
            machine = self.world.machines.get(node)
            if machine is None or not machine.alive:
                continue
            if machine.agent is None:
                away = True
                continue
            found[node] = machine.disk.holding(action.id)
        held = recovery.rank_holders(found)
        verdict = recovery.judge(action.source.manifest, self.disk.ranks, found)
        if action.rank in held or verdict.restorable:
            self.disk.files.setdefault(action.name, File(action.size_bytes)).segment = wanted
            return ev.Fetched(action.name, 3, 0)
        if away:
            self._later((0.05, 0.2), lambda: self._fetch(action))
            return None
        return ev.FetchFailed(action.name, "Unrecoverable", verdict.reason)

    def destroy(self) -> None:
        self.alive = False
        self.agent = None
        self.epoch += 1
        self.up.open = self.down.open = False
        self.locals.clear()


class Local:
    """A process that talks to the agent of its machine, and comes back when that was away."""

    numbers = itertools.count(1)

    def __init__(self, machine: Machine) -> None:
        self.machine, self.clock, self.plan = machine, machine.clock, machine.plan
        self.alive = True
        self.conn = 0
        self._epoch = -1
        self.down = self._up = Link(self.clock, (0.0, 0.0))
        self._connect()

    def _connect(self) -> None:
        if not self.alive or not self.machine.alive:
            return
        if self.machine.agent is not None and self._epoch != self.machine.epoch:
            self.conn, self._epoch = next(self.numbers), self.machine.epoch
            self.down.open = self._up.open = False
            self.down, self._up = (Link(self.clock, self.plan.local_s) for _ in range(2))
            self.machine.locals[self.conn] = self  # type: ignore[assignment]
            self.connected()
        self.clock.soon(0.05, 0.2, self._connect)

    def say(self, message: object) -> None:
        conn, epoch = self.conn, self._epoch

        def deliver() -> None:
            if self.machine.epoch == epoch and self.machine.alive:
                self.machine.feed(ev.FromLocal(conn, message))  # type: ignore[arg-type]

        self._up.carry(deliver)

    def die(self) -> None:
        """What it had said arrives before the news of its death, or of its closed socket."""
        if not self.alive:
            return
        self.alive = False
        conn, machine, epoch = self.conn, self.machine, self._epoch
        dead_at_once = self.clock.random.random() < 0.5

        def gone() -> None:
            if machine.alive and machine.epoch == epoch and machine.locals.pop(conn, None):
                machine.feed(ev.LocalGone(conn, "it ended", dead_at_once))
                if not dead_at_once:
                    self.clock.soon(0.05, 1.0, ended)

        def ended() -> None:
            if machine.alive and machine.epoch == epoch:
                machine.feed(ev.ProcessEnded(conn))

        self._up.carry(gone)

    def connected(self) -> None:
        raise NotImplementedError

    def hear(self, message: object) -> None:
        raise NotImplementedError


class Launcher(Local):
    """`ckptd run --spare`: waits to be called."""

    def connected(self) -> None:
        self.say(WaitForWork(JOB))

    def hear(self, message: object) -> None:
        if isinstance(message, Work) and self.alive:
            self.die()
            self.machine.world.launcher_called(self.machine)


class Trainer(Local):
    """One rank of one round."""

    def __init__(self, machine: Machine, run: "Run", rank: int) -> None:
        self.run, self.rank = run, rank
        self.life = 0
        self.pending: object = None
        """The request that waits for an answer, said again on a new connection."""
        self.opened = False
        self.tickets: dict[int, Ticket] = {}
        self.captures: set[SnapshotId] = set()
        self.copied_at = 0.0
        """When all that was to be captured is, or will be."""
        super().__init__(machine)

    def connected(self) -> None:
        self.tickets.clear()
        ranks, slots = self.plan.ranks, self.plan.slots
        keep = self.plan.keep
        self.say(Attach(JOB, self.run.round, self.rank, ranks, 1, slots, self.life, keep))
        if self.opened:
            self.say(OpenLayout(self.life, SIZE_BYTES))
        elif self.pending is not None:
            self.say(self.pending)

    def request(self, message: object) -> None:
        self.pending = message
        self.say(message)

    def hear(self, message: object) -> None:
        if not self.alive:
            return
        match message:
            case Ticket():
                self.tickets[message.id.step] = message
            case Revoked(id):
                held = self.tickets.pop(id.step, None)
                if held is not None:
                    self.say(CaptureFailed(id, "dropped", "the ticket was revoked"))
            case Attached():
                self.run.attached(self)
            case Waiting(reason):
                self.run.waiting = reason
            case Granted() | Restored() | LayoutOpened() | Rejected():
                self.pending = None
                self.run.answered(self, message)

    def step(self, step: int) -> None:
        for late in [s for s in self.tickets if s < step]:
            missed = self.tickets.pop(late)
            self.say(CaptureFailed(missed.id, "skipped", f"it was at step {step} already"))
        ticket = self.tickets.pop(step, None)
        self.say(Progress(step))
        if ticket is not None:
            file = self.machine.disk.files.get(ticket.path.removeprefix("/"))
            if file is None:  # its agent was restarted a moment ago
                self.say(CaptureFailed(ticket.id, "dropped", "there is no such file"))
            else:
                self._capture(ticket, file)

    def _capture(self, ticket: Ticket, file: File) -> None:
        """The file is mapped: what is written to it later goes there even if it was deleted."""
        assert file.segment is None, "a slot that holds a snapshot was given out"
        self.captures.add(ticket.id)
        self.machine.world.captured.setdefault(ticket.id, set()).add(self.rank)

        def sealed() -> None:
            self.captures.discard(ticket.id)
            if not self.alive or not self.machine.alive:
                return
            if self.run.tears(self):
                self.say(CaptureFailed(ticket.id, "torn", "for the story"))
                return
            file.segment = (ticket.id, self.rank)
            self.say(Sealed(ticket.id))

        self.copied_at = self.clock.now + self.clock.random.uniform(*self.plan.capture_s)
        self.clock.at(self.copied_at, sealed)


class Run:
    """One round: all ranks from the launch to the death of the first."""

    def __init__(self, world: "World", number: int, machines: list[Machine]) -> None:
        self.world, self.clock, self.plan = world, world.clock, world.plan
        self.round = f"r{number}"
        self.over = False
        self.waiting = ""
        self.life = 0
        self.step = 0
        self.granted: SnapshotId | None = None
        self.rejected: tuple[SnapshotId, ...] = ()
        self._here: set[int] = set()
        self._answers: dict[int, object] = {}
        self._asked = False
        self.training = False
        self.trainers: list[Trainer] = []
        for rank, machine in enumerate(machines):
            self.trainers.append(Trainer(machine, self, rank))

    def attached(self, trainer: Trainer) -> None:
        self._here.add(trainer.rank)
        if len(self._here) == self.plan.ranks and not self._asked:
            self._asked = True
            self.trainers[0].request(AskResume(()))

    def answered(self, trainer: Trainer, message: object) -> None:
        match message:
            case Granted(life, id):
                self.world.check_grant(life, id, self.rejected)
                self.life, self.granted = life, id
                self._answers = {}
                for other in self.trainers:
                    self.clock.soon(0.001, 0.05, lambda other=other: self._load(other, life, id))  # type: ignore[misc]
            case Rejected("ResumeImpossible", reason):
                self.world.refused.append(reason)
            case Rejected("MemoryTooSmall", reason):
                raise AssertionError(f"rank {trainer.rank} on {trainer.machine.name}: {reason}")
            case Restored() | Rejected():
                if not self.training:
                    self._loaded(trainer, message)
            case LayoutOpened():
                trainer.opened = True

    def _load(self, trainer: Trainer, life: int, id: SnapshotId | None) -> None:
        trainer.life = life
        if id is None:
            self._loaded(trainer, None)
        else:
            trainer.request(Restore(life, id, trainer.rank))

    def _loaded(self, trainer: Trainer, message: object) -> None:
        if isinstance(message, Restored):
            file = trainer.machine.disk.files[message.path.removeprefix("/")]
            assert file.segment == (self.granted, trainer.rank), "another segment was loaded"
        self._answers[trainer.rank] = message
        if len(self._answers) < self.plan.ranks or self.over:
            return
        failed = [answer for answer in self._answers.values() if isinstance(answer, Rejected)]
        if failed:
            assert self.granted is not None
            self.rejected = (*self.rejected, self.granted)
            self.world.rejections.append((self.granted, failed[0].reason))
            self.trainers[0].request(AskResume(self.rejected))
            return
        self.training = True
        if self.life > self.world.wanted_after:
            self.world.wanted = None
        self.step = self.granted.step if self.granted is not None else 0
        self.trainers[0].say(Resumed(self.life, self.step))
        for other in self.trainers:
            other.request(OpenLayout(self.life, SIZE_BYTES))
        self._train()

    def _train(self) -> None:
        """In lockstep, as collectives make it."""
        if self.over:
            return
        busy = any(trainer.captures for trainer in self.trainers)
        if not busy and all(trainer.opened or self.step for trainer in self.trainers):
            self.step += 1
            for trainer in self.trainers:
                trainer.step(self.step)
        self.clock.soon(*self.plan.step_s, self._train)

    def tears(self, trainer: Trainer) -> bool:
        """Whether this capture of the rank fails."""
        return self.clock.random.random() < self.plan.torn

    def end(self) -> None:
        if self.over:
            return
        self.over = True
        for trainer in self.trainers:
            self.clock.soon(0.0, 0.2, trainer.die)


@dataclass
class Promise:
    """A snapshot that was protected, and which of its nodes were destroyed since."""

    manifest: JobManifest
    lost: set[str] = field(default_factory=set)

    def kept_without(self, nodes: set[str]) -> bool:
        gone = self.lost | nodes
        return all(
            sum(member.node in gone for member in group.members) <= group.parity_shards
            for group in self.manifest.groups
        )


class World:
    """Nodes, spares, a coordinator, a launcher; and what must hold."""

    def __init__(
        self,
        seed: int,
        plan: Plan = Plan(),
        run_kind: type[Run] = Run,
        memory_limit_bytes: int = 1 << 20,
    ) -> None:
        self.clock = Clock(seed)
        self.plan = plan
        self._run_kind = run_kind
        self.memory_limit_bytes = memory_limit_bytes
        self.machines: dict[str, Machine] = {}
        self._names = itertools.count()
        self.pool: list[Machine] = []
        """Machines that the launcher runs ranks on."""
        self.rounds = itertools.count(1)
        self.run: Run | None = None
        self.promise: Promise | None = None
        self.wanted: SnapshotId | None = None
        """To which somebody wants to go back, until a life trains from there."""
        self.wanted_after = 0
        """The last life that may have been granted before that was asked for."""
        self.wishes: list[tuple[SnapshotId, int]] = []
        """All of them, with that life."""
        self.commits: list[tuple[float, SnapshotId]] = []
        self.tickets: set[SnapshotId] = set()
        self.captured: dict[SnapshotId, set[int]] = {}
        """The ranks that began to capture it."""
        self.refused: list[str] = []
        self.rejections: list[tuple[SnapshotId, str]] = []
        self.grants: list[SnapshotId | None] = []
        self._coordinators = itertools.count(1)
        self.coordinator: Coordinator | None = self._new_coordinator()
        for _ in range(plan.nodes):
            self.pool.append(self.add_machine())
        for _ in range(plan.spares):
            Launcher(self.add_machine())
        self._tick()
        self._launch()

    def add_machine(self, name: str = "", generation: int = 0) -> Machine:
        machine = Machine(self, name or f"n{next(self._names)}", generation)
        self.machines[machine.name] = machine
        return machine

    # The coordinator.

    def _new_coordinator(self) -> Coordinator:
        claim = Claim(f"c{next(self._coordinators)}", "tcp://coordinator:1")
        return Coordinator(SETTINGS, self.clock.now, claim)

    def to_coordinator(self, peer: bytes, message: object) -> None:
        if self.coordinator is not None:
            self._send(self.coordinator.handle(peer, message, self.clock.now))  # type: ignore[arg-type]

    def _send(self, sends: list[Send]) -> None:
        assert self.coordinator is not None
        self.coordinator.check_invariants()
        assert not self.coordinator.ended, self.coordinator.ended
        if not sends:
            return
        term, coordinator = self.coordinator.term, self.coordinator.claim.coordinator
        peers = {f"{m.disk.token}#{m.epoch}".encode(): m for m in self.machines.values()}
        for send in sends:
            if isinstance(send.message, Commit):
                self._committed(send.message.id)
            elif isinstance(send.message, TakeSnapshot):
                self._ticketed(send.message.id)
            machine = peers.get(send.peer)
            if machine is not None and machine.alive:
                order = ev.FromCoordinator(send.message, term, coordinator)
                machine.down.carry(lambda m=machine, o=order: m.feed(o))  # type: ignore[misc]

    def _tick(self) -> None:
        if self.coordinator is not None:
            self._send(self.coordinator.tick(self.clock.now))
        self.clock.soon(0.1, 0.2, self._tick)

    def restart_coordinator(self) -> None:
        """All connections break; what was on its way is lost."""
        self.coordinator = None
        for machine in self.machines.values():
            if machine.alive:
                machine.disconnect()

        def start() -> None:
            self.coordinator = self._new_coordinator()
            for machine in self.machines.values():
                if machine.alive and machine.agent is not None:
                    machine.connect()

        self.clock.soon(0.05, 1.0, start)

    def report_incident(self) -> None:
        """Something that the coordinator wants to be known after its death."""
        if self.coordinator is not None and self.coordinator.term:
            number, at = self.coordinator.journal.next_incident, self.clock.now
            self.coordinator.say(Incident(number, JOB, at, "test", "n0", "for the story"), at)
            self._send(self.coordinator.take_actions())

    # The launcher.

    def _launch(self) -> None:
        """A new round as soon as there are machines enough."""
        self.pool = [machine for machine in self.pool if machine.alive]
        if len(self.pool) < self.plan.nodes:
            self.clock.soon(0.1, 0.3, self._launch)
            return
        chosen = self.clock.random.sample(self.pool, self.plan.nodes)
        machines = [machine for machine in chosen for _ in range(self.plan.ranks_per_node)]
        self.run = self._run_kind(self, next(self.rounds), machines)

    def restart_job(self) -> None:
        if self.run is not None and not self.run.over:
            self.run.end()
            self.clock.soon(0.3, 0.8, self._launch)

    def launcher_called(self, machine: Machine) -> None:
        self.pool.append(machine)

    # Faults, and wishes.

    def roll_back(self) -> None:
        """Somebody wants to go back to a snapshot that is safe, and restarts the job."""
        here = self.coordinator
        job = here.jobs.get(JOB) if here is not None else None
        if here is None or job is None:
            return
        safe = [s for _, s in sorted(job.snapshots.items()) if keeping.is_safe(s, here.nodes)]
        chosen = self.clock.random.choice(safe) if safe else None
        if chosen is None or chosen.manifest is None:
            return
        promise = Promise(chosen.manifest, self._gone(chosen.manifest))
        if not promise.kept_without(set()):
            return
        after = max(job.life, job.record.life if job.record is not None else 0)
        if here.obey(RollBack(JOB, chosen.id.step, chosen.id.life), self.clock.now):
            return
        self.promise, self.wanted, self.wanted_after = promise, chosen.id, after
        self.wishes.append((chosen.id, after))
        self._send(here.take_actions())
        self.restart_job()

    def kill_trainer(self) -> None:
        if self.run is not None and not self.run.over:
            self.clock.random.choice(self.run.trainers).die()
            self.clock.soon(0.0, 0.3, self.restart_job)

    def restart_agent(self) -> None:
        machine = self.clock.random.choice([m for m in self.machines.values() if m.alive])
        if machine.agent is not None:
            machine.kill_agent()

    def cut_off(self) -> None:
        """One node does not reach the coordinator for a while; its trainers go on."""
        machine = self.clock.random.choice([m for m in self.machines.values() if m.alive])
        if machine.cut:
            return
        machine.cut = True
        machine.disconnect()

        def back() -> None:
            machine.cut = False
            if machine.alive:
                machine.connect()

        self.clock.soon(0.1, 2 * SETTINGS.lease_s, back)

    def destroy_node(self) -> None:
        """One of the pool, if the newest protected snapshot is promised to survive it."""
        alive = [machine for machine in self.pool if machine.alive]
        if self.promise is None or not alive:
            return
        machine = self.clock.random.choice(alive)
        if not self.promise.kept_without({machine.name}):
            return
        self.promise.lost.add(machine.name)
        machine.destroy()
        for local in self.run.trainers if self.run else ():
            if local.machine is machine:
                local.alive = False
        self.clock.soon(0.0, 0.3, self.restart_job)
        # The same name with empty memory, or another: either way a spare.
        name = machine.name if self.clock.random.random() < 0.3 else ""
        generation = int(machine.disk.token.split(".")[1]) + 1
        self.clock.soon(0.5, 3.0, lambda: Launcher(self.add_machine(name, generation)) and None)

    # What must hold.

    def _ticketed(self, id: SnapshotId) -> None:
        for machine in self.machines.values():
            if machine.alive and machine.agent is not None:
                assert not machine.disk.holding(id).extents or id in self.tickets, id
        self.tickets.add(id)

    def _committed(self, id: SnapshotId) -> None:
        assert self.coordinator is not None
        snapshot = self.coordinator.jobs[JOB].snapshots.get(id)
        if snapshot is None or snapshot.state is not State.PROTECTED or snapshot.manifest is None:
            return
        held = self.coordinator.live_holdings(id)
        if not recovery.is_protected(snapshot.manifest, held):
            return
        if self.wanted is not None or any(
            chosen < id and id.life <= after for chosen, after in self.wishes
        ):
            return  # what was asked for is promised, and nothing that it gave up
        if self.promise is None or id > self.promise.manifest.id:
            self.promise = Promise(snapshot.manifest, self._gone(snapshot.manifest))
            self.commits.append((self.clock.now, id))

    def _gone(self, manifest: JobManifest) -> set[str]:
        """Nodes that no longer hold their segments of it."""
        return {
            member.node
            for group in manifest.groups
            for member in group.members
            if member.node not in self.machines
            or not self.machines[member.node].alive
            or not self.machines[member.node].disk.holding(manifest.id).extents
        }

    def check_grant(
        self, life: int, id: SnapshotId | None, rejected: tuple[SnapshotId, ...]
    ) -> None:
        """What was asked for is granted; else what was promised, or something newer."""
        self.grants.append(id)
        assert id not in rejected
        if self.wanted is not None:
            if life > self.wanted_after:
                assert id == self.wanted, f"granted {id}, though {self.wanted} was asked for"
            return
        if self.promise is not None and self.promise.kept_without(set()):
            promised = self.promise.manifest.id
            assert promised not in rejected, f"{promised} was rejected: {self.rejections}"
            assert id is not None, f"granted nothing, though {promised} was promised"
            assert id >= promised, f"granted {id}, though {promised} was promised"

    def slots(self) -> dict[str, tuple[int, int]]:
        """Machine to the number of (segment, parity) files."""
        found = {}
        for machine in self.machines.values():
            if machine.alive and machine.agent is not None:
                slots = machine.agent.slots.values()
                parity = sum(slot.parity for slot in slots)
                found[machine.name] = (len(slots) - parity, parity)
        return found
