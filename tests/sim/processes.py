"""Processes that talk to the agent of their node, and the launcher of a spare node."""

from typing import TYPE_CHECKING, Any

from ckptd.agent import events as ev
from ckptd.wire import WaitForWork, Work

if TYPE_CHECKING:
    from .agents import Agent, Machine
    from .runs import TrainingJob

_RECONNECT_S = (0.05, 0.5)


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
