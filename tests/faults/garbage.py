"""Messages that make no sense, made from ones that do, and a wire on which to slip them in."""

import random
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import zmq

from ckptd.errors import ProtocolError
from ckptd.wire import Decoder

HEAD_BYTES = 3
_DEEP: Any = []
for _ in range(200):
    _DEEP = [_DEEP]
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 1e308, float("nan"), "", "..",
    "../../x", "a\0b", "x" * 5000, b"", b"\xff" * 40, (), {}, {"": 1}, _DEEP,
)  # fmt: skip
"""What may stand where something else belongs."""


def spoilt(frame: bytes, numbers: random.Random) -> bytes:
    """A frame that was sent by somebody who is broken."""
    at = numbers.randrange(len(frame))
    match numbers.randrange(8):
        case 0:
            return frame[:at]
        case 1:
            return frame + numbers.randbytes(numbers.randrange(1, 40))
        case 2:
            return frame[:at] + frame[at + numbers.randrange(1, 9) :]
        case 3:
            return frame[:at] + numbers.randbytes(numbers.randrange(1, 9)) + frame[at:]
        case 4:
            bits = bytearray(frame)
            for _ in range(numbers.randrange(1, 5)):
                bits[numbers.randrange(len(bits))] ^= 1 << numbers.randrange(8)
            return bytes(bits)
        case 5:
            return numbers.randbytes(numbers.randrange(200))
        case _:
            return altered(frame, numbers)


def altered(frame: bytes, numbers: random.Random) -> bytes:
    """A frame in good form, in which one value is another one, is missing, or is one too many."""
    body = msgspec.msgpack.decode(frame[HEAD_BYTES:])
    within, key = numbers.choice(list(_places(body)))
    match numbers.randrange(6):
        case 0:
            del within[key]
        case 1 if isinstance(within, dict):
            within["surplus"] = 1
        case _:
            within[key] = numbers.choice(ODD)
    return frame[:HEAD_BYTES] + msgspec.msgpack.encode(body)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of each value in a decoded body."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def is_sense(frame: bytes, decoder: Decoder[Any]) -> bool:
    with suppress(ProtocolError):
        decoder.decode(frame)
        return True
    return False


def nonsense(
    frames: Sequence[bytes], decoder: Decoder[Any], numbers: random.Random, count: int
) -> list[bytes]:
    """So many frames that must be dropped, made from good ones."""
    found: list[bytes] = []
    while len(found) < count:
        frame = spoilt(numbers.choice(frames), numbers)
        if not is_sense(frame, decoder):
            found.append(frame)
    return found


class Between:
    """Carries control between agents and their coordinator; remembers it, and slips more in."""

    def __init__(self, coordinator: str) -> None:
        self._context = zmq.Context()
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
                    self._backs[agent].send(frame)
                else:
                    frame = socket.recv()
                    self.ordered.append(frame)
                    self._front.send_multipart([socket.identity, frame])
            for _ in range(min(100, len(self._slipped))):
                self._front.send_multipart(list(self._slipped.popleft()))
        self._context.destroy(linger=0)

    def _back(self, agent: bytes) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.DEALER)
        socket.identity = agent
        socket.connect(self._coordinator)
        return socket
