"""Runs of a job, from one start to the next, and the launcher that starts it again."""

import itertools
from typing import TYPE_CHECKING

from ckptd.ids import SnapshotId
from ckptd.wire import AskResume, Granted, Resumed

from .processes import SpareLauncher
from .trainers import Trainer

if TYPE_CHECKING:
    from .agents import Machine
    from .world import World

_RESUME_TIMEOUT_S = 30.0


class Run:
    """All ranks from one start to the next: attach, resume, load, train."""

    def __init__(self, job: "TrainingJob", number: int, machines: list["Machine"]) -> None:
        self.job, self.world, self.clock = job, job.world, job.world.clock
        self.round = f"r{number}"
        self.over = self.training = False
        self.waiting = "its ranks to attach"
        self.life = self.step = 0
        self.id: SnapshotId | None = None
        self.origin = ""
        """The course of training up to what it resumed from."""
        self.rejected: tuple[SnapshotId, ...] = ()
        self._here: set[int] = set()
        self._answers: dict[int, str] = {}
        self._asked = False
        self._layout_due = True
        self.world.story.tell(job.name, f"{self.round} starts on", *(m.name for m in machines))
        self.trainers: list[Trainer] = []
        for rank, machine in enumerate(machines):
            self.trainers.append(Trainer(machine, self, rank))
        self.clock.at(self.clock.now + _RESUME_TIMEOUT_S, self._timed_out)

    def _timed_out(self) -> None:
        if not self.training and not self.over:
            self.world.story.tell(self.job.name, f"{self.round} waited too long for", self.waiting)
            self.job.fail()

    def attached(self, trainer: Trainer) -> None:
        self._here.add(trainer.rank)
        if len(self._here) == self.job.ranks and not self._asked:
            self._asked = True
            self.trainers[0].ask(AskResume(()))

    def granted(self, message: Granted) -> None:
        if self.over:
            return
        self.world.truth.granted(self, message)
        self.life, self.id = message.life, message.id
        self._answers = {}
        for trainer in self.trainers:
            trainer.when_awake((0.001, 0.05), trainer.load, message.life, message.id)

    def impossible(self, kind: str, reason: str) -> None:
        if kind == "ResumeImpossible":
            self.world.truth.refused(self, reason)
        self.job.fail()

    def loaded(self, trainer: Trainer, failure: str) -> None:
        """When all have answered: train, or ask for another snapshot."""
        if self.training or self.over:
            return
        self._answers[trainer.rank] = failure
        if len(self._answers) < self.job.ranks:
            return
        failures = [text for text in self._answers.values() if text]
        if failures:
            assert self.id is not None
            self.world.count("snapshot could not be loaded")
            self.world.story.tell(self.job.name, f"{self.id} could not be loaded:", failures[0])
            self.rejected = (*self.rejected, self.id)
            self.trainers[0].ask(AskResume(self.rejected))
            return
        self.training, self.waiting = True, ""
        self.step = self.id.step if self.id is not None else 0
        self.origin = self.world.truth.training_begins(self)
        self.trainers[0].say(Resumed(self.life, self.step))
        self._train()

    def _train(self) -> None:
        """In lockstep, as collectives make it; a rank that is stopped stops all."""
        if self.over:
            return
        ready = all(t.alive and not t.asleep and not t.copying for t in self.trainers)
        if ready and (self._layout_due or all(t.opened for t in self.trainers)):
            self.step += 1
            path = self.world.truth.step(self)
            if self._layout_due:
                self._layout_due = False
                for trainer in self.trainers:
                    trainer.open_layout()
            for trainer in self.trainers:
                trainer.finished(self.step, path)
        self.clock.later(self.world.plan.step_s, self._train)

    def end(self, zombies: bool) -> None:
        """The launcher kills what is left; with `zombies`, it does not reach some of them."""
        self.over = True
        for trainer in self.trainers:
            if zombies and self.clock.random.random() < 0.5:
                self.world.count("process of an old life lives on")
                if not trainer.asleep and self.clock.random.random() < 0.7:
                    trainer.stop()
                self.clock.later((0.5, 8.0), trainer.wake)
                self.clock.later((8.0, 12.0), trainer.die)
            else:
                self.clock.later((0.0, 0.2), trainer.die)


class TrainingJob:
    """A job and its launcher."""

    def __init__(self, world: "World", name: str, nodes: int) -> None:
        self.world, self.name, self.nodes = world, name, nodes
        self.ranks = nodes * world.plan.ranks_per_node
        self.pool: list[Machine] = []
        """Nodes that it may run on."""
        self.run: Run | None = None
        self.refusals: list[str] = []
        self._rounds = itertools.count(1)
        self._launching = False

    def launch(self) -> None:
        """As soon as there are nodes enough."""
        self._launching = False
        self.pool = list({id(m): m for m in self.pool if m.alive}.values())
        left_out = self.world.people.left_out
        able = [machine for machine in self.pool if machine.name not in left_out]
        if len(able) < self.nodes:
            if self._is_stopped():
                self._take_spares()
            self._launch_in((0.2, 0.5))
            return
        chosen = able[: self.nodes]
        if not self.world.plan.stable_ranks:
            chosen = self.world.clock.random.sample(able, self.nodes)
        places = [machine for machine in chosen for _ in range(self.world.plan.ranks_per_node)]
        self.run = Run(self, next(self._rounds), places)

    def _launch_in(self, range_s: tuple[float, float]) -> None:
        if not self._launching:
            self._launching = True
            self.world.clock.later(range_s, self.launch)

    def _is_stopped(self) -> bool:
        """Whether no spare is called for it: it was stopped on purpose, for all that is known.

        Who starts it sees that, and brings the nodes; the first of a new run may have been lost
        before anybody heard of it.
        """
        decider = self.world.coordinator.decider
        job = decider.jobs.get(self.name) if decider is not None else None
        return job is not None and 0 < job.world_size == len(job.left)

    def _take_spares(self) -> None:
        machines = [m for m in self.world.machines.values() if m.alive]
        for process in [p for m in machines for p in m.processes]:
            if isinstance(process, SpareLauncher) and process.job is self:
                process.join()

    def restart(self) -> None:
        """The ranks say goodbye, and another run is started."""
        if self.run is not None and not self.run.over:
            self.run.over = True
            for trainer in self.run.trainers:
                trainer.when_awake((0.0, 0.1), trainer.leave)
            self._launch_in((1.0, 2.0))

    def fail(self, zombies: bool = False) -> None:
        """The run is over, and another is started."""
        if self.run is not None and not self.run.over:
            self.run.end(zombies)
            self._launch_in((0.3, 1.5))
