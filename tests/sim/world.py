"""All of it together: nodes, jobs, a coordinator, faults, and what must hold in the end."""

import itertools
import random
from collections import Counter

from ckptd.agent.lifecycle import Lifecycle
from ckptd.coordinator.decider import Coordinator

from .agents import Machine
from .control import CoordinatorProcess
from .faults import Faults
from .kernel import START_S, Clock, Story, Violation
from .people import People
from .plan import Plan
from .processes import SpareLauncher
from .runs import TrainingJob
from .truth import Truth

_COMMITS_AT_THE_END = 3
_REST_S = 13.0  # after that, no process of an old life is left


class World:
    """One simulated cluster. `run()` raises Violation if something that must hold does not."""

    def __init__(
        self,
        plan: Plan,
        coordinator_kind: type[Coordinator] = Coordinator,
        lifecycle_kind: type[Lifecycle] = Lifecycle,
        story_lines: int | None = 2000,
    ) -> None:
        """`story_lines`: how many of the last lines of the story are kept; None: all."""
        self.plan, self.lifecycle_kind = plan, lifecycle_kind
        self.clock = Clock(f"world {plan.seed}")
        self.fault_random = random.Random(f"faults {plan.seed}")
        self.story = Story(self.clock, story_lines)
        self.counts: Counter[str] = Counter()
        self.faults_on = True
        self.machines: dict[str, Machine] = {}
        self.parted: set[frozenset[str]] = set()
        """Pairs of nodes that do not reach each other."""
        self.jobs: dict[str, TrainingJob] = {}
        self.truth = Truth(self)
        self._names = itertools.count()
        self._coordinator_kind = coordinator_kind
        self._coordinators = itertools.count(1)
        self.coordinator = self.add_coordinator()
        self.others: list[CoordinatorProcess] = []
        """Coordinators beside the one in office, of which no more than agents say is known."""
        self.people = People(self)
        self._populate()
        Faults(self)

    def _populate(self) -> None:
        shared: list[Machine] = []
        for number, nodes in enumerate(self.plan.jobs):
            job = self.jobs[f"job{number}"] = TrainingJob(self, f"job{number}", nodes)
            job.pool += shared[:nodes] if self.plan.shared_nodes else []
            while len(job.pool) < nodes:
                job.pool.append(self.add_machine())
            shared = job.pool if len(job.pool) > len(shared) else shared
            for _ in range(self.plan.spares):
                SpareLauncher(self.add_machine(), job)
            self.clock.later((0.0, 0.5), job.launch)

    def add_machine(self, name: str = "", generation: int = 0) -> Machine:
        machine = Machine(self, name or f"n{next(self._names)}", generation)
        self.machines[machine.name] = machine
        return machine

    def name_coordinator(self) -> str:
        return f"c{next(self._coordinators)}"

    def add_coordinator(self, take_over: bool = False) -> CoordinatorProcess:
        """A coordinator at an address of its own."""
        address = f"tcp://host{next(self._names)}:1"
        return CoordinatorProcess(self, self._coordinator_kind, address, take_over)

    def coordinator_for(self, machine: Machine) -> CoordinatorProcess:
        """The one to which it is led."""
        led = machine.routed
        return led if led is not None and led.decider is not None else self.coordinator

    def lead(self, machine: Machine, to: CoordinatorProcess | None) -> None:
        """From now on to this coordinator (None: to the one in office)."""
        machine.routed = to
        agent = machine.agent
        office = self.coordinator_for(machine)
        if agent is not None and agent.connection.open and agent.connection.office is not office:
            agent.break_connection((0.0, 0.2))

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def heal(self, machine: Machine) -> None:
        """It reaches the coordinator again."""
        machine.cut = False
        if machine.alive and machine.agent is not None:
            machine.agent.connect((0.01, 0.3))

    # The run.

    def run(self) -> None:
        """Faults for a while, then peace, in which every job must train and be protected again."""
        end = self.clock.now + self.plan.faults_s
        while self.clock.now < end:
            self.clock.run_until(min(end, self.clock.now + 1.0))
            self.truth.check_bounds()
        self._make_peace()
        before = dict(self.truth.commits)
        self.clock.run_until(
            self.clock.now + self.plan.quiet_s, lambda: self._has_recovered(before)
        )
        self._must_have_recovered(before)
        self.clock.run_until(self.clock.now + _REST_S)
        self.truth.check_bounds()
        self.truth.check_rest()

    def _make_peace(self) -> None:
        self.story.tell("world", "no more faults")
        self.faults_on = False
        self.parted.clear()
        self.coordinator.wake()
        self.people.make_peace()
        for other in self.others:
            other.kill()
        for machine in list(self.machines.values()):
            self.heal(machine)
            self.lead(machine, None)
            if machine.agent is not None:
                machine.agent.connection.unmute()
                machine.agent.wake()
            for process in list(machine.processes):
                process.wake()

    def _has_recovered(self, before: dict[str, int]) -> bool:
        return all(self._is_well(job, before) for job in self.jobs.values())

    def _is_well(self, job: TrainingJob, before: dict[str, int]) -> bool:
        made = self.truth.commits.get(job.name, 0) - before.get(job.name, 0)
        training = job.run is not None and job.run.training and not job.run.over
        return training and made >= _COMMITS_AT_THE_END

    def _must_have_recovered(self, before: dict[str, int]) -> None:
        for job in self.jobs.values():
            if self._is_well(job, before):
                continue
            run = job.run
            if run is None or run.over or not run.training:
                why = run.waiting if run is not None else "its first start"
                raise Violation(
                    f"{job.name} does not train: it waits for {why}; {job.refusals[-1:]}"
                )
            made = self.truth.commits.get(job.name, 0) - before.get(job.name, 0)
            raise Violation(
                f"{job.name} trains, step {run.step}, and {made} snapshots are protected"
            )

    @property
    def simulated_s(self) -> float:
        return self.clock.now - START_S
