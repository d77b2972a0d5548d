"""Every message that crosses a process boundary, and the one way to encode and decode them.

A frame is `b"ck"`, one byte of protocol version, then msgpack. The version is looked at before
anything else, so that a peer of another version is told so instead of failing on a field.
"""

from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

from ckptd.errors import ProtocolError
from ckptd.ids import Count, JobId, NodeId, Rank, SnapshotId, WorldSize
from ckptd.journal import Entry, LogSummary
from ckptd.manifest import Extent, JobManifest, JobRecord
from ckptd.sketches import Sketch
from ckptd.terms import Obeyed
from ckptd.watching import Place

PROTOCOL_VERSION = 4
FRAME_LIMIT_BYTES = 64 << 20
TRAINER_FRAME_LIMIT_BYTES = 64 << 10  # one SEQPACKET datagram
SLOTS_LIMIT = 1 << 10  # of one rank

PROBE_LIMIT_BYTES = 1 << 20

_MAGIC = b"ck"

Outcome = Literal["skipped", "torn", "dropped"]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the tag is the class's name."""


# Trainer to agent, over the Unix socket. One process, one connection, one rank.


class Attach(Message, frozen=True):
    """First message of a trainer. `life` is 0 before `resume()`, and set when it reconnects.

    `keep`: how many protected snapshots shall be kept; `slots` has at least one place more.
    `elastic`: its launcher starts it anew when it ends.
    """

    job: JobId
    round: str
    rank: Rank
    world_size: WorldSize
    every: int
    slots: Annotated[int, msgspec.Meta(ge=1, le=SLOTS_LIMIT)]
    life: Count = 0
    keep: Annotated[int, msgspec.Meta(ge=1, lt=SLOTS_LIMIT)] = 1
    elastic: bool = False


class AskResume(Message, frozen=True):
    """Rank 0 asks for a new life and a snapshot; `rejected` could not be loaded by every rank."""

    rejected: tuple[SnapshotId, ...] = ()


class Restore(Message, frozen=True):
    """Bring this rank's segment of `id` to this node and say where it is."""

    life: Count
    id: SnapshotId
    rank: Rank


class Resumed(Message, frozen=True):
    """All ranks have loaded (sent by rank 0), or training begins from nothing at `step` 0."""

    life: Count
    step: Count


class Share(msgspec.Struct, frozen=True):
    """State that this rank divides with others, each saving a part; they must divide alike.

    `group` stands for the set of `ranks` ranks, `tape` for what they divide.
    """

    group: int
    ranks: Count
    tape: int


class OpenLayout(Message, frozen=True):
    """Ask for slots of `size_bytes` for segments of this layout."""

    life: Count
    size_bytes: Count
    shares: tuple[Share, ...] = ()


class Progress(Message, frozen=True):
    """The trainer has finished `step`."""

    step: Count


class Sealed(Message, frozen=True):
    """The segment for `id` is complete in the slot that the ticket named."""

    id: SnapshotId


class CaptureFailed(Message, frozen=True):
    """The ticket for `id` cannot be honoured."""

    id: SnapshotId
    outcome: Outcome
    reason: str


class Detach(Message, frozen=True):
    """The trainer leaves on purpose; `finished` gives the job's memory back."""

    finished: bool


TrainerMessage = (
    Attach | AskResume | Restore | Resumed | OpenLayout | Progress | Sealed | CaptureFailed | Detach
)


# Agent to trainer.


class Attached(Message, frozen=True):
    """Answer to Attach."""

    node: NodeId
    cell_bytes: int


class Rejected(Message, frozen=True):
    """Answer to any request that is wrong; the text says why, and the way out.

    `kind` is the name of the error class of `ckptd.errors` to raise.
    """

    kind: str
    reason: str


class Granted(Message, frozen=True):
    """Answer to AskResume: a new life, and the snapshot to load (None: start from nothing)."""

    life: Count
    id: SnapshotId | None
    reason: str


class Waiting(Message, frozen=True):
    """AskResume cannot be answered yet; says what it waits for."""

    reason: str


