"""What an agent knows of its slots and trainers, and the table of what slots are used for."""

import enum
from dataclasses import dataclass, field

from ckptd.errors import InternalError
from ckptd.ids import SnapshotId
from ckptd.wire import AskResume, OpenLayout, Restore, Resumed, Share


class Use(enum.Enum):
    """What a slot file is being used for."""

    ALLOCATING = "allocating"
    FREE = "free"
    CAPTURING = "capturing"
    REVOKED = "revoked"
    """Its ticket is void, but the trainer may still be writing."""
    CHECKING = "checking"
    SEALED = "sealed"
    FETCHING = "fetching"
    ENCODING = "encoding"
    PARITY = "parity"
    RELEASING = "releasing"


USES: dict[Use, frozenset[Use]] = {
    Use.ALLOCATING: frozenset({Use.FREE}),
    Use.FREE: frozenset({Use.CAPTURING, Use.FETCHING, Use.ENCODING}),
    Use.CAPTURING: frozenset({Use.CHECKING, Use.REVOKED, Use.RELEASING}),
    Use.REVOKED: frozenset({Use.RELEASING}),
    Use.CHECKING: frozenset({Use.SEALED, Use.RELEASING}),
    Use.SEALED: frozenset({Use.RELEASING}),
    Use.FETCHING: frozenset({Use.SEALED, Use.RELEASING}),
    Use.ENCODING: frozenset({Use.PARITY, Use.RELEASING}),
    Use.PARITY: frozenset({Use.RELEASING}),
    Use.RELEASING: frozenset({Use.FREE}),
}


@dataclass
class Slot:
    """One preallocated file: a segment's, or one generation of parity."""

    name: str
    job: str
    size_bytes: int
    use: Use
    parity: bool = False
    owner: int | None = None
    """Connection of the trainer that may write to it."""
    id: SnapshotId | None = None
    rank: int = -1
    place: tuple[int, int] | None = None
    """(group, member) for which parity is made."""
    doomed: bool = False
    """Release it as soon as what is under way with it has ended."""
    guest: bool = False
    """It was made for the segment of a lost node, and not for a trainer here."""
    broken: bool = False
    """Its file may be missing or cut short: delete it when it has been released."""

    def move(self, use: Use) -> None:
        if use not in USES[self.use]:
            raise InternalError(f"{self.name} cannot go from {self.use.value} to {use.value}")
        self.use = use


@dataclass
class Trainer:
    """One connected trainer process."""

    conn: int
    job: str
    round: str
    rank: int
    world_size: int
    every: int
    slots: int
    keep: int
    elastic: bool
    life: int = 0
    answered: bool = False
    step: int = 0
    seen_step: int = 0
    segment_bytes: int = 0
    shares: tuple[Share, ...] = ()
    opening: bool = False
    reported_at: float = float("-inf")
    ask: AskResume | None = None
    waits: list[Restore | OpenLayout | Resumed] = field(default_factory=list)
    """Requests of a life whose grant has not arrived here yet."""


@dataclass(frozen=True)
class Identity:
    """Who this agent is."""

    node: str
    incarnation: str
    memory_token: str
    address: str
    cells: str
    domain: str
    spare: bool
    codec: str
    engine: str
    """What computes the codec here."""
    engine_reason: str
    """Why no better engine does; "" if there is none."""
    memory_dir: str
    memory_limit_bytes: int
    coordinator: str
    spare_memory_bytes: int | None = None
    """How much of the limit may hold other nodes' segments; None: all that is free."""
