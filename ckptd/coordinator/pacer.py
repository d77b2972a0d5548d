"""For which step to issue the next ticket: far enough ahead to reach every rank in time."""

import math

_FIRST_LEAD_STEPS = 2


class Pacer:
    """Predicts where training is, from the steps that ranks report. Times in seconds.

    The margin is the time that a ticket is given to reach all ranks. It doubles when a rank was
    already past the step, and shrinks slowly while tickets arrive in time.
    """

    MARGIN_MIN_S = 0.03
    MARGIN_MAX_S = 4.0

    def __init__(self, every: int) -> None:
        self.every = every
        self.margin_s = 0.06
        self.step_s: float | None = None
        self._step = 0
        self._seen_at = 0.0
        self._sampled_step = 0
        self._sampled_at = 0.0
        self._last_ticket = 0

    def start(self, step: int, now: float) -> None:
        """A life begins at `step`, or goes on from there; 0 where that is not known yet."""
        self._step, self._seen_at, self._last_ticket = step, now, step
        self._sampled_step, self._sampled_at = step, now
        self.step_s = None

    def observe(self, step: int, now: float) -> None:
        """Some rank has finished `step`."""
        if step <= self._step:
            return
        self._step, self._seen_at = step, now
        if self._sampled_step and now - self._sampled_at < self.MARGIN_MIN_S:
            return  # reports that were held up together say nothing of the pace
        # Nor does the way from an unknown step, or through the first one ever.
        if self._sampled_step:
            sample = (now - self._sampled_at) / (step - self._sampled_step)
            self.step_s = sample if self.step_s is None else 0.7 * self.step_s + 0.3 * sample
        self._sampled_step, self._sampled_at = step, now

    def missed(self) -> None:
        """A ticket came too late for some rank."""
        self.margin_s = min(self.MARGIN_MAX_S, 2 * self.margin_s)

    def met(self) -> None:
        """A ticket reached all ranks in time."""
        self.margin_s = max(self.MARGIN_MIN_S, 0.97 * self.margin_s)

    def next_step(self, now: float, used: int) -> int:
        """The step of a ticket issued `now`, after `used`; the caller then issues it."""
        if self.step_s is None:
            lead = _FIRST_LEAD_STEPS
        else:
            # A step that takes longer than usual is expected to end at any moment.
            elapsed_s = min(now - self._seen_at, self.step_s)
            lead = max(1, math.ceil((elapsed_s + self.margin_s) / max(self.step_s, 1e-6)))
        last = max(self._last_ticket, used)
        self._last_ticket = max(self._step + lead, last + self.every)
        return self._last_ticket