class Restored(Message, frozen=True):
    """Answer to Restore: the segment of `rank` lies, verified, at `path`."""

    id: SnapshotId
    rank: Rank
    path: str


class LayoutOpened(Message, frozen=True):
    """Answer to OpenLayout: the memory is there; `paths` are its slots as far as they are free."""

    size_bytes: Count
    paths: tuple[str, ...] = ()


class SaveAll(Message, frozen=True):
    """The ranks do not agree on what they divide: each saves all that it has from now on."""

    reason: str


class Ticket(Message, frozen=True):
    """Capture `id.step` into the slot file at `path`."""

    id: SnapshotId
    path: str


class Revoked(Message, frozen=True):
    """The ticket for `id` is void."""

    id: SnapshotId


class Detached(Message, frozen=True):
    """Answer to Detach; the connection may be closed."""


AgentToTrainer = (
    Attached
    | Rejected
    | Granted
    | Waiting
    | Restored
    | LayoutOpened
    | SaveAll
    | Ticket
    | Revoked
    | Detached
)


# Agent to coordinator. Reports are absolute statements, so that repeating one changes nothing.


class Holding(msgspec.Struct, frozen=True):
    """What a node holds of one snapshot: whole sealed segments, and all its parity or none.

    Nothing at all: `extents` empty and no parity.
    """

    id: SnapshotId
    world_size: WorldSize
    extents: tuple[Extent, ...] = ()
    parity: bool = False
    manifest: JobManifest | None = None
    place: tuple[int, int] | None = None
    """(group, member) for which its parity was made; another node may have that place now."""


class RankState(msgspec.Struct, frozen=True):
    """One attached trainer as its agent sees it.

    `keep` and `elastic` are as in `Attach`. `free_slots` counts slots that no ticket up to
    `seen_step` has taken.
    """

    job: JobId
    round: str
    life: Count
    rank: Rank
    world_size: WorldSize
    every: int
    free_slots: Count
    seen_step: Count
    step: Count
    shares: tuple[Share, ...] = ()
    keep: Annotated[int, msgspec.Meta(ge=1)] = 1
    elastic: bool = False


class Hello(Message, frozen=True):
    """Who an agent is and all that it holds. Sent on start and whenever the coordinator asks.

    `engine` computes `codec` there; `engine_reason` says why no better one does; it
    is empty if there is none. `spare_bytes`: how much more it may hold for other nodes.
    """

    node: NodeId
    incarnation: str
    memory_token: str
    address: str
    cells: str
    domain: str
    spare: bool
    codec: str
    engine: str
    engine_reason: str
    memory_limit_bytes: int
    memory_used_bytes: int
    holdings: tuple[Holding, ...]
    ranks: tuple[RankState, ...]
    records: tuple[JobRecord, ...]
    launchers: tuple[str, ...]
    problems: tuple[str, ...]
    spare_bytes: Count = 0
    obeyed: Obeyed = Obeyed()
    log: LogSummary = LogSummary()
    """What it keeps of the journal."""
    capturing: tuple[tuple[SnapshotId, Rank], ...] = ()
    """Captures that are under way there."""


class Fetching(msgspec.Struct, frozen=True):
    """A segment that is being brought to a node: `done` of so many cells, for so long."""

    id: SnapshotId
    rank: Rank
    size_bytes: Count
    cells: Count
    done: Count
    for_s: float


class Recoding(msgspec.Struct, frozen=True):
    """Parity that a node makes anew: `done` of so many cells, in all so large, for so long."""

    id: SnapshotId
    size_bytes: Count
    cells: Count
    done: Count
    for_s: float


class Beat(Message, frozen=True):
    """The agent is alive.

    `damaged_cells` and `mended_cells` are its own; `damaged_from` counts those that came to it from
    each other node. `bad_messages`: how many it has dropped because they made no sense.
    """

    node: NodeId
    incarnation: str
    memory_used_bytes: int
    problems: tuple[str, ...]
    fetching: tuple[Fetching, ...] = ()
    damaged_cells: Count = 0
    mended_cells: Count = 0
    recoding: tuple[Recoding, ...] = ()
    spare_bytes: Count = 0
    damaged_from: dict[str, Count] = {}
    bad_messages: Count = 0


