"""From sketches to actions: given what agents say, what is done, and what is not."""

from dataclasses import dataclass, field, replace
from math import inf, nan

import pytest

from ckptd.collectives import Collective, GroupInfo
from ckptd.coordinator.diagnosis import Thresholds
from ckptd.coordinator.diagnosis.actuators import KUBERNETES, SLURM, Actuator
from ckptd.coordinator.diagnosis.finding import Culprit, Finding, Kind, Scope
from ckptd.coordinator.diagnosis.shared import (
    ISOLATE,
    OBSERVE,
    RESTART,
    DiagnosisSettings,
    Life,
    Note,
    Remember,
    Run,
    Shared,
    Tell,
)
from ckptd.coordinator.diagnosis.supervisors import Supervisors
from ckptd.coordinator.diagnosis.witness import WitnessLimits
from ckptd.journal import Incident, Isolated, Journal, Restarts
from ckptd.sketches import Aggregator
from ckptd.watching import Place
from ckptd.wire import (
    AskClock,
    Clock,
    Collect,
    Collected,
    Counted,
    KillWorkers,
    Look,
    LookAt,
    Looked,
    Pause,
    Probe,
    Probed,
    Sketched,
    TellAll,
    Transfer,
)

JOB = "job"
STEP_S = 0.25
WALL_S = 1000.0
PAUSED_S = 30.0
STOPPED = (Look(0.0, "T"), Look(1.1, "T"))
BUSY = (Look(0.0, "R", 0.0, 0, "a"), Look(1.1, "R", 1.0, 0, "a"))
WAITS = (Look(0.0, "S", 0.0, 0, "all_reduce"), Look(1.1, "S", 0.0, 0, "all_reduce"))
STUCK = (Look(0.0, "S", 0.0, 0, "train\nlocked"), Look(1.1, "S", 0.0, 0, "train\nlocked"))


@dataclass
class Job:
    """Ranks 0 and 1, each on a node of its own, and the coordinator's diagnosis of them."""

    policy: str = RESTART
    now: float = 100.0
    life: int = 1
    step: int = 0
    does: tuple[Look, Look] = STOPPED
    """What rank 1 is seen to do."""
    paused_at: float | None = None
    """Since when rank 1 says that it evaluates."""
    spares: int = 0
    actuator: str = "torchrun"
    places: dict[int, Place] = field(
        default_factory=lambda: {rank: Place("77", f"s{rank}") for rank in (0, 1)}
    )
    runs: list[Run] = field(default_factory=list)
    journal: Journal = field(default_factory=Journal)
    notes: list[Note] = field(default_factory=list)
    orders: list[Tell] = field(default_factory=list)

    def __post_init__(self) -> None:
        actuator = Actuator(self.actuator)
        settings = DiagnosisSettings(self.policy, Thresholds(window_min_s=0.5), actuator=actuator)
        shared = Shared(
            settings,
            lambda: 1,
            self.journal.restarts,
            lambda job: self.spares,
            lambda node: f"{node}:1",
        )
        shared.wall_s = WALL_S
        self.all = Supervisors(shared)
        self.elastic = True
        self._begin()

    def _begin(self) -> None:
        self.nodes = {f"n{rank}": Aggregator(JOB, self.life, f"n{rank}") for rank in (0, 1)}
        for each in self.nodes.values():
            each.learn(GroupInfo("0", (0, 1), "gloo"))
        self.seq = 0
        self.whole: set[str] = set()
        if self.life:
            self.tick()

    def run(self, steps: int, hung: bool = False, entered: int = 1) -> None:
        """`hung`: the first `entered` ranks enter one more operation, and then nothing happens."""
        for number in range(steps):
            self.now += STEP_S
            if not hung or number == 0:
                self.seq += 1
                for rank, node in enumerate(self.nodes.values()):
                    if not hung or rank < entered:
                        node.add(self._record(rank, ended=not hung))
                self.step += not hung
            for name, node in self.nodes.items():
                sketch = node.sketch(self.now + WALL_S, name in self.whole)
                self.whole.discard(name)
                pauses = {}
                if name == "n1" and self.paused_at is not None:
                    pauses = {1: Pause("evaluation", self.now - self.paused_at, PAUSED_S)}
                self.all.heard(name, Sketched(sketch, pauses), self.now)
            self.tick()

    def _record(self, rank: int, ended: bool) -> Collective:
        at = self.now + WALL_S
        return Collective("0", self.seq, "all_reduce", 100, rank, at, 1e-6, ended)

    def tick(self, attached: bool = True) -> None:
        members = {0: "n0", 1: "n1"}
        life = Life(JOB, self.life, members, self.step, STEP_S, attached, self.elastic)
        self.all.tick([life] if self.life else [], self.now)
        for action in self.all.shared.take_actions():
            if isinstance(action, Note):
                self.notes.append(action)
            elif isinstance(action, Remember):
                self.journal.put(action.body)
            elif isinstance(action, Run):
                self.runs.append(action)
            else:
                self.orders.append(action)
                self._obey(action)

    def _obey(self, action: Tell) -> None:
        match action.message:
            case TellAll():
                self.whole.add(action.node)
            case LookAt() as order:
                looks = {rank: self.does for rank in order.ranks if action.node == f"n{rank}"}
                answer = Looked(JOB, order.life, order.finding, looks)
                self.all.heard(action.node, answer, self.now)
            case Collect() as order:
                path = f"/folder/{action.node}"  # and places, of which one is not its own
                folder = Collected(JOB, order.life, order.incident, path, "", self.places)
                self.all.heard(action.node, folder, self.now)
            case Probe() as order:
                took = tuple(Transfer(node, 1, 1 << 20, 0.01) for node in order.cells)
                answer = Probed(JOB, order.life, order.finding, took)
                self.all.heard(action.node, answer, self.now)

    def resume(self, from_step: int, saved_at: float) -> None:
        self.life += 1
        self.step = from_step
        self._begin()
        self.all.resumed(JOB, self.life, from_step, saved_at, self.now)
        self.tick()

    def ordered(self, kind: type) -> list[Tell]:
        return [order for order in self.orders if isinstance(order.message, kind)]

    def kinds(self) -> list[str]:
        return [note.kind for note in self.notes]

    def kept(self, kind: type) -> list:
        return [entry.body for entry in self.journal.entries if isinstance(entry.body, kind)]


