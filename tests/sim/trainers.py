"""Trainers, spare launchers, and the launcher of a job, which starts it again when it fails."""

import itertools
from typing import TYPE_CHECKING, Any

from ckptd.agent import events as ev
from ckptd.ids import SnapshotId
from ckptd.wire import (
    AskResume,
    Attach,
    Attached,
    CaptureFailed,
    Detach,
    Granted,
    LayoutOpened,
    OpenLayout,
    Progress,
    Rejected,
    Restore,
    Restored,
    Resumed,
    Revoked,
    Sealed,
    Ticket,
    WaitForWork,
    Waiting,
    Work,
)

from .disk import SIZE_BYTES, Damaged, File, Seal, State
from .kernel import Violation

if TYPE_CHECKING:
    from .agents import Agent, Machine
    from .world import World

_RECONNECT_S = (0.05, 0.5)
_RESUME_TIMEOUT_S = 30.0


class Local:
    """A process on a node: it talks to its agent, and comes back when that was away."""

    def __init__(self, machine: "Machine", name: str) -> None:
        self.machine, self.world, self.name = machine, machine.world, name
        self.clock, self.plan = machine.world.clock, machine.world.plan
        self.alive, self.asleep = True, False
        self.conn = 0
        self._agent: Agent | None = None
        self._up_at = self._down_at = 0.0
        self._stalled: list[tuple[Any, tuple[Any, ...]]] = []
        machine.processes.append(self)
        self._connect()

    def _connect(self) -> None:
        if not self.alive or self._agent is not None:
            return
        if self.asleep:
            self._stalled.append((self._connect, ()))
            return
        if self.machine.agent is None:
            self.clock.later(_RECONNECT_S, self._connect)
            return
        self._agent = self.machine.agent
        self.conn = self._agent.accept(self)
        self.connected()

    def agent_gone(self) -> None:
        self._agent = None
        self.disconnected()
        self.clock.later(_RECONNECT_S, self._connect)

    def say(self, message: object) -> None:
        """In order; what was said arrives though this process dies then."""
        if self._agent is not None:
            self._carry_up(ev.FromLocal(self.conn, message))  # type: ignore[arg-type]

    def _carry_up(self, event: ev.Event) -> None:
        agent = self._agent
        assert agent is not None
        self._up_at = max(
            self._up_at, self.clock.now + self.clock.random.uniform(*self.plan.local_s)
        )
        self.clock.at(self._up_at, agent.feed, event)

    def told(self, message: object) -> None:
        delay_s = self.clock.random.uniform(*self.plan.local_s)
        self._down_at = max(self._down_at, self.clock.now + delay_s)
        self.clock.at(self._down_at, self._hear, self._agent, message)

    def _hear(self, agent: object, message: object) -> None:
        if not self.alive or agent is not self._agent:
            return
        if self.asleep:
            self._stalled.append((self._hear, (agent, message)))
        else:
            self.hear(message)

    def stop(self) -> None:
        """As SIGSTOP does."""
        self.world.story.tell(self.name, "is stopped")
        self.asleep = True

    def wake(self) -> None:
        if not self.alive or not self.asleep:
            return
        self.world.story.tell(self.name, "wakes")
        self.asleep = False
        stalled, self._stalled = self._stalled, []
        for what, args in stalled:
            what(*args)

    def when_awake(self, range_s: tuple[float, float], what: Any, *args: Any) -> None:
        """Something that this process does later, if it lives and runs then."""

        def do() -> None:
            if self.asleep:
                self._stalled.append((do, ()))
            elif self.alive:
                what(*args)

        self.clock.later(range_s, do)

    def die(self) -> None:
        """Its agent sees the socket close, and the process end, at the same time or later."""
        if not self.alive:
            return
        agent, conn = self._agent, self.conn
        self.vanish()
        self.world.story.tell(self.name, "dies")
        if agent is None:
            return
        self._agent = agent
        at_once = self.clock.random.random() < 0.5
        self._carry_up(ev.LocalGone(conn, "it ended", at_once))
        self._agent = None
        agent.locals.pop(conn, None)
        if not at_once:
            self.clock.at(
                self._up_at + self.clock.random.uniform(0.0, 1.0), agent.feed, ev.ProcessEnded(conn)
            )

    def vanish(self) -> None:
        """With its node."""
        self.alive = False
        self._agent = None
        if self in self.machine.processes:
            self.machine.processes.remove(self)

    def connected(self) -> None:
        raise NotImplementedError

    def disconnected(self) -> None:
        """The agent has hung up."""

    def hear(self, message: object) -> None:
        raise NotImplementedError