class Holds(Message, frozen=True):
    """A node's holding of one snapshot has changed."""

    holding: Holding


class RankReport(Message, frozen=True):
    """A rank has attached, or its free slots or its step have changed."""

    state: RankState


class RankLeft(Message, frozen=True):
    """A trainer process has ended or detached."""

    job: JobId
    round: str
    life: Count
    rank: Rank
    reason: str
    finished: bool


class AskResumeFor(Message, frozen=True):
    """AskResume of rank 0, passed on.

    `term`: which its agent obeys. What a coordinator of an earlier term answers, it refuses.
    """

    job: JobId
    round: str
    rejected: tuple[SnapshotId, ...]
    term: Count


class SegmentReady(Message, frozen=True):
    """The segment of `rank` is on `node`, verified; `rebuilt_cells` were decoded from parity."""

    job: JobId
    life: Count
    rank: Rank
    id: SnapshotId
    fetched_cells: int
    rebuilt_cells: int


class LifeResumed(Message, frozen=True):
    """Rank 0 of `life` says that all ranks have loaded."""

    job: JobId
    life: Count
    step: Count


class SnapshotFailed(Message, frozen=True):
    """A capture, or the protection, of `id` failed on this node."""

    id: SnapshotId
    outcome: Outcome
    reason: str
    damaged: bool = False
    """Bytes that it was to be protected from are not those that were captured."""


class RebuildFailed(Message, frozen=True):
    """The segment of `rank` could not be rebuilt on this node."""

    id: SnapshotId
    rank: Rank
    reason: str


class LauncherWaiting(Message, frozen=True):
    """A `ckptd run --spare` on this node waits to join `job`; `waiting` False: no more."""

    job: JobId
    waiting: bool


class Outdated(Message, frozen=True):
    """An order was not obeyed: it is of another coordinator than the one that is obeyed here."""

    obeyed: Obeyed


class Entries(Message, frozen=True):
    """Answer to AskEntries: all that this agent keeps of the journal."""

    entries: tuple[Entry, ...]


class Kept(Message, frozen=True):
    """Answer to KeepEntries: what this agent keeps of the journal now, stored."""

    log: LogSummary


class Pause(msgspec.Struct, frozen=True, array_like=True):
    """What a rank does instead of training, for how long by now, and for how long at most."""

    what: str
    for_s: float
    at_most_s: float


class Sketched(Message, frozen=True):
    """How far the ranks of a node have come in their collectives, and which of them are paused."""

    sketch: Sketch
    pauses: dict[int, Pause] = {}


class Look(msgspec.Struct, frozen=True, array_like=True):
    """A trainer process at one instant. What could not be read is None."""

    at: float
    """Seconds since the epoch, by the node's clock."""
    state: str | None
    """The kernel's letter: "R", "S", "D", "T", "t", "Z"; "" for a process that is gone."""
    cpu_s: float | None = None
    """CPU time of all its threads."""
    io_bytes: int | None = None
    """Bytes moved, as far as it is worth a word: else as in the look before."""
    stack: str | None = None
    """Of its main thread, innermost call last."""


class Looked(Message, frozen=True):
    """Answer to LookAt: two looks at each of the ranks that are on this node."""

    job: JobId
    life: Count
    finding: Count
    looks: dict[int, tuple[Look, Look]]


class Counted(Message, frozen=True):
    """Answer to LookAt with `counts`, where NCCL answers: who lags by its own counts."""

    job: JobId
    life: Count
    finding: Count
    behind: tuple[Rank, ...]
    """Have launched fewer operations than others of a communicator."""
    silent: tuple[Rank, ...]
    """Of these NCCL has no answer."""
    text: str


class Collected(Message, frozen=True):
    """Answer to Collect: where the incident's folder is on this node, or the problem.

    `places`: where its ranks run, as far as their scheduler has told them.
    """

    job: JobId
    life: Count
    incident: Count
    path: str
    problem: str = ""
    places: dict[int, Place] = {}


class Clock(Message, frozen=True):
    """Answer to AskClock, at once: the node's clock, in seconds since the epoch."""

    asked: float
    at: float


