"""What must outlive the coordinator, and cannot be computed from the cells that agents hold.

Agents keep all entries; a new coordinator takes the union of what they send it. An entry says how
one thing stands, so that of two about the same thing the newer one counts, in whatever order they
are heard: there is nothing to replay.
"""

from collections.abc import Iterable

import msgspec

from ckptd.ids import Count, JobId, NodeId, SnapshotId

INCIDENTS_KEPT = 200


class Isolated(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Whether a node shall have no part in any life; `reason` says why, or why it may again."""

    node: NodeId
    isolated: bool
    reason: str

    @property
    def about(self) -> str:
        return f"node {self.node}"


class Rollback(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The snapshot from which `job` shall resume next; None once it has, or by choice of a user."""

    job: JobId
    id: SnapshotId | None

    @property
    def about(self) -> str:
        return f"rollback {self.job}"


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
        return f"incident {self.number}"


Body = Isolated | Rollback | Restarts | Incident


class Entry(msgspec.Struct, frozen=True):
    """One statement of one coordinator: the `number`-th of its term."""

    term: Count
    number: Count
    body: Body

    @property
    def age(self) -> tuple[int, int]:
        """Orders entries: what is greater is newer."""
        return self.term, self.number


class Journal:
    """The newest entry about each thing; of incidents, the newest few."""

    def __init__(self, term: int = 0) -> None:
        self.term = term
        self._number = 0
        self._newest: dict[str, Entry] = {}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All, oldest first."""
        return tuple(sorted(self._newest.values(), key=lambda entry: entry.age))

    def put(self, body: Body) -> Entry:
        """Say how something stands from now on."""
        self._number = 1 + max([self._number, *(e.number for e in self._newest.values())])
        entry = Entry(self.term, self._number, body)
        self.merge([entry])
        return entry

    def merge(self, entries: Iterable[Entry]) -> list[Entry]:
        """Take in what somebody else has kept; returns what was news."""
        news = []
        for entry in entries:
            old = self._newest.get(entry.body.about)
            if old is None or old.age < entry.age:
                self._newest[entry.body.about] = entry
                news.append(entry)
        incidents = sorted(
            (e for e in self._newest.values() if isinstance(e.body, Incident)), key=lambda e: e.age
        )
        for entry in incidents[:-INCIDENTS_KEPT]:
            del self._newest[entry.body.about]
        return news

    def is_isolated(self, node: str) -> Isolated | None:
        """Why a node is isolated, or None if it is not."""
        entry = self._newest.get(f"node {node}")
        body = entry.body if entry is not None else None
        return body if isinstance(body, Isolated) and body.isolated else None

    def rollback(self, job: str) -> SnapshotId | None:
        """What `job` shall resume from next, if somebody chose."""
        entry = self._newest.get(f"rollback {job}")
        return entry.body.id if entry is not None and isinstance(entry.body, Rollback) else None
