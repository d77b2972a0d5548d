"""What supervisors are told, what they want done, and what those of all jobs share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ckptd.coordinator.diagnosis.actuators import Actuator, Program
from ckptd.coordinator.diagnosis.clocks import Clocks
from ckptd.coordinator.diagnosis.incidents import IncidentRecord
from ckptd.coordinator.diagnosis.policy import PolicyLimits
from ckptd.coordinator.diagnosis.thresholds import Thresholds
from ckptd.coordinator.diagnosis.witness import WitnessLimits
from ckptd.journal import Body, Restarts
from ckptd.wire import CoordinatorMessage

OBSERVE, RESTART, ISOLATE = "observe", "restart", "restart+isolate"
POLICIES = (OBSERVE, RESTART, ISOLATE)
_RECORDS_KEPT = 100


@dataclass(frozen=True, slots=True)
class DiagnosisSettings:
    """How far diagnosis goes, and how sure it must be."""

    policy: str = OBSERVE
    """One of POLICIES."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    witness: WitnessLimits = field(default_factory=WitnessLimits)
    actuator: Actuator = field(default_factory=Actuator)
    """What carries out a decision."""

    @property
    def limits(self) -> PolicyLimits:
        return PolicyLimits(automatic=self.policy != OBSERVE, isolate=self.policy == ISOLATE)


@dataclass(frozen=True, slots=True)
class Life:
    """What the coordinator knows of the life that a job is in."""

    job: str
    number: int
    members: Mapping[int, str]
    """Rank to node."""
    step: int
    step_s: float
    """How long a step takes; 0: not known."""
    trains: bool
    """All ranks have loaded, and are there."""
    elastic: bool
    """Its launcher starts it anew when it ends."""


@dataclass(frozen=True, slots=True)
class Tell:
    """Send an order to the agent of a node."""

    node: str
    message: CoordinatorMessage


@dataclass(frozen=True, slots=True)
class Remember:
    """Put something in the journal."""

    body: Body


@dataclass(frozen=True, slots=True)
class Note:
    """Something that a person wants to know happened."""

    kind: str
    job: str
    text: str
    fields: dict[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """Run programs on the coordinator's machine, for an incident; answered by `Supervisors.ran`."""

    incident: int
    programs: tuple[Program, ...]
    timeout_s: float


Action = Tell | Remember | Note | Run


class Shared:
    """Settings, clocks, incidents, and actions that wait to be taken."""

    def __init__(
        self,
        settings: DiagnosisSettings,
        next_number: Callable[[], int],
        restarts_of: Callable[[str], Restarts | None],
        spares_of: Callable[[str], int] = lambda job: 0,
        cells_of: Callable[[str], str] = lambda node: "",
    ) -> None:
        """`next_number` of an incident, and `restarts_of` a job, are asked of the journal.

        `spares_of` a job: how many nodes wait to join it. `cells_of` a node: the address of its
        cell server, "" if it is not there.
        """
        self.settings, self.restarts_of = settings, restarts_of
        self.spares_of, self.cells_of = spares_of, cells_of
        self.wall_s = 0.0
        """What is to be added to monotonic seconds for those since the epoch; set by the shell."""
        self.clocks = Clocks()
        self.records: dict[int, IncidentRecord] = {}
        """Incidents that this coordinator has seen itself, with all that is known of them."""
        self._next_number = next_number
        self._out: list[Action] = []
        self._said: set[tuple[str, str]] = set()

    def take_actions(self) -> list[Action]:
        """What is to be done, in this order."""
        out, self._out = self._out, []
        return out

    def next_incident(self) -> int:
        """A number that no incident has had."""
        return max(self._next_number(), 1 + max(self.records, default=0))

    def keep(self, record: IncidentRecord) -> None:
        self.records[record.number] = record
        while len(self.records) > _RECORDS_KEPT:
            del self.records[min(self.records)]

    def do(self, action: Action) -> None:
        self._out.append(action)

    def note_once(self, kind: str, job: str, text: str) -> None:
        """An event, if it was not said before: peers that talk nonsense do so often."""
        if (kind, text) not in self._said and len(self._said) < 100:
            self._said.add((kind, text))
            self.do(Note(kind, job, text))
