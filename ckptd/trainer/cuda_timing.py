"""When operations on CUDA streams begin and end; the training thread never waits for that."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from ckptd.ring import Record

_LOOK_EVERY_S = 0.002
_FOLLOWED_LIMIT = 1024


class CudaTimes:
    """Follows operations by events on their streams; a thread looks at them once there are any."""

    def __init__(self, ended: Callable[[Record, int], None]) -> None:
        """`ended` is told a record and its duration in nanoseconds."""
        self._ended = ended
        self._followed: deque[tuple[Record, torch.cuda.Event, torch.cuda.Event]] = deque(
            maxlen=_FOLLOWED_LIMIT
        )
        self._thread: threading.Thread | None = None
        self._closed = False

    def follow(self, record: Record, start: torch.cuda.Event) -> None:
        """Called by the future of the operation, on a stream that waits for its end."""
        self._followed.append((record, start, _event()))
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="ckptd-cuda", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed = True

    def _look(self) -> None:
        while not self._closed:
            waiting = []
            while self._followed:
                record, start, end = self._followed.popleft()
                if end.query():  # type: ignore[no-untyped-call] # torch's
                    self._ended(record, int(start.elapsed_time(end) * 1e6))
                else:
                    waiting.append((record, start, end))
            self._followed.extendleft(reversed(waiting))
            time.sleep(_LOOK_EVERY_S)


def mark(tensors: Sequence[torch.Tensor]) -> torch.cuda.Event | None:
    """An event before an operation on the current stream; None if it is none of CUDA's."""
    return _event() if tensors and tensors[0].is_cuda else None


def _event() -> torch.cuda.Event:
    """Recorded on the current stream."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch's
    event.record()
    return event
