"""Many seeds, in several processes, and what came of them."""

import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from ckptd.agent.lifecycle import Lifecycle
from ckptd.coordinator.decider import Coordinator

from .plan import Plan, draw
from .world import World

_LINES_SHOWN = 80
_CHUNK = 4
_NO_FAULTS = (
    "coordinator gave way",
    "message arrived twice",
    "segment damaged after its agent looked",
    "snapshot could not be loaded",
    "spare called",
)
"""Counted beside the faults: what came of them, and what every network does."""


@dataclass
class Outcome:
    """What came of one seed."""

    seed: int
    plan: Plan
    simulated_s: float
    events: int
    faults: Counter[str]
    failure: str = ""
    trace: str = ""
    story: list[str] = field(default_factory=list)

    def report(self) -> str:
        """All that a person needs to look into a failure."""
        return "\n".join(
            [
                *self.story,
                self.trace,
                f"seed {self.seed}, after {self.simulated_s:.3f} s: {self.failure}",
                f"to see all of it: python -m tests.sim --seed {self.seed} --story",
            ]
        )


def live_through(
    seed: int,
    coordinator_kind: type[Coordinator] = Coordinator,
    lifecycle_kind: type[Lifecycle] = Lifecycle,
    lines: int | None = _LINES_SHOWN,
    plan: Plan | None = None,
) -> Outcome:
    """One seed, to its end or to its first violation, with the last `lines` of its story."""
    plan = plan or draw(seed)
    world = World(plan, coordinator_kind, lifecycle_kind, lines)
    failure = trace = ""
    try:
        world.run()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exc(limit=-4))
    outcome = Outcome(
        seed, plan, world.simulated_s, world.clock.events, world.counts, failure, trace
    )
    if failure or lines is None:
        outcome.story = world.story.lines()
    return outcome


def campaign(seeds: Iterable[int], jobs: int = 1) -> Iterator[Outcome]:
    """The outcomes of the seeds, in their order."""
    if jobs == 1:
        yield from map(live_through, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(live_through, seeds, chunksize=_CHUNK)


def must_hold(seeds: Iterable[int]) -> None:
    """Fail with the whole story of every seed in which something is violated."""
    failed = [outcome.report() for outcome in map(live_through, seeds) if outcome.failure]
    assert not failed, "\n\n".join(failed)


@dataclass
class Summary:
    """Of a campaign."""

    seeds: int = 0
    simulated_s: float = 0.0
    events: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.simulated_s += outcome.simulated_s
        self.events += outcome.events
        self.faults += outcome.faults
        if outcome.failure:
            self.failures.append((outcome.seed, outcome.failure))

    def __str__(self) -> str:
        found = sorted(self.faults.items(), key=lambda item: (item[0] in _NO_FAULTS, item[0]))
        faults = "\n".join(f"  {count:8} {name}" for name, count in found)
        injected = sum(count for name, count in found if name not in _NO_FAULTS)
        failures = "\n".join(f"  seed {seed}: {text[:150]}" for seed, text in self.failures)
        return (
            f"{self.seeds} seeds, {self.simulated_s / 3600:.1f} simulated hours, "
            f"{self.events} events, {injected} faults, and what came of them:\n{faults}\n"
            f"{len(self.failures)} violations\n{failures}"
        ).rstrip()
