"""A life that was over because a process or a node died, and the incident that it was.

There is nothing to find out, and its launcher starts the job anew by itself; but the time that it
cost is counted like that of any other.
"""

from dataclasses import dataclass

from ckptd.coordinator.diagnosis.finding import Culprit, Scope
from ckptd.coordinator.diagnosis.incidents import IncidentRecord
from ckptd.coordinator.diagnosis.policy import Do


@dataclass(slots=True)
class Ended:
    """What is known of it. Times in monotonic seconds, by the coordinator."""

    life: int
    step: int
    step_s: float
    since: float
    """Last progress of the job."""
    found_at: float
    decided_at: float = 0.0
    """When the last that belonged to the life was given up: its launchers can start anew."""
    culprit: Culprit | None = None
    reason: str = ""

    def add(self, culprit: Culprit, reason: str, now: float) -> None:
        """Somebody is gone. The first is the culprit, for its launcher ends the others.

        But a lost node is, whoever came first: its peers may fail before its silence is known.
        """
        self.decided_at = now
        known = self.culprit
        if known is None or (culprit.scope is Scope.NODE and known.scope is not Scope.NODE):
            self.culprit, self.reason = culprit, reason

    def record(self, number: int, job: str, wall_s: float) -> IncidentRecord:
        """The incident, in seconds since the epoch; `wall_s` is added to make them."""
        culprit = self.culprit
        assert culprit is not None
        record = IncidentRecord(
            number=number,
            job=job,
            life=self.life,
            step=self.step,
            step_s=self.step_s,
            at=self.since + wall_s,
            kind="dead node" if culprit.scope is Scope.NODE else "dead process",
            culprit=str(culprit),
            ranks=culprit.ranks,
            nodes=culprit.nodes,
            text=f"{culprit}: {self.reason}",
            decision=Do.RESTART.value,
            reason="its launcher starts it anew",
            detection_s=self.found_at - self.since,
            diagnosis_s=self.decided_at - self.found_at,
        )
        record.say(self.since + wall_s, "last progress of the job")
        record.say(self.found_at + wall_s, f"found: {record.text}")
        record.say(self.decided_at + wall_s, "all that belonged to the life is gone, or given up")
        return record