class Transfer(msgspec.Struct, frozen=True, array_like=True):
    """Cells that came from one node, since this was last said."""

    source: NodeId
    cells: Count
    size_bytes: Count
    seconds: float


class Transferred(Message, frozen=True):
    """How long transfers from other nodes took; the delay matrix is made of these."""

    transfers: tuple[Transfer, ...]


class Probed(Message, frozen=True):
    """Answer to Probe: what each transfer took; infinitely long, if it failed."""

    job: JobId
    life: Count
    finding: Count
    transfers: tuple[Transfer, ...]


AgentMessage = (
    Hello
    | Beat
    | Holds
    | RankReport
    | RankLeft
    | AskResumeFor
    | SegmentReady
    | LifeResumed
    | SnapshotFailed
    | RebuildFailed
    | LauncherWaiting
    | Outdated
    | Entries
    | Kept
    | Sketched
    | Looked
    | Counted
    | Collected
    | Clock
    | Transferred
    | Probed
)


# Coordinator to agent. Orders are idempotent.


class Welcome(Message, frozen=True):
    """The agent belongs to the cluster. The first order of a term; no other one begins it.

    `address` and `lease_s` are for the agent's word on whom it obeys, as in `Term`.
    """

    beat_s: float
    cell_bytes: int
    address: str = ""
    lease_s: float = 0.0


class WhoAreYou(Message, frozen=True):
    """The coordinator does not know this agent (any more): say Hello again. No order, of no term.

    Whoever asks is answered: so a coordinator hears of other terms before it gives an order.
    """


class Present(Message, frozen=True):
    """The coordinator is alive; said when there may be nothing else to say."""


class AskEntries(Message, frozen=True):
    """Send all that is kept of the journal."""


class KeepEntries(Message, frozen=True):
    """Keep these entries of the journal, too."""

    entries: tuple[Entry, ...]


class Dismiss(Message, frozen=True):
    """The coordinator will not have this agent; it says why and what to do."""

    reason: str


class Source(msgspec.Struct, frozen=True):
    """Where parts of a snapshot can be had now.

    `ranks`: nodes that hold a rank's whole segment. `sizes`: each segment's size in bytes.
    `parity`: nodes that hold their parity cells.
    `cells`: node to the address (`host:port`) of its agent's cell server. `manifest` is None for a
    snapshot that was only sealed: then there is no parity.
    """

    manifest: JobManifest | None
    ranks: dict[int, tuple[str, ...]]
    sizes: dict[int, int]
    parity: tuple[str, ...]
    cells: dict[str, str]


class Grant(Message, frozen=True):
    """A new life of a job. Sent to every agent that has ranks of it.

    `quota_bytes`: most memory that the job may have on each node; None: what the agent has.
    """

    job: JobId
    round: str
    life: Count
    id: SnapshotId | None
    reason: str
    record: JobRecord
    source: Source | None
    parity_fraction: float
    quota_bytes: Count | None = None


class ResumeWaits(Message, frozen=True):
    """The resume of `job` cannot be answered yet; `final`: nor by waiting."""

    job: JobId
    round: str
    reason: str
    final: bool = False


class Record(Message, frozen=True):
    """Keep this record of a job."""

    record: JobRecord


class TakeSnapshot(Message, frozen=True):
    """The ticket: all ranks of the life capture `id`."""

    id: SnapshotId


class Undivide(Message, frozen=True):
    """The ranks of `life` do not agree on what they divide: each must save all that it has."""

    job: JobId
    life: Count
    reason: str


class Protect(Message, frozen=True):
    """Every rank has sealed: encode. `cells` gives each node's cell server.

    `ranks`, if any: most of the group has its parity. A node that has not gets each row from one
    that holds data of the stripe, instead of pulling the data itself; they are as in `Source`.
    """

    manifest: JobManifest
    cells: dict[NodeId, str]
    ranks: dict[int, tuple[NodeId, ...]] = {}


class Rebuild(Message, frozen=True):
    """Hold the segment of `rank`, whose node is lost, in spare memory; a later resume finds it."""

    id: SnapshotId
    rank: Rank
    source: Source


