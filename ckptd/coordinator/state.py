"""What the coordinator knows, and the one table of a snapshot's states."""

import enum
from collections import deque
from dataclasses import dataclass, field

from ckptd.coordinator.pacer import Pacer
from ckptd.coordinator.rhythm import Rhythm
from ckptd.errors import InternalError
from ckptd.ids import SnapshotId
from ckptd.manifest import JobManifest, JobRecord
from ckptd.wire import Fetching, Hello, Holding, RankState, Recoding


class State(enum.Enum):
    """The life of a snapshot, in order; see the table below."""

    TICKETED = "ticketed"
    CAPTURING = "capturing"
    SEALED = "sealed"
    PROTECTED = "protected"
    RETIRED = "retired"
    SKIPPED = "skipped"
    TORN = "torn"
    DROPPED = "dropped"
    LOST = "lost"


_ROUNDS_REMEMBERED = 32

ENDED = frozenset({State.RETIRED, State.SKIPPED, State.TORN, State.DROPPED, State.LOST})
_FAILED = frozenset({State.SKIPPED, State.TORN, State.DROPPED, State.LOST})

TRANSITIONS: dict[State, frozenset[State]] = {
    State.TICKETED: _FAILED | {State.CAPTURING, State.SEALED},
    State.CAPTURING: _FAILED | {State.SEALED},
    State.SEALED: frozenset({State.PROTECTED, State.RETIRED, State.DROPPED, State.LOST}),
    State.PROTECTED: frozenset({State.RETIRED, State.LOST}),
    # A state that was given up for lost is restorable again when its nodes come back.
    State.LOST: frozenset({State.SEALED, State.PROTECTED, State.RETIRED}),
    State.RETIRED: frozenset(),
    State.SKIPPED: frozenset(),
    State.TORN: frozenset(),
    State.DROPPED: frozenset(),
}


@dataclass
class Node:
    """One agent, as of its last message."""

    hello: Hello
    peer: bytes
    """ZeroMQ identity of its connection."""
    last_seen: float
    since: float = float("-inf")
    """When it last said Hello: ranks may still come back to it."""
    told_at: float = float("-inf")
    """When it was last told that the coordinator is there."""
    live: bool = True
    suspect: bool = False
    """It has been silent for longer than it ever is; not for so long that it is lost."""
    rhythm: Rhythm = field(default_factory=Rhythm)
    rival_since: float | None = None
    """When another agent first said Hello under this node's id, with another memory."""
    holdings: dict[SnapshotId, Holding] = field(default_factory=dict)
    held: frozenset[SnapshotId] = frozenset()
    """What it had something of when it was lost: another may have its place, and it may be back."""
    launchers: set[str] = field(default_factory=set)
    """Jobs for which a launcher waits on this node."""
    memory_used_bytes: int = 0
    spare_bytes: int = 0
    """How much more it may hold for other nodes."""
    problems: tuple[str, ...] = ()
    fetching: tuple[Fetching, ...] = ()
    recoding: tuple[Recoding, ...] = ()
    damaged_cells: int = 0
    mended_cells: int = 0
    damaged_from: dict[str, int] = field(default_factory=dict)
    """Damaged cells that came to it from each other node."""
    bad_messages: int = 0
    """What it has dropped because it made no sense."""


@dataclass
class Snapshot:
    """One snapshot of a job; `manifest` is None until protection was ordered."""

    id: SnapshotId
    world_size: int
    state: State
    since: float
    created: float
    reason: str = ""
    manifest: JobManifest | None = None
    unloadable: bool = False
    """Some rank could not load it, and its job went on from another."""
    learned: bool = False
    """It was ticketed by the coordinator before this one, and learnt of from what nodes hold."""
    unprotected: str = ""
    """Why it could not be protected, if it could not."""
    unprotected_at: float = float("-inf")
    """When that was heard last."""
    damaged: bool = False
    """It could not, as a node's bytes of it are not those that were captured."""
    lost_at: float | None = None
    """Since when some of its parity is lost, as far as is known here."""
    hindrances: tuple[str, ...] = ()
    """Why parity that is lost cannot be made anew."""
    unable: dict[str, str] = field(default_factory=dict)
    """Nodes that were told to make it anew and could not, and why."""
    rebuilding: dict[int, str] = field(default_factory=dict)
    """Lost ranks, and the nodes that were told to rebuild their segments."""
    unbuilt: dict[tuple[int, str], str] = field(default_factory=dict)
    """Ranks, and nodes that could not rebuild their segments, and why."""
    no_room: str = ""
    """Why lost segments are not rebuilt, if there is no room for them."""
    ordered: dict[int, object] = field(default_factory=dict)
    """By group: to whom, and with which edition, the order to protect was given last."""

    hastened: bool = False
    """It was ordered to be protected before all else."""

    def move(self, state: State, now: float, reason: str = "") -> None:
        """Change state, by the table only."""
        if state not in TRANSITIONS[self.state]:
            raise InternalError(f"{self.id} cannot go from {self.state.value} to {state.value}")
        self.state, self.since, self.reason = state, now, reason


