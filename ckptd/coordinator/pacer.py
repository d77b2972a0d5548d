"""For which step to issue the next ticket: far enough ahead to reach every rank in time."""

import math
from collections import deque
from statistics import median_low

_FIRST_LEAD_STEPS = 2
_SAMPLES = 9
_SAMPLES_TRUSTED = 3  # what was held up together makes one of them far too small
_SHRINK = 0.99  # in balance with doubling, about one ticket in seventy is late
_SHRINK_AT_FIRST = 0.9  # until a ticket was late: then it is known what is too little
_TICKETS_KEPT = 16  # more than are under way: those that were dropped are never asked for


class Pacer:
    """Predicts where training is, from the steps that ranks report. Times in seconds.

    The margin is the time that a ticket is given to reach all ranks. It doubles when a rank was
    already past the step, and shrinks only after tickets that all ranks had a whole step early: so
    it comes to rest where nearly all are just in time.
    """

    MARGIN_MIN_S = 0.03
    MARGIN_MAX_S = 4.0

    def __init__(self, every: int) -> None:
        self.every = every
        self.margin_s = 0.1
        self.step_s: float | None = None
        """How long a step takes: the median, so that a stall now and then does not count."""
        self._samples: deque[float] = deque(maxlen=_SAMPLES)
        self._ever_missed = False
        self._step = 0
        self._seen_at = 0.0
        self._sampled_step = 0
        self._sampled_at = 0.0
        self._last_ticket = 0
        self._early: dict[int, int] = {}
        """Step of a ticket under way to how many whole steps early the last rank had it."""

    @property
    def progress_at(self) -> float:
        """When a step was finished that no rank had finished before."""
        return self._seen_at

    @property
    def slowest_s(self) -> float | None:
        """The longest of the last steps.

        None before the second was seen: of the first there may have been only the end to see.
        """
        return max(self._samples) if len(self._samples) > 1 else None

    def start(self, step: int, now: float) -> None:
        """A life begins at `step`, or goes on from there; 0 where that is not known yet."""
        self._step, self._seen_at, self._last_ticket = step, now, step
        self._sampled_step, self._sampled_at = step, now
        self.step_s = None
        self._samples.clear()
        self._early.clear()

    def observe(self, step: int, now: float) -> None:
        """Some rank has finished `step`."""
        if step <= self._step:
            return
        self._step, self._seen_at = step, now
        if self._sampled_step and now - self._sampled_at < self.MARGIN_MIN_S:
            return  # reports that were held up together say nothing of the pace
        # Nor does the way from an unknown step, or through the first one ever.
        if self._sampled_step:
            self._samples.append((now - self._sampled_at) / (step - self._sampled_step))
            self.step_s = median_low(self._samples)
        self._sampled_step, self._sampled_at = step, now

    def arrived(self, ticket: int, step: int) -> None:
        """A rank has the ticket for step `ticket`; it had finished `step` when it said so."""
        early = max(0, ticket - step)
        self._early[ticket] = min(early, self._early.get(ticket, early))
        if len(self._early) > _TICKETS_KEPT:
            del self._early[min(self._early)]

    def missed(self) -> None:
        """A ticket came too late for some rank."""
        self._ever_missed = True
        self.margin_s = min(self.MARGIN_MAX_S, 2 * self.margin_s)

    def met(self, ticket: int) -> None:
        """The ticket for step `ticket` reached all ranks in time."""
        early = self._early.pop(ticket, 0)
        shrink = _SHRINK if self._ever_missed else _SHRINK_AT_FIRST
        self.margin_s = max(self.MARGIN_MIN_S, shrink**early * self.margin_s)

    def next_step(self, now: float, used: int) -> int:
        """The step of a ticket issued `now`, after `used`; the caller then issues it."""
        if self.step_s is None:
            lead = _FIRST_LEAD_STEPS
        else:
            # A step that takes longer than usual is expected to end at any moment.
            elapsed_s = min(now - self._seen_at, self.step_s)
            lead = max(1, math.ceil((elapsed_s + self.margin_s) / max(self.step_s, 1e-6)))
            if len(self._samples) < _SAMPLES_TRUSTED:
                lead = min(lead, _FIRST_LEAD_STEPS)
        last = max(self._last_ticket, used)
        self._last_ticket = max(self._step + lead, last + self.every)
        return self._last_ticket
