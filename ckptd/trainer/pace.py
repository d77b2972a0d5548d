"""An upper bound on the rate of copies."""

import time
from collections.abc import Callable


class Pace:
    """Spreads copies so that at most `rate_bytes_per_s` go by in the long run."""

    def __init__(
        self,
        rate_bytes_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate, self._clock, self._sleep = rate_bytes_per_s, clock, sleep
        self._free_at = 0.0

    def wait(self, size_bytes: int) -> None:
        """Return when the copy of `size_bytes` may begin."""
        now = self._clock()
        self._free_at = max(now, self._free_at)
        if self._free_at > now:
            self._sleep(self._free_at - now)
        self._free_at += size_bytes / self._rate
