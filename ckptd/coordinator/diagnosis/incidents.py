"""Incidents, with all that is known of them, as `ckptd incidents` shows them."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ckptd.coordinator.diagnosis.finding import Finding
from ckptd.journal import Incident

_TIMELINE_MAX = 100
_TEXT_MAX = 2000


@dataclass
class IncidentRecord:
    """Something that stopped or slowed a job. Times in seconds since the epoch."""

    number: int
    job: str
    life: int
    step: int
    at: float
    step_s: float = 0.0
    """How long a step took."""
    kind: str = ""
    culprit: str = ""
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()
    text: str = ""
    confidence: float = 0.0
    evidence: dict[str, str | int | float] = field(default_factory=dict)
    witness: str = ""
    """What the second witness said."""
    doing: dict[str, str] = field(default_factory=dict)
    """By rank, what it was seen to do."""
    stacks: dict[str, str] = field(default_factory=dict)
    """By rank of the culprit, its main thread, innermost call last."""
    folders: dict[str, str] = field(default_factory=dict)
    """By node, where its folder is, or why there is none."""
    decision: str = ""
    reason: str = ""
    over_at: float | None = None
    lost_work_s: float | None = None
    detection_s: float | None = None
    diagnosis_s: float | None = None
    restart_s: float | None = None
    timeline: list[tuple[float, str]] = field(default_factory=list)

    def describe(self, finding: Finding) -> None:
        """Say what was found, as it is known now."""
        self.kind, self.culprit = finding.kind.value, str(finding.culprit)
        self.ranks, self.nodes = finding.culprit.ranks, finding.culprit.nodes
        self.text, self.confidence = finding.sentence, finding.confidence
        self.evidence = dict(finding.evidence)

    def say(self, at: float, text: str) -> None:
        """Add a line to the timeline."""
        if len(self.timeline) < _TIMELINE_MAX:
            self.timeline.append((at, text[:_TEXT_MAX]))

    def entry(self) -> Incident:
        """What is kept of it for coordinators to come."""
        return Incident(
            self.number,
            self.job,
            self.at,
            self.kind,
            self.culprit,
            self.text[:_TEXT_MAX],
            self.lost_work_s,
            self.detection_s,
            self.diagnosis_s,
            self.restart_s,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def from_journal(body: Incident) -> IncidentRecord:
    """What a coordinator knows that was not there."""
    return IncidentRecord(
        number=body.number,
        job=body.job,
        life=0,
        step=0,
        at=body.at,
        kind=body.kind,
        culprit=body.culprit,
        text=body.text,
        lost_work_s=body.lost_work_s,
        detection_s=body.detection_s,
        diagnosis_s=body.diagnosis_s,
        restart_s=body.restart_s,
    )
