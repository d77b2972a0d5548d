"""How much each peer may have on the way to this node: the same for all of them.

While a group protects a snapshot, every node receives from every other. TCP shares a link between
connections with some luck: one has several times the rate of another for seconds, cells arrive in
another order than they are needed, and in the end links idle. Connections whose receive windows are
alike share a full link alike, since the rate of each is its window over the time in the queue that
all of them wait in; and the queue stays short, so that nothing is lost in it. That is how the
receiver sets the rates in rLEDBAT (RFC 9840), too.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

_QUEUE_S = 0.012
"""What may be on its way to a node, in time of its link: many round trips within a cluster, and
less than a switch keeps for a port."""
_LEAST_BYTES = 32 << 10
_TICK_S = 0.2
_PAUSE_S = 0.6
"""After a longer silence it is not known how fast the link is."""
_KEPT = 0.8
"""Of the rate seen before, where a tick sees less: senders pause."""
_LIMIT = Path("/proc/sys/net/core/rmem_max")


class Windows:
    """Receive windows of the connections that bytes come from. Thread-safe.

    Where a fair window is larger than the kernel lets us set, it is left to the kernel: such a link
    is a fast one, and the processor its limit.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mutex = threading.Lock()
        self._open: set[socket.socket] = set()
        self._sizes: WeakKeyDictionary[socket.socket, int] = WeakKeyDictionary()
        """Windows that were set. The kernel sizes such a connection's buffer no more by itself."""
        self._bytes, self._since_s, self._rate = 0, clock(), 0.0
        try:
            self._limit_bytes = int(_LIMIT.read_text())
        except (OSError, ValueError):
            self._limit_bytes = 0

    @contextmanager
    def one(self, conn: socket.socket) -> Iterator[None]:
        """While bytes are expected from it."""
        with self._mutex:
            self._open.add(conn)
        try:
            yield
        finally:
            with self._mutex:
                self._open.remove(conn)

    def arrived(self, size_bytes: int) -> None:
        """Bytes have come, from any of them."""
        with self._mutex:
            self._bytes += size_bytes
            now = self._clock()
            passed_s = now - self._since_s
            if passed_s < _TICK_S:
                return
            if passed_s < _PAUSE_S:
                self._rate = max(self._bytes / passed_s, self._rate * _KEPT)
                self._share()
            self._bytes, self._since_s = 0, now

    def _share(self) -> None:
        fair = max(_LEAST_BYTES, int(self._rate * _QUEUE_S / len(self._open)))
        fits = fair <= self._limit_bytes
        for conn in self._open:
            size = self._sizes.get(conn, 0)
            wanted = fair if fits else self._limit_bytes if size else 0
            if wanted and not 0.8 * wanted < size < 1.25 * wanted:
                conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
                self._sizes[conn] = wanted
