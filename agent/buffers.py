"""Memory for cells on their way, used again: touching fresh memory is slower than the copy."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_KEPT_BYTES = 64 << 20
_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 1 << 20


def give_large_buffers_back() -> None:
    """Have malloc return memory of 1 MiB and more at once, in this process.

    By default glibc keeps freed buffers of up to 32 MiB, and for each thread apart.
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


class Buffers:
    """Lends buffers, and keeps up to `kept_bytes` of those that came back. Thread-safe."""

    def __init__(self, kept_bytes: int = _KEPT_BYTES) -> None:
        self._mutex = threading.Lock()
        self._left_bytes = kept_bytes
        self._idle: dict[int, list[bytearray]] = {}

    @contextmanager
    def lend(self, size_bytes: int, count: int = 1) -> Iterator[list[memoryview]]:
        """`count` writable buffers of `size_bytes` each, with anything in them.

        No view of them must be left afterwards.
        """
        found = [self._take(size_bytes) for _ in range(count)]
        try:
            yield [memoryview(buffer) for buffer in found]
        finally:
            for buffer in found:
                self._give(buffer)

    def _take(self, size_bytes: int) -> bytearray:
        with self._mutex:
            idle = self._idle.get(size_bytes)
            if idle:
                self._left_bytes += size_bytes
                return idle.pop()
        return bytearray(size_bytes)

    def _give(self, buffer: bytearray) -> None:
        with self._mutex:
            if len(buffer) <= self._left_bytes:
                self._left_bytes -= len(buffer)
                self._idle.setdefault(len(buffer), []).append(buffer)
                return
            # Another size is wanted now: let go of one that is not.
            for size in [size for size in self._idle if size != len(buffer)]:
                self._left_bytes += size * len(self._idle.pop(size))
