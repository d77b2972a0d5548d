"""What the detector finds, and how it says it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """The four findings; the names are C4's."""

    NON_COMMUNICATION_HANG = "non-communication hang"
    COMMUNICATION_HANG = "communication hang"
    NON_COMMUNICATION_SLOW = "non-communication slow"
    COMMUNICATION_SLOW = "communication slow"

    @property
    def is_hang(self) -> bool:
        return self in (Kind.NON_COMMUNICATION_HANG, Kind.COMMUNICATION_HANG)


class Scope(Enum):
    """What a culprit is."""

    RANK = "rank"
    RANKS = "ranks"
    NODE = "node"
    DEVICE = "device"
    """What joins the ranks of one node: its GPUs, or the links between them."""
    LINK = "link"
    """Between two nodes."""
    NODES = "nodes"
    """One of these, or what joins them: which one, only a probe can tell."""
    JOB = "job"
    """All ranks alike: data, storage, power, or the program."""


@dataclass(frozen=True, slots=True)
class Culprit:
    """Who is to blame."""

    scope: Scope
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()
    """Of those ranks; for a link its two ends, in order of names."""

    def __str__(self) -> str:
        if self.scope is Scope.JOB:
            return "the job as a whole"
        if self.scope is Scope.RANK:
            return f"rank {self.ranks[0]} on node {self.nodes[0]}"
        if self.scope is Scope.RANKS:
            return f"ranks {listed(self.ranks)}"
        if self.scope is Scope.LINK:
            return f"the link between nodes {self.nodes[0]} and {self.nodes[1]}"
        if self.scope is Scope.DEVICE:
            return f"what joins the ranks of node {self.nodes[0]}"
        if self.scope is Scope.NODE:
            return f"node {self.nodes[0]}"
        return f"nodes {listed(self.nodes)}, or what joins them"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something is wrong, or (`over`) is so no more. `number` ties beginning and end together."""

    number: int
    kind: Kind
    culprit: Culprit
    since: float
    """Monotonic seconds, by the coordinator: since when there was no progress, or it was slow."""
    found_at: float
    confidence: float
    """0 to 1; how far from what the job's own history allows."""
    sentence: str
    """One that a person can check."""
    evidence: dict[str, str | int | float] = field(default_factory=dict)
    over: bool = False
    suspects: tuple[int, ...] = ()
    """Ranks whose processes a second witness should look at; bounded."""
    victims: int = 0
    """Ranks that wait, directly or not, for the culprit."""
    measured: bool = False
    """Transfers between agents show the culprit, too."""
    peers_unknown: bool = False
    """With whom the suspects communicate is not recorded: it may be another node."""


SUSPECTS_MAX = 64
_LISTED_MAX = 6


def listed(names: Sequence[object]) -> str:
    """The first few of `names`, and how many more there are."""
    shown = ", ".join(str(name) for name in names[:_LISTED_MAX])
    more = len(names) - _LISTED_MAX
    return f"{shown} and {more} more" if more > 0 else shown