@pytest.fixture
def job() -> Job:
    made = Job()
    made.run(60)
    assert made.notes == []
    return made


def test_a_hang_is_looked_at_collected_and_then_all_ranks_are_killed(job: Job) -> None:
    job.run(40, hung=True)
    kinds = [type(o.message) for o in job.orders if not isinstance(o.message, AskClock)]
    first = [kind for n, kind in enumerate(kinds) if kind not in kinds[:n]]
    assert first == [LookAt, Collect, KillWorkers]
    assert {o.node for o in job.ordered(LookAt)} == {"n1"}
    assert {o.node for o in job.ordered(Collect)} == {"n0", "n1"}
    assert {o.node for o in job.ordered(KillWorkers)} == {"n0", "n1"}
    assert {o.message.life for o in job.ordered(KillWorkers)} == {1}
    assert job.kinds() == ["hang_suspected", "restart_ordered"]


def test_the_order_to_kill_is_said_again_until_the_life_is_another(job: Job) -> None:
    job.run(30, hung=True)
    before = len(job.ordered(KillWorkers))
    assert before >= 4
    job.resume(50, job.now - 20)
    job.run(60)
    assert len(job.ordered(KillWorkers)) == before


def test_an_incident_has_the_four_parts_of_downtime(job: Job) -> None:
    saved_at, hung_at = job.now - 3.0, job.now
    job.run(40, hung=True)
    (kept,) = job.kept(Incident)
    assert kept.restart_s is None
    job.resume(50, saved_at)
    (kept,) = job.kept(Incident)
    parts = (kept.lost_work_s, kept.detection_s, kept.diagnosis_s, kept.restart_s)
    assert all(part is not None and part >= 0 for part in parts)
    assert kept.lost_work_s == pytest.approx(3.0)
    assert kept.at == pytest.approx(hung_at + WALL_S)
    assert sum(parts[1:]) == pytest.approx(job.now - hung_at)
    (record,) = job.all.shared.records.values()
    assert record.culprit == "rank 1 on node n1"
    assert record.folders == {"n0": "/folder/n0", "n1": "/folder/n1"}
    assert "restarted" in job.kinds()


