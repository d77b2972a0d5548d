"""Connections between agents and the coordinator, and the coordinator's process.

What ZeroMQ can do to messages: within one connection they keep their order and are delayed; when it
breaks, what is under way is lost in both directions; what is sent without a connection is lost. A
partition that ends before anybody gives up only delays. Messages over different connections
overtake one another.
"""

from typing import TYPE_CHECKING, Any

from ckptd.agent import events as ev
from ckptd.coordinator.claim import Claim
from ckptd.coordinator.decider import Coordinator, Send
from ckptd.journal import Entry
from ckptd.wire import (
    AgentMessage,
    Beat,
    ClientOrder,
    Decoder,
    Drop,
    Hello,
    Order,
    Outdated,
    encode,
)

from .kernel import Violation
from .offices import Hearsay

if TYPE_CHECKING:
    from .agents import Agent
    from .world import World

_ENCODED_EVERY = 16  # messages; to see that what is sent can be sent
_CHECKED_EVERY = 4  # events; what a decider has counted wrong stays wrong

_reports: Decoder[AgentMessage] = Decoder(AgentMessage)
_orders: Decoder[Order] = Decoder(Order)

Said = tuple[AgentMessage, tuple[Entry, ...]]
"""A report, and with a Hello what its node was told to keep of the log."""


class Connection:
    """One connection of an agent to a coordinator."""

    def __init__(self, world: "World", agent: "Agent", office: "CoordinatorProcess") -> None:
        self._world, self._agent, self.office = world, agent, office
        office.connections[agent.lifecycle.identity.incarnation.encode()] = self
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
        told = self._agent.machine.obedience.entries if isinstance(message, Hello) else ()
        report = self._coded(message, _reports)
        self._up_at = self._carry(self._up_at, self._arrive_up, (report, told))

    def down(self, order: Order) -> None:
        if self.open:
            self._down_at = self._carry(
                self._down_at, self._arrive_down, self._coded(order, _orders)
            )

    def close(self) -> None:
        if self.open:
            self._agent.break_connection((0.0, 0.3))

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

    def _arrive_up(self, said: Said) -> None:
        if self.open:
            self.office.receive(self.peer, said)

    def _arrive_down(self, order: Order) -> None:
        if self.open:
            self._agent.feed(ev.FromCoordinator(order.message, order.term, order.coordinator))

    def _coded(self, message: Any, decoder: "Decoder[Any]") -> Any:
        self._count += 1
        return decoder.decode(encode(message)) if self._count % _ENCODED_EVERY == 0 else message


class CoordinatorProcess:
    """The real decider, a clock, and an inbox for while it is stopped."""

    def __init__(
        self, world: "World", kind: type[Coordinator], address: str, take_over: bool = False
    ) -> None:
        self._world, self._kind = world, kind
        self._address, self._take_over = address, take_over
        self.decider: Coordinator | None = None
        self.connections: dict[bytes, Connection] = {}
        self.name = ""
        self.was_in_office = False
        """Another has taken over from it."""
        self.hearsay = Hearsay()
        self._asleep = False
        self._events = 0
        self._inbox: list[tuple[bytes, Said]] = []
        self.start()
        self._tick()

    def start(self) -> None:
        if self.decider is not None:
            return
        self.name = self._world.name_coordinator()
        claim = Claim(self.name, self._address, self._take_over)
        self._take_over, self.hearsay = False, Hearsay()
        self.decider = self._kind(self._world.plan.settings, self._world.clock.now, claim)
        self._tell("starts at", self._address)

    def kill(self) -> None:
        """Connections break; what was on its way is lost."""
        if self.decider is None:
            return
        self._tell("dies")
        self.decider, self._asleep = None, False
        self._inbox.clear()
        connections, self.connections = list(self.connections.values()), {}
        for connection in connections:
            connection.close()

    def _end(self, reason: str) -> None:
        """It gives way to another; who started it does so again, where it should be in office."""
        self._tell("ends:", reason)
        self._world.count("coordinator gave way")
        self.kill()
        if self is self._world.coordinator:
            self._world.clock.later((0.2, 1.0), self.start)

    def stop(self) -> None:
        """As SIGSTOP does; messages wait for it."""
        self._tell("is stopped")
        self._asleep = True

    def wake(self) -> None:
        if not self._asleep or self.decider is None:
            return
        self._tell(f"wakes, with {len(self._inbox)} messages")
        self._asleep = False
        if self._world.clock.random.random() < 0.5:
            self._carry_out(self.decider.tick(self._world.clock.now))
        inbox, self._inbox = self._inbox, []
        for peer, said in inbox:
            self.receive(peer, said)

    @property
    def at_work(self) -> bool:
        return self.decider is not None and not self._asleep

    @property
    def in_office(self) -> bool:
        """Whether no agent obeys a later one, so that its decisions count."""
        machines = self._world.machines.values()
        terms = [machine.obedience.term for machine in machines if machine.alive]
        return self.decider is not None and self.decider.term >= max(terms, default=0)

    def receive(self, peer: bytes, said: Said) -> None:
        if self.decider is None:
            return
        if self._asleep:
            self._inbox.append((peer, said))
            return
        message, entries = said
        if not isinstance(message, Beat):
            self._tell("<", peer.decode(), message)
        if isinstance(message, Hello | Outdated):
            self.hearsay.hear(message, entries, self.decider)
        sends = self.decider.handle(peer, message, self._world.clock.now)
        if self.in_office:
            self._world.truth.coordinator_learnt(self, message)
        self._carry_out(sends)

    def obey(self, order: ClientOrder) -> str:
        """What somebody asks for with the CLI; returns "" or the reason why not."""
        assert self.decider is not None
        refusal = self.decider.obey(order, self._world.clock.now)
        self._tell("is asked for", order, refusal and f"and refuses: {refusal}")
        self._carry_out(self.decider.take_actions())
        return refusal

    def _tick(self) -> None:
        if self.decider is not None and not self._asleep:
            self._carry_out(self.decider.tick(self._world.clock.now))
        self._world.clock.later((0.1, 0.2), self._tick)

    def _carry_out(self, sends: list[Send]) -> None:
        decider = self.decider
        assert decider is not None
        self._events += 1
        if self._events % _CHECKED_EVERY == 0:
            decider.check_invariants()
        while decider.news:
            self._tell("event:", decider.news.popleft().text)
        if sends and self is not self._world.coordinator and self.hearsay.rival:
            self._must_be_silent(decider)
        for send in sends:
            # Who has not heard of the later one yet still obeys: what it drops may be gone.
            if self.in_office or isinstance(send.message, Drop):
                self._world.truth.coordinator_says(self, send)
            self._tell(">", send.peer.decode(), send.message)
            connection = self.connections.get(send.peer)
            if connection is not None:
                connection.down(Order(decider.term, decider.claim.coordinator, send.message))
        if decider.ended:
            self._end(decider.ended)

    def _must_be_silent(self, decider: Coordinator) -> None:
        if not decider.claim.take_over and not self.was_in_office:
            raise Violation(f"{self.name} gives orders, though {self.hearsay.rival} is alive")

    def _tell(self, *what: Any) -> None:
        self._world.story.tell(self.name, *what)