@dataclass
class Attachment:
    """A trainer process of a job."""

    node: str
    state: RankState
    since: float = float("-inf")
    """When its agent last said Hello, or it attached: what was sent before may be lost."""


@dataclass
class PendingResume:
    """Rank 0 of a round waits for an answer."""

    round: str
    node: str
    rejected: tuple[SnapshotId, ...]
    said: str = ""
    """The reason for waiting that was sent last."""
    said_at: float = float("-inf")
    there: int = 0
    """All ranks below this one are there."""


@dataclass
class Job:
    """One training run."""

    name: str
    pacer: Pacer
    record: JobRecord | None = None
    life: int = 0
    round: str = ""
    """The round of resume calls that `life` was granted to."""
    world_size: int = 0
    members: dict[int, str] = field(default_factory=dict)
    """Rank to node, for `life`."""
    resumed: bool = False
    """Its ranks have loaded, so that it may have tickets."""
    resumed_from: SnapshotId | None = None
    """What `life` was granted to begin from."""
    granted_because: str = ""

    attachments: dict[tuple[str, int], Attachment] = field(default_factory=dict)
    """By (round, rank)."""
    pending: PendingResume | None = None
    snapshots: dict[SnapshotId, Snapshot] = field(default_factory=dict)
    ended: deque[Snapshot] = field(default_factory=lambda: deque(maxlen=100))
    """Snapshots that are no more, newest last."""
    untold: set[str] = field(default_factory=set)
    """Nodes of `round` that may have missed the grant of `life`."""
    vacancies: dict[str, str] = field(default_factory=dict)
    """Lost node of the life to the spare that was called for it, or ""."""
    finished: set[int] = field(default_factory=set)
    """Ranks of `life` that said that the job is finished."""
    left: set[int] = field(default_factory=set)
    """Ranks of `life` that detached on purpose."""
    incomplete: tuple[SnapshotId, float] | None = None
    """The snapshot that a resume would choose, if segments of it are lost, and since when."""
    changed: bool = False
    """What nodes hold of it, or what is wanted, has changed since that was looked at as a whole."""
    moved_at: float = float("-inf")
    """When a rank of `life` was last heard to do something: finish a step, or end a capture."""
    tickets: deque[tuple[SnapshotId, float]] = field(default_factory=lambda: deque(maxlen=32))
    """The newest tickets and when they were issued, those that were dropped since included."""
    full_since: tuple[float, int] | None = None
    """Since when, and which step, some rank has no free slot although nothing is under way."""
    disagree_since: float | None = None
    """Since when the ranks of `life` do not divide alike what they share."""

    uncommitted: set[SnapshotId] = field(default_factory=set)
    """What is to be committed as soon as that may retire others."""
    waits_for: int = 0
    """The rank that was not ready for a ticket when that was looked at last."""
    keeps: set[int] = field(default_factory=set)
    """How many snapshots shall be kept, as ranks said since the last life was granted."""
    grants: int = 0
    """How many lives this coordinator has granted."""
    seen: dict[str, int] = field(default_factory=dict)
    """The newest rounds that were seen, and how many lives had been granted until then."""

    def see(self, round_: str) -> None:
        """A rank of a round is there."""
        self.seen.setdefault(round_, self.grants)
        if len(self.seen) > _ROUNDS_REMEMBERED:
            del self.seen[next(iter(self.seen))]

    def is_older(self, round_: str) -> bool:
        """Whether a round certainly began before the one that `life` was granted to.

        Processes that were stopped may all wake up when another run has long had a life.
        """
        grants = self.grants
        return self.seen.get(round_, grants) < self.seen.get(self.round, 0)

    @property
    def keep(self) -> int:
        """How many protected snapshots are kept."""
        return self.record.keep if self.record is not None else 1

    @property
    def states(self) -> list[RankState]:
        """Of the ranks of `round` that are there, whether they know of the life yet or not."""
        here = self.attachments.items()
        return [held.state for (round_, _), held in here if round_ == self.round]

    @property
    def runs(self) -> bool:
        """Whether all ranks of the life are there."""
        return sum(state.life == self.life for state in self.states) == self.world_size > 0

    def has_given_up(self, id: SnapshotId) -> bool:
        """Whether a rollback went back past `id`."""
        return self.record is not None and self.record.has_given_up(id)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a person, or the demo, wants to know happened."""

    at: float
    kind: str
    job: str
    text: str
    fields: dict[str, str | int | float]