def test_who_makes_progress_is_looked_at_again_and_again_and_left_alone(job: Job) -> None:
    job.does = BUSY
    job.run(280, hung=True)  # an evaluation of more than a minute
    assert len(job.ordered(LookAt)) > 2
    assert job.ordered(Collect) == job.ordered(KillWorkers) == job.kept(Incident) == []
    assert job.kinds() == ["hang_suspected", "witness"]
    assert job.all.suspects_of(JOB) == {"n1"}
    for node in job.nodes.values():
        for rank in (0, 1):
            node.add(job._record(rank, ended=True))
    job.run(20)
    assert job.kinds()[2:] == ["finding_over"]
    assert job.all.suspects_of(JOB) == job.all.suspects_of("another") == set()


def test_the_first_looks_are_close_and_later_ones_far_enough_apart(job: Job) -> None:
    job.does, limits = STUCK, WitnessLimits()
    job.run(100, hung=True)
    first, *later = [order.message.apart_s for order in job.ordered(LookAt)]
    assert first == limits.first_apart_s < limits.stuck_s
    assert set(later) == {limits.later_apart_s}
    assert limits.later_apart_s > limits.stuck_s


def test_a_stuck_rank_is_shown_with_its_stack(job: Job) -> None:
    job.does = STUCK
    job.run(30, hung=True)
    assert not job.all.shared.records, "it may wait for storage"
    job.run(70, hung=True)
    (record,) = job.all.shared.records.values()
    assert record.stacks == {"1": "train\nlocked"}


def test_without_a_witness_nothing_is_done(job: Job) -> None:
    job._obey = lambda action: None  # type: ignore[method-assign] # no agent answers
    job.run(200, hung=True)
    assert job.ordered(KillWorkers) == []


def test_who_only_observes_kills_nobody() -> None:
    job = Job(OBSERVE)
    job.run(60)
    job.run(40, hung=True)
    assert job.ordered(KillWorkers) == []
    assert job.kinds() == ["hang_suspected", "observed"]
    assert "it would be" in job.notes[-1].text
    assert len(job.kept(Incident)) == 1


def test_a_job_without_a_checkpointer_is_not_restarted() -> None:
    job = Job(life=0)
    job.run(60)
    job.run(40, hung=True)
    assert job.ordered(KillWorkers) == []
    assert "begin from nothing" in job.notes[-1].text


def test_what_nothing_would_start_again_is_not_killed(job: Job) -> None:
    job.elastic = False
    job.run(40, hung=True)
    assert job.ordered(KillWorkers) == []
    assert "ckptd run" in job.notes[-1].text
    assert len(job.kept(Incident)) == 1


def test_the_same_fault_at_the_same_step_stops_restarts_for_later_coordinators_too(
    job: Job,
) -> None:
    for _ in range(3):
        job.run(40, hung=True)
        job.resume(60, job.now)
        job.run(60)
        job.step = 60
    assert "restarts_stopped" in job.kinds()
    assert len(job.ordered(KillWorkers)) > 0
    (kept,) = job.kept(Restarts)
    assert "the same fault" in kept.broken
    later = Job(journal=job.journal)
    later.run(60)
    later.run(40, hung=True)
    assert later.ordered(KillWorkers) == []
    assert later.all.status(later.now)["jobs"][JOB]["restarts_stopped"] == kept.broken
    later.journal.put(Restarts(JOB, (), ()))
    later.tick()
    assert later.ordered(KillWorkers), "what hangs when the breaker is armed again is restarted"
    assert later.all.status(later.now)["jobs"][JOB]["restarts_stopped"] == ""


def test_what_a_coordinator_before_has_counted_is_known_whenever_it_is_heard(job: Job) -> None:
    assert job.all.status(job.now)["jobs"][JOB]["restarts_stopped"] == ""
    job.journal.put(Restarts(JOB, (WALL_S,), ("x",), "too many"))
    assert job.all.status(job.now)["jobs"][JOB]["restarts_stopped"] == "too many"
    job.run(40, hung=True)
    assert job.ordered(KillWorkers) == []


