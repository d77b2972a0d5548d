"""What happens to an agent, and what it does about it: the vocabulary of the lifecycle decider.

Order contract of actions: the shell carries out the actions of one call in the order given, and an
action that stores something (`KeepTerm`, `KeepRecord`, …) has finished before the next begins.
So whatever is reported was stored before.
"""

from dataclasses import dataclass, field

from ckptd.ids import SnapshotId
from ckptd.journal import Entry
from ckptd.manifest import JobManifest, JobRecord
from ckptd.segment import ParitySidecar, Sidecar
from ckptd.terms import KeptTerm
from ckptd.wire import (
    AgentMessage,
    AgentToLauncher,
    AgentToTrainer,
    CoordinatorMessage,
    DiagnosisOrder,
    LauncherMessage,
    Source,
    TrainerMessage,
)

# Events.


@dataclass(frozen=True, slots=True)
class Connected:
    """The connection to the coordinator is up (again)."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection to the coordinator is down."""


@dataclass(frozen=True, slots=True)
class FromCoordinator:
    """A message, and the term and random id of the coordinator that sent it."""

    message: CoordinatorMessage
    term: int = 0
    coordinator: str = ""


@dataclass(frozen=True, slots=True)
class ManifestNotKept:
    """There was no room to keep a job manifest, so nothing is encoded by it."""

    id: SnapshotId
    reason: str


@dataclass(frozen=True, slots=True)
class TermNotKept:
    """KeepTerm has failed: what comes in that term is not to be obeyed."""

    reason: str


@dataclass(frozen=True, slots=True)
class EntriesKept:
    """All entries that were ever to be kept are in the log now."""


@dataclass(frozen=True, slots=True)
class FromLocal:
    """A message over the Unix socket, from a trainer or a launcher."""

    conn: int
    message: TrainerMessage | LauncherMessage


@dataclass(frozen=True, slots=True)
class LocalGone:
    """A connection over the Unix socket has ended.

    `dead`: so has its process. If not, it may still write to its slots: they stay its own until
    ProcessEnded.
    """

    conn: int
    reason: str
    dead: bool


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """The process of a connection that ended earlier is dead, too."""

    conn: int


@dataclass(frozen=True, slots=True)
class Allocated:
    """The slot file `name` is there, reserved and prefaulted."""

    name: str


@dataclass(frozen=True, slots=True)
class AllocationFailed:
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class SegmentChecked:
    """The slot holds a sealed segment with a valid sidecar (None: it does not; `reason`)."""

    name: str
    sidecar: Sidecar | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Released:
    """Nothing holds the file any more and it is no longer published."""

    name: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """All parity that this node keeps of `id` is stored, and every manifest of its group."""

    id: SnapshotId


@dataclass(frozen=True, slots=True)
class EncodeFailed:
    """Encoding has ended without parity: trying again cannot help, or ("") it was stopped."""

    id: SnapshotId
    reason: str
    damaged: bool = False
    """Bytes that were read for it are not those that were captured."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something does not work, and is being tried again; for people to know."""

    reason: str


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """A damaged cell was found at rest: so many in all, and what was done about this one."""

    damaged_cells: int
    mended_cells: int
    text: str


@dataclass(frozen=True, slots=True)
class RecodeMoved:
    """So many of the parity cells that are made anew are here, for so long."""

    id: SnapshotId
    done: int
    cells: int
    for_s: float


@dataclass(frozen=True, slots=True)
class Damaged:
    """`node` has sent so many damaged cells, in all, since this agent was started."""

    node: str
    cells: int


@dataclass(frozen=True, slots=True)
class BadMessages:
    """So many messages that made no sense have been dropped since this agent was started."""

    count: int


@dataclass(frozen=True, slots=True)
class FetchMoved:
    """So many of the cells that a segment needs have been brought here, for so long."""

    name: str
    done: int
    cells: int
    for_s: float


@dataclass(frozen=True, slots=True)
class Fetched:
    """A segment has been brought here (or checked, and repaired, where it was)."""

    name: str
    fetched_cells: int
    rebuilt_cells: int


