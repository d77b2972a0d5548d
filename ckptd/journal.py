"""What must outlive the coordinator, and cannot be computed from the cells that agents hold.

Agents keep all entries; a new coordinator takes the union of what they send it. An entry says how
one thing stands, so that of two about the same thing the newer one counts, in whatever order they
are heard: there is nothing to replay.
"""

from collections.abc import Iterable

import msgspec

from ckptd.digest import digest
from ckptd.ids import Count, JobId, NodeId, SnapshotId

INCIDENTS_KEPT = 200
NODES_KEPT = 20_000
THINGS_KEPT = 1000


class Isolated(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Whether a node shall have no part in any life; `reason` says why, or why it may again."""

    node: NodeId
    isolated: bool
    reason: str

    @property
    def about(self) -> str:
        return f"node {self.node}"


class Rollback(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The snapshot from which `job` shall resume next; None once it has, or by choice of a user.

    It is for the lives after `after`, the last that had been granted when it was asked for: when
    one of them trains it is done with, even where the entry that says so has not been heard.
    """

    job: JobId
    id: SnapshotId | None
    after: Count = 0

    @property
    def about(self) -> str:
        return f"rollback {self.job}"


class Draining(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Whether a node is to leave the cluster."""

    node: NodeId
    draining: bool

    @property
    def about(self) -> str:
        return f"draining {self.node}"


class Quota(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Most memory that `job` may have on each node, in bytes; None: as all jobs."""

    job: JobId
    size_bytes: Count | None

    @property
    def about(self) -> str:
        return f"quota {self.job}"


class Restarts(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The restarts of `job` that count for its breaker: when (seconds since the epoch), and why."""

    job: JobId
    at: tuple[float, ...]
    faults: tuple[str, ...]
    broken: str = ""
    """Why it is not restarted any more, if so."""
    steps: tuple[Count, ...] = ()
    """The step of each."""
    nodes: tuple[tuple[NodeId, ...], ...] = ()
    """The nodes at fault of each."""

    @property
    def about(self) -> str:
        return f"restarts {self.job}"


class Incident(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Something that stopped or slowed a job. Times in seconds; its four parts as C4 counts."""

    number: Count
    job: JobId
    at: float
    kind: str
    culprit: str
    text: str
    lost_work_s: float | None = None
    detection_s: float | None = None
    diagnosis_s: float | None = None
    restart_s: float | None = None

    @property
    def about(self) -> str:
        # A new coordinator may give a number again before it has heard of all incidents.
        return f"incident {self.number} at {self.at}"


Body = Isolated | Rollback | Draining | Quota | Restarts | Incident

_KEPT: dict[type[Body], int] = {
    Isolated: NODES_KEPT,
    Draining: NODES_KEPT,
    Incident: INCIDENTS_KEPT,
}
"""Of each kind, how many of the newest are kept; of the others, THINGS_KEPT."""


class Entry(msgspec.Struct, frozen=True):
    """One statement of one coordinator: the `number`-th of its term."""

    term: Count
    number: Count
    body: Body

    @property
    def age(self) -> tuple[int, int]:
        """Orders entries: what is greater is newer."""
        return self.term, self.number


class LogSummary(msgspec.Struct, frozen=True):
    """What tells one set of entries from another."""

    entries: Count = 0
    newest: tuple[Count, Count] = (0, 0)
    """Term and number of the newest."""
    digest: int = 0


class Journal:
    """The newest entry about each thing, and of each kind the newest few."""

    def __init__(self, term: int = 0) -> None:
        self.term = term
        self._newest: dict[str, Entry] = {}
        self._summary: LogSummary | None = LogSummary()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All, oldest first."""
        return tuple(sorted(self._newest.values(), key=_order))

    @property
    def summary(self) -> LogSummary:
        """Equal for equal entries only."""
        if self._summary is None:
            entries = self.entries
            content = digest(*(_encoded(entry) for entry in entries))
            self._summary = LogSummary(len(entries), entries[-1].age, content)
        return self._summary

    @property
    def next_incident(self) -> int:
        """The number of the next incident."""
        bodies = (entry.body for entry in self._newest.values())
        return 1 + max((body.number for body in bodies if isinstance(body, Incident)), default=0)

    def begin(self, term: int) -> list[Entry]:
        """Speak in this term from now on; returns what had been said too low, said again."""
        spoken = [entry for entry in self.entries if entry.term == self.term]
        self.term = term
        return [self.put(entry.body) for entry in spoken]

    def put(self, body: Body) -> Entry:
        """Say how something stands from now on."""
        numbers = (e.number for e in self._newest.values())
        entry = Entry(self.term, 1 + max(numbers, default=0), body)
        self.merge([entry])
        return entry

    def merge(self, entries: Iterable[Entry]) -> list[Entry]:
        """Take in what somebody else has kept; returns what was news."""
        news = []
        for entry in entries:
            old = self._newest.get(entry.body.about)
            if old is None or _order(old) < _order(entry):
                self._newest[entry.body.about] = entry
                news.append(entry)
        if news:
            self._summary = None
            for kind in {type(entry.body) for entry in news}:
                self._drop_oldest(kind)
        return [entry for entry in news if self._newest.get(entry.body.about) is entry]

    def _drop_oldest(self, kind: type[Body]) -> None:
        alike = [e for e in self._newest.values() if isinstance(e.body, kind)]
        kept = _KEPT.get(kind, THINGS_KEPT)
        if len(alike) > kept:
            for entry in sorted(alike, key=_order)[:-kept]:
                del self._newest[entry.body.about]

    @property
    def isolates(self) -> bool:
        """Whether any node is isolated."""
        bodies = (entry.body for entry in self._newest.values())
        return any(isinstance(body, Isolated) and body.isolated for body in bodies)

    def is_isolated(self, node: str) -> Isolated | None:
        """Why a node is isolated, or None if it is not."""
        entry = self._newest.get(f"node {node}")
        body = entry.body if entry is not None else None
        return body if isinstance(body, Isolated) and body.isolated else None

    def rollback(self, job: str) -> Rollback | None:
        """What `job` shall resume from next, if somebody chose."""
        entry = self._newest.get(f"rollback {job}")
        body = entry.body if entry is not None else None
        return body if isinstance(body, Rollback) and body.id is not None else None

    def term_of(self, body: Body) -> int:
        """The term in which the newest about the same thing was said."""
        return self._newest[body.about].term

    def is_draining(self, node: str) -> bool:
        """Whether a node is to leave."""
        entry = self._newest.get(f"draining {node}")
        return entry is not None and isinstance(entry.body, Draining) and entry.body.draining

    def quota(self, job: str) -> int | None:
        """The quota of `job` in bytes, if it has one of its own."""
        entry = self._newest.get(f"quota {job}")
        return entry.body.size_bytes if entry and isinstance(entry.body, Quota) else None

    def restarts(self, job: str) -> Restarts | None:
        """The restarts of `job` that its breaker counts, if there were any."""
        entry = self._newest.get(f"restarts {job}")
        return entry.body if entry and isinstance(entry.body, Restarts) else None


def _encoded(entry: Entry) -> bytes:
    return msgspec.msgpack.encode(entry)


def _order(entry: Entry) -> tuple[int, int, bytes]:
    """By age; two coordinators of one term may have said two things under one number."""
    return *entry.age, _encoded(entry)