class Commit(Message, frozen=True):
    """`id` is protected: permission to free `retire`."""

    id: SnapshotId
    retire: tuple[SnapshotId, ...]


class Drop(Message, frozen=True):
    """`id` will never be restored: free it."""

    id: SnapshotId
    reason: str


class Forget(Message, frozen=True):
    """The job is finished or was removed: free all that is held for it."""

    job: JobId
    reason: str


class Activate(Message, frozen=True):
    """A node of `job` is lost: the launcher that waits on this spare may start."""

    job: JobId


class TellAll(Message, frozen=True):
    """Send a sketch with its whole layout: what an earlier one refers to is not known."""

    job: JobId
    life: Count


class LookAt(Message, frozen=True):
    """Look twice at those of these ranks that are on this node, so many seconds apart; answered by
    Looked.

    `counts`: ask NCCL what it counts, too; answered by Counted, if NCCL answers.
    """

    job: JobId
    life: Count
    finding: Count
    ranks: tuple[Rank, ...]
    apart_s: Annotated[float, msgspec.Meta(ge=0.1, le=5.0)]
    counts: bool = False


class Collect(Message, frozen=True):
    """Write an incident folder of all ranks of the life on this node; answered by Collected."""

    job: JobId
    life: Count
    incident: Count
    reason: str


class KillWorkers(Message, frozen=True):
    """Kill the trainers of this life on this node, stopped ones too: the launcher starts anew.

    `launchers`: end that, too, for the node shall have no part in the job.
    """

    job: JobId
    life: Count
    reason: str
    launchers: bool = False


class AskClock(Message, frozen=True):
    """What is the time? Answered by Clock, with `asked` as it is."""

    asked: float


class Probe(Message, frozen=True):
    """Get a few MiB from these nodes' cell servers, and say how long that takes, with Probed."""

    job: JobId
    life: Count
    finding: Count
    cells: dict[NodeId, str]


class Hasten(Message, frozen=True):
    """A node that holds `id` may be lost soon: what protects it goes first, and at full speed."""

    id: SnapshotId


DiagnosisOrder = TellAll | LookAt | Collect | KillWorkers | AskClock | Probe | Hasten

CoordinatorMessage = (
    Welcome
    | WhoAreYou
    | Present
    | AskEntries
    | KeepEntries
    | Dismiss
    | Grant
    | ResumeWaits
    | Record
    | TakeSnapshot
    | Undivide
    | Protect
    | Rebuild
    | Commit
    | Drop
    | Forget
    | Activate
    | TellAll
    | LookAt
    | Collect
    | KillWorkers
    | AskClock
    | Probe
    | Hasten
)


class Order(Message, frozen=True):
    """What goes over the wire: a message of the coordinator, and its term, for it to be refused."""

    term: Count
    coordinator: str
    message: CoordinatorMessage


# CLI to coordinator, and CLI to agent (a launcher that waits).


class AskStatus(Message, frozen=True):
    """Ask for everything the coordinator knows, as one JSON document."""


class RemoveJob(Message, frozen=True):
    """Forget a job and free its memory on every node."""

    job: JobId


class RollBack(Message, frozen=True):
    """Let a job resume next from its snapshot of `step`, of `life` if several lives have one.

    Without a step, what was asked for before is taken back.
    """

    job: JobId
    step: Count | None = None
    life: Count | None = None


class DrainNode(Message, frozen=True):
    """A node is to leave the cluster, or (`drain` False) is to stay after all."""

    node: NodeId
    drain: bool


class IsolateNode(Message, frozen=True):
    """A node shall have no part in any new life, or (`isolated` False) it may again."""

    node: NodeId
    isolated: bool
    reason: str


class SetQuota(Message, frozen=True):
    """Most memory that a job may have on each node from its next life on; None: the default."""

    job: JobId
    size_bytes: Count | None


class Rearm(Message, frozen=True):
    """A job may be restarted by itself again: what stopped that has been seen to."""

    job: JobId


class Answer(Message, frozen=True):
    """The coordinator's answer to the CLI: a JSON document, or an error text."""

    body: bytes
    error: str = ""


