"""No waiting, no disagreement: what 64 ranks begin to capture is committed.

The real deciders at training's pace, with messages that are half a step on their way; and beside
them ranks that decide alone, which shows that it is the tickets that make it so.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest

from ckptd.coordinator.pacer import Pacer

from .world import JOB, Clock, Link, Plan, Range, Run, Trainer, World

SEED = 1
DRAIN_S = 3.0
"""Enough for whatever is under way when training ends."""

SLOW_NETWORK = Plan(
    nodes=8,
    ranks_per_node=8,
    spares=0,
    control_s=(0.025, 0.075),
    local_s=(0.0001, 0.0005),
    step_s=(0.09, 0.11),
    capture_s=(0.025, 0.035),
    torn=0.0,
    check_s=(0.001, 0.005),
    release_s=(0.001, 0.005),
    encode_s=(0.05, 0.1),
    encode_again_s=(0.005, 0.01),
)
"""Steps of 100 ms, and messages that take 50 ms."""
FAST_NETWORK = replace(SLOW_NETWORK, step_s=(0.18, 0.22), control_s=(0.0025, 0.0075))
"""Steps of 200 ms, and messages that take 5 ms."""
MANY_NODES = replace(
    SLOW_NETWORK, nodes=64, ranks_per_node=1, control_s=(0.025, 0.035), control_tail_s=0.02
)
"""Each rank on a node of its own; the same 50 ms on average, and now and then three times that."""
SKEW_S: Range = (0.0, 0.003)
"""How much later than the collective of a step a rank ends it."""


class Marathon(Run):
    """Each rank computes at its own pace, and meets the others in the collective of each step."""

    steps = 240
    gated_s = 0.0
    """How long ranks waited for their own captures."""

    def late_s(self, rank: int) -> float:
        """How much longer than usual the next step takes on this rank."""
        return 0.0

    def _train(self) -> None:
        if all(trainer.opened for trainer in self.trainers):
            self._compute([self.clock.now] * len(self.trainers))
        else:
            self.clock.soon(*self.plan.step_s, self._train)

    def _compute(self, begun: list[float]) -> None:
        if self.step == self.steps:
            self.over = True
            return
        draw = self.clock.random.uniform
        took = (draw(*self.plan.step_s) + self.late_s(rank) for rank in range(len(begun)))
        self.clock.at(max(at + s for at, s in zip(begun, took, strict=True)), self._meet)

    def _meet(self) -> None:
        self.step += 1
        ended = []
        for trainer in self.trainers:
            gate_s = max(0.0, trainer.copied_at - self.clock.now)
            self.gated_s += gate_s
            ended.append(self.clock.now + gate_s + self.clock.random.uniform(*SKEW_S))
            self.clock.at(ended[-1], partial(trainer.step, self.step))
        self._compute(ended)


class Long(Marathon):
    """As long as the ranks that decide alone have. The first tickets teach what "late" is."""

    steps = 599


class Sprint(Marathon):
    steps = 100


class Stalling(Marathon):
    """Now and then rank 9 takes a second longer, and all others wait for it."""

    def late_s(self, rank: int) -> float:
        return 1.0 if rank == 9 and self.clock.random.random() < 0.03 else 0.0


class Failing(Marathon):
    """One capture in five fails on rank 17."""

    def tears(self, trainer: Trainer) -> bool:
        return trainer.rank == 17 and self.clock.random.random() < 0.2


@dataclass(frozen=True)
class Figures:
    """What came of a run."""

    seed: int
    steps: int
    begun: int
    """Snapshots that at least one rank began to capture."""
    failed: int
    """Those of them of which a capture failed."""
    committed: int

    @property
    def share(self) -> float:
        """Of what could be committed."""
        return self.committed / (self.begun - self.failed)

    @property
    def steps_per_commit(self) -> float:
        return self.steps / max(1, self.committed)

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.begun} begun, {self.failed} failed, {self.committed} "
            f"committed: {self.share:.1%}, a commit every {self.steps_per_commit:.1f} steps"
        )


def train(plan: Plan, kind: type[Marathon] = Marathon, seed: int = SEED) -> Figures:
    """Run to the end, and check that nobody waited and nobody disagreed."""
    world = World(seed, plan, kind, memory_limit_bytes=1 << 30)
    while world.run is None or not world.run.over:
        world.clock.run_until(world.clock.now + 1)
    world.clock.run_until(world.clock.now + DRAIN_S)
    assert isinstance(world.run, Marathon)
    assert world.run.gated_s == 0, "a rank waited for its capture"
    committed = {id for _, id in world.commits}
    for id in committed:
        assert len(world.captured[id]) == plan.ranks, f"{id} was not captured by all"
    assert world.coordinator is not None
    job = world.coordinator.jobs[JOB]
    # Tickets for steps after the last one stay open.
    left = {id for id in job.snapshots if id.step <= world.run.step}
    assert left == {max(committed)}, "what was not committed was not given up"
    for machine in world.machines.values():
        assert machine.agent is not None
        held = {slot.id for slot in machine.agent.slots.values()} - {None}
        assert held & world.captured.keys() == left, f"{machine.name} still holds others"
    failed = sum(event.kind == "snapshot_torn" for event in world.coordinator.events)
    figures = Figures(seed, world.run.step, len(world.captured), failed, len(committed))
    print(figures)
    return figures


class TestTickets:
    """The coordinator decides for all."""

    @pytest.mark.parametrize(
        ("plan", "kind", "steps_per_commit"),
        [
            pytest.param(SLOW_NETWORK, Marathon, 7.0, id="slow network"),
            pytest.param(MANY_NODES, Long, 10.0, id="many nodes, long tail"),
            pytest.param(FAST_NETWORK, Sprint, 1.2, id="fast network"),
            pytest.param(SLOW_NETWORK, Stalling, 7.0, id="a rank that stalls"),
            pytest.param(SLOW_NETWORK, Failing, 8.0, id="a rank whose captures fail"),
        ],
    )
    def test_what_is_begun_is_committed(
        self, plan: Plan, kind: type[Marathon], steps_per_commit: float
    ) -> None:
        figures = train(plan, kind)
        assert figures.share >= 0.95, figures
        assert figures.steps_per_commit <= steps_per_commit, figures
        assert (figures.failed > 0) == (kind is Failing), figures

    def test_a_third_slot_hides_the_round_trips(self) -> None:
        """The next ticket is on its way while the snapshot before it is being protected."""
        two, three = train(SLOW_NETWORK), train(replace(SLOW_NETWORK, slots=3))
        assert three.share >= 0.95, three
        assert three.steps_per_commit < 0.6 * two.steps_per_commit, (two, three)

    def test_a_seed_tells_the_same_story_again(self) -> None:
        few = replace(MANY_NODES, nodes=8)
        assert train(few, Sprint) == train(few, Sprint)


class Alone:
    """The baseline: a rank captures whenever it has a free slot.

    The coordinator drops a step that some rank has passed, and has all protect, and then commits,
    what all ranks have captured; a commit frees what is older. Same messages, same times.
    """

    STEPS = 599

    def __init__(self, seed: int, plan: Plan) -> None:
        self.clock, self.plan = Clock(seed), plan
        self.free = [plan.slots] * plan.ranks
        self.held: list[set[int]] = [set() for _ in range(plan.ranks)]
        self.up = [self._link() for _ in range(plan.ranks)]
        self.down = [self._link() for _ in range(plan.ranks)]
        self.said: dict[tuple[str, int], set[int]] = {}
        """(word, step) to the ranks that have said it."""
        self.passed: set[int] = set()
        self.step = 0
        self.captures = 0
        self.begun: set[int] = set()
        self.committed: list[int] = []
        self._train()
        self.clock.run_until(self.clock.now + 2 * self.STEPS * plan.step_s[1] + DRAIN_S)
        newest = {max(self.committed)}
        assert all(held == newest for held in self.held), "a slot was lost by the model itself"

    def _link(self) -> Link:
        return Link(self.clock, self.plan.control_s, self.plan.control_tail_s)

    def _train(self) -> None:
        self.step += 1
        step = self.step
        for rank in range(self.plan.ranks):
            self.clock.soon(*SKEW_S, partial(self._decide, rank, step))
        if step < self.STEPS:
            draws = (self.clock.random.uniform(*self.plan.step_s) for _ in self.free)
            self.clock.at(self.clock.now + max(draws), self._train)

    def _decide(self, rank: int, step: int) -> None:
        if not self.free[rank]:
            self._say(rank, "passed", step)
            return
        self.free[rank] -= 1
        self.held[rank].add(step)
        self.captures += 1
        self.begun.add(step)
        self.clock.soon(*self.plan.capture_s, partial(self._say, rank, "sealed", step))

    def _say(self, rank: int, word: str, step: int) -> None:
        self.up[rank].carry(partial(self._hear, rank, word, step))

    def _hear(self, rank: int, word: str, step: int) -> None:
        if word == "passed":
            if step not in self.passed:
                self.passed.add(step)
                self._order(lambda other: self._drop(other, step))
            return
        said = self.said.setdefault((word, step), set())
        said.add(rank)
        if len(said) < self.plan.ranks:
            return
        if word == "sealed":
            self._order(lambda other: self._protect(other, step))
        else:
            self.committed.append(step)
            self._order(lambda other: self._free_before(other, step))

    def _order(self, order: Callable[[int], None]) -> None:
        for rank, link in enumerate(self.down):
            link.carry(partial(order, rank))

    def _protect(self, rank: int, step: int) -> None:
        self.clock.soon(*self.plan.encode_s, partial(self._say, rank, "encoded", step))

    def _free_before(self, rank: int, step: int) -> None:
        for old in [old for old in self.held[rank] if old < step]:
            self._drop(rank, old)

    def _drop(self, rank: int, step: int) -> None:
        """What is being captured is captured to the end before a word of it arrives here."""
        if step in self.held[rank]:
            self.held[rank].remove(step)
            self.free[rank] += 1


class TestAlone:
    """Each rank decides for itself: the baseline, and proof that the tests above could fail.

    It is not so everywhere. Where no message is ever late (`SLOW_NETWORK`, whose delays end at
    75 ms), such ranks may stay in phase by luck and commit all that they capture; steps of 90 ms
    instead of 100 are enough to end it. Tickets need no luck.
    """

    def test_ranks_that_decide_alone_starve_commits(self) -> None:
        """The network of "many nodes, long tail"."""
        alone = Alone(SEED, MANY_NODES)
        share = len(alone.committed) / len(alone.begun)
        figures = (
            f"seed {SEED}, alone: {alone.captures / alone.plan.ranks:.0f} captures per rank, "
            f"{len(alone.committed)} commits in {alone.STEPS} steps: {share:.1%}"
        )
        print(figures)
        assert alone.captures > 100 * alone.plan.ranks, figures
        assert share < 0.1, figures


class TestPacer:
    """How far ahead a ticket is issued."""

    def steady(self, pacer: Pacer, steps: int, step_s: float = 0.1) -> float:
        """Training begins at 0 and reports each step; returns the time of the last."""
        pacer.start(0, 0.0)
        for step in range(1, steps + 1):
            pacer.observe(step, step * step_s)
        return steps * step_s

    def test_a_stall_does_not_bring_the_next_tickets_too_near(self) -> None:
        pacer = Pacer(every=1)
        now = self.steady(pacer, 20)
        pacer.margin_s = 0.15
        assert pacer.next_step(now, 0) == 22
        pacer.observe(21, now + 1.1)
        assert pacer.next_step(now + 1.1, 0) == 23

    def test_after_reports_that_were_held_up_tickets_are_not_far_ahead(self) -> None:
        """The first that comes by itself seems to be the end of many steps."""
        pacer = Pacer(every=1)
        pacer.margin_s = pacer.MARGIN_MAX_S
        pacer.start(236, 10.0)
        for step in range(237, 291):
            pacer.observe(step, 10.0)
        for step in range(291, 300):
            now = 10.0 + 0.1 * (step - 290)
            pacer.observe(step, now)
            assert pacer.next_step(now, 0) <= step + 41

    def test_the_margin_rests_when_the_last_rank_was_only_just_in_time(self) -> None:
        pacer = Pacer(every=1)
        margin_s = pacer.margin_s
        for ticket, last in itertools.product((10, 20, 30), (3, 0)):
            pacer.arrived(ticket, ticket - last)
        for ticket in (10, 20, 30):
            pacer.met(ticket)
        assert pacer.margin_s == margin_s

    def test_the_margin_shrinks_fast_until_a_ticket_is_late(self) -> None:
        margins = []
        for missed in (False, True):
            pacer = Pacer(every=1)
            if missed:
                pacer.missed()
            pacer.margin_s = 0.1
            for ticket in range(10, 20):
                pacer.arrived(ticket, ticket - 1)
                pacer.met(ticket)
            margins.append(pacer.margin_s)
        assert margins[0] < 0.04 < 0.08 < margins[1]

    def test_the_margin_shrinks_faster_the_earlier_all_ranks_have_the_ticket(self) -> None:
        margins = []
        for early in (1, 30):
            pacer = Pacer(every=1)
            pacer.missed()
            pacer.margin_s = 4.0
            for ticket in range(100, 500, 40):
                pacer.arrived(ticket, ticket - early)
                pacer.met(ticket)
            margins.append(pacer.margin_s)
        assert margins[1] < 0.25 < 3.0 < margins[0]
