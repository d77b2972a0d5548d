"""Connections between agents and the coordinator, and the coordinator's process.

What ZeroMQ can do to messages: within one connection they keep their order and are delayed; when it
breaks, what is under way is lost in both directions; what is sent without a connection is lost. A
partition that ends before anybody gives up only delays. Messages over different connections
overtake one another.
"""

from typing import TYPE_CHECKING, Any

from ckptd.agent import events as ev
from ckptd.coordinator.decider import Coordinator, Send
from ckptd.wire import AgentMessage, Beat, CoordinatorMessage, Decoder, Grant, encode

if TYPE_CHECKING:
    from .agents import Agent
    from .world import World

_ENCODED_EVERY = 16  # messages; to see that what is sent can be sent

_reports: Decoder[AgentMessage] = Decoder(AgentMessage)
_orders: Decoder[CoordinatorMessage] = Decoder(CoordinatorMessage)


class Connection:
    """One connection of an agent to a coordinator."""

    def __init__(self, world: "World", agent: "Agent") -> None:
        self._world, self._agent = world, agent
        self.peer = agent.lifecycle.identity.incarnation.encode()
        self.open = True
        self.muted = False
        """What the agent says is held up; what it is told is not."""
        self._held: list[AgentMessage] = []
        self._up_at = self._down_at = 0.0
        self._count = 0

    def up(self, message: AgentMessage) -> None:
        if not self.open:
            return
        if self.muted:
            self._held.append(message)
            return
        self._up_at = self._carry(self._up_at, self._arrive_up, self._coded(message, _reports))

    def down(self, message: CoordinatorMessage) -> None:
        if self.open:
            self._down_at = self._carry(
                self._down_at, self._arrive_down, self._coded(message, _orders)
            )

    def unmute(self) -> None:
        self.muted = False
        held, self._held = self._held, []
        for message in held:
            self.up(message)

    def _carry(self, last: float, arrive: Any, message: Any) -> float:
        plan, clock = self._world.plan, self._world.clock
        delay_s = clock.random.uniform(*plan.control_s)
        if plan.control_tail_s:
            delay_s += clock.random.expovariate(1 / plan.control_tail_s)
        at = max(last, clock.now + delay_s)
        clock.at(at, arrive, message)
        if plan.duplicate and clock.random.random() < plan.duplicate:
            self._world.count("message arrived twice")
            clock.at(at, arrive, message)
        return at

    def _arrive_up(self, message: AgentMessage) -> None:
        if self.open:
            self._world.coordinator.receive(self.peer, message)

    def _arrive_down(self, message: CoordinatorMessage) -> None:
        if self.open:
            if isinstance(message, Grant):
                self._world.truth.granted_to(message)
            self._agent.feed(ev.FromCoordinator(message))

    def _coded(self, message: Any, decoder: "Decoder[Any]") -> Any:
        self._count += 1
        return decoder.decode(encode(message)) if self._count % _ENCODED_EVERY == 0 else message


class CoordinatorProcess:
    """The real decider, a clock, and an inbox for while it is stopped."""

    def __init__(self, world: "World", kind: type[Coordinator] = Coordinator) -> None:
        self._world, self._kind = world, kind
        self.decider: Coordinator | None = None
        self.number = 0
        """Counts the coordinators that there have been."""
        self._asleep = False
        self._inbox: list[tuple[bytes, AgentMessage]] = []
        self.start()
        self._tick()

    def start(self) -> None:
        self.number += 1
        self.decider = self._kind(self._world.plan.settings, self._world.clock.now)
        self._world.story.tell("coordinator", f"number {self.number} starts")

    def kill(self) -> None:
        """Connections break; what was on its way is lost."""
        self._world.story.tell("coordinator", "dies")
        self.decider, self._asleep = None, False
        self._inbox.clear()

    def stop(self) -> None:
        """As SIGSTOP does; messages wait for it."""
        self._world.story.tell("coordinator", "is stopped")
        self._asleep = True

    def wake(self) -> None:
        if not self._asleep or self.decider is None:
            return
        self._world.story.tell("coordinator", f"wakes, with {len(self._inbox)} messages")
        self._asleep = False
        if self._world.clock.random.random() < 0.5:
            self._carry_out(self.decider.tick(self._world.clock.now))
        inbox, self._inbox = self._inbox, []
        for peer, message in inbox:
            self.receive(peer, message)

    @property
    def at_work(self) -> bool:
        return self.decider is not None and not self._asleep

    def receive(self, peer: bytes, message: AgentMessage) -> None:
        if self.decider is None:
            return
        if self._asleep:
            self._inbox.append((peer, message))
            return
        if not isinstance(message, Beat):
            self._world.story.tell("coordinator", "<", peer.decode(), message)
        sends = self.decider.handle(peer, message, self._world.clock.now)
        self._world.truth.coordinator_learnt(message)
        self._carry_out(sends)

    def _tick(self) -> None:
        if self.decider is not None and not self._asleep:
            self._carry_out(self.decider.tick(self._world.clock.now))
        self._world.clock.later((0.1, 0.2), self._tick)

    def _carry_out(self, sends: list[Send]) -> None:
        assert self.decider is not None
        self.decider.check_invariants()
        while self.decider.news:
            self._world.story.tell("coordinator", "event:", self.decider.news.popleft().text)
        for send in sends:
            self._world.truth.coordinator_says(send)
            self._world.story.tell("coordinator", ">", send.peer.decode(), send.message)
            connection = self._world.connections.get(send.peer)
            if connection is not None:
                connection.down(send.message)