ClientOrder = RemoveJob | RollBack | DrainNode | IsolateNode | SetQuota | Rearm
ClientMessage = AskStatus | ClientOrder


class WaitForWork(Message, frozen=True):
    """`ckptd run --spare` waits on this node for `job`; answered by Work."""

    job: JobId


class WhereAmI(Message, frozen=True):
    """Ask an agent for its node's address."""


class Here(Message, frozen=True):
    """Answer to WhereAmI."""

    node: NodeId
    address: str


class Work(Message, frozen=True):
    """The launcher may start."""

    job: JobId


LauncherMessage = WaitForWork | WhereAmI
AgentToLauncher = Here | Work | Rejected


# Agent to agent, over TCP, for cells.


class GetCell(Message, frozen=True):
    """Cell `cell` of the segment of `rank`. Of many requests, the lowest order goes first."""

    id: SnapshotId
    rank: Rank
    cell: Count
    order: Count = 0


class GetParity(Message, frozen=True):
    """A parity cell at rest: row `row` of stripe `stripe`, from the member that keeps it."""

    id: SnapshotId
    group: Count
    stripe: Count
    row: Count


class GetEncoded(Message, frozen=True):
    """A parity row from the stripe's encoder, while the snapshot is being protected."""

    id: SnapshotId
    group: Count
    stripe: Count
    row: Count


class GetDecoded(Message, frozen=True):
    """A data cell that is lost, decoded by a node that holds another cell of its stripe.

    `ranks`, `parity` and `cells` say where the rest of the stripe is, as in `Source`.
    """

    id: SnapshotId
    rank: Rank
    cell: Count
    ranks: dict[int, tuple[NodeId, ...]]
    parity: tuple[NodeId, ...]
    cells: dict[NodeId, str]


class GetRecoded(Message, frozen=True):
    """A parity row that is lost, computed anew by a node that holds data of its stripe.

    `ranks` and `cells` say where that data is, as in `Source`.
    """

    id: SnapshotId
    group: Count
    stripe: Count
    row: Count
    ranks: dict[int, tuple[NodeId, ...]]
    cells: dict[NodeId, str]


class GetManifest(Message, frozen=True):
    """The node manifest of `node` for `id`."""

    id: SnapshotId
    node: NodeId


class GetBytes(Message, frozen=True):
    """So many bytes of no meaning, for a measurement; at most PROBE_LIMIT_BYTES."""

    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=PROBE_LIMIT_BYTES)]


PeerRequest = GetCell | GetParity | GetEncoded | GetDecoded | GetRecoded | GetManifest | GetBytes


class Payload(Message, frozen=True):
    """Success: `length_bytes` raw bytes follow, whose xxh3-64 is `digest`."""

    length_bytes: Count
    digest: int


class NotHere(Message, frozen=True):
    """The peer does not have it (any more)."""

    reason: str


PeerReply = Payload | NotHere


_Union = TypeVar("_Union")
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """One frame."""
    return _MAGIC + bytes((PROTOCOL_VERSION,)) + _encoder.encode(message)


class Decoder(Generic[_Union]):
    """Decodes frames that must be one of a union of messages."""

    def __init__(self, union: Any, limit_bytes: int = FRAME_LIMIT_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[_Union] = msgspec.msgpack.Decoder(union)
        self._limit_bytes = limit_bytes

    def decode(self, frame: bytes) -> _Union:
        """Raises ProtocolError, which says whether it is the version or the content."""
        if len(frame) > self._limit_bytes:
            raise ProtocolError(
                f"a message of {len(frame)} bytes is over the limit of {self._limit_bytes}"
            )
        if frame[:2] != _MAGIC or len(frame) < 3:
            raise ProtocolError(f"not a ckptd message (begins with {frame[:8]!r})")
        if frame[2] != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the peer speaks protocol version {frame[2]}, this ckptd speaks "
                f"{PROTOCOL_VERSION}; install the same ckptd version on every node"
            )
        try:
            return self._decoder.decode(frame[3:])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"malformed message: {error}") from error
