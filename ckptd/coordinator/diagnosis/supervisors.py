"""The supervisors of all jobs: hands each what it is told."""

from collections.abc import Iterable
from typing import Any

from ckptd.coordinator.diagnosis.finding import Culprit
from ckptd.coordinator.diagnosis.matrix import DelayMatrix
from ckptd.coordinator.diagnosis.shared import Life, Shared, Tell
from ckptd.coordinator.diagnosis.supervisor import Supervisor
from ckptd.wire import AskClock, Clock, Collected, Counted, Looked, Probed, Sketched, Transferred

_JOBS_LIMIT = 256


class Supervisors:
    """Those of all jobs."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.matrix = DelayMatrix()
        self.jobs: dict[str, Supervisor] = {}

    def heard(
        self,
        node: str,
        message: Sketched | Looked | Counted | Collected | Clock | Transferred | Probed,
        now: float,
    ) -> None:
        """Take in what an agent says."""
        match message:
            case Clock():
                self.shared.clocks.heard(node, message.asked, message.at - self.shared.wall_s, now)
            case Transferred() | Probed():
                for each in message.transfers:
                    if each.cells and each.seconds > 0:
                        size, seconds = each.size_bytes // each.cells, each.seconds / each.cells
                        self.matrix.observe(each.source, node, size, seconds)
                if isinstance(message, Probed) and message.job in self.jobs:
                    self.jobs[message.job].probed(node, message)
            case Sketched():
                job = message.sketch.job
                if job not in self.jobs and len(self.jobs) < _JOBS_LIMIT:
                    self.jobs[job] = Supervisor(job, self.shared)  # until the coordinator says more
                if job in self.jobs:
                    self.jobs[job].sketched(node, message, now)
            case Looked() if message.job in self.jobs:
                self.jobs[message.job].looked(node, message, now)
            case Counted() if message.job in self.jobs:
                self.jobs[message.job].counted(message, now)
            case Collected() if message.job in self.jobs:
                self.jobs[message.job].collected(node, message)

    def tick(self, lives: Iterable[Life], now: float) -> None:
        """Let time pass; `lives`: how all jobs stand that the coordinator knows."""
        known = {life.job for life in lives if life.number}
        for life in lives:
            if life.number:
                if life.job not in self.jobs:
                    self.jobs[life.job] = Supervisor(life.job, self.shared)
                self.jobs[life.job].follow(life, now)
        for job, each in list(self.jobs.items()):
            if each.life.number and job not in known:
                del self.jobs[job]  # it was forgotten
                continue
            each.tick(now)
        for node in {node for each in self.jobs.values() for node in each.detector.table.nodes}:
            if self.shared.clocks.is_due(node, now):
                self.shared.do(Tell(node, AskClock(now)))

    def ended(
        self, job: str, life: int, culprit: Culprit, reason: str, since: float, now: float
    ) -> None:
        """A trainer or a node is gone; see `Supervisor.ended`."""
        if job in self.jobs:
            self.jobs[job].ended(life, culprit, reason, since, now)

    def resumed(self, job: str, life: int, step: int, saved_at: float | None, now: float) -> None:
        """A life of a job trains; `saved_at` as for `Supervisor.resumed`."""
        if job in self.jobs:
            self.jobs[job].resumed(life, step, saved_at, now)

    def ran(self, incident: int, program: str, failure: str, now: float) -> None:
        """A program of a `Run` has ended; "" for `failure` if it has done its work."""
        record = self.shared.records.get(incident)
        if record is not None and record.job in self.jobs:
            self.jobs[record.job].ran(incident, program, failure, now)

    def suspects_of(self, job: str) -> set[str]:
        """Nodes of ranks of the job that are suspected to hang."""
        return self.jobs[job].suspects if job in self.jobs else set()

    def status(self, now: float) -> dict[str, Any]:
        """JSON-ready: what is found, and why not."""
        return {
            "policy": self.shared.settings.policy,
            "jobs": {name: self._job_status(each, now) for name, each in sorted(self.jobs.items())},
            "matrix": {
                "pairs": [
                    {"source": source, "destination": destination, "s_per_gib": delay}
                    for (source, destination), delay in sorted(self.matrix.delays().items())
                ],
                "hot": [
                    {"nodes": list(hot.culprit.nodes), "ratio": hot.ratio, "text": hot.sentence}
                    for hot in self.matrix.hot()
                ],
            },
        }

    def _job_status(self, each: Supervisor, now: float) -> dict[str, Any]:
        case = each.case
        witness = ""
        if case is not None:
            judged = case.judgement.reason if case.judgement else ""
            witness = "; ".join(filter(None, (judged, case.counts)))
        past = self.shared.restarts_of(each.job)
        return {
            "life": each.life.number,
            "quiet_because": each.quiet_because(now),
            "unseen_ranks": list(each.unseen),
            "pauses": each.pauses.as_json(now),
            "hang_timeout_s": each.detector.hang_timeout_s,
            "restarts_stopped": past.broken if past is not None else "",
            "findings": [
                {
                    "number": finding.number,
                    "kind": finding.kind.value,
                    "is_hang": finding.kind.is_hang,
                    "culprit": str(finding.culprit),
                    "ranks": list(finding.culprit.ranks),
                    "nodes": list(finding.culprit.nodes),
                    "text": finding.sentence,
                    "confidence": finding.confidence,
                    "for_s": now - finding.since,
                    "witness": witness if finding.kind.is_hang else "",
                }
                for finding in each.findings
            ],
        }