class SpareLauncher(Local):
    """`ckptd run --spare`: waits to be called."""

    def __init__(self, machine: "Machine", job: "TrainingJob") -> None:
        self.job = job
        super().__init__(machine, f"{machine.name}:spare")

    def connected(self) -> None:
        self.say(WaitForWork(self.job.name))

    def hear(self, message: object) -> None:
        if isinstance(message, Work):
            self.world.count("spare called")
            self.join()

    def join(self) -> None:
        """Its node is the job's from now on."""
        self.job.pool.append(self.machine)
        self.die()


class Trainer(Local):
    """One rank of one run, with its client of the agent."""

    def __init__(self, machine: "Machine", run: "Run", rank: int) -> None:
        self.run, self.rank = run, rank
        self.life = 0
        self.memory: State | None = None
        """What has been loaded."""
        self.opened = False
        self._asked: object = None
        """The request that waits for an answer, asked again on a new connection."""
        self._layout = False
        self._tickets: dict[int, Ticket] = {}
        self.copying = 0
        """Captures whose copy is not complete: the gate waits for them."""
        self.captures = 0
        """Those that are not sealed."""
        super().__init__(machine, f"{run.job.name}.{run.round}.{rank}")

    # Talking to the agent.

    def connected(self) -> None:
        job = self.run.job
        plan = self.plan
        self.say(
            Attach(
                job.name, self.run.round, self.rank, job.ranks, plan.every, plan.slots, self.life
            )
        )
        if self._layout:
            self.say(OpenLayout(self.life, SIZE_BYTES))
        if self._asked is not None:
            self.say(self._asked)

    def disconnected(self) -> None:
        self._tickets.clear()

    def ask(self, message: object) -> None:
        self._asked = message
        self.say(message)

    def hear(self, message: object) -> None:
        match message:
            case Ticket(id):
                if id.life != self.life:
                    raise Violation(f"{self.name}, of life {self.life}, got a ticket for {id}")
                self._tickets[id.step] = message
            case Revoked(id):
                if self._tickets.pop(id.step, None) is not None:
                    self.say(CaptureFailed(id, "dropped", "the ticket was revoked"))
            case Attached():
                self.run.attached(self)
            case Waiting(reason):
                self.run.waiting = reason
            case Granted() if isinstance(self._asked, AskResume):
                if message.id is None or message.id not in self._asked.rejected:
                    self._asked = None
                    self.run.granted(message)
            case Restored(id, rank, path):
                if self._asked == Restore(self.life, id, rank):
                    self._asked = None
                    self._load(id, rank, path)
            case LayoutOpened():
                self.opened = True
            case Rejected(kind, reason):
                self._rejected(kind, reason)
            case _:
                pass

    def _rejected(self, kind: str, reason: str) -> None:
        if self.run.over:
            return
        if kind == "MemoryTooSmall":
            raise Violation(f"{self.name}: {reason}")
        asked, self._asked = self._asked, None
        if asked is None:
            return
        if isinstance(asked, AskResume):
            self.run.impossible(kind, reason)
        else:
            self.run.loaded(self, reason)

    # Loading.

    def load(self, life: int, id: SnapshotId | None) -> None:
        """Bring the segments here that this rank needs: its own and, perhaps, others'."""
        self.life = life
        if id is None:
            self.memory = State(self.run.job.name, self.rank, 0, "")
            self.run.loaded(self, "")
            return
        others = [r for r in range(self.run.job.ranks) if r != self.rank]
        self._to_load = [self.rank, *(others if self.plan.shared_state else [])]
        self.ask(Restore(life, id, self.rank))

    def _load(self, id: SnapshotId, rank: int, path: str) -> None:
        if self.run.over:
            return  # it wakes up in a time that is not its own; nobody waits for it
        file = self.machine.disk.files.get(path.removeprefix("/"))
        self.world.truth.loaded(self, id, rank, file)
        if rank == self.rank:
            self.memory = file.data  # type: ignore[union-attr, assignment]
        self._to_load.remove(rank)
        if self._to_load:
            self.ask(Restore(self.life, id, self._to_load[0]))
        else:
            self.run.loaded(self, "")

    # Training.

    def open_layout(self) -> None:
        self._layout = True
        if self._agent is None:
            self.opened = True  # the client says it when the agent is back
        else:
            self.say(OpenLayout(self.life, SIZE_BYTES))

    def finished(self, step: int, path: str) -> None:
        """A training step is over; the state is what `path` says."""
        self.memory = State(self.run.job.name, self.rank, step, path)
        for late in [s for s in self._tickets if s < step]:
            missed = self._tickets.pop(late)
            self.say(CaptureFailed(missed.id, "skipped", f"it was at step {step} already"))
        ticket = self._tickets.pop(step, None)
        self.say(Progress(step))
        if ticket is None:
            return
        name = ticket.path.removeprefix("/")
        file = self.machine.disk.files.get(name)
        if file is None:  # its agent was restarted a moment ago
            self.say(CaptureFailed(ticket.id, "dropped", "there is no such file"))
            return
        self._capture(ticket.id, name, file)

    def _capture(self, id: SnapshotId, name: str, file: File) -> None:
        """The file is mapped: what is written to it goes there even if it was deleted."""
        self.world.truth.capture_begins(self, id, file)
        file.writer = self
        file.data, state = Damaged("half a copy"), self.memory
        self.copying += 1
        self.captures += 1
        low, high = self.plan.capture_s
        slow = 10 if self.clock.random.random() < self.plan.tail else 1
        self.when_awake((low, high * slow), self._copied, id, name, file, state)

    def _copied(self, id: SnapshotId, name: str, file: File, state: State) -> None:
        self.copying -= 1
        if self.clock.random.random() < self.plan.torn:
            self.world.count("capture torn")
            file.writer = None
            self.captures -= 1
            self.say(CaptureFailed(id, "torn", "something wrote to it"))
            return
        file.data = state
        self.when_awake((0.0001, 0.01), self._seal, id, name, file, state)

    def _seal(self, id: SnapshotId, name: str, file: File, state: State) -> None:
        """The sidecar, then the header; a process may be stopped, or die, in between."""
        self.machine.disk.seals[name] = Seal(id, self.rank, self.run.job.ranks, state)

        def publish() -> None:
            file.header, file.writer = (id, self.rank), None
            self.captures -= 1
            self.say(Sealed(id))

        self.when_awake((0.0, 0.001), publish)

    def leave(self) -> None:
        """`close()`: it waits for the capture that is under way, says goodbye, and ends."""
        if self.captures:
            self.when_awake((0.05, 0.1), self.leave)
            return
        self.say(Detach(False))
        self.when_awake((0.01, 0.05), self.die)


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
        self._by_hand = False
        """Somebody starts it; for a job that was stopped on purpose, no spare is called."""

    def launch(self) -> None:
        """As soon as there are nodes enough."""
        self._launching = False
        self.pool = list({id(m): m for m in self.pool if m.alive}.values())
        if len(self.pool) < self.nodes:
            if self._by_hand:
                self._take_spares()
            self._launch_in((0.2, 0.5))
            return
        self._by_hand = False
        chosen = self.pool[: self.nodes]
        if not self.world.plan.stable_ranks:
            chosen = self.world.clock.random.sample(self.pool, self.nodes)
        places = [machine for machine in chosen for _ in range(self.world.plan.ranks_per_node)]
        self.run = Run(self, next(self._rounds), places)

    def _launch_in(self, range_s: tuple[float, float]) -> None:
        if not self._launching:
            self._launching = True
            self.world.clock.later(range_s, self.launch)

    def _take_spares(self) -> None:
        machines = [m for m in self.world.machines.values() if m.alive]
        for process in [p for m in machines for p in m.processes]:
            if isinstance(process, SpareLauncher) and process.job is self:
                process.join()

    def restart(self) -> None:
        """The ranks say goodbye, and another run is started."""
        if self.run is not None and not self.run.over:
            self.run.over = self._by_hand = True
            for trainer in self.run.trainers:
                trainer.when_awake((0.0, 0.1), trainer.leave)
            self._launch_in((1.0, 2.0))

    def fail(self, zombies: bool = False) -> None:
        """The run is over, and another is started."""
        if self.run is not None and not self.run.over:
            self.run.end(zombies)
            self._launch_in((0.3, 1.5))
