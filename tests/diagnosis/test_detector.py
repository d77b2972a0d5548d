"""The detector over whole simulated jobs: quiet when it should be, and over when it is over."""

from collections.abc import Callable
from dataclasses import replace
from math import nan

import msgspec
import numpy as np
import pytest

from ckptd.collectives import Collective, GroupInfo
from ckptd.coordinator.diagnosis import Detector, Finding, Kind, Offset, Scope
from ckptd.coordinator.diagnosis.score import BOLD
from ckptd.coordinator.diagnosis.slowness import History
from ckptd.coordinator.diagnosis.windows import Window
from ckptd.sketches import Aggregator, Sketch, pack, unpack

from .simulation import Fault, Job, Shape, play

SMALL = Shape(data=8, pipeline=1, tensor=2, microbatches=1, hiccups=0.0)


def watch(
    job: Job, until_step: int, detector: Detector | None = None, poll_steps: float = 0.5
) -> list[Finding]:
    """All that is found in `until_step` steps."""
    watcher = detector or Detector()
    news: list[Finding] = []

    def observe(at: float, sketches: list[Sketch]) -> bool:
        for sketch in sketches:
            watcher.observe(sketch, at)
        news.extend(watcher.findings(at))
        return job.step >= until_step or any(finding.kind.is_hang for finding in news)

    play(job, poll_steps * job.shape.step_s, 1e9, observe)
    return news


@pytest.mark.parametrize("source", ["durations", "entries", "gpu", "gpu entries"])
def test_nothing_is_found_in_a_healthy_job(source: str) -> None:
    assert watch(Job(replace(SMALL, compile_s=60.0), 1, source=source), 300) == []


def untimed(sketch: Sketch) -> Sketch:
    samples = (each._replace(duration_s=nan) for each in unpack(sketch.samples))
    return msgspec.structs.replace(sketch, samples=pack(samples), waited_s=())


