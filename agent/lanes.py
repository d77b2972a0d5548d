"""Cells from one peer, in order, over one connection that is never idle.

The next cell is asked for before the last one has come. So as long as there is something to ask
for, a node's link is shared by as many flows as it has peers, and none of them pauses: that is
when TCP shares all links of a group alike.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ckptd.agent.cells import Peers, Pipeline
from ckptd.errors import Gone, PeerError
from ckptd.wire import PeerRequest

_ASKED_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Wanted:
    """Something to ask a peer for."""

    request: PeerRequest
    into: memoryview
    take: Callable[[int, int], bool]
    """Gets (length in bytes, digest that the peer gave); whether `into` holds what was wanted."""
    otherwise: Callable[[], None]
    """Called instead where it did not come right, once the lane has nothing better to do."""


class Lane:
    """Asks one peer for one thing after another, in a thread of its own. One caller may put."""

    def __init__(self, peers: Peers, address: Callable[[], str], stop: threading.Event) -> None:
        """`address` may raise OSError while the peer is away. After `stop` nothing is asked for."""
        self._peers, self._address, self._stop = peers, address, stop
        self._queue: queue.SimpleQueue[Wanted | None] = queue.SimpleQueue()
        self._asked: deque[Wanted] = deque()
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, wanted: Wanted) -> None:
        """Ask for it after all that was put before. Either of its functions will be called."""
        self._queue.put(wanted)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ckptd-lane", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait until all has been asked for and taken."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._next(wait=True)
            try:
                if self._asked and not self._stop.is_set():
                    with self._peers.pipeline(self._address()) as pipe:
                        self._pump(pipe)
            except (PeerError, OSError):
                pass
            while self._asked:
                self._asked.popleft().otherwise()

    def _pump(self, pipe: Pipeline) -> None:
        for wanted in self._asked:
            pipe.ask(wanted.request)
        while not self._stop.is_set():
            while len(self._asked) < _ASKED_AT_ONCE and self._next(wait=not self._asked):
                pipe.ask(self._asked[-1].request)
            if not self._asked:
                return
            wanted = self._asked[0]
            try:
                right = wanted.take(*pipe.answer(wanted.into))
            except Gone:
                right = False
            self._asked.popleft()
            if not right:
                wanted.otherwise()

    def _next(self, wait: bool) -> bool:
        """Move one from the queue to what is to be asked for; whether there was one."""
        if self._closed:
            return False
        try:
            wanted = self._queue.get(wait)
        except queue.Empty:
            return False
        if wanted is None:
            self._closed = True
            return False
        self._asked.append(wanted)
        return True