@dataclass(frozen=True, slots=True)
class FetchFailed:
    name: str
    kind: str
    reason: str


Event = (
    Connected
    | Disconnected
    | FromCoordinator
    | TermNotKept
    | EntriesKept
    | ManifestNotKept
    | FromLocal
    | LocalGone
    | ProcessEnded
    | Allocated
    | AllocationFailed
    | SegmentChecked
    | Released
    | Encoded
    | EncodeFailed
    | Trouble
    | Scrubbed
    | RecodeMoved
    | Damaged
    | BadMessages
    | FetchMoved
    | Fetched
    | FetchFailed
)


# Actions.


@dataclass(frozen=True, slots=True)
class Report:
    """Send to the coordinator (lost when there is none: Hello repeats all that counts)."""

    message: AgentMessage


@dataclass(frozen=True, slots=True)
class Tell:
    """Send to a trainer or launcher."""

    conn: int
    message: AgentToTrainer | AgentToLauncher


@dataclass(frozen=True, slots=True)
class Diagnose:
    """Look at trainers, collect evidence, or kill them: `ckptd.agent.reports` does it."""

    order: DiagnosisOrder


@dataclass(frozen=True, slots=True)
class Allocate:
    """Make a slot file: answered by Allocated or AllocationFailed."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CheckSegment:
    """Look whether the slot was sealed: answered by SegmentChecked."""

    name: str
    id: SnapshotId
    rank: int


@dataclass(frozen=True, slots=True)
class Release:
    """Unpublish a segment or parity file, once nothing pins it: answered by Released."""

    name: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a file that holds nothing."""

    name: str


@dataclass(frozen=True, slots=True)
class KeepTerm:
    """Answered by TermNotKept if it cannot be stored."""

    kept: KeptTerm


@dataclass(frozen=True, slots=True)
class KeepEntries:
    """Add these to the log. Answered by EntriesKept, later if there is no room now."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class KeepRecord:
    record: JobRecord


@dataclass(frozen=True, slots=True)
class KeepManifest:
    manifest: JobManifest


@dataclass(frozen=True, slots=True)
class ForgetManifests:
    id: SnapshotId


@dataclass(frozen=True, slots=True)
class ForgetJob:
    """Delete the job's record; its slots go one by one."""

    job: str


@dataclass(frozen=True, slots=True)
class Encode:
    """Protect this node's part: answered by Encoded or EncodeFailed.

    Repeated while it is under way: only names and addresses are new. `serve_only`: this node has
    its parity, and others want the rows that it encodes. `ranks`: as of `Protect`.
    """

    manifest: JobManifest
    cells: dict[str, str]
    name: str
    size_bytes: int
    serve_only: bool = False
    ranks: dict[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StopEncode:
    id: SnapshotId


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring the segment of `rank` into the file `name`: answered by Fetched or FetchFailed.

    `present`: the file is a sealed segment already, to be verified and repaired.
    """

    name: str
    size_bytes: int
    id: SnapshotId
    rank: int
    source: Source
    present: bool


Action = (
    Report
    | Tell
    | Diagnose
    | Allocate
    | CheckSegment
    | Release
    | Delete
    | KeepTerm
    | KeepEntries
    | KeepRecord
    | KeepManifest
    | ForgetManifests
    | ForgetJob
    | Encode
    | StopEncode
    | Fetch
)


@dataclass(frozen=True, slots=True)
class Adopted:
    """What a restarted agent found, whole, in its memory directory."""

    segments: tuple[tuple[str, Sidecar], ...] = ()
    parities: tuple[tuple[str, int, ParitySidecar], ...] = ()
    """(name, size in bytes of the file, sidecar)"""
    manifests: tuple[JobManifest, ...] = ()
    records: tuple[JobRecord, ...] = ()
    problems: tuple[str, ...] = ()
    term: KeptTerm | None = None
    entries: tuple[Entry, ...] = ()