@pytest.mark.parametrize("told", [untimed, lambda _: None], ids=["recorder", "nothing"])
@pytest.mark.parametrize("source", ["durations", "gpu"])
def test_a_job_of_which_half_the_nodes_have_another_source_is_left_alone(
    source: str, told: Callable[[Sketch], Sketch | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while it is upgraded: some are timed, others only recorded, or not seen at all."""
    whole = Job.sketches

    def sketches(job: Job, at: float) -> list[Sketch]:
        made = [
            sketch if number % 2 else told(sketch) for number, sketch in enumerate(whole(job, at))
        ]
        return [sketch for sketch in made if sketch is not None]

    monkeypatch.setattr(Job, "sketches", sketches)
    job = Job(replace(SMALL, data=16, compile_s=60.0), 1, source=source)
    assert watch(job, 300) == []


def test_a_slow_rank_is_named_and_then_it_is_over() -> None:
    fault = Fault("slow", 120, 170, ranks=(5,), factor=1.5)
    news = watch(Job(SMALL, 2, fault), 300)
    assert [(f.kind, f.culprit.ranks, f.over) for f in news] == [
        (Kind.NON_COMMUNICATION_SLOW, (5,), False),
        (Kind.NON_COMMUNICATION_SLOW, (5,), True),
    ]
    assert news[0].number == news[1].number
    assert "rank 5 on node node-00000 arrives last" in news[0].sentence
    assert 0.5 <= news[0].confidence <= 1


def test_without_durations_a_slow_rank_is_not_told_from_slow_communication() -> None:
    fault = Fault("slow", 120, ranks=(5,), factor=3.0)
    (timed,) = watch(Job(SMALL, 2, fault), 170)
    (entered,) = watch(Job(SMALL, 2, fault, "entries"), 170)
    assert timed.confidence > BOLD > entered.confidence
    assert "or its communication, which is not timed, is slow" in entered.sentence
    assert "not timed" not in timed.sentence


def test_a_node_is_named_rather_than_all_its_ranks() -> None:
    fault = Fault("slow", 120, ranks=tuple(range(8, 16)), factor=1.5)
    (finding,) = watch(Job(replace(SMALL, data=16), 2, fault), 160)
    assert (finding.culprit.scope, finding.culprit.nodes) == (Scope.NODE, ("node-00001",))


def test_all_slow_together_is_named_so() -> None:
    news = watch(Job(SMALL, 3, Fault("all_slow", 120, 200, factor=1.6)), 350)
    assert [(f.culprit.scope, f.over) for f in news] == [(Scope.JOB, False), (Scope.JOB, True)]


def test_a_straggler_hides_behind_its_victims_to_those_who_look_at_one_group() -> None:
    """The ranks of its tensor group are as late in their own data-parallel groups as it is."""
    fault = Fault("slow", 120, ranks=(6,), factor=1.6)
    shape = replace(SMALL, tensor=4, data=8)
    news = watch(Job(shape, 4, fault), 170)
    assert {finding.culprit.ranks for finding in news} == {(6,)}


def test_a_source_that_only_tells_of_enqueueing_names_no_slow_rank() -> None:
    fault = Fault("slow", 120, ranks=(5,), factor=3.0)
    news = watch(Job(SMALL, 2, fault, "gpu entries"), 220)
    assert all(finding.culprit.scope is Scope.JOB for finding in news)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[Window]:
    """All that a detector reads off."""
    read: list[Window] = []
    add = History.add
    monkeypatch.setattr(History, "add", lambda self, w: (read.append(w), add(self, w))[1])
    return read


def test_who_sends_seven_times_in_a_window_is_compared_like_who_sends_eight(
    windows: list[Window],
) -> None:
    """A window ends after eight operations of data parallelism; a step has one, and one send."""
    shape = replace(SMALL, pipeline=2, tensor=1, layers=1, buckets=1, noise=0.05)
    assert watch(Job(shape, 7, source="gpu"), 900, poll_steps=0.9) == []
    assert len(windows) > 50
    assert max(float(np.nanmax(window.excess)) for window in windows) < 0.15


def test_a_node_that_tells_later_now_and_then_is_no_slower_for_it(windows: list[Window]) -> None:
    """Its operations are in the next window: so there are fewer in one, and more in another."""
    shape = replace(SMALL, data=2, pipeline=2, tensor=1, microbatches=2, layers=2, buckets=4)
    job = Job(replace(shape, ranks_per_node=1, noise=0.02), 3)
    watcher, held = Detector(), list[Sketch]()

    def observe(at: float, sketches: list[Sketch]) -> bool:
        held.append(sketches.pop())
        if int(at / shape.step_s) % 6 > 2:
            sketches += held
            held.clear()
        for sketch in sketches:
            watcher.observe(sketch, at)
        assert watcher.findings(at) == []
        return job.step >= 300

    play(job, 0.5 * shape.step_s, 1e9, observe)
    assert len(windows) > 30
    assert max(float(np.nanmax(window.excess)) for window in windows) < 0.06


def test_one_of_two_replicas_that_is_hardly_slower_is_named_however_few_ranks_there_are() -> None:
    """The slow one and its replica are half of the ranks by which the rest is judged."""
    shape = replace(SMALL, data=2, pipeline=2, tensor=1, microbatches=2, layers=1, buckets=1)
    fault = Fault("slow", 60, ranks=(0,), factor=1.12)
    news = watch(Job(replace(shape, noise=0.1), 0, fault), 160, poll_steps=0.9)
    assert [(f.kind, f.culprit.ranks) for f in news] == [(Kind.NON_COMMUNICATION_SLOW, (0,))]


@pytest.mark.parametrize("source", ["entries", "durations"])
def test_clocks_that_are_not_known_well_prove_nothing_but_durations_need_none(source: str) -> None:
    fault = Fault("slow", 120, ranks=(5,), factor=1.5)
    job = Job(SMALL, 2, fault, source)
    watcher, news = Detector(), list[Finding]()

    def observe(at: float, sketches: list[Sketch]) -> bool:
        for sketch in sketches:
            watcher.observe(sketch, at, Offset(error_s=0.2))
        news.extend(watcher.findings(at))
        return job.step >= 180

    play(job, 0.5, 1e9, observe)
    named = {finding.culprit.ranks for finding in news if finding.culprit.scope is not Scope.JOB}
    assert named == (set() if source == "entries" else {(5,)})


def test_offsets_of_clocks_are_taken_out() -> None:
    job, watcher = Job(SMALL, 2, None, "entries"), Detector()
    news: list[Finding] = []

    def observe(at: float, sketches: list[Sketch]) -> bool:
        for number, sketch in enumerate(sketches):
            ahead_s = 100.0 * number
            watcher.observe(
                msgspec.structs.replace(sketch, at=at + ahead_s), at, Offset(ahead_s, 1e-3)
            )
        news.extend(watcher.findings(at))
        return job.step >= 150

    play(job, 0.5, 1e9, observe)
    assert news == []
    assert not watcher.quiet_because


def test_a_hang_is_suspected_soon_and_since_when_it_began() -> None:
    job = Job(SMALL, 5, Fault("hang", 120, ranks=(3,)))
    (finding,) = watch(job, 200, poll_steps=0.25)
    assert finding.culprit.ranks == (3,)
    assert finding.found_at - job.fault_at <= 3 * job.shape.step_s + 2
    assert finding.since <= job.fault_at + 0.25 * job.shape.step_s
    assert finding.suspects == (3,)


def test_a_hang_in_the_first_step_takes_the_long_time_out() -> None:
    job = Job(SMALL, 5, Fault("hang", 2, ranks=(3,)))
    (finding,) = watch(job, 200, poll_steps=5)
    assert finding.found_at - job.fault_at >= Detector().thresholds.startup_hang_s


def test_a_declared_pause_is_quiet_and_what_came_before_is_not_forgotten() -> None:
    job, watcher = Job(SMALL, 6, Fault("evaluate", 120, 121, (0,), seconds=100.0)), Detector()
    news: list[Finding] = []

    def observe(at: float, sketches: list[Sketch]) -> bool:
        if job.fault_at <= at < job.fault_at + 101:
            watcher.pause({0: "evaluation"}, at)
            assert watcher.quiet_because == "paused: evaluation (rank 0)"
        elif watcher.quiet_because.startswith("paused"):
            watcher.pause({}, at)
            assert not watcher.quiet_because
        for sketch in sketches:
            watcher.observe(sketch, at)
        news.extend(watcher.findings(at))
        return job.step >= 200

    play(job, 0.5, 1e9, observe)
    assert news == []


def test_a_suspicion_ends_when_the_rank_goes_on() -> None:
    job = Job(SMALL, 6, Fault("evaluate", 120, 121, (0,), seconds=30.0))
    watcher, news = Detector(), list[Finding]()

    def observe(at: float, sketches: list[Sketch]) -> bool:
        for sketch in sketches:
            watcher.observe(sketch, at)
        news.extend(watcher.findings(at))
        return job.step >= 200

    play(job, 0.5, 1e9, observe)
    assert [(f.culprit.ranks, f.over) for f in news] == [((0,), False), ((0,), True)]
    assert watcher.open == {}


def test_a_re_plan_is_learnt_anew() -> None:
    watcher = Detector()
    watch(Job(SMALL, 7), 100, watcher)
    assert not watcher.quiet_because
    watcher.replan(1000.0)
    assert watcher.quiet_because
    assert watcher.hang_timeout_s == watcher.thresholds.startup_hang_s


def test_from_records_to_a_finding() -> None:
    """Through the agent's aggregator: four ranks on two nodes, one of them late at every step."""
    world = GroupInfo("world", (0, 1, 2, 3), "gloo")
    agents = [Aggregator("job", 1, f"node-{n}") for n in range(2)]
    for agent in agents:
        agent.learn(world)
    watcher, news = Detector(), list[Finding]()
    for step in range(1, 200):
        begin, late_s = float(step), 0.4 if step > 100 else 0.0
        for rank in range(4):
            wobble_s = 0.01 * ((step * 7 + rank * 5) % 11)
            entered_at = begin + 0.3 + wobble_s + (late_s if rank == 2 else 0.0)
            agents[rank // 2].add(
                Collective("world", step, "all_reduce", 1 << 20, rank, entered_at, 1e-6, True)
            )
        for agent in agents:
            watcher.observe(agent.sketch(begin + 0.9), begin + 0.9)
        news += watcher.findings(begin + 0.9)
    assert [finding.culprit.ranks for finding in news] == [(2,)]
