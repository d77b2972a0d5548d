"""A wire between agents and their coordinator that remembers, slips messages in, and loses some."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from ckptd.client import ask_status
from ckptd.wire import AgentMessage, ClientMessage, CoordinatorMessage, Decoder, Hello, Order

from .fleet import Fleet

_orders: Decoder[Order] = Decoder(Order)
_reports: Decoder[AgentMessage | ClientMessage] = Decoder(AgentMessage | ClientMessage)

Meddle = Callable[[str, AgentMessage | ClientMessage | CoordinatorMessage], bool]
"""Is told of each message, and the node that it is from or for; whether to lose it."""


class Between:
    """Carries control, in a thread of its own, until it is closed."""

    def __init__(self, coordinator: str) -> None:
        self._context = zmq.Context()
        self._context.setsockopt(zmq.SNDHWM, 0)  # loses what it is told to, and nothing else
        self._context.setsockopt(zmq.RCVHWM, 0)
        self._front = self._context.socket(zmq.ROUTER)
        self._front.router_handover = True
        port = self._front.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self._coordinator = coordinator
        self._backs: dict[bytes, zmq.Socket[bytes]] = {}
        self._slipped: deque[tuple[bytes, bytes]] = deque()
        self.said: deque[bytes] = deque(maxlen=2000)
        """By agents."""
        self.ordered: deque[bytes] = deque(maxlen=2000)
        """By the coordinator."""
        self.meddle: Meddle | None = None
        self._nodes: dict[bytes, str] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    @property
    def agents(self) -> list[bytes]:
        """How they are known to the coordinator."""
        return list(self._backs)

    def slip(self, agent: bytes, frames: Sequence[bytes]) -> None:
        """Let an agent have these, too, as if its coordinator had sent them."""
        self._slipped.extend((agent, frame) for frame in frames)

    def close(self) -> None:
        self._end.set()
        self._thread.join(10)

    def _carry(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        while not self._end.is_set():
            for socket, _ in poller.poll(5):
                if socket is self._front:
                    agent, frame = socket.recv_multipart()
                    self.said.append(frame)
                    if agent not in self._backs:
                        self._backs[agent] = self._back(agent)
                        poller.register(self._backs[agent], zmq.POLLIN)
                    if not self._loses(agent, _reports, frame):
                        self._backs[agent].send(frame)
                else:
                    frame = socket.recv()
                    self.ordered.append(frame)
                    if not self._loses(socket.identity, _orders, frame):
                        self._front.send_multipart([socket.identity, frame])
            for _ in range(min(100, len(self._slipped))):
                self._front.send_multipart(list(self._slipped.popleft()))
        self._context.destroy(linger=0)

    def _loses(self, agent: bytes, decoder: Decoder[Any], frame: bytes) -> bool:
        message = decoder.decode(frame)
        if isinstance(message, Hello):
            self._nodes[agent] = message.node
        said = message.message if isinstance(message, Order) else message
        return self.meddle is not None and self.meddle(self._nodes[agent], said)

    def _back(self, agent: bytes) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.DEALER)
        socket.identity = agent
        socket.connect(self._coordinator)
        return socket


class Overheard(Fleet):
    """A fleet that trains; what its agents and the coordinator say passes `between`."""

    def open(self) -> "Overheard":
        self.direct = self.start_coordinator()
        self.between = Between(self.direct)
        self.endpoint = self.between.address
        for node in self.places:
            self.start_agent(node)
        self.wait_for_nodes(len(self.places))
        self.get_going()
        return self

    def close(self) -> None:
        super().close()
        self.between.close()

    def status(self) -> dict[str, Any]:
        return ask_status(self.direct, self.key, 30.0)
