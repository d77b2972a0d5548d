"""A cluster made of plain messages, to tell stories to a `Coordinator`."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from ckptd.coordinator.decider import Coordinator, Send, Settings
from ckptd.coordinator.state import State
from ckptd.ids import SnapshotId
from ckptd.manifest import Extent, JobManifest, JobRecord
from ckptd.wire import (
    AgentMessage,
    AskResumeFor,
    Beat,
    ClientOrder,
    Commit,
    CoordinatorMessage,
    Grant,
    Hello,
    Holding,
    Holds,
    LauncherWaiting,
    LifeResumed,
    Protect,
    RankLeft,
    RankReport,
    RankState,
    Record,
    TakeSnapshot,
)

JOB = "job"
SIZE_BYTES = 10


def snapshot(life: int, step: int) -> SnapshotId:
    return SnapshotId(JOB, life, step)


@dataclass
class Node:
    """What a fake agent would know after a restart, and the trainers that it has."""

    name: str
    token: str
    incarnation: int = 1
    holdings: dict[SnapshotId, Holding] = field(default_factory=dict)
    record: JobRecord | None = None
    ranks: dict[int, RankState] = field(default_factory=dict)
    launchers: tuple[str, ...] = ()
    inbox: list[CoordinatorMessage] = field(default_factory=list)
    up: bool = True
    domain: str = ""
    spare_bytes: int = 0

    @property
    def peer(self) -> bytes:
        return f"{self.name}#{self.incarnation}".encode()


class Cluster:
    """Fake agents before one real coordinator. Time passes only by `pass_time`."""

    def __init__(self, *names: str, settings: Settings | None = None) -> None:
        self.settings = settings or Settings(cell_bytes=4)
        self.now = 100.0
        self.coordinator = Coordinator(self.settings, self.now)
        self.nodes: dict[str, Node] = {}
        self.world_size = 0
        self.round = ""
        self.steps: dict[int, int] = {}
        for name in names:
            self.add(name)

    # Nodes.

    def add(
        self, name: str, token: str = "", launchers: tuple[str, ...] = (), domain: str = ""
    ) -> Node:
        """A node with empty memory says Hello."""
        token = token or f"memory of {name}"
        self.nodes[name] = Node(name, token, launchers=launchers, domain=domain)
        self.hello(name)
        return self.nodes[name]

    def hello_of(self, name: str) -> Hello:
        node = self.nodes[name]
        return Hello(
            node=name,
            incarnation=str(node.incarnation),
            memory_token=node.token,
            address=f"{name}.example",
            cells=f"{name}.example:1",
            domain=node.domain,
            spare=False,
            codec="zfec",
            engine="zfec 1.6",
            engine_reason="",
            memory_limit_bytes=1 << 30,
            memory_used_bytes=0,
            holdings=tuple(node.holdings.values()),
            ranks=tuple(node.ranks.values()),
            records=(node.record,) if node.record else (),
            launchers=node.launchers,
            problems=(),
        )

    def hello(self, name: str) -> None:
        self.say(name, self.hello_of(name))

    def say(self, name: str, message: AgentMessage, peer: bytes = b"") -> list[CoordinatorMessage]:
        """One message of an agent; returns what it is answered."""
        if isinstance(message, Holds) and message.holding.extents:
            self.nodes[name].holdings[message.holding.id] = message.holding
        sends = self.coordinator.handle(peer or self.nodes[name].peer, message, self.now)
        self.deliver(sends)
        return [send.message for send in sends if send.peer == (peer or self.nodes[name].peer)]

    def deliver(self, sends: Iterable[Send]) -> None:
        self.coordinator.check_invariants()
        by_peer = {node.peer: node for node in self.nodes.values()}
        for send in sends:
            node = by_peer.get(send.peer)
            if node is None or not node.up:
                continue
            node.inbox.append(send.message)
            match send.message:
                case Record(record) | Grant(record=record):
                    node.record = record
                case Protect(manifest):
                    if manifest.id in node.holdings:
                        held = node.holdings[manifest.id]
                        node.holdings[manifest.id] = msgspec.structs.replace(
                            held, manifest=manifest
                        )
                case _:
                    pass

    def pass_time(self, seconds: float, silent: Iterable[str] = ()) -> None:
        """All nodes but the silent ones go on saying that they are alive."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + self.settings.beat_s)
            for name, node in self.nodes.items():
                if node.up and name not in silent:
                    beat = Beat(name, str(node.incarnation), 0, (), spare_bytes=node.spare_bytes)
                    self.say(name, beat)
            self.deliver(self.coordinator.tick(self.now))

    def destroy(self, *names: str, wait: bool = True) -> None:
        """Nodes vanish with all that they hold; by default until their leases have run out."""
        for name in names:
            self.nodes[name].up = False
        if wait:
            self.pass_time(self.settings.lease_s + self.settings.beat_s)

    def obey(self, order: ClientOrder) -> str:
        """Somebody asks for something; returns the reason why not."""
        refusal = self.coordinator.obey(order, self.now)
        self.deliver(self.coordinator.take_actions())
        return refusal

    def restart_coordinator(self, *speaking: str) -> None:
        """A new one, which knows only the journal, and the nodes that say Hello, in that order."""
        entries = self.coordinator.journal.entries
        self.coordinator = Coordinator(self.settings, self.now)
        self.coordinator.journal.merge(entries)
        for name in speaking or [n for n, node in self.nodes.items() if node.up]:
            self.hello(name)

    def restart_agent(self, name: str, ranks: bool = False) -> None:
        """The agent process on `name` ends and comes back with what its directory holds."""
        node = self.nodes[name]
        node.incarnation += 1
        if not ranks:
            node.ranks = {}
        self.hello(name)

    # The job.

    def attach(self, round_: str, *where: str, keep: int = 1) -> None:
        """A launcher starts rank r on the r-th node; `keep` protected snapshots shall be kept."""
        self.round, self.world_size = round_, len(where)
        for rank, name in enumerate(where):
            state = RankState(JOB, round_, 0, rank, len(where), 1, 0, 0, 0, keep=keep)
            self.report(name, state)

    def ask(self, *rejected: SnapshotId) -> Grant | None:
        """Rank 0 asks to resume; returns what its node was granted at once, if anything was."""
        name = self.where(0)
        before = len(self.granted(name))
        self.say(name, AskResumeFor(JOB, self.round, rejected, self.coordinator.term))
        return next(iter(self.granted(name)[before:]), None)

    def begin(self, grant: Grant, free_slots: int = 2) -> None:
        """All ranks have loaded, opened their layouts and begin to train."""
        step = grant.id.step if grant.id else 0
        self.say(self.where(0), LifeResumed(JOB, grant.life, step))
        for rank in range(self.world_size):
            self.update(rank, life=grant.life, free_slots=free_slots, step=step, seen_step=0)

    def start(self, *where: str, round_: str = "r1", keep: int = 1) -> Grant:
        """A job begins, or goes on, with rank r on the r-th node."""
        self.attach(round_, *where, keep=keep)
        grant = self.ask()
        assert grant is not None, self.inbox(where[0])[-1]
        self.begin(grant)
        return grant

    def where(self, rank: int) -> str:
        for name, node in self.nodes.items():
            if rank in node.ranks and node.ranks[rank].round == self.round:
                return name
        raise KeyError(rank)

    def state(self, rank: int) -> RankState:
        return self.nodes[self.where(rank)].ranks[rank]

    def report(self, name: str, state: RankState) -> None:
        self.nodes[name].ranks[state.rank] = state
        self.say(name, RankReport(state))

    def update(self, rank: int, **fields: object) -> None:
        """A rank's report, with these fields changed."""
        self.report(self.where(rank), msgspec.structs.replace(self.state(rank), **fields))

    def leave(self, rank: int, reason: str = "died", finished: bool = False) -> None:
        name = self.where(rank)
        state = self.nodes[name].ranks.pop(rank)
        self.say(name, RankLeft(JOB, state.round, state.life, rank, reason, finished))

    def stop_job(self) -> None:
        for node in self.nodes.values():
            if node.up:
                for rank in list(node.ranks):
                    self.leave(rank)

    def take(self, rank: int, id: SnapshotId) -> None:
        """A rank has its ticket: one slot less."""
        free = self.state(rank).free_slots
        self.update(rank, seen_step=id.step, free_slots=free - 1)

    def seal(self, rank: int, id: SnapshotId) -> None:
        name = self.where(rank)
        held = self.nodes[name].holdings.get(id)
        extents = (*(held.extents if held else ()), Extent(rank, SIZE_BYTES))
        manifest = held.manifest if held else None
        self.say(name, Holds(Holding(id, self.world_size, extents, False, manifest)))

    def encode(self, name: str, id: SnapshotId) -> None:
        """The node has stored all its parity of `id`."""
        held = self.nodes[name].holdings[id]
        place = held.manifest.place_of(name) if held.manifest is not None else None
        self.say(name, Holds(msgspec.structs.replace(held, parity=True, place=place)))

    def bring(self, name: str, id: SnapshotId, *ranks: int) -> None:
        """The node has fetched these segments, beside what it holds."""
        held = self.nodes[name].holdings.get(id)
        extents = held.extents if held else ()
        manifest = self.coordinator.jobs[JOB].snapshots[id].manifest
        extents = tuple(sorted({*extents, *(Extent(rank, SIZE_BYTES) for rank in ranks)}))
        held = held or Holding(id, self.world_size)
        self.say(name, Holds(msgspec.structs.replace(held, extents=extents, manifest=manifest)))

    def seal_all(self, id: SnapshotId) -> None:
        for rank in range(self.world_size):
            self.take(rank, id)
        for rank in range(self.world_size):
            self.seal(rank, id)

    def protect(self, id: SnapshotId) -> JobManifest:
        """Seal on all ranks, encode on all nodes."""
        self.seal_all(id)
        names = sorted({self.where(rank) for rank in range(self.world_size)})
        for name in names:
            self.encode(name, id)
        manifest = self.nodes[names[0]].holdings[id].manifest
        assert manifest is not None
        return manifest

    def free(self, ids: Iterable[SnapshotId] = (), slots: int = 2) -> None:
        """Agents have freed these snapshots, and all ranks have so many free slots again."""
        for id in ids:
            for name, node in self.nodes.items():
                if node.up and node.holdings.pop(id, None):
                    self.say(name, Holds(Holding(id, 0)))
        for rank in range(self.world_size):
            self.update(rank, free_slots=slots)

    def make_protected(self) -> SnapshotId:
        """The oldest open ticket is honoured, and protected; agents free what they may."""
        known = self.coordinator.jobs[JOB].snapshots
        id = min(id for id in known if known[id].state is State.TICKETED)
        for rank in range(self.world_size):
            self.update(rank, step=id.step)
        self.protect(id)
        commits = [m for m in self.told(self.where(0), Commit) if isinstance(m, Commit)]
        self.free([gone for commit in commits for gone in commit.retire], slots=1)
        return id

    # What was said.

    def inbox(self, name: str) -> list[CoordinatorMessage]:
        return self.nodes[name].inbox

    def told(self, name: str, kind: type[msgspec.Struct]) -> list[CoordinatorMessage]:
        return [message for message in self.inbox(name) if isinstance(message, kind)]

    def granted(self, name: str) -> list[Grant]:
        return [message for message in self.inbox(name) if isinstance(message, Grant)]

    def tickets(self, name: str) -> list[SnapshotId]:
        return [message.id for message in self.inbox(name) if isinstance(message, TakeSnapshot)]

    def wait_for_launcher(self, name: str, waiting: bool = True) -> None:
        self.nodes[name].launchers = (JOB,) if waiting else ()
        self.say(name, LauncherWaiting(JOB, waiting))
