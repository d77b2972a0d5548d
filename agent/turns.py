"""Whose bytes go next, where many peers want some from one node."""

import heapq
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Lets `at_once` threads through at a time; of those that wait, the lowest order first.

    While a group protects a snapshot, every node sends to every other. Served as they come, some
    nodes fall behind by chance, and at the end the links of the others idle. With the number of the
    stripe as the order, a node that is behind is served first, by everyone.
    """

    def __init__(self, at_once: int) -> None:
        self._mutex = threading.Lock()
        self._free = at_once
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int, threading.Event]] = []

    @property
    def waiting(self) -> int:
        """How many threads wait for their turn."""
        return len(self._waiting)

    @contextmanager
    def one(self, order: int) -> Iterator[None]:
        """A turn; to be held only while bytes move."""
        with self._mutex:
            go = None
            if self._free:
                self._free -= 1
            else:
                go = threading.Event()
                heapq.heappush(self._waiting, (order, next(self._numbers), go))
        if go is not None:
            go.wait()
        try:
            yield
        finally:
            with self._mutex:
                if self._waiting:
                    heapq.heappop(self._waiting)[2].set()
                else:
                    self._free += 1
