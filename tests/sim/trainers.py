"""One rank of a run: what a trainer does with its client of the agent."""

from typing import TYPE_CHECKING

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
    Revoked,
    Sealed,
    Ticket,
    Waiting,
)

from .disk import SIZE_BYTES, Damaged, File, Seal, State
from .kernel import Violation
from .processes import Local

if TYPE_CHECKING:
    from .agents import Machine
    from .runs import Run


class Trainer(Local):
    """One rank of one run, with its client of the agent."""

    def __init__(self, machine: "Machine", run: "Run", rank: int) -> None:
        self.run, self.rank = run, rank
        self.life = 0
        self.memory: State | None = None
        """What has been loaded."""
        self.opened = False
        self._again = False
        """Whether it loads for the second time what was damaged the first."""
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
                job.name,
                self.run.round,
                self.rank,
                job.ranks,
                plan.every,
                plan.slots,
                self.life,
                plan.keep,
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

    def load(self, life: int, id: SnapshotId | None, again: bool = False) -> None:
        """Bring the segments here that this rank needs: its own and, perhaps, others'."""
        self.life, self._again = life, again
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
        name = path.removeprefix("/")
        file, seal = self.machine.disk.files.get(name), self.machine.disk.seals.get(name)
        if file is not None and seal is not None and file.data != seal.digests:
            # As the Checkpointer does: once more, then it says so.
            self.world.count("segment damaged after its agent looked")
            if self._again:
                self.run.loaded(self, f"{name} is damaged")
            else:
                self.load(self.life, id, again=True)
            return
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
        if self.machine.disk.files.get(name) is not file:
            self.captures -= 1
            self.say(CaptureFailed(id, "dropped", "its agent has given up the slot"))
            return
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
