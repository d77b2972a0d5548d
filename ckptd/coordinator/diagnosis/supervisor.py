"""From sketches to a job that runs again: finds, asks the second witness, keeps records, restarts.

A hang goes through stages: suspected by the timing, looked at by the second witness (again and
again, as long as that sees progress), then an incident, whose evidence is collected, decided by the
policy, and, if so decided, the end of all trainers of the life, which their launchers start anew.
Slowness is an incident, and never more.

No IO, clock or randomness: what is to be done is returned by `take_actions`.
"""

from dataclasses import dataclass, field, replace

from ckptd.coordinator.diagnosis.actuators import Fault, Plan, plan
from ckptd.coordinator.diagnosis.detector import Detector
from ckptd.coordinator.diagnosis.ended import Ended
from ckptd.coordinator.diagnosis.finding import Culprit, Finding, Scope
from ckptd.coordinator.diagnosis.incidents import IncidentRecord
from ckptd.coordinator.diagnosis.pauses import Pauses
from ckptd.coordinator.diagnosis.policy import Decision, Do, Policy, Restart
from ckptd.coordinator.diagnosis.probing import Probing
from ckptd.coordinator.diagnosis.shared import Action, Life, Note, Remember, Run, Shared, Tell
from ckptd.coordinator.diagnosis.witness import (
    Judgement,
    Verdict,
    judge,
    weigh,
)
from ckptd.errors import ProtocolError
from ckptd.journal import Isolated, Restarts
from ckptd.watching import Place
from ckptd.wire import (
    Collect,
    Collected,
    CoordinatorMessage,
    Counted,
    KillWorkers,
    Look,
    LookAt,
    Looked,
    Probed,
    Sketched,
    TellAll,
)

_LOOK_PATIENCE_S = 8.0
_COLLECT_PATIENCE_S = 8.0
_REPEAT_KILL_S = 3.0
_KILLS = 10
_TELL_ALL_S = 0.5
_SIGHT_S = 15.0
_STACK_LINES_KEPT = 30
_COUNTING_NODES = 2
"""Each answer is for the whole job: a second node is asked in case the first one's is none."""


@dataclass(slots=True)
class _Case:
    """A hang, from the suspicion to its end."""

    finding: Finding
    asked_at: float = 0.0
    """When the witness was asked; 0: it is to be asked at `look_at`."""
    look_at: float = 0.0
    looks: dict[int, tuple[Look, Look]] = field(default_factory=dict)
    awaited: set[str] = field(default_factory=set)
    """Nodes that have not answered yet."""
    tries: int = 0
    said: str = ""
    """What the witness said last."""
    judgement: Judgement | None = None
    counted: Counted | None = None
    """What NCCL itself counts."""
    counts: str = ""
    """Whether that bears the finding out, in words."""
    record: IncidentRecord | None = None
    collect_until: float = 0.0
    places: dict[int, Place] = field(default_factory=dict)
    decided: Decision | None = None
    plan: Plan = field(default_factory=lambda: Plan(kills=False))
    programs_done: int = 0
    killed_at: float = 0.0
    kills: int = 0
    repeat_at: float = 0.0