def test_a_node_at_fault_twice_is_isolated_if_so_told() -> None:
    job = Job(ISOLATE, spares=1)
    job.run(60)
    for life in (1, 2):
        job.run(40, hung=True)
        assert len(job.kept(Isolated)) == life - 1
        job.resume(job.step, job.now)
        job.run(60)
    assert job.kept(Isolated)[0].node == "n1"
    ended = {(o.message.life, o.node) for o in job.ordered(KillWorkers) if o.message.launchers}
    assert ended == {(2, "n1")}
    assert {o.node for o in job.ordered(KillWorkers) if o.message.life == 2} == {"n0", "n1"}


def test_no_node_is_taken_out_whose_place_nobody_can_take() -> None:
    job = Job(ISOLATE)
    job.run(60)
    for _ in range(2):
        job.run(40, hung=True)
        job.resume(job.step, job.now)
        job.run(60)
    assert job.kept(Isolated) == []
    assert job.kinds().count("restarted") == 2
    assert "no spare waits" in job.all.shared.records[max(job.all.shared.records)].reason


def test_what_has_no_launcher_is_left_to_the_scheduler() -> None:
    job = Job(actuator=SLURM)
    job.elastic = False
    job.run(60)
    job.run(40, hung=True)
    assert job.ordered(KillWorkers) == []
    (run,) = job.runs
    assert [str(program) for program in run.programs] == ["scontrol requeue 77"]
    job.all.ran(run.incident, "scontrol requeue 77", "", job.now)
    job.resume(50, job.now)
    job.run(1)
    assert job.kinds() == ["hang_suspected", "restart_ordered", "actuated", "restarted"]


def at_fault_twice(job: Job) -> None:
    """Its node is to be taken out then."""
    job.run(60)
    job.run(40, hung=True)
    job.resume(job.step, job.now)
    job.run(60)
    job.run(40, hung=True)


def test_where_the_scheduler_fails_the_launchers_do_what_they_can() -> None:
    job = Job(ISOLATE, actuator=SLURM)
    at_fault_twice(job)
    before = len(job.ordered(KillWorkers))
    (run,) = job.runs
    first, second = map(str, run.programs)
    assert first.startswith("scontrol update NodeName=s1 State=DRAIN")
    assert second == "scontrol requeue 77"
    job.all.ran(run.incident, first, "Slurm is not there", job.now)
    job.tick()
    assert len(job.ordered(KillWorkers)) == before + 2
    assert job.kinds()[-1] == "actuator_failed"
    assert job.kept(Isolated) == [], "its ranks would wait for ever"
    assert "Slurm is not there" in job.all.shared.records[run.incident].timeline[-1][1]


def test_a_node_is_marked_once_all_programs_have_taken_it_out() -> None:
    """A coordinator that ends meanwhile leaves none that its successor knows nothing of."""
    job = Job(ISOLATE, actuator=SLURM)
    at_fault_twice(job)
    (run,) = job.runs
    first, second = map(str, run.programs)
    job.all.ran(run.incident, first, "", job.now)
    job.tick()
    assert job.kept(Isolated) == []
    job.resume(job.step, job.now)  # faster than the program that has brought it about
    job.all.ran(run.incident, second, "", job.now)
    job.tick()
    assert [(one.node, one.isolated) for one in job.kept(Isolated)] == [("n1", True)]
    assert job.kinds()[-1] == "node_isolated"


def test_what_a_person_has_isolated_stays_so_when_the_scheduler_fails() -> None:
    job = Job(ISOLATE, actuator=SLURM)
    job.journal.put(Isolated("n1", True, "by hand"))
    at_fault_twice(job)
    (run,) = job.runs
    job.all.ran(run.incident, str(run.programs[0]), "Slurm is not there", job.now)
    job.tick()
    assert job.kept(Isolated) == [Isolated("n1", True, "by hand")]


def test_a_node_that_cannot_be_taken_out_is_neither_cordoned_nor_marked() -> None:
    job = Job(ISOLATE, actuator=KUBERNETES, places={1: Place(kubernetes_node="k1")})
    at_fault_twice(job)
    assert job.runs == job.kept(Isolated) == []
    assert job.kinds()[-2:] == ["restart_ordered", "actuator_failed"]
    killed = {(o.message.life, o.message.launchers) for o in job.ordered(KillWorkers)}
    assert killed == {(1, False), (2, False)}


