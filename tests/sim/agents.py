"""A node: its memory directory, its agent (the real lifecycle decider), and who may reach it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ckptd.agent import events as ev
from ckptd.agent.lifecycle import Lifecycle
from ckptd.agent.state import Identity
from ckptd.ids import SnapshotId
from ckptd.wire import Grant, Record

from .control import Connection, CoordinatorProcess
from .disk import Disk, File, State, check_segment
from .offices import Obedience
from .transfers import EncodeRun, Fetching

if TYPE_CHECKING:
    from .plan import Range
    from .processes import Local
    from .world import World

_LIMIT_BYTES = 1 << 20


class Machine:
    """A node. Destroyed, it never comes back; another of its name may."""

    def __init__(self, world: "World", name: str, generation: int) -> None:
        self.world, self.name, self.generation = world, name, generation
        self.disk = Disk(f"{name}/{generation}")
        self.alive = True
        self.cut = False
        """It does not reach the coordinator."""
        self.agent: Agent | None = None
        self.routed: CoordinatorProcess | None = None
        """The coordinator that it is led to, if not to the one in office."""
        self.obedience = Obedience(name)
        self.processes: list[Local] = []
        """Trainers and launchers that run on it."""
        self.starts = 0
        self.start_agent()

    def start_agent(self) -> None:
        if self.alive and self.agent is None:
            self.starts += 1
            self.agent = Agent(self, self.starts)
            self.agent.connect((0.005, 0.2))

    def kill_agent(self, away_s: "Range") -> None:
        """It comes back after a while with what the memory directory holds."""
        if self.agent is not None:
            self.world.story.tell(self.name, "its agent dies")
            self.agent.die()
            self.agent = None
            self.world.clock.later(away_s, self.start_agent)

    def destroy(self) -> None:
        self.world.story.tell(self.name, "is destroyed")
        if self.agent is not None:
            self.agent.die()
            self.agent = None
        self.alive = False
        for process in list(self.processes):
            process.vanish()

    def wipe(self) -> None:
        """Its memory directory is emptied while its agent is away, as by a reboot."""
        if self.agent is not None:
            self.agent.die()
            self.agent = None
        self.world.story.tell(self.name, "is rebooted: its memory is empty")
        self.generation += 1
        self.disk = Disk(f"{self.name}/{self.generation}")
        self.obedience = Obedience(self.name)
        for process in list(self.processes):
            process.vanish()
        self.world.clock.later((0.2, 2.0), self.start_agent)

    def reaches(self, name: str) -> "Agent | None":
        """The agent of a node, if this one can ask it for cells."""
        other = self.world.machines.get(name)
        if other is None or not other.alive or other.agent is None or other.agent.asleep:
            return None
        if other is not self and frozenset((self.name, name)) in self.world.parted:
            return None
        return other.agent


class Agent:
    """One agent process: the decider, and what the shell does around it."""

    def __init__(self, machine: Machine, start: int) -> None:
        self.machine, self.world = machine, machine.world
        self.clock, self.plan = machine.world.clock, machine.world.plan
        self.disk = machine.disk
        self.dead = self.asleep = False
        self.segments: dict[tuple[SnapshotId, int], tuple[str, State]] = {}
        """Published segments: the file, and the digests."""
        self.parities: dict[SnapshotId, str] = {}
        self.runs: dict[SnapshotId, EncodeRun] = {}
        self.locals: dict[int, Local] = {}
        self._conns = 0
        self._stalled: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        """What happens as soon as the process runs again."""
        adopted = self.disk.adopt()  # first: it may change the token
        for name, sidecar in adopted.segments:
            self.segments[sidecar.id, sidecar.rank] = (name, self.disk.seals[name].digests)
        for name, _, parity in adopted.parities:
            self.parities[parity.id] = name
        name = machine.name
        identity = Identity(
            node=name,
            incarnation=f"{name}/{machine.generation}#{start}",
            memory_token=self.disk.token,
            address=name,
            cells=f"{name}:1",
            domain="",
            spare=False,
            codec="zfec",
            engine="zfec 1.6",
            engine_reason="",
            memory_dir="",
            memory_limit_bytes=_LIMIT_BYTES,
            coordinator="tcp://coordinator:1",
        )
        self.lifecycle: Lifecycle = self.world.lifecycle_kind(identity, adopted, self.clock.now)
        self.connection = Connection(self.world, self, self.world.coordinator)
        self.connection.open = False
        self.world.story.tell(name, "agent starts with", *self.disk.files)
        self._tick()

    def die(self) -> None:
        self.dead = True
        self.connection.open = False
        for process in self.locals.values():
            process.agent_gone()

    # The coordinator.

    def connect(self, range_s: "Range") -> None:
        self.clock.later(range_s, self._connect)

    def _connect(self) -> None:
        if self.dead or self.machine.cut or self.connection.open:
            return
        office = self.world.coordinator_for(self.machine)
        if office.decider is None:
            self.connect((0.1, 0.5))
            return
        self.connection = Connection(self.world, self, office)
        self.feed(ev.Connected())

    def break_connection(self, noticed_s: "Range") -> None:
        """What is under way is lost at once; the agent notices later."""
        self.connection.open = False
        self.clock.later(noticed_s, self._disconnected)

    def _disconnected(self) -> None:
        if not self.dead and not self.connection.open and self.lifecycle.connected:
            self.feed(ev.Disconnected())
        self.connect((0.1, 0.5))

    # Events in.

    def _tick(self) -> None:
        if self.dead:
            return
        if self.asleep:
            self._stalled.append((self._tick, ()))
            return
        self._carry_out(self.lifecycle.tick(self.clock.now))
        self.clock.at(self.lifecycle.next_deadline() + 1e-6, self._tick)

    def feed(self, event: ev.Event) -> None:
        if self.dead:
            return
        if self.asleep:
            self._stalled.append((self.feed, (event,)))
            return
        if not isinstance(event, ev.FromCoordinator):  # these are told of where they are sent
            self.world.story.tell(self.machine.name, "<", event)
        actions = self.lifecycle.handle(event, self.clock.now)
        self.lifecycle.check_invariants()
        if isinstance(event, ev.FromCoordinator):
            self._obey(event, actions)
        self._carry_out(actions)

    def _obey(self, event: ev.FromCoordinator, actions: list[ev.Action]) -> None:
        obedience = self.machine.obedience
        obedience.check(event, actions)
        if not obedience.obeys(event):
            return
        match event.message:
            case Grant(record=record) as grant:
                self.world.truth.granted_to(grant)
                self.world.truth.heard(record, self.disk)
            case Record(record):
                self.world.truth.heard(record, self.disk)

    def in_background(self, range_s: "Range", work: Callable[..., None], *args: Any) -> None:
        """Work that ends with the process, and waits while it is stopped."""

        def done() -> None:
            if self.asleep:
                self._stalled.append((done, ()))
            elif not self.dead:
                work(*args)

        self.clock.later(range_s, done)

    def wake(self) -> None:
        if self.dead or not self.asleep:
            return
        self.world.story.tell(self.machine.name, "its agent wakes")
        self.asleep = False
        stalled, self._stalled = self._stalled, []
        for what, args in stalled:
            what(*args)

    # Processes of this node.

    def accept(self, process: "Local") -> int:
        self._conns += 1
        self.locals[self._conns] = process
        return self._conns

    # Actions out.

    def _carry_out(self, actions: list[ev.Action]) -> None:
        for action in actions:
            if self.dead:
                return
            if not isinstance(action, ev.Report):  # these are told of where they arrive
                self.world.story.tell(self.machine.name, ">", action)
            self._do(action)
            deadly = self.plan.crash_between if self.world.faults_on else 0.0
            if deadly and self.clock.random.random() < deadly:
                self.world.count("agent died between two actions")
                self.machine.kill_agent((0.1, 1.0))
                return

    def _do(self, action: ev.Action) -> None:
        match action:
            case ev.Report(message):
                if self.lifecycle.connected:
                    self.connection.up(message)
            case ev.Tell(conn, message):
                process = self.locals.get(conn)
                if process is not None:
                    process.told(message)
            case ev.KeepTerm(kept):
                self.disk.term = kept
            case ev.KeepEntries(entries):
                self.disk.log.merge(entries)
                self.feed(ev.EntriesKept())
            case ev.KeepRecord(record):
                self.disk.records[record.job] = record
            case ev.KeepManifest(manifest):
                self.disk.manifests[manifest.id] = manifest
            case ev.ForgetManifests(id):
                self.disk.forget_manifests(id)
                self.world.truth.freed(id)
            case ev.ForgetJob(job):
                self.disk.records.pop(job, None)
            case ev.Delete(name):
                self._destroying(name, self.disk.delete)
            case ev.Allocate(name, size_bytes):
                self.in_background((0.005, 0.05), self._allocate, name, size_bytes)
            case ev.CheckSegment(name, id, rank):
                self.in_background(self.plan.check_s, self._check, name, id, rank)
            case ev.Release(name):
                self.in_background((0.0, 0.005), self._unpublish, name)
            case ev.Encode():
                self._encode(action)
            case ev.StopEncode(id):
                run = self.runs.pop(id, None)
                if run is not None:
                    run.stop()
            case ev.Fetch():
                Fetching(self, action)

    def _allocate(self, name: str, size_bytes: int) -> None:
        self.disk.delete(name)  # always another file
        self.disk.files[name] = File(size_bytes)
        self.feed(ev.Allocated(name))

    def _check(self, name: str, id: SnapshotId, rank: int) -> None:
        found = check_segment(self.disk, name, id, rank)
        if isinstance(found, str):
            self.feed(ev.SegmentChecked(name, None, found))
            return
        self.segments[id, rank] = (name, self.disk.seals[name].digests)
        self.feed(ev.SegmentChecked(name, found))

    def _unpublish(self, name: str) -> None:
        for key in [key for key, (where, _) in self.segments.items() if where == name]:
            del self.segments[key]
        for id in [id for id, where in self.parities.items() if where == name]:
            del self.parities[id]
        self.in_background(self.plan.release_s, self._unseal, name)

    def _unseal(self, name: str) -> None:
        self._destroying(name, self.disk.unseal)
        self.feed(ev.Released(name))

    def _destroying(self, name: str, destroy: Callable[[str], None]) -> None:
        file = self.disk.files.get(name)
        sealed = self.disk.parity_seals.get(name)
        held = file.header[0] if file is not None and file.header is not None else None
        destroy(name)
        for id in {held, sealed.id if sealed is not None else None} - {None}:
            self.world.truth.freed(id)

    def _encode(self, action: ev.Encode) -> None:
        running = self.runs.get(action.manifest.id)
        if running is not None:
            running.update(action)
            return
        self.runs[action.manifest.id] = EncodeRun(self, action)

    # What peers ask for.

    def read(self, id: SnapshotId, rank: int) -> object:
        """The bytes of a published segment, as they are, or None."""
        found = self.segments.get((id, rank))
        file = self.disk.files.get(found[0]) if found is not None else None
        return file.data if file is not None else None

    def read_parity(self, id: SnapshotId) -> object:
        name = self.parities.get(id)
        file = self.disk.files.get(name) if name is not None else None
        return (
            file.data
            if file is not None and file.data == self.disk.parity_seals.get(name)
            else None
        )

    def node_manifest(self, id: SnapshotId, node: str) -> dict[int, State] | None:
        """The digests of a node's segments: those that it keeps, and with its own name its own."""
        kept = self.disk.node_manifests.get((id, node))
        if node != self.machine.name:
            return kept
        own = {rank: digests for (of, rank), (_, digests) in self.segments.items() if of == id}
        return {**(kept or {}), **own} or None
