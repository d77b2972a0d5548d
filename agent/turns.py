"""Whose bytes go next, where many peers want some from one node, and how fast they may go."""

import heapq
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SLICE_S = 0.02


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


class Pace:
    """Lets bytes go no faster than `bytes_per_s`, all threads together; None: as fast as they can.

    A token bucket that holds nothing: what was not used is lost, so that there are no bursts.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._mutex = threading.Lock()
        self._free_at = 0.0

    def most_bytes(self, wanted: int) -> int:
        """So much of `wanted` at a time, that others need not wait long."""
        if self._bytes_per_s is None:
            return wanted
        return max(1, min(wanted, int(self._bytes_per_s * _SLICE_S)))

    def spend(self, size_bytes: int) -> None:
        """`size_bytes` have gone: wait until more may."""
        if self._bytes_per_s is None:
            return
        with self._mutex:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + size_bytes / self._bytes_per_s
            wait_s = self._free_at - now
        time.sleep(wait_s)