def test_a_transfer_that_is_stuck_is_probed_when_it_is_suspected(job: Job) -> None:
    job.does = WAITS
    job.run(100, hung=True, entered=2)
    kinds = [type(order.message) for order in job.orders]
    assert kinds.index(Probe) < kinds.index(Collect) < kinds.index(KillWorkers)
    probes = {order.node: order.message.cells for order in job.ordered(Probe)}
    assert probes == {"n0": {"n1": "n1:1"}, "n1": {"n0": "n0:1"}}
    (record,) = job.all.shared.records.values()
    assert "too few pairs" in str(record.evidence["matrix"])
    assert job.all.matrix.delays() == {("n0", "n1"): 10.24, ("n1", "n0"): 10.24}


def test_without_answers_to_probes_it_is_decided_all_the_same(job: Job) -> None:
    obey, job.does = job._obey, WAITS
    job._obey = lambda action: None if isinstance(action.message, Probe) else obey(action)  # type: ignore[method-assign] # no agent measures
    job.run(100, hung=True, entered=2)
    assert job.kinds() == ["hang_suspected", "witness", "restart_ordered"]


@pytest.mark.parametrize("kind", [Kind.COMMUNICATION_HANG, Kind.COMMUNICATION_SLOW])
def test_nothing_is_kept_of_probes_for_what_is_over(job: Job, kind: Kind) -> None:
    """Before they are all answered: it would stay until the life ends."""
    job._obey = lambda action: None  # type: ignore[method-assign] # no agent measures
    here = job.all.jobs[JOB]
    culprit = Culprit(Scope.NODES, (0, 1), ("n0", "n1"))
    finding = Finding(7, kind, culprit, job.now, job.now, 0.5, "not well")
    begun = {Kind.COMMUNICATION_HANG: here._hang, Kind.COMMUNICATION_SLOW: here._slow}[kind]
    begun(finding, job.now)
    assert set(here._probing) == {7}
    begun(replace(finding, over=True), job.now)
    assert here._probing == {}


def test_who_has_paused_is_left_alone_until_that_lasts_too_long(job: Job) -> None:
    job.paused_at = job.now
    job.run(100, hung=True)
    assert job.ordered(LookAt) == []
    assert job.all.jobs[JOB].quiet_because(job.now) == "paused: evaluation (rank 1)"
    (shown,) = job.all.status(job.now)["jobs"][JOB]["pauses"]
    assert (shown["rank"], shown["over"]) == (1, False)
    job.run(40, hung=True)
    assert job.kinds() == ["pause_overrun", "hang_suspected", "restart_ordered"]
    assert job.all.status(job.now)["jobs"][JOB]["pauses"][0]["over"]


def test_a_pause_is_known_to_the_next_coordinator_and_ends_with_its_block(job: Job) -> None:
    job.paused_at = job.now
    later = Job(paused_at=job.now)
    later.run(60)
    assert later.all.jobs[JOB].quiet_because(later.now) == "paused: evaluation (rank 1)"
    job.run(40)
    job.paused_at = None
    job.run(10)
    assert not job.all.jobs[JOB].quiet_because(job.now)
    job.run(40, hung=True)
    assert job.kinds() == ["hang_suspected", "restart_ordered"]


def test_a_pause_ends_with_the_life_and_is_nobody_elses_to_declare(job: Job) -> None:
    job.paused_at = job.now
    job.run(1)
    foreign = job.nodes["n0"].sketch(job.now + WALL_S)
    job.all.heard("n0", Sketched(foreign, {1: Pause("lies", 0.0, 1e9)}), job.now)
    assert [one["what"] for one in job.all.jobs[JOB].pauses.as_json(job.now)] == ["evaluation"]
    endless = {0: Pause("lies", -inf, 1.0), 7: Pause("nobody", 0.0, 1.0)}
    for told in (endless, {0: Pause("lies", 0.0, inf)}, {0: Pause("lies", nan, nan)}):
        job.all.heard("n0", Sketched(foreign, told), job.now)
        job.all.status(job.now)
        assert [one["rank"] for one in job.all.jobs[JOB].pauses.as_json(job.now)] == [1]
    job.paused_at = None
    job.resume(50, job.now)
    assert job.all.jobs[JOB].pauses.as_json(job.now) == []


