"""Whether to restart a job, and without which node. Every decision has its reason."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ckptd.coordinator.diagnosis.finding import Finding, Kind, Scope
from ckptd.coordinator.diagnosis.witness import Judgement, Verdict


class Do(Enum):
    OBSERVE = "observe"
    RESTART = "restart"
    ISOLATE = "restart and isolate"


@dataclass(frozen=True, slots=True)
class PolicyLimits:
    """How far the policy may go."""

    automatic: bool = True
    """False: only ever say what would be done."""
    isolate: bool = True
    """Whether nodes may be taken out at all."""
    window_s: float = 24 * 3600.0
    """Two faults of one node within this isolate it."""
    restarts_per_hour: int = 6
    """More than this stops restarting."""
    same_step: int = 3
    """The same fault at the same step so often is the program's."""
    history: int = 64
    """Restarts that are remembered."""


@dataclass(frozen=True, slots=True)
class Restart:
    """One that was ordered. These are what is kept in the log, and given to a new coordinator."""

    at: float
    """Seconds; of the same clock as `now`."""
    fault: str
    step: int
    nodes: tuple[str, ...]
    """Nodes that were at fault."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why. `isolate` are nodes to take out."""

    do: Do
    reason: str
    isolate: tuple[str, ...] = ()
    tripped: bool = False
    """The breaker has stopped restarts: a person is needed."""


class Policy:
    """Decides for one job, over all its lives."""

    def __init__(self, limits: PolicyLimits | None = None, past: Sequence[Restart] = ()) -> None:
        self.limits = limits or PolicyLimits()
        self.past: deque[Restart] = deque(past, maxlen=self.limits.history)
        self.tripped = ""
        """Why the breaker has stopped restarts; "" if it has not."""

    def decide(
        self,
        finding: Finding,
        judgement: Judgement | None,
        step: int,
        now: float,
        spares: int | None = None,
    ) -> Decision:
        """What to do about a finding at `step`. A restart that is decided is remembered.

        `spares`: how many nodes can take the place of others; None: as many as are needed.
        """
        refused = self._refusal(finding, judgement)
        if refused:
            return Decision(Do.OBSERVE, refused)
        assert judgement is not None
        fault = str(finding.culprit)
        self._check_breaker(fault, step, now)
        if self.tripped:
            return Decision(Do.OBSERVE, self.tripped, tripped=True)
        why = f"{finding.sentence}; second witness: {judgement.reason}"
        if not self.limits.automatic:
            return Decision(Do.OBSERVE, f"restarts are not automatic; it would be: {why}")
        nodes = _nodes_at_fault(finding, judgement)
        again = tuple(node for node in nodes if self._was_at_fault(node, now))
        self.past.append(Restart(now, fault, step, nodes))
        if again and self.limits.isolate:
            hours = self.limits.window_s / 3600
            twice = f"{', '.join(again)} at fault twice in {hours:.0f} h"
            if spares is None or spares >= len(again):
                return Decision(Do.ISOLATE, f"{twice}: {why}", again)
            why = f"{twice}, and not taken out, for no spare waits to take its place: {why}"
        return Decision(Do.RESTART, why)

    @staticmethod
    def _refusal(finding: Finding, judgement: Judgement | None) -> str:
        """Why a restart is out of the question; "" if it is not."""
        if finding.over:
            return "it is over"
        if not finding.kind.is_hang:
            return f"the job makes progress: {finding.sentence}"
        if judgement is None:
            return "no restart on timing alone: a second witness is needed"
        if judgement.verdict is not Verdict.HANGS:
            return f"second witness: {judgement.verdict.value}: {judgement.reason}"
        return ""

    def _check_breaker(self, fault: str, step: int, now: float) -> None:
        if self.tripped:
            return
        limits = self.limits
        # The last step may not have been reported, and one stop is told as either kind of hang.
        same = sum(r.fault == fault and abs(r.step - step) <= 1 for r in self.past)
        if same + 1 >= limits.same_step:
            self.tripped = (
                f"restarts are stopped: the same fault at step {step} for the {same + 1}. time "
                f"({fault}); restarting does not mend it"
            )
        recent = sum(now - r.at < 3600 for r in self.past)
        if not self.tripped and recent >= limits.restarts_per_hour:
            self.tripped = (
                f"restarts are stopped: {recent} in the last hour, limit {limits.restarts_per_hour}"
            )

    def _was_at_fault(self, node: str, now: float) -> bool:
        since = now - self.limits.window_s
        return any(node in restart.nodes and restart.at >= since for restart in self.past)


def _nodes_at_fault(finding: Finding, judgement: Judgement) -> tuple[str, ...]:
    """Nodes that a culprit points to; not those of which it cannot tell which it is.

    Where only a transfer is stuck, what joins the nodes may be to blame as well, unless
    transfers between agents show the node, too.
    """
    culprit = finding.culprit
    stuck = finding.kind is Kind.COMMUNICATION_HANG and not judgement.culprits
    if stuck and culprit.scope is Scope.NODE and not finding.measured:
        return ()
    if culprit.scope in (Scope.RANK, Scope.NODE, Scope.DEVICE):
        return culprit.nodes
    if culprit.scope is Scope.RANKS and len(culprit.nodes) == 1:
        return culprit.nodes
    return ()