class Supervisor:
    """Watches one job, over its lives."""

    def __init__(self, job: str, shared: Shared) -> None:
        self.job, self._shared = job, shared
        self.life = Life(job, 0, {}, 0, 0.0, True, False)
        self.detector = Detector(shared.settings.thresholds)
        self.case: _Case | None = None
        self.slow: dict[int, IncidentRecord] = {}
        """By number of the finding: slowness that is not over."""
        self._recovering: _Case | None = None
        self._isolating: dict[int, _Case] = {}
        """By number of the incident: nodes are marked once programs have taken them out."""
        self._ended: Ended | None = None
        self._wanted_at: dict[str, float] = {}
        self.pauses = Pauses()
        self._probing: dict[int, Probing] = {}
        """By number of the finding."""
        self._began_at = 0.0
        self._heard_at: float | None = None

    # What comes in.

    def follow(self, life: Life, now: float) -> None:
        """How the job stands. A new life begins with nothing known."""
        if life.number != self.life.number:
            self.detector = Detector(self._shared.settings.thresholds)
            self._end_slow(now, "its life has ended")
            self.case = None
            self._wanted_at.clear()
            self.pauses = Pauses()
            self._probing.clear()
            self._began_at, self._heard_at = now, None
        elif not self._began_at:
            self._began_at = now
        self.life = life

    def sketched(self, node: str, message: Sketched, now: float) -> None:
        sketch = message.sketch
        if sketch.life != self.life.number or sketch.node != node:
            return
        offset = self._shared.clocks.offset(node, now)
        try:
            known = self.detector.observe(sketch, now, offset)
        except ProtocolError as error:
            self._shared.note_once("sketch_refused", self.job, f"{node}: {error}")
            return
        self._heard_at = now
        self.pauses.hear(node, message.pauses, self.life.members, now)
        self._count_pauses(now)
        if not known and now >= self._wanted_at.get(node, 0.0):
            self._wanted_at[node] = now + _TELL_ALL_S
            self._tell(node, TellAll(self.job, self.life.number))

    def looked(self, node: str, message: Looked, now: float) -> None:
        case = self.case
        if case is None or message.life != self.life.number or not case.asked_at:
            return
        if message.finding != case.finding.number:
            return
        case.looks.update(message.looks)
        case.awaited.discard(node)

    def counted(self, message: Counted, now: float) -> None:
        """NCCL's counts are evidence, and nothing else."""
        case = self.case
        if case is None or message.life != self.life.number:
            return
        if message.finding != case.finding.number:
            return
        case.counted = message
        said, case.counts = case.counts, weigh(case.finding, message)
        if case.counts == said:
            return
        self._note("nccl_counts", case.counts, finding=case.finding.number)
        if case.record is not None:
            self._add_counts(case, now)
            self._do(Remember(case.record.entry()))

    def collected(self, node: str, message: Collected) -> None:
        case = self.case
        records = [*self.slow.values()]
        if case is not None and case.record is not None:
            records.append(case.record)
        for record in records:
            if record.number == message.incident:
                record.folders[node] = message.path or message.problem
        if case is not None and case.record is not None:
            case.awaited.discard(node)
            case.places.update(
                (rank, place)
                for rank, place in message.places.items()
                if self.life.members.get(rank) == node
            )

    def probed(self, node: str, message: Probed) -> None:
        probing = self._probing.get(message.finding)
        if probing is not None and message.life == self.life.number:
            probing.heard(node, message.transfers)

    def ran(self, incident: int, program: str, failure: str, now: float) -> None:
        """A program has ended; `failure`: why it has not done its work, "" if it has."""
        record = self._shared.records.get(incident)
        if record is None:
            return
        if failure:
            self._isolating.pop(incident, None)
            self._not_actuated(record, f"{program}: {failure}", now)
            return
        record.say(now + self._shared.wall_s, f"{program}: done")
        self._note("actuated", f"incident {incident}: {program}: done", incident=incident)
        case = self._isolating.get(incident)
        if case is not None:
            case.programs_done += 1
            if case.programs_done == len(case.plan.programs):
                del self._isolating[incident]
                self._mark(case)

    def ended(self, life: int, culprit: Culprit, reason: str, since: float, now: float) -> None:
        """A trainer is gone that had not said goodbye, or a node. `since`: the last progress.

        It is an incident once the job runs again: until then it may have been stopped on purpose.
        """
        if self._ended is None or self._ended.life != life:
            elastic = self.life.elastic or culprit.scope is Scope.NODE
            if not elastic or self._recovering is not None or self.life.number != life:
                return  # a person starts it again, or it was killed for an incident that is known
            self._ended = Ended(life, self.life.step, self.life.step_s, since, now)
        self._ended.add(culprit, reason, now)

    def resumed(self, life: int, step: int, saved_at: float | None, now: float) -> None:
        """The job runs again. `saved_at`: when the snapshot that it went on from was taken."""
        case, ended = self._recovering, self._ended
        if case is not None and case.record is not None and life > case.record.life:
            self._recovering = None
            at = (case.finding.since, case.killed_at, now)
            self._runs_again(case.record, at, life, step, saved_at)
        elif ended is not None and life > ended.life:
            self._ended = None
            record = ended.record(self._shared.next_incident(), self.job, self._shared.wall_s)
            self._shared.keep(record)
            at = (ended.since, ended.decided_at, now)
            self._runs_again(record, at, life, step, saved_at)

    def _runs_again(
        self,
        record: IncidentRecord,
        at: tuple[float, float, float],
        life: int,
        step: int,
        saved_at: float | None,
    ) -> None:
        """`at`: of the last progress, of the decision, and now."""
        since, decided_at, now = at
        wall = now + self._shared.wall_s
        if saved_at is not None:
            # The last progress that was seen may be a moment before the last that was made.
            steps_s = (record.step - step) * record.step_s
            record.lost_work_s = max(0.0, since - saved_at, steps_s)
        record.restart_s = now - decided_at
        record.over_at = wall
        record.say(wall, f"life {life} trains again, from step {step}")
        self._do(Remember(record.entry()))
        downtime_s = now - since
        self._note(
            "restarted",
            f"incident {record.number}: {self.job} trains again from step {step}, "
            f"{downtime_s:.1f} s after it stopped",
            incident=record.number,
            life=life,
            step=step,
            seconds=downtime_s,
        )

    def tick(self, now: float) -> None:
        """Let time pass."""
        self._count_pauses(now)
        if self.life.trains or self.case is not None:
            for finding in self.detector.findings(now):
                if finding.kind.is_hang:
                    self._hang(finding, now)
                else:
                    self._slow(finding, now)
        for probing in list(self._probing.values()):
            if not probing.awaited or now >= probing.until:
                self._end_probes(probing, now)
        if self.case is not None:
            self._proceed(self.case, now)

    @property
    def findings(self) -> list[Finding]:
        """Those that are not over, as far as they are known."""
        case = self.case
        return [
            case.finding if case is not None and case.finding.number == each.number else each
            for each in self.detector.open.values()
        ]

    @property
    def suspects(self) -> set[str]:
        """Nodes of ranks that are suspected to hang."""
        if self.case is None:
            return set()
        culprit = self.case.finding.culprit
        return {*culprit.nodes, *map(self._node_of, culprit.ranks)} - {""}

    @property
    def unseen(self) -> tuple[int, ...]:
        """Ranks of which no collective was ever seen in this life."""
        table = self.detector.table
        return tuple(
            rank
            for rank in sorted(self.life.members)
            if rank >= table.ranks or table.rank_node[rank] < 0
        )

    def quiet_because(self, now: float) -> str:
        """Why nothing is found now; "" if it is because all is well, or something is."""
        if not self.life.trains:
            return "not all ranks train"
        if self.unseen or self._heard_at is None:
            # At the start, or for good: then the nodes' reasons say how to switch it on.
            ranks = ", ".join(map(str, self.unseen[:8]))
            which = f" of ranks {ranks}{' …' if len(self.unseen) > 8 else ''}" if ranks else ""
            if now - self._began_at < _SIGHT_S:
                return f"waiting for the first collectives{which}"
            return (
                f"collectives{which} are not seen, so no hang is found: start the job with "
                "`ckptd run`, or make a Checkpointer before the first collective; a node may say "
                "more"
            )
        return self.detector.quiet_because

    def _count_pauses(self, now: float) -> None:
        for rank, text in self.pauses.overrun(now).items():
            self._note("pause_overrun", text, rank=rank)
        self.detector.pause(self.pauses.counting, now)

    # Hangs.

    def _hang(self, finding: Finding, now: float) -> None:
        case = self.case
        if case is not None and case.killed_at:
            return  # its end is that of the life
        if finding.over:
            if case is not None:
                if case.record is not None:
                    case.record.over_at = now + self._shared.wall_s
                    case.record.say(now + self._shared.wall_s, "it is over by itself")
                    self._do(Remember(case.record.entry()))
                self._note("finding_over", f"over: {finding.sentence}", finding=finding.number)
            self.case = None
            self._probing.pop(finding.number, None)
            return
        if case is None or case.finding.number != finding.number:
            self.case = _Case(finding, look_at=now)
            self._note("hang_suspected", finding.sentence, finding=finding.number)
            self._begin_probes(finding, now)
        elif case.record is None and not case.finding.measured:  # other ranks are suspected now
            case.finding, case.asked_at, case.look_at = finding, 0.0, now
            self._begin_probes(finding, now)

    def _proceed(self, case: _Case, now: float) -> None:
        if case.decided is not None and case.decided.tripped and not self.policy.tripped:
            case.decided = None  # somebody has armed the breaker again
        if case.decided is not None:
            due = bool(case.kills) and now >= case.repeat_at
            if due and case.kills < _KILLS:
                self._kill(case, now)
        elif case.record is not None:
            probing = self._probing.get(case.finding.number)
            awaited = case.awaited or (probing.awaited if probing is not None else ())
            if not awaited or now >= case.collect_until:
                self._decide(case, now)
        elif not case.asked_at:
            if now >= case.look_at:
                self._ask_witness(case, now)
        elif not case.awaited or now >= case.asked_at + _LOOK_PATIENCE_S:
            self._hear_witness(case, now)

    def _ask_witness(self, case: _Case, now: float) -> None:
        ranks: dict[str, list[int]] = {}
        for rank in case.finding.suspects:
            ranks.setdefault(self._node_of(rank), []).append(rank)
        case.asked_at, case.looks, case.awaited = now, {}, {node for node in ranks if node}
        limits = self._shared.settings.witness
        apart_s = limits.later_apart_s if case.tries else limits.first_apart_s
        case.tries += 1
        for place, node in enumerate(sorted(case.awaited)):
            order = LookAt(
                self.job,
                self.life.number,
                case.finding.number,
                tuple(sorted(ranks[node])),
                apart_s,
                counts=place < _COUNTING_NODES,
            )
            self._tell(node, order)

    def _hear_witness(self, case: _Case, now: float) -> None:
        limits = self._shared.settings.witness
        judgement = judge(case.finding, case.looks, now, limits)
        case.judgement = judgement
        if judgement.verdict is Verdict.HANGS:
            self._open_incident(case, now)
            return
        if judgement.waiting and not self.unseen:
            other = self.detector.reconsidered(case.finding, judgement.waiting)
            if other is not None:
                case.finding, case.asked_at, case.look_at = other, 0.0, now
                self._begin_probes(other, now)
                return
        if judgement.absent and len(case.finding.culprit.ranks) > 1:
            case.finding = self.detector.narrowed(case.finding, judgement.absent)
        text = f"{judgement.verdict.value}: {judgement.reason}"
        if text != case.said:
            case.said = text
            self._note("witness", text, finding=case.finding.number)
        wait_s = judgement.look_again_s or limits.look_again_s
        case.asked_at = 0.0
        case.look_at = limits.next_look(case.finding, case.tries, wait_s, now)

    def _open_incident(self, case: _Case, now: float) -> None:
        assert case.judgement is not None
        case.finding = finding = self.detector.confirmed(case.finding, case.judgement.culprits)
        record = case.record = self._record(finding, now)
        record.detection_s = finding.found_at - finding.since
        record.witness = case.judgement.reason
        record.doing = {str(r): doing.value for r, doing in sorted(case.judgement.doing.items())}
        culprits = finding.culprit.ranks or finding.suspects
        record.stacks = {
            str(rank): "\n".join(looks[1].stack.splitlines()[-_STACK_LINES_KEPT:])
            for rank, looks in sorted(case.looks.items())
            if rank in culprits and looks[1].stack
        }
        record.say(now + self._shared.wall_s, f"second witness: {case.judgement.reason}")
        self._add_counts(case, now)
        reason = f"{finding.kind.value}: {finding.sentence}; {case.judgement.reason}"
        case.awaited = self._collect(record, reason)
        case.collect_until = now + _COLLECT_PATIENCE_S
        if case.judgement.culprits:  # it is certain who it is
            self._probing.pop(finding.number, None)
        elif "matrix" in finding.evidence:
            record.say(now + self._shared.wall_s, f"probes: {finding.evidence['matrix']}")

    def _add_counts(self, case: _Case, now: float) -> None:
        if case.record is not None and case.counted is not None:
            case.counts = weigh(case.finding, case.counted)  # who is suspected may have changed
            case.record.evidence["nccl"] = case.counts
            case.record.say(now + self._shared.wall_s, case.counts)

    def _decide(self, case: _Case, now: float) -> None:
        record = case.record
        assert record is not None
        wall = now + self._shared.wall_s
        record.say(wall, f"evidence collected on {len(record.folders)} nodes")
        probing = self._probing.get(case.finding.number)
        if probing is not None:
            self._end_probes(probing, now)
        policy, actuator = self.policy, self._shared.settings.actuator
        if not self.life.number:
            decision = Decision(
                Do.OBSERVE, "the job has no Checkpointer: a restart would begin from nothing"
            )
        elif not self.life.elastic and not actuator.starts_anew:
            decision = Decision(
                Do.OBSERVE,
                "nothing would start its processes again: start it with `ckptd run`, or with "
                "torchrun and --max-restarts, or give the coordinator an --actuator",
            )
        else:
            spares = None if actuator.replaces_nodes else self._shared.spares_of(self.job)
            decision = policy.decide(case.finding, case.judgement, self.life.step, wall, spares)
        case.decided = decision
        record.decision, record.reason = decision.do.value, decision.reason
        record.say(wall, f"decision: {decision.do.value}: {decision.reason}")
        self._do(Remember(record.entry()))
        if decision.do is Do.OBSERVE:
            kind = "restarts_stopped" if decision.tripped else "observed"
            if decision.tripped:
                self._remember_restarts(policy)
            self._note(kind, decision.reason, incident=record.number)
            return
        self._remember_restarts(policy)
        record.diagnosis_s = now - case.finding.found_at
        case.killed_at = now
        case.plan = plan(actuator, self._fault(case, decision.isolate))
        self._recovering = case
        self._act(case, now)

    def _fault(self, case: _Case, isolate: tuple[str, ...]) -> Fault:
        assert case.record is not None
        record, life = case.record, self.life
        return Fault(
            record.number,
            self.job,
            life.number,
            life.step,
            record.kind,
            record.culprit,
            record.text,
            record.ranks,
            record.nodes,
            isolate,
            life.members,
            case.places,
            life.elastic,
            self._shared.spares_of(self.job),
        )

    def _act(self, case: _Case, now: float) -> None:
        """Do what was planned."""
        record, todo, wall = case.record, case.plan, now + self._shared.wall_s
        assert record is not None
        actuator = self._shared.settings.actuator
        how = "for their launchers to start them anew" if todo.kills else f"by {actuator.name}"
        self._note(
            "restart_ordered",
            f"incident {record.number}: all trainers of life {self.life.number} are killed, {how}: "
            f"{case.finding.sentence}",
            incident=record.number,
            life=self.life.number,
        )
        record.say(wall, f"all trainers of life {self.life.number} are killed, {how}")
        if todo.stops_launchers:
            self._mark(case)
        elif todo.programs and not todo.problem:
            self._isolating[record.number] = case
        if todo.programs:
            self._do(Run(record.number, todo.programs, actuator.timeout_s))
        if todo.kills:
            self._kill(case, now)
        if todo.problem:
            self._not_actuated(record, todo.problem, now)

    def _mark(self, case: _Case) -> None:
        """Isolate the nodes that are taken out.

        Not before: the ranks of one that is still in the job would wait for ever.
        """
        assert case.decided is not None
        reason = case.decided.reason
        for node in case.decided.isolate:
            self._do(Remember(Isolated(node, True, reason[:1000])))
            self._note("node_isolated", f"{node} is isolated: {reason}", node=node)

    def _not_actuated(self, record: IncidentRecord, why: str, now: float) -> None:
        """The scheduler has not done its part: launchers do what they can, on what there is."""
        record.say(now + self._shared.wall_s, why)
        text = f"incident {record.number}: {why}"
        self._note("actuator_failed", text, incident=record.number)
        case = self.case
        if case is None or case.record is not record or case.decided is None:
            return
        if self.life.elastic and not case.plan.kills:
            case.plan = Plan(kills=True)
            self._kill(case, now)

    def _kill(self, case: _Case, now: float) -> None:
        """Again after a while: orders may be lost."""
        case.kills += 1
        case.repeat_at = now + _REPEAT_KILL_S
        assert case.record is not None
        text = f"incident {case.record.number}: {case.finding.sentence}"
        isolated = case.decided.isolate if case.decided and case.plan.stops_launchers else ()
        for node in self._nodes():
            self._tell(node, KillWorkers(self.job, self.life.number, text, node in isolated))

    # Slowness.

    def _slow(self, finding: Finding, now: float) -> None:
        record = self.slow.get(finding.number)
        wall = now + self._shared.wall_s
        if finding.over:
            self._probing.pop(finding.number, None)
            if record is not None:
                del self.slow[finding.number]
                record.over_at = wall
                record.say(wall, "it is over")
                self._do(Remember(record.entry()))
            self._note("finding_over", f"over: {finding.sentence}", finding=finding.number)
            return
        if record is None:
            record = self.slow[finding.number] = self._record(finding, now)
            record.decision, record.reason = Do.OBSERVE.value, "the job makes progress"
            self._note("slow", finding.sentence, incident=record.number)
            self._do(Remember(record.entry()))
            self._collect(record, f"{finding.kind.value}: {finding.sentence}")
        else:
            record.describe(finding)
            record.say(wall, finding.sentence)
        self._begin_probes(finding, now)

    def _end_slow(self, now: float, why: str) -> None:
        wall = now + self._shared.wall_s
        for record in self.slow.values():
            record.over_at = wall
            record.say(wall, why)
        self.slow.clear()

    # Probes.

    def _begin_probes(self, finding: Finding, now: float) -> None:
        """Before a network is blamed, it is measured: at the first suspicion, while it lasts."""
        if finding.number in self._probing:
            return
        probing = Probing(finding, self._nodes(), self._shared.cells_of, now)
        if probing.awaited:
            self._probing[finding.number] = probing
            for node, order in probing.orders(self.job, self.life.number):
                self._tell(node, order)

    def _end_probes(self, probing: Probing, now: float) -> None:
        """The finding is as far narrowed as the answers allow."""
        narrowed = probing.narrowed()
        number = narrowed.number
        del self._probing[number]
        case, record = self.case, self.slow.get(number)
        if case is not None and case.finding.number == number:
            if not narrowed.measured:  # others may be suspected by now
                evidence = {**case.finding.evidence, "matrix": narrowed.evidence["matrix"]}
                narrowed = replace(case.finding, evidence=evidence)
            case.finding, record = narrowed, case.record
        if record is not None:
            record.describe(narrowed)
            if case is not None and case.record is record and case.counts:
                record.evidence["nccl"] = case.counts
            record.say(now + self._shared.wall_s, f"probes: {narrowed.evidence['matrix']}")
            self._do(Remember(record.entry()))
        if narrowed.measured:
            self._note("probed", narrowed.sentence, finding=number)

    # Small helpers.

    def _record(self, finding: Finding, now: float) -> IncidentRecord:
        wall = self._shared.wall_s
        record = IncidentRecord(
            number=self._shared.next_incident(),
            job=self.job,
            life=self.life.number,
            step=self.life.step,
            step_s=self.life.step_s,
            at=finding.since + wall,
        )
        record.describe(finding)
        record.say(finding.since + wall, "last progress of the culprit")
        record.say(finding.found_at + wall, f"found: {finding.sentence}")
        self._shared.keep(record)
        return record

    def _collect(self, record: IncidentRecord, reason: str) -> set[str]:
        nodes = self._nodes()
        for node in nodes:
            order = Collect(self.job, self.life.number, record.number, reason[:3000])
            self._tell(node, order)
        return set(nodes)

    def _nodes(self) -> list[str]:
        """Nodes with ranks of the life."""
        return sorted({*self.life.members.values(), *self.detector.table.nodes})

    def _node_of(self, rank: int) -> str:
        table = self.detector.table
        known = rank < table.ranks and table.rank_node[rank] >= 0
        return self.life.members.get(rank) or (table.node_name(rank) if known else "")

    @property
    def policy(self) -> Policy:
        """What decides about restarts: by the journal, so by those of coordinators before, too."""
        made = Policy(self._shared.settings.limits)
        past = self._shared.restarts_of(self.job)
        if past is not None:
            made.tripped = past.broken
            nodes = past.nodes or ((),) * len(past.at)
            steps = past.steps or (-1,) * len(past.at)
            rows = zip(past.at, past.faults, steps, nodes, strict=False)
            made.past.extend(Restart(*row) for row in rows)
        return made

    def _remember_restarts(self, policy: Policy) -> None:
        past = list(policy.past)
        body = Restarts(
            self.job,
            tuple(restart.at for restart in past),
            tuple(restart.fault[:500] for restart in past),
            policy.tripped[:1000],
            tuple(max(0, restart.step) for restart in past),
            tuple(restart.nodes for restart in past),
        )
        self._do(Remember(body))

    def _tell(self, node: str, message: CoordinatorMessage) -> None:
        self._do(Tell(node, message))

    def _note(self, kind: str, text: str, **fields: str | int | float) -> None:
        self._do(Note(kind, self.job, text, fields))

    def _do(self, action: Action) -> None:
        self._shared.do(action)