def test_a_sketch_whose_layout_is_not_known_is_asked_for_as_a_whole() -> None:
    job = Job()
    job.nodes["n0"].add(job._record(0, ended=True))
    job.nodes["n0"].sketch(0.0)  # lost on the way
    job.run(1)
    assert [(o.node, o.message) for o in job.ordered(TellAll)] == [("n0", TellAll(JOB, 1))]


def test_sketches_of_another_life_or_under_anothers_name_count_for_nothing(job: Job) -> None:
    old = job.nodes["n1"]
    job.resume(50, job.now)
    job.all.heard("n1", Sketched(old.sketch(job.now, whole=True)), job.now)
    job.all.heard("n0", Sketched(job.nodes["n1"].sketch(job.now, whole=True)), job.now)
    assert job.all.jobs[JOB].detector.table.nodes == []


def test_ranks_that_are_not_seen_are_said() -> None:
    job = Job()
    job.tick()
    assert "waiting for the first" in job.all.jobs[JOB].quiet_because(job.now)
    job.now += 60
    job.tick()
    assert "of ranks 0, 1 are not seen" in job.all.jobs[JOB].quiet_because(job.now)


def test_clocks_are_asked_and_the_fastest_answer_counts() -> None:
    job = Job()
    job.run(1)
    (order,) = [o for o in job.ordered(AskClock) if o.node == "n0"]
    asked = order.message.asked
    for way_s in (0.4, 0.002, 0.3):
        answer = Clock(asked, asked + WALL_S + 7.0 + way_s / 2)
        job.all.heard("n0", answer, asked + way_s)
    offset = job.all.shared.clocks.offset("n0", asked)
    assert offset.ahead_s == pytest.approx(7.0)
    assert offset.error_s < 0.002
    assert job.all.shared.clocks.offset("stranger", 0.0).error_s > 10


def counted(job: Job, *behind: int, silent: tuple[int, ...] = ()) -> None:
    (asked, *_) = job.ordered(LookAt)
    assert asked.message.counts
    said = Counted(JOB, 1, asked.message.finding, behind, silent, "rank 1 launched 41 of 42")
    job.all.heard(asked.node, said, job.now)
    job.tick()


def test_counts_of_nccl_are_evidence_and_decide_nothing() -> None:
    job = Job(does=BUSY)
    job.run(60)
    job.run(40, hung=True)
    counted(job, 1)
    job.run(20, hung=True, entered=0)
    assert job.ordered(KillWorkers) == []  # as the second witness says
    (note,) = [note for note in job.notes if note.kind == "nccl_counts"]
    assert note.text == "NCCL's own counts agree: rank 1 launched 41 of 42"
    (shown,) = job.all.status(job.now)["jobs"][JOB]["findings"]
    assert shown["witness"].endswith(f"; {note.text}")


@pytest.mark.parametrize(
    ("behind", "silent", "said"),
    [
        ((1,), (), "agree: rank 1 launched"),
        ((), (1,), "agree: rank 1 launched"),
        ((0,), (), "disagree, by them 0 lag: rank 1"),
        ((), (), "disagree, by them nobody lags: rank 1"),
    ],
)
def test_counts_of_nccl_are_in_the_incident_also_where_they_disagree(
    job: Job, behind: tuple[int, ...], silent: tuple[int, ...], said: str
) -> None:
    job.run(40, hung=True)
    counted(job, *behind, silent=silent)
    (record,) = job.all.shared.records.values()
    assert said in str(record.evidence["nccl"])
    assert any(said in text for _, text in record.timeline)
    assert job.ordered(KillWorkers)


def test_counts_for_what_is_over_are_dropped(job: Job) -> None:
    job.run(40, hung=True)
    job.all.heard("n1", Counted(JOB, 1, 999, (0,), (), "?"), job.now)
    job.all.heard("n1", Counted(JOB, 7, 1, (0,), (), "?"), job.now)
    job.all.heard("n1", Counted("other", 1, 1, (0,), (), "?"), job.now)
    job.tick()
    assert "nccl_counts" not in job.kinds()
