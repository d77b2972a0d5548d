"""After what silence a node is suspect: from how its heartbeats come in. No IO, no clock."""

from collections import deque
from statistics import median

_SAMPLES = 32
_ENOUGH = 4
_SPREADS = 8.0
_BEATS_AT_LEAST, _BEATS_AT_MOST = 2.0, 3.0


def least_s(beat_s: float, lease_s: float) -> float:
    """No node is suspect that has been silent for less, in seconds."""
    return min(_BEATS_AT_LEAST * beat_s, lease_s)


class Rhythm:
    """How long a node is silent as a rule, from the times at which its heartbeats came in.

    Suspicion must be quick, and is cheap to be wrong about: tickets pause, no more. So its bound
    follows the node: the median interval and eight times the median deviation from it, which single
    stalls leave as they are. It is never less than two intervals, nor more than three: a node that
    is gone is noticed within three heartbeats, its own as they come in. To be lost is dear, and
    takes the whole lease.
    """

    def __init__(self) -> None:
        self._intervals: deque[float] = deque(maxlen=_SAMPLES)
        self._last: float | None = None
        self._usual_s, self._spread_s = 0.0, 0.0
        self._counted = 0

    def beat(self, now: float) -> None:
        """A heartbeat has come in."""
        if self._last is not None:
            self._intervals.append(now - self._last)
            self._counted += 1
            # Sorting a few numbers for each beat of ten thousand nodes would be felt.
            if self._counted <= _ENOUGH or self._counted % _ENOUGH == 0:
                self._usual_s = median(self._intervals)
                self._spread_s = median(abs(each - self._usual_s) for each in self._intervals)
        self._last = now

    def bound_s(self, beat_s: float, lease_s: float) -> float:
        """The node is suspect when it has been silent for so long, in seconds.

        `beat_s` is the interval that it was told, `lease_s` after what silence it is lost.
        """
        usual_s = max(beat_s, self._usual_s)
        least_s, most_s = _BEATS_AT_LEAST * usual_s, _BEATS_AT_MOST * usual_s
        if len(self._intervals) < _ENOUGH:
            return min(most_s, lease_s)
        return min(max(least_s, usual_s + _SPREADS * self._spread_s), most_s, lease_s)
